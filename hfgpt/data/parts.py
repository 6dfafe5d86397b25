"""A source of any size -> parts, which are read one by one and in any process.

Reading the parts of a split in order gives exactly its rows. Which parts there are depends only on the source, not on
the number of processes or machines that read them.
"""

import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import datasets

from hfgpt.data.files import (
    LONGEST_DECOMPRESSED,
    Section,
    divide_file,
    explain_url,
    is_url,
    list_urls,
    one_family,
    without_secrets,
)
from hfgpt.data.report import DataReport
from hfgpt.data.rows import Reading, Row, SourceArguments, divide_files, find_source_splits, read_hub, read_sections
from hfgpt.errors import InputError

PART_BYTES = 1 << 24
# Every part becomes one or two open files of the run that trains on it; many systems allow 1,024.
MOST_PARTS = 256


@dataclass(frozen=True)
class Part:
    """Consecutive rows of one split.

    Args:
        read: Reads the rows; can be pickled.
        version: JSON-compatible fingerprint of the rows. Equal on all machines that have the same files, with the same
            times.
        bytes: Size in the source, compressed if that is; None: unknown.
    """

    read: Callable[[], Iterator[Row]]
    version: list[Any]
    bytes: int | None = None


def find_parts(source: SourceArguments, reading: Reading, report: DataReport) -> dict[str, list[Part]]:
    """Finds a source and divides each of its splits into parts.

    Files are divided by size. A Hub dataset is streamed, and divided into its files. Synthetic data, and the first
    rows of a source (`reading.limit`), are a single part.

    Args:
        source: What to find.
        reading: How to read it; with `stream`.
        report: `source` and `unused_files` are set.

    Returns:
        Split -> parts.

    Raises:
        InputError: As `find_source_splits`; or a document is too large to be held in memory.
    """
    if is_url(source.path) and reading.limit is None:
        report.source = without_secrets(source.path)
        return _find_url_parts(source, reading, report)
    found = find_source_splits(source, reading, report)
    if reading.limit is None and found.files:
        return {split: _group_sections(files, source.path, reading) for split, files in found.files.items()}
    if reading.limit is None and (tables := found.streams or found.tables):
        return {split: _divide_table(table, found.version, source, reading) for split, table in tables.items()}
    return {split: [Part(read, [found.version, split])] for split, read in found.splits.items()}


def fingerprint_parts(parts: Iterable[Part]) -> str:
    """SHA-256 of the versions of all parts."""
    return hashlib.sha256(json.dumps([part.version for part in parts]).encode()).hexdigest()


def _part_size(total: int) -> int:
    """Bytes of a part, so that there are at most about MOST_PARTS."""
    return max(PART_BYTES, total // MOST_PARTS)


def _group(pieces: Iterable[tuple[Any, int]], size: int) -> Iterator[tuple[list[Any], int]]:
    """Consecutive pieces, given with their bytes, in groups of at least `size` bytes; the last one may be smaller."""
    group, total = [], 0
    for piece, length in pieces:
        group, total = [*group, piece], total + length
        if total >= size:
            yield group, total
            group, total = [], 0
    if group:
        yield group, total


def _group_sections(files: list[Path], path: str, reading: Reading) -> list[Part]:
    size = _part_size(sum(file.stat().st_size for file in files))
    sections = [found for file in files for found in divide_file(file, reading.sample_by, size)]
    for section, length in sections:
        _check_memory(section, length, reading)
    used = [found for found in sections if found[1]] or sections[:1]
    return [_section_part(group, total, path, reading) for group, total in _group(used, size)]


def _section_part(sections: list[Section], size: int, path: str, reading: Reading) -> Part:
    version = [reading.settings]
    for file, start, stop in sections:
        found = file.stat()
        version.append([file.name, found.st_size, int(found.st_mtime), start, stop])
    return Part(functools.partial(read_sections, sections, path, reading), version, size)


def _check_memory(section: Section, size: int, reading: Reading):
    """Refuses what would be held in memory as a whole."""
    suffix = section.path.suffix.lower()
    is_document = suffix in (".txt", ".md") and reading.sample_by == "document"
    if size > LONGEST_DECOMPRESSED and (is_document or suffix == ".json"):
        what = "one document" if is_document else "one JSON value"
        remedy = (
            "set data.sample_by to paragraph or line"
            if is_document
            else "convert it to JSON Lines, or rename it to .jsonl if that is what it has"
        )
        raise InputError(
            f"{section.path} is read as {what} of {size:,} bytes, the limit is {LONGEST_DECOMPRESSED:,}: {remedy}"
        )


def _find_url_parts(source: SourceArguments, reading: Reading, report: DataReport) -> dict[str, list[Part]]:
    """Parts of whole files at a URL, each downloaded when it is read."""
    _download.cache_clear()  # the file may have changed
    urls = {Path(urlsplit(url).path): (url, about) for url, about in list_urls(source.path)}
    splits = divide_files(one_family(source.path, urls), source, reading, report)
    return {split: _group_urls([urls[file] for file in files], reading) for split, files in splits.items()}


def _group_urls(urls: list[tuple[str, dict[str, Any]]], reading: Reading) -> list[Part]:
    sizes = [about.get("size") for _, about in urls]
    known = None not in sizes
    pieces = zip(urls, sizes if known else [0] * len(urls), strict=True)
    parts = []
    for group, total in _group(pieces, _part_size(sum(sizes)) if known else 0):  # 0: one file per part
        # With times or checksums, if the server has any.
        version = [reading.settings, *([without_secrets(url), str(about)] for url, about in group)]
        read = functools.partial(_read_urls, [url for url, _ in group], reading)
        parts.append(Part(read, version, total if known else None))
    return parts


def _read_urls(urls: list[str], reading: Reading) -> Iterator[Row]:
    for url in urls:
        folder = _download(url)  # a reference, so that it is not removed meanwhile
        file = Path(folder.name, Path(urlsplit(url).path).name)
        for section, length in divide_file(file, reading.sample_by, PART_BYTES):
            _check_memory(section, length, reading)
            if length:
                yield from read_sections([section], without_secrets(url), reading)


@functools.lru_cache(maxsize=1)
def _download(url: str) -> tempfile.TemporaryDirectory:
    """A folder with the file, which is removed when another one is downloaded, or this process ends.

    A source that is a single file is read several times: to divide it, to train a tokenizer, and to tokenize it.
    """
    import fsspec

    folder = tempfile.TemporaryDirectory()
    with explain_url(url):
        system, place = fsspec.url_to_fs(url)
        system.get_file(place, str(Path(folder.name, Path(urlsplit(url).path).name)))
    return folder


def _divide_table(
    table: datasets.Dataset | datasets.IterableDataset, version: list[Any], source: SourceArguments, reading: Reading
) -> list[Part]:
    if isinstance(table, datasets.IterableDataset):
        number, size = min(table.num_shards, MOST_PARTS), None
    else:  # downloaded before, and the Hub cannot be reached
        number = max(min(table.data.nbytes // _part_size(table.data.nbytes), len(table)), 1)
        size = table.data.nbytes // number
    parts = []
    for index in range(number):
        shard = table.shard(num_shards=number, index=index, contiguous=True)
        read = functools.partial(read_hub, shard, source.path, reading.columns)
        parts.append(Part(read, [version, number, index], size))
    return parts
