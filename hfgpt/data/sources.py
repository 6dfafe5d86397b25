"""Any text source -> unmodified documents in a training and a validation split.

Local files are not read with the builders of `datasets`, because those change text: the text builder rewrites `\\r\\n`
and keeps the byte order mark, the CSV builder (pandas) converts "NA" and "007", and their errors do not name the byte
or line. The texts are cached as an Arrow table for later runs; a Hub dataset already is one. Everything derived from
that table is computed with `Dataset.map` and cached next to it.
"""

import functools
import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Value

from hfgpt.data.cache import cache_folder, map_rows, read_kept, remove_abandoned
from hfgpt.data.files import hash_files, wrong_column
from hfgpt.data.report import DataReport, SplitReport
from hfgpt.data.rows import Reading, Source, SourceArguments, find_source_splits, is_unicode
from hfgpt.data.splits import cut_document, divide_documents, seeded_digest
from hfgpt.errors import InputError
from hfgpt.saving import appearing_folder, write_json

FORMAT_VERSION = 1  # part of the fingerprint: other versions are not found in the cache
# Offsets of an Arrow string column are 32 bits wide.
LONGEST_DOCUMENT = 2**31 - 1
BATCH_BYTES = 1 << 24
SOURCE_FILE = "source.json"
# Keys that determine the tokens, in addition to `path` and the tokenizer.
SETTINGS = (
    "name",
    "revision",
    "train_split",
    "validation_split",
    "validation_fraction",
    "text_column",
    "sample_by",
    "max_documents",
    "deduplicate",
)


@dataclass(kw_only=True)
class MixtureSource:
    """One source of a mixture.

    Args:
        path: As `data.path`.
        weight: Its share of the training blocks, relative to those of the other sources.
        name, revision, train_split, validation_split, text_column, sample_by: As the keys of the section `data`;
            None: its values.
    """

    path: str
    weight: float = 1.0
    name: str | None = None
    revision: str | None = None
    train_split: str | None = None
    validation_split: str | None = None
    text_column: str | None = None
    sample_by: Literal["document", "paragraph", "line"] | None = None

    def __post_init__(self):
        if not 0 < self.weight < float("inf"):
            raise InputError(f"data.mixture has the weight {self.weight} for {self.path}; it must be above 0")


@dataclass
class DataArguments(SourceArguments):
    """The recipe's section `data` for pre-training, in addition to the source of the text.

    Args:
        validation_fraction: Fraction of the documents held out for validation; of the characters, if there is only one
            document.
        text_column: Column or key of the text; for a .csv or .tsv file without a header line, its index from 0.
        sample_by: What one document is in .txt and .md files: `document` (the whole file), `paragraph` (separated by
            blank lines) or `line`.
        max_documents: Read only the first N rows of each split; for synthetic text, the number of rows to generate.
        deduplicate: Repeated texts that `hfgpt prepare` removes, keeping the first: `exact` (the same text) or `near`
            (also most texts that share 80 % of their word 5-grams); None: no texts.
        mixture: Sources that `hfgpt prepare` mixes, instead of `path`: a list of {path, weight}, each optionally with
            its own name, revision, splits, text_column and sample_by. Every block of every source occurs in an epoch;
            those of a source that is smaller than its share occur several times.
        block_size: Tokens predicted per block; None: the model's context length.
        stride: Tokens between the starts of consecutive blocks; None: `block_size`, no overlap.
        document_boundaries: Keep documents in a block separate: positions restart at each document, and attention does
            not cross documents.
        num_proc: Processes for tokenization; None: one per core, fewer for small data.
        cache_dir: Folder for cached texts and tokens; None: `hfgpt` in the Hugging Face cache folder (HF_HOME). Safe
            to delete between runs.
    """

    validation_fraction: float = 0.1
    text_column: str = "text"
    sample_by: Literal["document", "paragraph", "line"] = "document"
    max_documents: int | None = None
    deduplicate: Literal["exact", "near"] | None = None
    mixture: list[MixtureSource] | None = None
    block_size: int | None = None
    stride: int | None = None
    document_boundaries: bool = False
    num_proc: int | None = None
    cache_dir: str | None = None

    def sources(self) -> list[tuple["DataArguments", float]]:
        """The sources that `hfgpt prepare` reads, with their weights; `path` is one source.

        Raises:
            InputError: The mixture is empty.
        """
        if self.mixture is None:
            return [(self, 1.0)]
        if not self.mixture:
            raise InputError("data.mixture is empty: list sources, or set data.path")
        found = []
        for source in self.mixture:
            own = {name: value for name, value in vars(source).items() if value is not None}
            weight = own.pop("weight")
            found.append((replace(self, mixture=None, **own), weight))
        return found


@dataclass
class _Texts:
    """Usable texts of one split, with the uint64 digest (of text and seed) and the lengths of each."""

    dataset: datasets.Dataset
    digests: np.ndarray
    characters: np.ndarray
    bytes: np.ndarray


def load_documents(arguments: DataArguments, seed: int, report: DataReport) -> datasets.DatasetDict:
    """Reads a source and splits it into training and validation.

    Identical texts always go to the same split; if the source has both splits, texts that are in both are counted in
    `report.leaked`.

    Args:
        arguments: What to read.
        seed: Chooses the validation documents, and generates synthetic text.
        report: Updated in place; `split_by` tells whether the documents are complete.

    Returns:
        Splits `train` and `validation`, with the column `text`.

    Raises:
        InputError: The source does not exist, cannot be read, is not supported, or has too little text.
    """
    splits = _read_splits(arguments, seed, report)
    if "validation" in splits:
        report.split_by = "given"
        report.leaked = int(np.isin(splits["validation"].digests, splits["train"].digests).sum())
    elif len(splits["train"].dataset) == 1:
        splits = _cut_document(splits["train"], arguments, report)
    else:
        splits = _divide_documents(splits["train"], arguments, report)
    for name, texts in splits.items():
        _count(report, name, texts)
    return datasets.DatasetDict({name: texts.dataset for name, texts in splits.items()})


def load_all_documents(arguments: DataArguments, report: DataReport) -> datasets.Dataset:
    """Reads a source to evaluate a model: all documents, or only `validation_split` if it is set.

    Args:
        arguments: What to read.
        report: Updated in place; sizes are recorded for the split `validation`.

    Returns:
        The column `text`.

    Raises:
        InputError: As `load_documents`.
    """
    splits = _read_splits(arguments, 0, report)
    chosen = [splits["validation"]] if arguments.validation_split else list(splits.values())
    for texts in chosen:
        _count(report, "validation", texts)
    return datasets.concatenate_datasets([texts.dataset for texts in chosen])


def shorten(documents: datasets.Dataset, sizes: SplitReport, characters: int) -> datasets.Dataset:
    """The first documents of a split, or the beginning of one long document, with about `characters` characters.

    Args:
        documents: The column `text`.
        sizes: Their sizes, from `load_documents`.
        characters: Number of characters wanted; at most all are returned.
    """
    if sizes.characters <= characters:
        return documents
    rows = max(len(documents) * characters // sizes.characters, 1)
    first = documents.select(range(rows))
    if rows > 1:
        return first
    return map_rows(first, _cut, {"text": Value("string")}, {"start": 0, "stop": characters}, "Cutting")


def reading_of(arguments: DataArguments, seed: int) -> Reading:
    """How to read the documents of a source.

    Args:
        arguments: What to read.
        seed: Seed of synthetic text.

    Raises:
        InputError: A value is out of range.
    """
    _check_arguments(arguments)
    return Reading(
        columns={"text_column": arguments.text_column},
        splits={"validation": arguments.validation_split},
        limit=arguments.max_documents,
        sample_by=arguments.sample_by,
        seed=seed,
    )


def _check_arguments(arguments: DataArguments) -> None:
    if arguments.mixture is not None:
        raise InputError(
            "data.mixture is mixed by hfgpt prepare: run hfgpt prepare RECIPE OUT, and train with --data.path OUT"
        )
    if not arguments.path:
        raise InputError("data.path is not set: give a Hub id, a file, a folder or synthetic:stories")
    if not 0 < arguments.validation_fraction < 1:
        raise InputError(
            f"data.validation_fraction is {arguments.validation_fraction}; it must be above 0 and below 1, such as 0.1"
        )
    if arguments.max_documents is not None and arguments.max_documents < 1:
        raise InputError(f"data.max_documents is {arguments.max_documents}; it must be at least 1 (unset: no limit)")
    if arguments.deduplicate not in (None, "exact", "near"):
        raise InputError(f"data.deduplicate is {arguments.deduplicate!r}; it must be exact or near (unset: keep all)")
    if arguments.sample_by not in ("document", "paragraph", "line"):
        raise InputError(f"data.sample_by is {arguments.sample_by!r}; it must be document, paragraph or line")


def _read_splits(arguments: DataArguments, seed: int, report: DataReport) -> dict[str, _Texts]:
    """Reads all splits of the source: `train`, and `validation` if it has one."""
    reading = reading_of(arguments, seed)
    if arguments.deduplicate:
        raise InputError(
            f"data.deduplicate is {arguments.deduplicate!r}, and only hfgpt prepare removes repeated texts: run hfgpt "
            "prepare RECIPE OUT, and train with --data.path OUT"
        )
    source = find_source_splits(arguments, reading, report)
    tables, report.sha256 = _load_tables(source, arguments.text_column, cache_folder(arguments.cache_dir))
    splits = {name: _measure_texts(table, seed, report) for name, table in tables.items()}
    for name, texts in splits.items():
        if not len(texts.dataset):
            raise InputError(
                f"the {name} split of data.path {arguments.path!r} has no text ({report.reasons}): add text, or check "
                "data.text_column"
            )
    digests = np.concatenate([texts.digests for texts in splits.values()])
    report.rows_kept += len(digests)
    report.duplicated += len(digests) - len(np.unique(digests))
    return splits


def _load_tables(source: Source, column: str, cache: Path) -> tuple[dict[str, datasets.Dataset], str]:
    """Split -> memory-mapped column `text`; and the SHA-256 of the source. Reads nothing that is already cached."""
    for table in source.tables.values():
        if column not in table.column_names:
            raise wrong_column("text_column", column, source.name, table.column_names)
    key = json.dumps([FORMAT_VERSION, column, source.version])
    place = cache / hashlib.sha256(key.encode()).hexdigest()[:32]
    kept = _open_kept(place)
    if kept is None:
        remove_abandoned(cache)
        shutil.rmtree(place, ignore_errors=True)  # if it is damaged
        try:
            with appearing_folder(place) as folder:
                _keep(source, column, folder)
        except OSError:
            if not (place / SOURCE_FILE).is_file():  # otherwise another process has written it
                raise
        kept = _open_kept(place)
    written, sha256 = kept
    return {name: _text_column(table, column) for name, table in source.tables.items()} or written, sha256


def _text_column(table: datasets.Dataset, column: str) -> datasets.Dataset:
    table = table.select_columns(column)
    return table if column == "text" else table.rename_column(column, "text")


def _keep(source: Source, column: str, folder: Path):
    """Caches the texts of a source, unless they are tables already, and its SHA-256."""
    rows = {}
    tables = {name: _text_column(table, column) for name, table in source.tables.items()}
    if not tables:
        for name, read in source.splits.items():
            # Later rows of a JSON file may not have the key: None, counted as "not text".
            rows[name] = _write_texts((row.get(column) for row in read()), folder / f"{name}.arrow")
        tables = {name: datasets.Dataset.from_file(str(folder / f"{name}.arrow")) for name in rows}
    sha256 = hash_files(source.all_files) if source.files else _hash_texts(tables)
    write_json(folder / SOURCE_FILE, {"sha256": sha256, "rows": rows})


def _open_kept(place: Path) -> tuple[dict[str, datasets.Dataset], str] | None:
    """Tables and SHA-256 from the cache; None if they are missing or damaged."""
    try:
        record = json.loads((place / SOURCE_FILE).read_text(encoding="utf-8"))
        rows, sha256 = record["rows"], record["sha256"]
        files = {name: str(place / f"{name}.arrow") for name in rows}
        tables = {name: read_kept(functools.partial(datasets.Dataset.from_file, file)) for name, file in files.items()}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    whole = all(table is not None and len(table) == rows[name] for name, table in tables.items())
    return (tables, sha256) if whole else None


def _write_texts(values: Iterable[Any], path: Path) -> int:
    """Writes one row per value, null if it is not text; returns the number of rows."""
    schema, rows = pa.schema({"text": pa.string()}), 0
    with open(path, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        batch, size = [], 0
        for value in values:
            rows += 1
            # JSON can contain lone surrogates, which cannot be encoded as UTF-8.
            data = value.encode() if isinstance(value, str) and is_unicode(value) else None
            length = len(data or b"")
            if length > LONGEST_DOCUMENT:
                raise InputError(
                    f"one document has {length:,} bytes, the limit is {LONGEST_DOCUMENT:,}: set data.sample_by to "
                    "paragraph or line"
                )
            if batch and size + length > BATCH_BYTES:
                writer.write_batch(pa.record_batch([pa.array(batch, pa.string())], schema))
                batch, size = [], 0
            batch.append(data)
            size += length
        if batch:
            writer.write_batch(pa.record_batch([pa.array(batch, pa.string())], schema))
    return rows


def _hash_texts(tables: dict[str, datasets.Dataset]) -> str:
    """SHA-256 of the usable texts and their lengths."""
    digest = hashlib.sha256()
    for table in tables.values():
        for text in table.data.column("text"):
            if not unusable_reason(text.as_py()):
                data = text.as_py().encode()
                digest.update(len(data).to_bytes(8, "little"))
                digest.update(data)
    return digest.hexdigest()


def unusable_reason(value: Any) -> str:
    """The reason to drop a row; "" to keep it.

    Args:
        value: The value of its text column.
    """
    if not isinstance(value, str):
        return "not text"
    return "" if value and not value.isspace() else "empty"


def _measure_texts(table: datasets.Dataset, seed: int, report: DataReport) -> _Texts:
    """The usable texts of a table, with digests and lengths; the other rows are counted as dropped."""
    features = {**dict.fromkeys(("digest", "characters", "bytes"), Value("uint64")), "unusable": Value("string")}
    measured = map_rows(table, _measure, features, {"seed": seed, "version": FORMAT_VERSION}, "Reading").data
    report.rows_read += len(table)
    for reason in pc.value_counts(measured.column("unusable")):
        if reason["values"].as_py():
            report.drop(reason["values"].as_py(), reason["counts"].as_py())
    usable = pc.equal(measured.column("unusable"), "").to_numpy()
    columns = (measured.column(name).to_numpy()[usable] for name in ("digest", "characters", "bytes"))
    return _Texts(table if usable.all() else table.select(np.flatnonzero(usable)), *columns)


def _measure(batch: pa.Table, seed: int, version: int) -> pa.Table:
    texts = [value.as_py() for value in batch["text"]]
    reasons = [unusable_reason(text) for text in texts]
    texts = ["" if reason else text for text, reason in zip(texts, reasons, strict=True)]
    # Digests include the seed, so their order is the seeded permutation that splits the documents.
    digests = b"".join(seeded_digest(text, seed) for text in texts)
    return pa.table(
        {
            "digest": np.frombuffer(digests, "<u8"),
            "characters": list(map(len, texts)),
            "bytes": [len(text.encode()) for text in texts],
            "unusable": reasons,
        }
    )


def _cut_document(texts: _Texts, arguments: DataArguments, report: DataReport) -> dict[str, _Texts]:
    """Splits one document at a character, as the book and nanoGPT do; the end is for validation."""
    size = int(texts.characters[0])
    cut = cut_document(size, arguments.validation_fraction)
    report.split_by = "position"
    parts = {}
    for name, start, stop in (("train", 0, cut), ("validation", cut, size)):
        where = {"start": start, "stop": stop}
        part = map_rows(texts.dataset, _cut, {"text": Value("string")}, where, "Dividing")
        length = pc.binary_length(part.data.column("text")).to_numpy()
        parts[name] = _Texts(part, texts.digests, np.array([stop - start]), length)
    return parts


def _cut(batch: pa.Table, start: int, stop: int) -> pa.Table:
    return pa.table({"text": [text.as_py()[start:stop] for text in batch["text"]]})


def _divide_documents(texts: _Texts, arguments: DataArguments, report: DataReport) -> dict[str, _Texts]:
    """Splits whole documents, with all copies of a text in the same split."""
    held_out = divide_documents(texts.digests, arguments.validation_fraction, arguments.path)
    report.split_by = "documents"
    parts = {}
    for name, chosen in (("train", ~held_out), ("validation", held_out)):
        columns = (column[chosen] for column in (texts.digests, texts.characters, texts.bytes))
        parts[name] = _Texts(texts.dataset.select(np.flatnonzero(chosen)), *columns)
    return parts


def _count(report: DataReport, name: str, texts: _Texts):
    split = report.split(name)
    split.documents += len(texts.dataset)
    split.characters += int(texts.characters.sum())
    split.bytes += int(texts.bytes.sum())
