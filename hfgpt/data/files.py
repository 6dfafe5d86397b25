"""Files -> rows, with values unchanged; errors name the file and the byte offset or line."""

import codecs
import contextlib
import csv
import difflib
import glob
import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from hfgpt.data.cache import cache_folder
from hfgpt.errors import InputError

FAMILIES = {
    ".txt": "text",
    ".md": "text",
    ".json": "JSON",
    ".jsonl": "JSON",
    ".csv": "table",
    ".tsv": "table",
    ".parquet": "Parquet",
}
CODECS = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES = f"{', '.join(FAMILIES)}, and .gz or .zst of the first six"
# A well-known file without a suffix: the SMS Spam Collection from the UCI archive (228).
SUFFIX_OF = {"SMSSpamCollection": ".tsv"}
PREPARATION_FILE = "preparation.json"  # in every folder of prepared data
TOKENS_SUFFIX = ".ds"  # of datatrove's token files
CHUNK = 1 << 20
# Where a row of plain text or JSON Lines can end.
ROW_ENDS = {"line": re.compile(rb"\n"), "paragraph": re.compile(rb"\n[ \t\r]*\n")}
# Characters or bytes decompressed into memory together: a line, a row, a document, a .json file. A few compressed
# kilobytes can expand to gigabytes; for other files, the size on disk tells how much memory they need.
LONGEST_DECOMPRESSED = 2**27


class Section(NamedTuple):
    """A section of a file that can be read on its own: bytes of a text file, row groups of a Parquet file.

    Args:
        path: The file.
        start: First byte, or row group.
        stop: End, exclusive; None: the end of the file.
    """

    path: Path
    start: int = 0
    stop: int | None = None


def find_files(path: str) -> list[Path]:
    """The files of supported types at a path, sorted, without hidden ones.

    Args:
        path: A file, a folder (searched recursively) or a glob; or the URL of one, such as `s3://bucket/texts`, whose
            files are downloaded or taken from the datasets cache.

    Returns:
        Files of one family (text, JSON, table or Parquet); empty if the path does not exist locally, or has
        tokens.

    Raises:
        InputError: No file has a supported type, the files have several types, or the URL cannot be read.
    """
    if is_url(path):
        return one_family(path, download_files(path, [found for found, _ in list_urls(path)]))
    place = Path(path).expanduser()
    if place.is_file() and place.suffix != TOKENS_SUFFIX:
        if family(place) is None:
            kind = f"has the unsupported file type {place.suffix!r}" if place.suffix else "has no file extension"
            raise InputError(f"data.path {path!r} {kind}; supported: {SUFFIXES}")
        return [place]
    if place.is_dir() and (is_prepared(path) or find_token_files(path)):
        return []
    if place.is_dir():
        found = [item for item in place.rglob("*") if not any(p[0] == "." for p in item.relative_to(place).parts)]
    elif glob.has_magic(path):
        found = [Path(item) for item in glob.glob(str(place), recursive=True)]
    else:
        return []
    return one_family(path, [item for item in found if item.is_file()])


def one_family(path: str, found: Iterable[Path]) -> list[Path]:
    """The files of supported types, sorted.

    Raises:
        InputError: There is none, or they are of several types.
    """
    files = sorted(item for item in found if family(item))
    if not files:
        raise InputError(
            f"data.path {without_secrets(path)!r} does not contain a file of a supported type: {SUFFIXES}"
        )
    kinds = {family(file): file.name for file in reversed(files)}
    if len(kinds) > 1:
        examples = ", ".join(f"{kind} ({name})" for kind, name in sorted(kinds.items()))
        raise InputError(f"data.path {path!r} mixes file types, {examples}: choose one with a glob such as '*.txt'")
    return files


def find_source(path: str) -> list[Path]:
    """The files at `data.path`, see `find_files`; empty if it has tokens, or may be a Hub dataset id.

    Raises:
        InputError: As `find_files`; or a path that must be local does not exist.
    """
    files = find_files(path)
    if not files and looks_local(path) and not has_tokens(path):
        raise InputError(f"data.path {path!r} does not exist{nearest(path)}: check the path")
    return files


def divide_file(path: Path, sample_by: str, size: int) -> list[tuple[Section, int]]:
    """Divides a file between rows into sections; reading them in order gives the rows of the file.

    JSON Lines, and text by line or paragraph, can be divided at any row, Parquet between row groups; other files are
    one section.

    Args:
        path: A local file.
        sample_by: What one row of a text file is.
        size: Bytes per section, approximately.

    Returns:
        The sections, with their sizes in bytes.
    """
    suffix, compression = _suffixes(path)
    total = path.stat().st_size
    if suffix == ".parquet":
        return _divide_row_groups(path, size)
    by = {".jsonl": "line", ".txt": sample_by, ".md": sample_by}.get(suffix)
    pattern = None if compression else ROW_ENDS.get(by)
    cuts = [0]
    if pattern:
        with _open(path) as file:
            while cuts[-1] + size < total and (cut := _find_end(file, cuts[-1] + size, pattern)):
                cuts.append(cut)
    cuts += [total] if cuts[-1] < total or len(cuts) == 1 else []
    return [(Section(path, start, stop), stop - start) for start, stop in itertools.pairwise(cuts)]


def read_rows(
    path: Path,
    sample_by: str = "document",
    columns: list[str] | None = None,
    header: list[str] | None = None,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Reads the rows of one local file of any supported type, or of a section of it, with values unchanged.

    A row of a compressed file has at most `LONGEST_DECOMPRESSED` characters.

    Args:
        path: A file that `find_files` returned.
        sample_by: What one row of a text file is; its only column is `text`.
        columns: Columns to read from a Parquet file. If all are numbers, a .csv or .tsv file is read without a header
            line, with columns named 0, 1, 2, ...
        header: Column names for a .csv or .tsv file without a header line.
        start, stop: A section from `divide_file`.

    Yields:
        Column -> value.

    Raises:
        InputError: The file cannot be read, decoded or parsed, or a row is too long; names the byte offset or line.
    """
    suffix, compression = _suffixes(path)
    held = lines = 0  # characters read since the last row; lines since the first

    def read_pieces() -> Iterator[str]:
        nonlocal held, lines
        for piece in _read_text(path, start, stop):
            held += len(piece)
            lines += piece.count("\n")
            # Ordinary text is 3 to 10 times its compressed size.
            if compression and held > max(LONGEST_DECOMPRESSED, 100 * path.stat().st_size):
                other = "set data.sample_by to paragraph, or " if family(path) == "text" else ""
                raise InputError(
                    f"{path}, line {lines + 1}: one row has more than {LONGEST_DECOMPRESSED:,} characters, the limit "
                    f"for compressed files: {other}decompress it first"
                )
            yield piece

    if suffix in (".txt", ".md"):
        rows = ({"text": text} for text in _read_documents(read_pieces(), sample_by))
    elif suffix == ".json":
        rows = _read_json(path, read_pieces())
    elif suffix == ".jsonl":
        rows = _read_json_lines(path, read_pieces(), start)
    elif suffix == ".parquet":
        rows = _read_parquet(path, columns, start, stop)
    else:
        has_header = not (columns and all(name.isdigit() for name in columns))
        rows = _read_table(path, read_pieces(), has_header, header)
    for row in rows:
        held = 0
        yield row


def find_columns(path: Path) -> dict[str, int]:
    """Guesses the text and label columns of a .csv or .tsv file without a header line.

    The first line counts as a row if one of its fields is long or occurs again in its column. The text is then the
    longest column, and the label the column with the fewest distinct values.

    Args:
        path: The file; its first 1,000 rows are read.

    Returns:
        Column indices from 0 for `text_column` and, with several columns, `label_column`; empty if the file seems to
        have a header line.
    """
    first, *rows = itertools.islice(read_rows(path, columns=["0"]), 1000)
    columns = [[row[name] for row in (first, *rows)] for name in first]
    if not any(len(values[0]) > 40 or values[0] in values[1:] for values in columns):
        return {}
    text, *others = sorted(range(len(columns)), key=lambda index: -sum(map(len, columns[index])))
    found = {"text_column": text}
    return (
        found | {"label_column": min(sorted(others), key=lambda index: len(set(columns[index])))} if others else found
    )


def wrong_column(key: str, column: str, place: str | Path, row: Iterable[str], remedy: str = "") -> InputError:
    names = ", ".join(repr(name[:40]) for name in row)
    return InputError(f"data.{key} {column!r} is not a column of {place}, which has: {names}{remedy}")


def is_url(path: str) -> bool:
    return "://" in path


def is_prepared(path: str) -> bool:
    """Whether a path is a local folder of `hfgpt prepare`, which may be incomplete."""
    return not is_url(path) and Path(path, PREPARATION_FILE).expanduser().is_file()


def has_tokens(path: str) -> bool:
    """Whether a local path has tokens rather than text."""
    return is_prepared(path) or bool(find_token_files(path))


def find_token_files(path: str) -> list[Path]:
    """The token files of datatrove in a local folder, or the one at a path; sorted."""
    place = Path(path).expanduser()
    if is_url(path) or not place.exists():
        return []
    return [place] if place.suffix == TOKENS_SUFFIX else sorted(place.glob(f"*{TOKENS_SUFFIX}"))


def without_secrets(path: str) -> str:
    """The path; of a URL, without credentials and query, which may contain secrets."""
    if not is_url(path):
        return path
    parts = urlsplit(path)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def looks_local(path: str) -> bool:
    return not is_url(path) and (path[0] in "./~" or path.count("/") > 1 or family(Path(path)) is not None)


def nearest(path: str) -> str:
    """ " (nearest: NAME)" if the folder contains a similar name, else ""."""
    place = Path(path).expanduser()
    names = [item.name for item in place.parent.iterdir()] if place.parent.is_dir() else []
    near = difflib.get_close_matches(place.name, names, n=1)
    return f" (nearest: {place.parent / near[0]})" if near else ""


def list_urls(url: str) -> list[tuple[str, dict[str, Any]]]:
    """The URLs of the files of supported types at a URL, and what a listing says of each, such as its `size`.

    Raises:
        InputError: The URL cannot be read.
    """
    import fsspec

    if urlsplit(url).username:
        raise InputError(f"data.path {without_secrets(url)!r} contains a user name: remove it, and log in another way")
    with explain_url(url):
        system, place = fsspec.url_to_fs(url)
        if glob.has_magic(place.partition("?")[0]):
            places = system.glob(place, detail=True)
        else:
            # Web servers do not have folders, so a supported extension means a file.
            is_file = family(Path(urlsplit(url).path)) is not None
            places = {place: {}} if is_file or not system.isdir(place) else system.find(place, detail=True)
        urls = [(system.unstrip_protocol(found), about) for found, about in places.items()]
        return [(found, about) for found, about in urls if family(Path(urlsplit(found).path))]


@contextlib.contextmanager
def explain_url(url: str) -> Iterator[None]:
    """Turns the errors of reading a URL into one line."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(
            f"data.path {without_secrets(url)!r} was not found, or its server does not answer: check the URL"
        ) from error
    except ImportError as error:
        raise InputError(f"data.path {without_secrets(url)!r} needs another package ({error}): install it") from error
    # Servers, buckets and their libraries raise all kinds of errors, and only the user can fix them.
    except Exception as error:
        reason = " ".join(str(error).replace(url, without_secrets(url)).split()) or type(error).__name__
        raise InputError(
            f"data.path {without_secrets(url)!r} cannot be read ({reason}): check the URL and the network"
        ) from error


def download_files(url: str, urls: list[str]) -> list[Path]:
    """Downloads files to the datasets cache; returns local paths that keep the file names.

    Args:
        url: `data.path`, for error messages.
        urls: The files.
    """
    import datasets

    with explain_url(url):
        contents = datasets.DownloadManager().download(urls)
    return [_name_download(found, Path(content)) for found, content in zip(urls, contents, strict=True)]


def _name_download(url: str, content: Path) -> Path:
    """A link, named like the URL, to a downloaded file, whose own name is a hash."""
    parts = urlsplit(url)
    inside = [name for name in parts.path.split("/") if name not in ("", "..")]  # a server may list any name
    link = cache_folder(None).joinpath("downloads", content.name, parts.netloc, *inside)
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        with contextlib.suppress(FileExistsError):  # created by another process
            link.symlink_to(content.absolute())
    return link


def _suffixes(path: Path) -> tuple[str, str]:
    """The file type's suffix, and that of the compression or ""."""
    suffixes = ["", *(suffix.lower() for suffix in path.suffixes or [SUFFIX_OF.get(path.name, "")])]
    return (suffixes[-2], suffixes[-1]) if suffixes[-1] in CODECS else (suffixes[-1], "")


def family(path: Path) -> str | None:
    suffix, compression = _suffixes(path)
    # Parquet is compressed internally and read from its end, so it cannot be wrapped in another compression.
    return None if compression and suffix == ".parquet" else FAMILIES.get(suffix)


def describe_file(file: Path) -> list[str | int]:
    """Detects changes to a file without reading it; unlike mtime, ctime cannot be set by a user."""
    found = file.stat()
    return [str(file.absolute()), found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def hash_files(files: list[Path]) -> str:
    root = os.path.commonpath([file.parent for file in files])
    lines = []
    for file in files:
        with _open(file) as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        lines.append(f"{digest}  {file.relative_to(root).as_posix()}\n")
    return digest if len(files) == 1 else hashlib.sha256("".join(lines).encode()).hexdigest()


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except PermissionError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): change its permissions") from error


def _read_bytes(path: Path, start: int, stop: int | None) -> Iterator[bytes]:
    """The decompressed content in chunks."""
    compression = _suffixes(path)[1]
    with _open(path) as file:
        if not compression:
            file.seek(start)
            left = path.stat().st_size - start if stop is None else stop - start
            while left > 0 and (chunk := file.read(min(left, CHUNK))):
                left -= len(chunk)
                yield chunk
            return
        # Both codecs verify checksums and read concatenated streams.
        stream = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), CODECS[compression])
        try:
            yield from iter(lambda: stream.read(CHUNK), b"")
        except OSError as error:
            if error.errno is not None:
                raise
            if "Truncated" in str(error):
                raise InputError(f"{path} is truncated {compression} data: copy or compress it again") from error
            raise InputError(f"{path} is not valid {compression} data ({error}): compress it again") from error


def _read_text(path: Path, start: int, stop: int | None) -> Iterator[str]:
    """The decoded content in chunks, without a byte order mark; line endings are unchanged."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, at_start = start, start == 0
    for chunk in itertools.chain(_read_bytes(path, start, stop), [b""]):
        if b"\0" in chunk:
            raise InputError(f"{path} is not text: byte {offset + chunk.index(0)} is NUL; convert it to UTF-8 text")
        # Bytes of a character split across chunks: the decoder's offsets count from them.
        unfinished = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path} is not valid UTF-8: byte 0x{error.object[error.start]:02x} at offset "
                f"{offset - unfinished + error.start}; convert it to UTF-8"
            ) from error
        offset += len(chunk)
        if text:
            yield text.removeprefix("\ufeff") if at_start else text
            at_start = False


def _read_lines(pieces: Iterable[str]) -> Iterator[str]:
    """Lines with their endings, split at line feeds only; str.splitlines would also split at other characters."""
    unfinished = []
    for text in pieces:
        *lines, rest = text.split("\n")
        for line in lines:
            yield "".join([*unfinished, line, "\n"])
            unfinished.clear()
        unfinished.append(rest)
    if last := "".join(unfinished):
        yield last


def _without_end(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


def _read_documents(pieces: Iterable[str], sample_by: str) -> Iterator[str]:
    if sample_by == "document":
        yield "".join(pieces)
    elif sample_by == "line":
        yield from map(_without_end, _read_lines(pieces))
    else:
        for is_blank, lines in itertools.groupby(_read_lines(pieces), key=str.isspace):
            if not is_blank:
                yield _without_end("".join(lines))


def _read_json(path: Path, pieces: Iterable[str]) -> Iterator[dict[str, Any]]:
    text = "".join(pieces)
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        # More data after a complete value: JSON Lines with the extension .json.
        if getattr(error, "msg", "") == "Extra data":
            return _read_json_lines(path, [text])
        raise _invalid_json(path, error) from error
    rows = rows if isinstance(rows, list) else [rows]
    return (_json_row(row, f"{path}: row {number}") for number, row in enumerate(rows, start=1))


def _read_json_lines(path: Path, pieces: Iterable[str], start: int = 0) -> Iterator[dict[str, Any]]:
    """The rows from byte `start` on."""

    def count_lines(number: int) -> int:
        return number + sum(chunk.count(b"\n") for chunk in _read_bytes(path, 0, start)) if start else number

    for number, line in enumerate(_read_lines(pieces), start=1):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _invalid_json(path, error, count_lines(number)) from error
        if isinstance(row, dict):
            yield row
        else:
            yield _json_row(row, f"{path}: line {count_lines(number)}")


def _invalid_json(path: Path, error: Exception, line: int | None = None) -> InputError:
    """Explains a JSONDecodeError, a RecursionError, or json's ValueError for a number of 5,000 digits."""
    fact = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))
    if isinstance(error, json.JSONDecodeError):
        fact += f" in line {line or error.lineno}, column {error.colno}"
    elif line:
        fact += f" in line {line}"
    return InputError(f"{path} is not valid JSON: {fact}")


def _json_row(row: Any, place: str) -> dict[str, Any]:
    if isinstance(row, str):
        return {"text": row}
    if not isinstance(row, dict):
        raise InputError(f"{place} has the type {type(row).__name__}; it must be an object or a string")
    return row


def _read_table(
    path: Path, pieces: Iterable[str], has_header: bool, header: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    lines = _read_lines(pieces)
    if _suffixes(path)[0] == ".tsv":
        # In a .tsv file, quotes are ordinary characters, and tabs and line feeds always separate.
        reader = (_without_end(line).split("\t") for line in lines if not line.isspace())
    else:
        # Process-wide; the default limit of 131,072 characters per field is too small for long documents.
        csv.field_size_limit(sys.maxsize)
        reader = (fields for fields in csv.reader(lines, strict=True) if fields)
    number = 0
    try:
        for number, fields in enumerate(reader, start=1):
            if header is None:
                header = fields if has_header else [str(column) for column in range(len(fields))]
                if has_header:
                    continue
            if len(fields) != len(header):
                raise InputError(
                    f"{path}: row {number} has {len(fields)} fields, but the first has {len(header)}: fix or quote it"
                )
            yield dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise InputError(f"{path} is not a valid table: {error} in row {number + 1}; fix or quote it") from error


def _read_parquet(
    path: Path, columns: list[str] | None, start: int = 0, stop: int | None = None
) -> Iterator[dict[str, Any]]:
    try:
        with _open(path) as stream, pq.ParquetFile(stream) as file:
            if not set(columns or []) <= set(file.schema_arrow.names):
                columns = None  # the caller then reports the columns of the first row
            groups = range(file.num_row_groups)[start:stop]
            _check_sizes(path, file, groups)
            # Small batches: a text that is stored once can be the value of many rows.
            for batch in file.iter_batches(batch_size=16, row_groups=groups, columns=columns):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # a disk error
        fact = " ".join(str(error).split())
        raise InputError(f"{path} is not a valid Parquet file ({fact}): write it again") from error


def _divide_row_groups(path: Path, size: int) -> list[tuple[Section, int]]:
    """Consecutive row groups of a Parquet file with about `size` bytes in total."""
    try:
        with _open(path) as stream, pq.ParquetFile(stream) as file:
            metadata = file.metadata
            sizes = [metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)]
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise InputError(f"{path} is not a valid Parquet file ({error}): write it again") from error
    sections, start, held = [], 0, 0
    for number, group in enumerate(sizes, start=1):
        held += group
        if held >= size or number == len(sizes):
            sections.append((Section(path, start, number), held))
            start, held = number, 0
    return sections or [(Section(path), 0)]


def _find_end(file: BinaryIO, position: int, pattern: re.Pattern) -> int | None:
    """The end of the first match from `position` on, which is where a row starts; None if there is none."""
    file.seek(position)
    seen = b""
    while chunk := file.read(CHUNK):
        seen = seen[-1024:] + chunk  # blank lines may be divided between chunks
        if found := pattern.search(seen):
            return file.tell() - len(seen) + found.end()
    return None


def _check_sizes(path: Path, file: pq.ParquetFile, groups: Iterable[int]):
    metadata = file.metadata
    for number in groups:
        # Opens the columns without reading rows: raises if they are damaged, where reading the metadata would crash.
        list(file.reader.iter_batches(0, [number]))
        group = metadata.row_group(number)
        for column in map(group.column, range(group.num_columns)):
            # Ordinary text is 3 to 10 times its compressed size.
            if column.total_uncompressed_size > max(LONGEST_DECOMPRESSED, 100 * column.total_compressed_size):
                raise InputError(
                    f"{path} decompresses {column.total_compressed_size:,} bytes of {column.path_in_schema} to "
                    f"{column.total_uncompressed_size:,}, above the limits of {LONGEST_DECOMPRESSED:,} bytes and 100 "
                    "times the compressed size: write it again with shorter texts"
                )
