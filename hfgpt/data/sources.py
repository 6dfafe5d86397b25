"""Any text source -> documents, exactly as they are written, in a training and a validation split.

Local files are read here and not by the builders of `datasets`, because those change text: the text builder rewrites
`\\r\\n` and keeps the byte order mark, the CSV one (pandas) turns "NA" and "007" into other things, and neither names
the byte or the line at fault. Documents then live in an Arrow table on disk, so that memory stays small.
"""

import hashlib
import itertools
import mmap
import os
import re
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa

from hfgpt.data.files import CHUNK, family, find_files, hash_files, looks_local, nearest, read_rows, wrong_column
from hfgpt.data.report import DataReport
from hfgpt.errors import InputError

VALIDATION_NAMES = {"validation", "valid", "val", "dev"}
SYNTHETIC_STORIES = 2_000
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
    collected = _collect_splits(arguments, seed, report)
    if "validation" in collected:
        report.split_by = "given"
        report.leaked = int(np.isin(collected["validation"].digests, collected["train"].digests).sum())
        _count(report, "train", collected["train"])
        _count(report, "validation", collected["validation"])
        return datasets.DatasetDict({name: split.dataset for name, split in collected.items()})
    if len(collected["train"].dataset) == 1:
        return _divide_by_position(collected["train"].dataset[0]["text"], arguments, report)
    return _divide_by_documents(collected["train"], arguments, report)


def load_all_documents(arguments: DataArguments, report: DataReport) -> datasets.Dataset:
    """Reads a source to measure a model on: all of it, or `validation_split` where one is named.

    Args:
        arguments: What to read.
        report: Filled in place; the sizes are those of the split `validation`.

    Returns:
        One column `text`.

    Raises:
        InputError: As `load_documents`.
    """
    collected = _collect_splits(arguments, 0, report)
    chosen = [collected["validation"]] if arguments.validation_split else list(collected.values())
    for split in chosen:
        _count(report, "validation", split)
    return datasets.concatenate_datasets([split.dataset for split in chosen])


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


def _collect_splits(arguments: DataArguments, seed: int, report: DataReport) -> dict[str, _Collected]:
    """Reads every split the source has: `train`, and `validation` if it is given."""
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
    return collected


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
        report.sha256 = hash_files([file for split in splits.values() for file in split])
        return {name: _read_values(split, arguments) for name, split in splits.items()}
    if looks_local(arguments.path):
        raise InputError(f"data.path {arguments.path!r} does not exist{nearest(arguments.path)}: check the path")
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
            f"data.path {arguments.path!r} is no local file{nearest(arguments.path)} and cannot be had from the Hub "
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
            raise wrong_column(column, arguments.path, batch)
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
    column = "text" if family(files[0]) == "text" else arguments.text_column
    for file in files:
        if file.stat().st_size == 0 and len(files) == 1:
            raise InputError(f"data.path {arguments.path!r} is empty: add text to it")
        rows = read_rows(file, arguments.sample_by, [column])
        first = next(rows, None)
        if first is None:
            continue
        if column not in first:
            raise wrong_column(column, file, first)
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
    split.documents += len(collected.digests[rows])
    split.characters += int(collected.characters[rows].sum())
    split.bytes += int(collected.bytes[rows].sum())
