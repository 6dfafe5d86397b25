"""Any text source -> documents, exactly as they are written, in a training and a validation split.

Local files are read here and not by the builders of `datasets`, because those change text: the text builder rewrites
`\\r\\n` and keeps the byte order mark, the CSV one (pandas) turns "NA" and "007" into other things, and neither names
the byte or the line at fault. Documents then live in an Arrow table on disk, so that memory stays small.
"""

import hashlib
import mmap
import os
import tempfile
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa

from hfgpt.data.files import CHUNK
from hfgpt.data.report import DataReport
from hfgpt.data.rows import Reading, SourceArguments, open_rows
from hfgpt.errors import InputError

# Offsets of an Arrow string column are 32 bits wide.
LONGEST_DOCUMENT = 2**31 - 1


@dataclass
class DataArguments(SourceArguments):
    """The recipe's section `data` for pre-training, beside where the text comes from.

    Args:
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
    contents = hashlib.sha256()
    collected = {}
    reading = Reading(
        columns={"text_column": arguments.text_column},
        splits={"validation": arguments.validation_split},
        limit=arguments.max_documents,
        sample_by=arguments.sample_by,
        seed=seed,
    )
    for name, rows in open_rows(arguments, reading, report).items():
        # A later row of a JSON file may lack the key: None, counted as "not text".
        values = (row.get(arguments.text_column) for row in rows)
        collected[name] = _collect(values, folder, seed, report, contents)
        if not len(collected[name].dataset):
            raise InputError(
                f"the {name} split of data.path {arguments.path!r} has no text ({report.reasons}): add text, or name "
                "the column that holds it in data.text_column"
            )
    report.sha256 = report.sha256 or contents.hexdigest()
    digests = np.concatenate([split.digests for split in collected.values()])
    report.rows_kept += len(digests)
    report.duplicated += len(digests) - len(np.unique(digests))
    return collected


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
