"""Any source -> rows of each split: files, a Hub dataset, or synthetic data."""

import functools
import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import HfApi

from hfgpt.data.files import (
    Section,
    describe_file,
    family,
    find_columns,
    find_source,
    has_tokens,
    hash_files,
    nearest,
    read_rows,
    without_secrets,
    wrong_column,
)
from hfgpt.data.report import DataReport
from hfgpt.demo_corpus import generate_instructions, generate_messages, generate_stories
from hfgpt.errors import InputError

Row = dict[str, Any]
SPLIT_WORDS = {"validation": {"validation", "valid", "val", "dev"}, "test": {"test"}}
SYNTHETIC_STORIES = 2_000
SYNTHETIC_ROWS = {"train": 4_000, "validation": 300, "test": 300}


@dataclass
class SourceArguments:
    """The source of the rows: keys of the section `data` for all tasks.

    Args:
        path: A Hub id; a .txt, .md, .json, .jsonl, .csv, .tsv or .parquet file (also .gz, .zst, except .parquet), or a
            folder or glob of them; a URL of these (https, s3, gs, hf or any other fsspec protocol); or the generated
            `synthetic:stories`, `synthetic:messages` or `synthetic:instructions`. For pre-training also the output of
            `hfgpt prepare`, or a folder of datatrove's token files (.ds). A row or document of a compressed file may
            have at most 134,217,728 characters.
        name: Configuration name of a Hub dataset.
        revision: Branch, tag or commit of a Hub dataset.
        train_split: Split to train on; for a folder with several splits, the word in the names of its training files.
        validation_split: Split to validate on, or the word in the names of a folder's validation files. None:
            `validation` if the source has one, else `validation_fraction` of the training split.
    """

    path: str | None = None
    name: str | None = None
    revision: str | None = None
    train_split: str = "train"
    validation_split: str | None = None


@dataclass
class Reading:
    """How to read the rows of a source.

    Args:
        columns: Recipe key -> required column, an error if the first row lacks it; other columns may be skipped.
            Empty: read all columns.
        splits: Splits to look for in addition to `train`, with the name the user gave each; None: its usual names.
        limit: Read only the first N rows of each split; for synthetic data, the number of rows to generate.
        sample_by: What one row of a text file is.
        seed: Seed of synthetic rows.
        column_names: Column names for a .csv or .tsv file without a header line.
        stream: Read a Hub dataset without downloading it completely, as is always done with a limit.
    """

    columns: dict[str, str]
    splits: dict[str, str | None]
    limit: int | None = None
    sample_by: str = "document"
    seed: int = 0
    column_names: list[str] | None = None
    stream: bool = False

    @property
    def settings(self) -> list[Any]:
        """Everything that determines which rows are read from files."""
        return [list(self.columns.values()), self.limit, self.sample_by, self.column_names]


@dataclass
class Source:
    """A source that has been found but not read.

    Args:
        name: Path of the source.
        splits: Split -> function that reads its rows: `train`, and those of `Reading.splits` that the source has.
        version: JSON-compatible fingerprint of the rows; for files, their paths, sizes and timestamps.
        files: Split -> local files to read.
        tables: Split -> rows of a Hub dataset, already cached as Arrow tables.
        streams: Split -> rows of a Hub dataset that are read without downloading it completely.
    """

    name: str
    splits: dict[str, Callable[[], Iterator[Row]]]
    version: list[Any]
    files: dict[str, list[Path]] = field(default_factory=dict)
    tables: dict[str, datasets.Dataset] = field(default_factory=dict)
    streams: dict[str, datasets.IterableDataset] = field(default_factory=dict)

    @property
    def all_files(self) -> list[Path]:
        """The files of all splits."""
        return list(itertools.chain.from_iterable(self.files.values()))


def find_source_splits(source: SourceArguments, reading: Reading, report: DataReport) -> Source:
    """Finds a source and its splits.

    Args:
        source: What to find.
        reading: How to read it.
        report: `source` and `unused_files` are set.

    Raises:
        InputError: The source does not exist, is not supported, or does not have a requested split.
    """
    report.source = without_secrets(source.path)
    if source.path.startswith("synthetic:"):
        return _generate_rows(source.path, reading)
    if has_tokens(source.path):
        raise InputError(f"data.path {source.path!r} has tokens, which only pre-training can use: set it to the text")
    files = find_source(source.path)
    if not files:
        return _open_hub(source, reading)
    splits = divide_files(files, source, reading, report)
    return Source(
        source.path,
        {name: functools.partial(_read_files, split, source.path, reading) for name, split in splits.items()},
        [*reading.settings, {name: list(map(describe_file, split)) for name, split in splits.items()}],
        splits,
    )


def open_rows(source: SourceArguments, reading: Reading, report: DataReport) -> dict[str, Iterator[Row]]:
    """Opens a source; rows are read lazily, with values unchanged.

    Args:
        source: What to open.
        reading: How to read it.
        report: As for `find_source_splits`; for local files, `sha256` is also set.

    Returns:
        Split -> rows.

    Raises:
        InputError: As `find_source_splits`; or the source cannot be read, or does not have a required column.
    """
    found = find_source_splits(source, reading, report)
    report.sha256 = hash_files(found.all_files) if found.files else ""
    return {name: read() for name, read in found.splits.items()}


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded as UTF-8; JSON can contain lone surrogates, which cannot."""
    try:
        return text.encode() is not None
    except UnicodeEncodeError:
        return False


def _generate_rows(path: str, reading: Reading) -> Source:
    kinds = {
        "synthetic:stories": _generate_stories,
        "synthetic:messages": generate_messages,
        "synthetic:instructions": generate_instructions,
    }
    if path not in kinds:
        raise InputError(f"data.path {path!r} does not exist; choose one of {', '.join(kinds)}")
    if path == "synthetic:stories":
        numbers = {"train": reading.limit or SYNTHETIC_STORIES}
    else:
        numbers = {name: min(reading.limit or size, size) for name, size in SYNTHETIC_ROWS.items()}
        numbers["train"] = reading.limit or SYNTHETIC_ROWS["train"]
    splits = {
        name: functools.partial(kinds[path], number, reading.seed, name)
        for name, number in numbers.items()
        if name in ("train", *reading.splits)
    }
    return Source(path, splits, [path, numbers, reading.seed])


def _generate_stories(number: int, seed: int, split: str) -> Iterator[Row]:
    return ({"text": story} for story in generate_stories(number, seed))


def _open_hub(source: SourceArguments, reading: Reading) -> Source:
    # With a limit the rows are streamed, so that a huge dataset is not downloaded completely.
    streaming = (reading.limit is not None or reading.stream) and not datasets.config.HF_HUB_OFFLINE
    revision = source.revision
    try:
        if streaming:  # pin the revision that is recorded
            revision = HfApi().dataset_info(source.path, revision=revision).sha
        splits = datasets.load_dataset(source.path, source.name, revision=revision, streaming=streaming)
    # The network, the server, the login, a missing or damaged file: each library raises its own errors.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"data.path {source.path!r} was not found locally{nearest(source.path)} or on the Hub ({reason}): check "
            "data.path, data.name, data.revision, the network and the login"
        ) from error
    names = {"train": source.train_split}
    for split, wanted in reading.splits.items():
        if wanted or (split in splits and source.train_split != split):
            names[split] = wanted or split
    if len(set(names.values())) < len(names):
        raise InputError(f"data.train_split, validation_split and test_split must name different splits, not {names}")
    for split, name in names.items():
        if name not in splits:
            raise InputError(
                f"data.{split}_split {name!r} is not a split of {source.path}, which has: {', '.join(splits)}"
            )
    tables = {split: splits[name] for split, name in names.items()}
    for split, table in tables.items() if reading.limit else ():
        tables[split] = table.take(reading.limit) if streaming else table.select(range(min(reading.limit, len(table))))
    rows = {name: functools.partial(read_hub, table, source.path, reading.columns) for name, table in tables.items()}
    if streaming:
        version = [source.path, source.name, revision, names, *reading.settings]
        return Source(source.path, rows, version, streams=tables)
    fingerprints = {name: table._fingerprint for name, table in tables.items()}  # no public name for it
    return Source(source.path, rows, [names, fingerprints], tables=tables)


def read_hub(split: datasets.Dataset | datasets.IterableDataset, path: str, columns: dict[str, str]) -> Iterator[Row]:
    """Reads the rows of a Hub dataset, with class labels as their names.

    Args:
        split: One of its splits.
        path: The path of the source, for error messages.
        columns: As in `Reading`.
    """
    # A streamed dataset may not know its columns before the first row. Other columns, such as images, are not decoded.
    if columns and set(columns.values()) <= set(split.column_names or []):
        split = split.select_columns(list(columns.values()))
    features = split.features or {}
    classes = {name: kind for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
    for batch in split.iter(batch_size=1000):
        for key, column in columns.items():
            if column not in batch:
                raise wrong_column(key, column, path, batch)
        for name, kind in classes.items():
            if name in batch:  # -1: no label
                batch[name] = [None if value in (None, -1) else kind.int2str(value) for value in batch[name]]
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def divide_files(
    files: list[Path], source: SourceArguments, reading: Reading, report: DataReport
) -> dict[str, list[Path]]:
    """Assigns files to splits by the words in their paths below the common folder."""
    named = {split: name for split, name in reading.splits.items() if name}
    if len(files) == 1:
        if named:
            split, name = next(iter(named.items()))
            raise InputError(
                f"data.{split}_split is {name!r}, but data.path {source.path!r} is a single file: unset it to use "
                f"data.{split}_fraction, or give a folder with a file named {name}"
            )
        return {"train": files}
    root = os.path.commonpath([file.parent for file in files])
    words = {file: set(re.split(r"[^a-z0-9]+", str(file.relative_to(root)).lower())) for file in files}
    divided, rest = {}, files
    for split, name in reading.splits.items():
        names = SPLIT_WORDS[split] if name in (None, split) else {name.lower()}
        divided[split] = [file for file in rest if words[file] & names]
        if name and not divided[split]:
            listed = ", ".join(file.name for file in files[:5])
            raise InputError(f"data.{split}_split {name!r} does not match any file in {source.path!r}: {listed}")
        rest = [file for file in rest if file not in divided[split]]
    train = [file for file in rest if source.train_split.lower() in words[file]]
    if not train and source.train_split != "train":
        listed = ", ".join(file.name for file in files[:5])
        raise InputError(
            f"data.train_split {source.train_split!r} does not match any file in {source.path!r}: {listed}"
        )
    train = train or rest
    if not train:
        raise InputError(f"data.path {source.path!r} has no training files: add one with 'train' in its name")
    report.unused_files = sorted(str(file) for file in set(rest) - set(train))
    return {"train": train, **{split: found for split, found in divided.items() if found}}


def _read_files(files: list[Path], path: str, reading: Reading) -> Iterator[Row]:
    return itertools.islice(read_sections([Section(file) for file in files], path, reading), reading.limit)


def read_sections(sections: list[Section], path: str, reading: Reading) -> Iterator[Row]:
    """Reads the rows of sections of files of one family.

    Args:
        sections: The sections, in order.
        path: The path of the source, for error messages.
        reading: How to read them; without its limit.

    Raises:
        InputError: A file is empty, cannot be read, or does not have a required column.
    """
    is_text, text = family(sections[0].path) == "text", reading.columns.get("text_column", "text")
    for file, start, stop in sections:
        if file.stat().st_size == 0 and len(sections) == 1:
            raise InputError(f"data.path {path!r} is an empty file: add text")
        asked = list(reading.columns.values())
        rows = read_rows(file, reading.sample_by, asked or None, None, start, stop)
        if is_text:  # has a single column, under the name that the recipe uses
            rows = ({text: row["text"]} for row in rows)
        first = next(rows, None)
        if first is None:
            continue
        missing = [key for key, column in reading.columns.items() if column not in first]
        if missing and family(file) == "table" and (found := find_columns(file)):
            names = reading.column_names or ()
            unnamed = [key for key in missing if reading.columns[key] not in names]
            if len(names) == len(first) and 0 < len(unnamed) < len(missing):  # the names fit, except for one key
                raise wrong_column(unnamed[0], reading.columns[unnamed[0]], file, names)
            if len(names) != len(first) or not set(asked) <= set(names):
                places = " ".join(f"--data.{key} {found[key]}" for key in reading.columns if key in found)
                remedy = f"; it seems to have no header line: give column indices from 0 ({places})"
                raise wrong_column(missing[0], reading.columns[missing[0]], file, first, remedy)
            rows = read_rows(file, header=list(names))
            first = next(rows)
        elif missing and is_text:
            raise InputError(
                f"data.{missing[0]} is {reading.columns[missing[0]]!r}, but {file} is a text file without columns: "
                "use a .csv, .tsv (tab-separated), JSON or Parquet file"
            )
        elif missing:
            raise wrong_column(missing[0], reading.columns[missing[0]], file, first)
        yield from itertools.chain([first], rows)
