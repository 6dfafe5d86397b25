"""Any text source -> documents, exactly as they are written, in a training and a validation split.

Local files are read here and not by the builders of `datasets`, because those change text: the text builder rewrites
`\\r\\n` and keeps the byte order mark, the CSV one (pandas) turns "NA" and "007" into other things, and neither names
the byte or the line at fault. Documents then live in an Arrow table on disk, so that memory stays small.
"""

import codecs
import csv
import difflib
import glob
import hashlib
import itertools
import json
import mmap
import os
import re
import sys
import tempfile
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from hfgpt.data.report import DataReport
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
DECOMPRESSORS = {
    # wbits 31: a gzip header and trailer are expected and checked.
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
}
SUFFIXES = f"{', '.join(FAMILIES)}, and .gz or .zst of the first six"
VALIDATION_NAMES = {"validation", "valid", "val", "dev"}
SYNTHETIC_STORIES = 2_000
CHUNK = 1 << 20
# Offsets of an Arrow string column are 32 bits wide.
LONGEST_DOCUMENT = 2**31 - 1


@dataclass
class DataArguments:
    """The recipe's section `data`.

    Args:
        path: A Hub id; a local .txt, .md, .json, .jsonl, .csv, .tsv, .parquet (also .gz, .zst), a folder or a glob of
            them; or `synthetic:stories`, generated on the spot.
        name: Configuration of a Hub data set.
        revision: Branch, tag or commit of a Hub data set.
        train_split: Split to train on; in a folder with several, the files that carry this word in their name.
        validation_split: Split to validate on, or the word in the names of a folder's validation files. None:
            `validation` if there is one, otherwise `validation_fraction` of the training split.
        validation_fraction: Part of the documents (of the characters, if there is one document) that validates.
        text_column: Column or key that holds the text; of a .csv or .tsv without header line, its position from 0.
        sample_by: What one document is in .txt and .md files: the file, a run of lines between blank ones, or a line.
        max_documents: Read only the first N rows of each split; for synthetic text, how many to generate.
        block_size: Tokens predicted per block; None: the context length of the model.
        stride: Tokens between the starts of blocks; None: `block_size`, which is no overlap.
        document_boundaries: Packing keeps documents apart: positions restart at each of them.
        num_proc: Processes for tokenizing; None: one per core, fewer for little data.
        cache_dir: Where token streams are kept; None: `hfgpt` inside Hugging Face's cache folder (HF_HOME).
    """

    path: str | None = None
    name: str | None = None
    revision: str | None = None
    train_split: str = "train"
    validation_split: str | None = None
    validation_fraction: float = 0.1
    text_column: str = "text"
    sample_by: Literal["document", "paragraph", "line"] = "document"
    max_documents: int | None = None
    block_size: int | None = None
    stride: int | None = None
    document_boundaries: bool = False
    num_proc: int | None = None
    cache_dir: str | None = None


@dataclass
class _Collected:
    """Documents of one split, and for each a digest of its text and its length in characters and bytes."""

    dataset: datasets.Dataset
    digests: np.ndarray
    characters: np.ndarray
    bytes: np.ndarray


def load_documents(arguments: DataArguments, seed: int, report: DataReport) -> datasets.DatasetDict:
    """Reads a source and separates validation from training.

    Identical texts are never on both sides of a division made here; where the source gives both splits, those that are
    on both sides are counted in `report.leaked`.

    Args:
        arguments: What to read.
        seed: Chooses the documents that validate, and generates synthetic text.
        report: Filled in place; its `split_by` tells whether the documents are whole.

    Returns:
        Splits `train` and `validation`, each with the one column `text`.

    Raises:
        InputError: The source is missing, unreadable, of a kind not taken, or holds too little text.
    """
    _check_arguments(arguments)
    folder = cache_folder(arguments.cache_dir)
    report.source = arguments.path
    contents = hashlib.sha256()
    collected = {}
    for name, values in _open_source(arguments, seed, report).items():
        values = itertools.islice(values, arguments.max_documents)
        collected[name] = _collect(values, folder, seed, report, contents)
        if not len(collected[name].dataset):
            dropped = ", ".join(f"{rows} {reason}" for reason, rows in report.dropped.items()) or "none"
            raise InputError(
                f"data.path {arguments.path!r} is empty: its {name} split has no text in {report.rows_read} rows read "
                f"(dropped: {dropped}); add text, or name the column that holds it in data.text_column"
            )
    report.sha256 = report.sha256 or contents.hexdigest()
    digests = np.concatenate([split.digests for split in collected.values()])
    report.rows_kept += len(digests)
    report.duplicated += len(digests) - len(np.unique(digests))
    if "validation" in collected:
        report.split_by = "given"
        report.leaked = int(np.isin(collected["validation"].digests, collected["train"].digests).sum())
        _count(report, "train", collected["train"])
        _count(report, "validation", collected["validation"])
        return datasets.DatasetDict({name: split.dataset for name, split in collected.items()})
    if len(collected["train"].dataset) == 1:
        return _divide_by_position(collected["train"].dataset[0]["text"], arguments, report)
    return _divide_by_documents(collected["train"], arguments, report)


def cache_folder(cache_dir: str | os.PathLike | None) -> Path:
    """The folder where token streams are kept, made if needed.

    Args:
        cache_dir: `data.cache_dir`; None is `hfgpt` inside Hugging Face's cache folder (HF_HOME).
    """
    folder = Path(cache_dir).expanduser() if cache_dir else Path(datasets.config.HF_CACHE_HOME) / "hfgpt"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _check_arguments(arguments: DataArguments) -> None:
    if not arguments.path:
        raise InputError("data.path is not set: give a Hub id, a file, a folder or synthetic:stories")
    if not 0 < arguments.validation_fraction < 1:
        raise InputError(
            f"data.validation_fraction is {arguments.validation_fraction}, it must be above 0 and below 1: try 0.1"
        )
    if arguments.max_documents is not None and arguments.max_documents < 1:
        raise InputError(f"data.max_documents is {arguments.max_documents}, the least is 1: unset it to read all")
    if arguments.sample_by not in ("document", "paragraph", "line"):
        raise InputError(f"data.sample_by is {arguments.sample_by!r}, it must be document, paragraph or line")


def _open_source(arguments: DataArguments, seed: int, report: DataReport) -> dict[str, Iterator[Any]]:
    """Split name (`train`, and `validation` if the source has it) -> the values of its text column, lazily."""
    if arguments.path.startswith("synthetic:"):
        if arguments.path != "synthetic:stories":
            raise InputError(f"data.path {arguments.path!r} is not known: the synthetic text is synthetic:stories")
        from hfgpt.data.synthetic import generate_stories

        return {"train": iter(generate_stories(arguments.max_documents or SYNTHETIC_STORIES, seed))}
    files = find_files(arguments.path)
    if files:
        splits = _divide_files(files, arguments, report)
        report.sha256 = _hash_files([file for split in splits.values() for file in split])
        return {name: _read_values(split, arguments) for name, split in splits.items()}
    if _looks_local(arguments.path):
        raise InputError(f"data.path {arguments.path!r} does not exist{_nearest(arguments.path)}: check the path")
    return _open_hub(arguments)


def _open_hub(arguments: DataArguments) -> dict[str, Iterator[Any]]:
    # The first rows are streamed, so that max_documents of a huge set does not download all of it.
    streaming = arguments.max_documents is not None and not datasets.config.HF_HUB_OFFLINE
    try:
        splits = datasets.load_dataset(
            arguments.path, arguments.name, revision=arguments.revision, streaming=streaming
        )
    except (datasets.exceptions.FileNotFoundDatasetsError, ConnectionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"data.path {arguments.path!r} is no local file{_nearest(arguments.path)} and cannot be had from the Hub "
            f"({reason}): check data.path, data.name, data.revision, the network and the login"
        ) from error
    names = {"train": arguments.train_split}
    if arguments.validation_split or ("validation" in splits and arguments.train_split != "validation"):
        names["validation"] = arguments.validation_split or "validation"
    for key, name in names.items():
        if name not in splits:
            raise InputError(f"data.{key}_split {name!r} is not in {arguments.path}, which has: {', '.join(splits)}")
    return {key: _hub_values(splits[name], arguments) for key, name in names.items()}


def _hub_values(split: datasets.Dataset | datasets.IterableDataset, arguments: DataArguments) -> Iterator[Any]:
    column = arguments.text_column
    # A streamed set may not know its columns before its first row. Other columns, images say, are not even decoded.
    if column in (split.column_names or []):
        split = split.select_columns([column])
    for batch in split.iter(batch_size=1000):
        if column not in batch:
            raise _wrong_column(column, arguments.path, batch)
        yield from batch[column]


def _divide_files(files: list[Path], arguments: DataArguments, report: DataReport) -> dict[str, list[Path]]:
    """Training and validation files by the words in their names, below the folder they have in common."""
    wanted = arguments.validation_split
    if len(files) == 1:
        if wanted:
            raise InputError(
                f"data.validation_split is {wanted!r} but data.path {arguments.path!r} is one file: unset it (then "
                f"data.validation_fraction divides the file) or give a folder with a file named {wanted}"
            )
        return {"train": files}
    root = os.path.commonpath([file.parent for file in files])
    words = {file: set(re.split(r"[^a-z0-9]+", str(file.relative_to(root)).lower())) for file in files}
    names = VALIDATION_NAMES if wanted in (None, "validation") else {wanted.lower()}
    validation = [file for file in files if words[file] & names]
    if wanted and not validation:
        listed = ", ".join(file.name for file in files[:5])
        raise InputError(f"data.validation_split {wanted!r} is in no file name of {arguments.path!r}: {listed}")
    rest = [file for file in files if not words[file] & names]
    train = [file for file in rest if arguments.train_split.lower() in words[file]] or rest
    if not train:
        raise InputError(f"data.path {arguments.path!r} has only validation files: name one with the word train")
    report.unused_files = sorted(str(file) for file in set(rest) - set(train))
    return {"train": train, "validation": validation} if validation else {"train": train}


def _read_values(files: list[Path], arguments: DataArguments) -> Iterator[Any]:
    column = "text" if _family(files[0]) == "text" else arguments.text_column
    for file in files:
        if file.stat().st_size == 0 and len(files) == 1:
            raise InputError(f"data.path {arguments.path!r} is empty: add text to it")
        rows = read_rows(file, arguments.sample_by, [column])
        first = next(rows, None)
        if first is None:
            continue
        if column not in first:
            raise _wrong_column(column, file, first)
        # A later row of a JSON file may lack the key: None, counted as "not text".
        yield from (row.get(column) for row in itertools.chain([first], rows))


def _collect(values: Iterable[Any], folder: Path, seed: int, report: DataReport, contents: Any) -> _Collected:
    """Writes the usable texts to an Arrow table on disk, and counts the others into the report."""
    digests, characters, sizes = array("Q"), array("Q"), array("Q")
    salt = (seed % 2**64).to_bytes(8, "little")
    schema = pa.schema({"text": pa.string()})
    # An unnamed file: it is gone with the process, however that ends. Its pages are read as they are needed.
    with tempfile.TemporaryFile(dir=folder) as file:
        with pa.ipc.new_stream(file, schema) as writer:
            batch, size = [], 0
            for value in values:
                report.rows_read += 1
                data, reason = _encode(value)
                if reason:
                    report.drop(reason)
                    continue
                contents.update(len(data).to_bytes(8, "little"))
                contents.update(data)
                # With the seed as salt, the order of the digests is the seeded permutation that divides documents.
                digest = hashlib.blake2b(data, digest_size=8, salt=salt).digest()
                digests.append(int.from_bytes(digest, "little"))
                characters.append(len(value))
                sizes.append(len(data))
                if batch and size + len(data) > 16 * CHUNK:
                    writer.write_batch(pa.record_batch([pa.array(batch, pa.string())], schema))
                    batch, size = [], 0
                batch.append(value)
                size += len(data)
            if batch:
                writer.write_batch(pa.record_batch([pa.array(batch, pa.string())], schema))
        file.flush()
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    table = pa.ipc.open_stream(pa.py_buffer(pages)).read_all()
    # Given here because datasets would pickle the whole table to find one.
    dataset = datasets.Dataset(table, fingerprint=contents.hexdigest()[:16])
    return _Collected(dataset, *(np.array(column, dtype=np.uint64) for column in (digests, characters, sizes)))


def _encode(value: Any) -> tuple[bytes, str]:
    """The UTF-8 of a usable text and "", or nothing and the reason to drop it."""
    if not isinstance(value, str):
        return b"", "not text"
    if not value or value.isspace():
        return b"", "empty"
    try:
        data = value.encode()
    # JSON can spell half of a surrogate pair, which no UTF-8 stands for.
    except UnicodeEncodeError:
        return b"", "not Unicode"
    if len(data) > LONGEST_DOCUMENT:
        raise InputError(
            f"one document has {len(data):,} bytes, the limit is {LONGEST_DOCUMENT:,}: set data.sample_by to paragraph"
        )
    return data, ""


def _divide_by_position(text: str, arguments: DataArguments, report: DataReport) -> datasets.DatasetDict:
    """Cuts one document; the last characters validate. The rule of the book and of nanoGPT, to the character."""
    cut = int(len(text) * (1 - arguments.validation_fraction))
    parts = {"train": text[:cut], "validation": text[cut:]}
    report.split_by = "position"
    for name, part in parts.items():
        if not part:
            raise InputError(
                f"data.validation_fraction {arguments.validation_fraction} of one document of {len(text)} characters "
                f"leaves the {name} split empty: add text or change the fraction"
            )
        split = report.split(name)
        split.documents, split.characters, split.bytes = 1, len(part), len(part.encode())
    return datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": [part]}) for name, part in parts.items()})


def _divide_by_documents(collected: _Collected, arguments: DataArguments, report: DataReport) -> datasets.DatasetDict:
    """Takes whole documents, all copies of a text together, until the fraction is reached."""
    total = len(collected.digests)
    _, texts, copies = np.unique(collected.digests, return_inverse=True, return_counts=True)
    if len(copies) == 1:
        raise InputError(
            f"all {total} documents of data.path {arguments.path!r} are the same text, so validation would repeat "
            "training: add other texts or give data.validation_split"
        )
    wanted = left = min(max(round(total * arguments.validation_fraction), 1), total - 1)
    chosen = np.zeros(len(copies), dtype=bool)
    for text, count in enumerate(copies.tolist()):
        if count <= left:
            chosen[text] = True
            left -= count
        if not left:
            break
    # Every text has more copies than were wanted: the rarest one it is.
    if left == wanted:
        chosen[copies.argmin()] = True
    validates = chosen[texts]
    report.split_by = "documents"
    parts = {}
    for name, rows in (("train", np.flatnonzero(~validates)), ("validation", np.flatnonzero(validates))):
        _count(report, name, collected, rows)
        parts[name] = collected.dataset.select(rows)
    return datasets.DatasetDict(parts)


def _count(report: DataReport, name: str, collected: _Collected, rows: np.ndarray | slice = slice(None)) -> None:
    split = report.split(name)
    split.documents = len(collected.digests[rows])
    split.characters = int(collected.characters[rows].sum())
    split.bytes = int(collected.bytes[rows].sum())


def find_files(path: str) -> list[Path]:
    """The usable files that a path names, sorted; hidden ones are left out.

    Args:
        path: A file, a folder (searched to any depth) or a glob.

    Returns:
        Files of one family (text, JSON, table or Parquet); empty if nothing local has this name.

    Raises:
        InputError: There are no usable files, or of several families.
    """
    place = Path(path).expanduser()
    if place.is_file():
        if _family(place) is None:
            raise InputError(f"data.path {path!r} has the suffix {place.suffix!r}: taken are {SUFFIXES}")
        return [place]
    if place.is_dir():
        found = [item for item in place.rglob("*") if not any(p[0] == "." for p in item.relative_to(place).parts)]
    elif glob.has_magic(path):
        found = [Path(item) for item in glob.glob(str(place), recursive=True)]
    else:
        return []
    files = sorted(item for item in found if item.is_file() and _family(item))
    if not files:
        raise InputError(f"data.path {path!r} holds no usable file: taken are {SUFFIXES}")
    kinds = {_family(file): file.name for file in reversed(files)}
    if len(kinds) > 1:
        examples = ", ".join(f"{kind} ({name})" for kind, name in sorted(kinds.items()))
        raise InputError(
            f"data.path {path!r} mixes kinds of files, {examples}: choose one with a glob such as '*.txt'"
        )
    return files


def read_rows(path: Path, sample_by: str = "document", columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Reads the rows of one local file, whatever its kind, with nothing in their values changed.

    Args:
        path: The file, of a kind that `find_files` returns.
        sample_by: What one row of a text file is; its one column is `text`.
        columns: Columns to read of a Parquet file. A .csv or .tsv file is taken to have no header line if they are all
            numbers: its columns are then named 0, 1, 2, ...

    Yields:
        Column -> value.

    Raises:
        InputError: The file cannot be read, decoded or parsed; the message names the byte offset or the line.
    """
    suffix = _suffixes(path)[0]
    if suffix in (".txt", ".md"):
        return ({"text": text} for text in _read_documents(path, sample_by))
    if suffix == ".json":
        return _read_json(path)
    if suffix == ".jsonl":
        return _read_json_lines(path)
    if suffix == ".parquet":
        return _read_parquet(path, columns)
    return _read_table(path, has_header=not (columns and all(name.isdigit() for name in columns)))


def _wrong_column(column: str, place: str | Path, row: Iterable[str]) -> InputError:
    names = ", ".join(repr(name[:40]) for name in row)
    return InputError(f"data.text_column {column!r} is not in {place}, which has: {names}")


def _looks_local(path: str) -> bool:
    return path[0] in "./~" or path.count("/") > 1 or _family(Path(path)) is not None


def _nearest(path: str) -> str:
    """ " (nearest: NAME)" if the folder has something of a similar name, otherwise ""."""
    place = Path(path).expanduser()
    names = [item.name for item in place.parent.iterdir()] if place.parent.is_dir() else []
    near = difflib.get_close_matches(place.name, names, n=1)
    return f" (nearest: {place.parent / near[0]})" if near else ""


def _suffixes(path: Path) -> tuple[str, str]:
    """The suffix that tells the kind, and that of the compression or ""."""
    suffixes = ["", *(suffix.lower() for suffix in path.suffixes)]
    return (suffixes[-2], suffixes[-1]) if suffixes[-1] in DECOMPRESSORS else (suffixes[-1], "")


def _family(path: Path) -> str | None:
    suffix, compression = _suffixes(path)
    # A Parquet file is compressed inside, and is read from its end: nothing may be wrapped around it.
    return None if compression and suffix == ".parquet" else FAMILIES.get(suffix)


def _hash_files(files: list[Path]) -> str:
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
        chunks = iter(lambda: file.read(CHUNK), b"")
        if not compression:
            yield from chunks
            return
        decoder, started = DECOMPRESSORS[compression](), False
        try:
            for chunk in chunks:
                # A file may be several compressed ones put together: each takes up where the one before ended.
                while chunk:
                    yield decoder.decompress(chunk)
                    started, chunk = not decoder.eof, decoder.unused_data
                    if decoder.eof:
                        decoder = DECOMPRESSORS[compression]()
        except (zlib.error, zstandard.ZstdError) as error:
            raise InputError(f"{path} is not valid {compression} ({error}): compress it again") from error
        if started:
            raise InputError(f"{path} ends in the middle of its {compression} data: copy or compress it again")


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


def _read_lines(path: Path) -> Iterator[str]:
    """Lines with their ends; only a line feed ends a line, as str.splitlines would also split at other characters."""
    unfinished = []
    for text in _read_text(path):
        *lines, rest = text.split("\n")
        for line in lines:
            yield "".join([*unfinished, line, "\n"])
            unfinished.clear()
        unfinished.append(rest)
    if last := "".join(unfinished):
        yield last


def _without_end(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


def _read_documents(path: Path, sample_by: str) -> Iterator[str]:
    if sample_by == "document":
        yield "".join(_read_text(path))
    elif sample_by == "line":
        yield from map(_without_end, _read_lines(path))
    else:
        for is_blank, lines in itertools.groupby(_read_lines(path), key=str.isspace):
            if not is_blank:
                yield _without_end("".join(lines))


def _read_json(path: Path) -> Iterator[dict[str, Any]]:
    text = "".join(_read_text(path))
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        # A whole value and then more: JSON Lines under the name .json.
        if error.msg == "Extra data":
            return _read_json_lines(path)
        raise InputError(f"{path} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}") from error
    rows = rows if isinstance(rows, list) else [rows]
    return (_json_row(row, f"{path}: row {number}") for number, row in enumerate(rows, start=1))


def _read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_read_lines(path), start=1):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is not JSON: {error.msg} in line {number}, column {error.colno}") from error
        yield _json_row(row, f"{path}: line {number}")


def _json_row(row: Any, place: str) -> dict[str, Any]:
    if isinstance(row, str):
        return {"text": row}
    if not isinstance(row, dict):
        raise InputError(f"{place} is a {type(row).__name__}, it must be an object (or a text): correct the file")
    return row


def _read_table(path: Path, has_header: bool) -> Iterator[dict[str, Any]]:
    lines = _read_lines(path)
    if _suffixes(path)[0] == ".tsv":
        # In a .tsv quotes are letters like others, and a tab or a line end always separates.
        reader = (_without_end(line).split("\t") for line in lines if not line.isspace())
    else:
        # Process-wide; the limit of 131,072 characters a field is less than one long document.
        csv.field_size_limit(sys.maxsize)
        reader = (fields for fields in csv.reader(lines, strict=True) if fields)
    header, number = None, 0
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
            if missing := [name for name in columns or [] if name not in file.schema_arrow.names]:
                raise _wrong_column(missing[0], path, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1000, columns=columns):
                yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is not a valid Parquet file ({error}): write it again") from error
