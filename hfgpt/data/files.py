"""Files -> rows, with nothing in them changed; a file that is at fault is named with the byte or the line."""

import codecs
import contextlib
import csv
import difflib
import glob
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO
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
# A well-known file whose name has no suffix: the SMS Spam Collection as UCI's archive (228) has it.
SUFFIX_OF = {"SMSSpamCollection": ".tsv"}
CHUNK = 1 << 20
# Of what is decompressed and held at once: a line, a row, a document, a .json file. A few kilobytes of a compressed
# file can stand for gigabytes; of other files the size on the disk says what they will take.
LONGEST_DECOMPRESSED = 2**27


def find_files(path: str) -> list[Path]:
    """The usable files that a path names, sorted; hidden ones are left out.

    Args:
        path: A file, a folder (searched to any depth) or a glob; or a URL of one, such as `s3://bucket/texts`, whose
            files are downloaded, or found in the cache of datasets.

    Returns:
        Files of one family (text, JSON, table or Parquet); empty if nothing local has this name.

    Raises:
        InputError: There are no usable files, or of several families; or a URL cannot be read.
    """
    if is_url(path):
        return _one_family(path, _download_files(path))
    place = Path(path).expanduser()
    if place.is_file():
        if family(place) is None:
            kind = f"is of the unsupported file type {place.suffix!r}" if place.suffix else "has no file type"
            raise InputError(f"data.path {path!r} {kind}; supported: {SUFFIXES}")
        return [place]
    if place.is_dir():
        found = [item for item in place.rglob("*") if not any(p[0] == "." for p in item.relative_to(place).parts)]
    elif glob.has_magic(path):
        found = [Path(item) for item in glob.glob(str(place), recursive=True)]
    else:
        return []
    return _one_family(path, [item for item in found if item.is_file()])


def _one_family(path: str, found: Iterable[Path]) -> list[Path]:
    files = sorted(item for item in found if family(item))
    if not files:
        raise InputError(f"data.path {without_secrets(path)!r} has no file of a supported type: {SUFFIXES}")
    kinds = {family(file): file.name for file in reversed(files)}
    if len(kinds) > 1:
        examples = ", ".join(f"{kind} ({name})" for kind, name in sorted(kinds.items()))
        raise InputError(
            f"data.path {path!r} mixes kinds of files, {examples}: choose one with a glob such as '*.txt'"
        )
    return files


def find_source(path: str) -> list[Path]:
    """The files that `data.path` names, as `find_files` does; empty for what may be a data set of the Hub.

    Raises:
        InputError: As `find_files`, or nothing is there and the path is that of a file.
    """
    files = find_files(path)
    if not files and looks_local(path):
        raise InputError(f"data.path {path!r} does not exist{nearest(path)}: check the path")
    return files


def read_rows(
    path: Path, sample_by: str = "document", columns: list[str] | None = None, header: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Reads the rows of one local file, whatever its kind, with nothing in their values changed.

    What is held at once of a compressed file, a row or a file that is one row, has `LONGEST_DECOMPRESSED` characters
    at most.

    Args:
        path: The file, of a kind that `find_files` returns.
        sample_by: What one row of a text file is; its one column is `text`.
        columns: Columns to read of a Parquet file. A .csv or .tsv file is taken to have no header line if they are all
            numbers: its columns are then named 0, 1, 2, ...
        header: Names of the columns of a .csv or .tsv file without a header line.

    Yields:
        Column -> value.

    Raises:
        InputError: The file cannot be read, decoded or parsed, or a row is too long; the message names the byte offset
            or the line.
    """
    suffix, compression = _suffixes(path)
    held = lines = 0  # characters read since the last row; lines since the first

    def read_pieces() -> Iterator[str]:
        nonlocal held, lines
        for piece in _read_text(path):
            held += len(piece)
            lines += piece.count("\n")
            # Text compresses to a third or a tenth.
            if compression and held > max(LONGEST_DECOMPRESSED, 100 * path.stat().st_size):
                other = "set data.sample_by to paragraph, or " if family(path) == "text" else ""
                raise InputError(
                    f"{path}, line {lines + 1}: one row has more than {LONGEST_DECOMPRESSED:,} characters, the limit "
                    f"of a compressed file: {other}decompress it first"
                )
            yield piece

    if suffix in (".txt", ".md"):
        rows = ({"text": text} for text in _read_documents(read_pieces(), sample_by))
    elif suffix == ".json":
        rows = _read_json(path, read_pieces())
    elif suffix == ".jsonl":
        rows = _read_json_lines(path, read_pieces())
    elif suffix == ".parquet":
        rows = _read_parquet(path, columns)
    else:
        has_header = not (columns and all(name.isdigit() for name in columns))
        rows = _read_table(path, read_pieces(), has_header, header)
    for row in rows:
        held = 0
        yield row


def find_columns(path: Path) -> dict[str, int]:
    """Where text and label are in a .csv or .tsv file that seems to have no header line: recipe key -> position.

    The first line is taken for a row if one of its fields is long or occurs again in its column. The text is then the
    longest column, the label the one with the fewest different values.

    Args:
        path: The file; its first 1,000 rows are read.

    Returns:
        Positions from 0 for `text_column` and, with several columns, `label_column`; empty if there seems to be a
        header line.
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
    return InputError(f"data.{key} {column!r} is not in {place}, which has: {names}{remedy}")


def is_url(path: str) -> bool:
    return "://" in path


def without_secrets(path: str) -> str:
    """A path as it is; a URL without what may sign its user in."""
    if not is_url(path):
        return path
    parts = urlsplit(path)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def looks_local(path: str) -> bool:
    return not is_url(path) and (path[0] in "./~" or path.count("/") > 1 or family(Path(path)) is not None)


def nearest(path: str) -> str:
    """ " (nearest: NAME)" if the folder has something of a similar name, otherwise ""."""
    place = Path(path).expanduser()
    names = [item.name for item in place.parent.iterdir()] if place.parent.is_dir() else []
    near = difflib.get_close_matches(place.name, names, n=1)
    return f" (nearest: {place.parent / near[0]})" if near else ""


def _download_files(url: str) -> list[Path]:
    """The files of a URL on this machine, under their own names, which say what they are."""
    import datasets
    import fsspec

    if urlsplit(url).username:
        raise InputError(f"data.path {without_secrets(url)!r} has a user name in it: sign in by other means")
    try:
        system, place = fsspec.url_to_fs(url)
        if glob.has_magic(place.partition("?")[0]):
            places = system.glob(place)
        else:
            # A web server has no folders; what has a file's name is one.
            is_file = family(Path(urlsplit(url).path)) is not None
            places = [place] if is_file or not system.isdir(place) else system.find(place)
        urls = [system.unstrip_protocol(found) for found in places]
        urls = [found for found in urls if family(Path(urlsplit(found).path))]
        contents = datasets.DownloadManager().download(urls)
    except FileNotFoundError as error:
        raise InputError(f"data.path {without_secrets(url)!r} was not found: check the URL") from error
    except ImportError as error:
        raise InputError(f"data.path {without_secrets(url)!r} needs another package ({error}): install it") from error
    # Whatever a server, a bucket or its library answers, it is the user's to correct.
    except Exception as error:
        reason = " ".join(str(error).replace(url, without_secrets(url)).split()) or type(error).__name__
        raise InputError(
            f"data.path {without_secrets(url)!r} cannot be read ({reason}): check the URL and the network"
        ) from error
    return [_name_download(found, Path(content)) for found, content in zip(urls, contents, strict=True)]


def _name_download(url: str, content: Path) -> Path:
    """A link to a downloaded file, which has a hash for a name, under the path of its URL."""
    parts = urlsplit(url)
    link = cache_folder(None) / "downloads" / content.name / parts.netloc / parts.path.lstrip("/")
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        with contextlib.suppress(FileExistsError):  # another process was first
            link.symlink_to(content.absolute())
    return link


def _suffixes(path: Path) -> tuple[str, str]:
    """The suffix that tells the kind, and that of the compression or ""."""
    suffixes = ["", *(suffix.lower() for suffix in path.suffixes or [SUFFIX_OF.get(path.name, "")])]
    return (suffixes[-2], suffixes[-1]) if suffixes[-1] in CODECS else (suffixes[-1], "")


def family(path: Path) -> str | None:
    suffix, compression = _suffixes(path)
    # A Parquet file is compressed inside, and is read from its end: nothing may be wrapped around it.
    return None if compression and suffix == ".parquet" else FAMILIES.get(suffix)


def describe_file(file: Path) -> list[str | int]:
    """What tells, without reading a file, whether it was changed; a user cannot set the time of its last change."""
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
        raise InputError(f"{path} cannot be read ({error.strerror}): give yourself the right to read it") from error


def _read_bytes(path: Path) -> Iterator[bytes]:
    """The content in pieces, decompressed."""
    compression = _suffixes(path)[1]
    with _open(path) as file:
        # Both codecs check what they decompress, and read files that are several compressed ones put together.
        stream = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), CODECS[compression]) if compression else file
        try:
            yield from iter(lambda: stream.read(CHUNK), b"")
        except OSError as error:
            if not compression or error.errno is not None:
                raise
            if "Truncated" in str(error):
                raise InputError(
                    f"{path} ends in the middle of its {compression} data: copy or compress it again"
                ) from error
            raise InputError(f"{path} is not valid {compression} ({error}): compress it again") from error


def _read_text(path: Path) -> Iterator[str]:
    """The content in pieces of text, without a byte order mark; line ends stay as they are."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, at_start = 0, True
    for chunk in itertools.chain(_read_bytes(path), [b""]):
        if b"\0" in chunk:
            raise InputError(f"{path} is not text: byte {offset + chunk.index(0)} is NUL; convert it to UTF-8 text")
        # Bytes of a character that the chunk before left unfinished: the decoder counts from them.
        unfinished = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset "
                f"{offset - unfinished + error.start}; convert it to UTF-8"
            ) from error
        offset += len(chunk)
        if text:
            yield text.removeprefix("\ufeff") if at_start else text
            at_start = False


def _read_lines(pieces: Iterable[str]) -> Iterator[str]:
    """Lines with their ends; only a line feed ends a line, as str.splitlines would also split at other characters."""
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
        # A whole value and then more: JSON Lines under the name .json.
        if getattr(error, "msg", "") == "Extra data":
            return _read_json_lines(path, [text])
        raise _invalid_json(path, error) from error
    rows = rows if isinstance(rows, list) else [rows]
    return (_json_row(row, f"{path}: row {number}") for number, row in enumerate(rows, start=1))


def _read_json_lines(path: Path, pieces: Iterable[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_read_lines(pieces), start=1):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _invalid_json(path, error, number) from error
        yield _json_row(row, f"{path}: line {number}")


def _invalid_json(path: Path, error: Exception, line: int | None = None) -> InputError:
    """What json raises: besides a JSONDecodeError a RecursionError, or of a number of 5,000 digits a ValueError."""
    fact = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))
    if isinstance(error, json.JSONDecodeError):
        fact += f" in line {line or error.lineno}, column {error.colno}"
    elif line:
        fact += f" in line {line}"
    return InputError(f"{path} is not JSON: {fact}")


def _json_row(row: Any, place: str) -> dict[str, Any]:
    if isinstance(row, str):
        return {"text": row}
    if not isinstance(row, dict):
        raise InputError(
            f"{place} is of type {type(row).__name__}, it must be an object (or a text): correct the file"
        )
    return row


def _read_table(
    path: Path, pieces: Iterable[str], has_header: bool, header: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    lines = _read_lines(pieces)
    if _suffixes(path)[0] == ".tsv":
        # In a .tsv quotes are letters like others, and a tab or a line end always separates.
        reader = (_without_end(line).split("\t") for line in lines if not line.isspace())
    else:
        # Process-wide; the limit of 131,072 characters a field is less than one long document.
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
                    f"{path}: row {number} has {len(fields)} fields, the first row {len(header)}: correct or quote it"
                )
            yield dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise InputError(f"{path} is not a valid table: {error} in row {number + 1}: correct or quote it") from error


def _read_parquet(path: Path, columns: list[str] | None) -> Iterator[dict[str, Any]]:
    try:
        with _open(path) as stream, pq.ParquetFile(stream) as file:
            if not set(columns or []) <= set(file.schema_arrow.names):
                columns = None  # the first row then shows what there is
            _check_sizes(path, file)
            # Few rows at a time: one text, stored once, can be the value of all of them.
            for batch in file.iter_batches(batch_size=16, columns=columns):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk
        fact = " ".join(str(error).split())
        raise InputError(f"{path} is not a valid Parquet file ({fact}): write it again") from error


def _check_sizes(path: Path, file: pq.ParquetFile):
    metadata = file.metadata
    for number in range(metadata.num_row_groups):
        # Opens its columns and reads no row: of a damaged one this raises, where its metadata would end the process.
        list(file.reader.iter_batches(0, [number]))
        group = metadata.row_group(number)
        for column in map(group.column, range(group.num_columns)):
            # Text compresses to a third or a tenth.
            if column.total_uncompressed_size > max(LONGEST_DECOMPRESSED, 100 * column.total_compressed_size):
                raise InputError(
                    f"{path} decompresses {column.total_compressed_size:,} bytes of {column.path_in_schema} to "
                    f"{column.total_uncompressed_size:,}, more than the limit of {LONGEST_DECOMPRESSED:,} and more "
                    "than 100 times as many: write it again with shorter texts"
                )
