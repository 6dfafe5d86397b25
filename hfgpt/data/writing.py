"""Writes prepared data: tokenizes the parts of a source, one after the other or in several processes.

The memory of a process does not depend on the size of a part: its rows are read once, as a stream, or twice if
there are few, or a single part, to count the documents first.
"""

import array
import contextlib
import hashlib
import io
import itertools
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from hfgpt.data.duplicates import BANDS, sign_texts
from hfgpt.data.encoding import BATCH_CHARACTERS, Encoding
from hfgpt.data.parts import Part
from hfgpt.data.prepared import (
    CARD,
    RECORDS_FOLDER,
    SPLITS,
    TOKENIZER_FOLDER,
    Folder,
    Manifest,
    PartRecord,
    Preparation,
    TokenFile,
    read_manifest,
    read_part_records,
    read_preparation,
)
from hfgpt.data.report import DataReport
from hfgpt.data.rows import is_unicode
from hfgpt.data.sources import unusable_reason
from hfgpt.data.splits import cut_document, divide_documents, seeded_digest
from hfgpt.errors import InputError
from hfgpt.saving import hash_file

SIZES = ("documents", "characters", "bytes", "tokens", "unknown_tokens")
REASONS = {"exact": "duplicate", "near": "near-duplicate"}
BUCKETS = 16  # digests are compared in this many steps, since sorting takes more memory than keeping them


@dataclass(frozen=True)
class Rules:
    """Which rows of a source become documents of which split.

    Args:
        column: Column of the text.
        seed: Seed of the split.
        validation_fraction: Fraction of the documents for validation; None: the source has both splits.
        deduplicate: As the recipe key.
    """

    column: str
    seed: int
    validation_fraction: float | None
    deduplicate: str | None = None


@dataclass(frozen=True)
class Division:
    """Which documents of a source are for validation; all others are for training.

    Args:
        limit: Those with a digest below it.
        chosen: Those with these digests.
        cut: If there is only one document, its characters from this one on; None: documents are complete.
        single: Splits of a single text, which may be a part of a document, so no end-of-text token is appended.
    """

    limit: int = 0
    chosen: frozenset[int] = frozenset()
    cut: int | None = None
    single: tuple[str, ...] = ()


@dataclass(frozen=True)
class PartJob:
    """A part to tokenize.

    Args:
        name: Name of the part.
        source_split: Its split in the source; its documents may go to another one.
        part: The part.
        rules: What becomes of its rows.
        source: Index of the source in the mixture.
        repeated: Indices of the documents to leave out, because they repeat others.
        divided: Where the documents go, if `divide_jobs` has seen all of the source; None: each by its digest alone.
    """

    name: str
    source_split: str
    part: Part
    rules: Rules
    source: int = 0
    repeated: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    divided: Division | None = None

    @property
    def division(self) -> Division:
        """Where the documents go."""
        if self.divided:
            return self.divided
        fraction = self.rules.validation_fraction
        if fraction is None:
            return Division(2**64 if self.source_split == "validation" else 0)
        return Division(int(fraction * 2**64))


@dataclass(frozen=True)
class OutputSettings:
    """Where and how the tokens of a part are written.

    Args:
        out: Folder or URL of the prepared data.
        preparation: SHA-256 of what the data is made from.
        encoding: The tokenizer.
        unknown_id: Id of the unknown token; None: there is none.
    """

    out: str
    preparation: str
    encoding: Encoding
    unknown_id: int | None


def list_jobs(sources: list[tuple[dict[str, list[Part]], Rules]]) -> list[PartJob]:
    """One job per part of the sources of a mixture, in the order of the streams; the training parts first."""
    jobs = []
    for split in SPLITS:
        split_parts = [
            (source, part, rules) for source, (parts, rules) in enumerate(sources) for part in parts.get(split, ())
        ]
        for number, (source, part, rules) in enumerate(split_parts):
            jobs.append(PartJob(f"{split}-{number:05}", split, part, rules, source))
    return jobs


def divide_jobs(jobs: list[PartJob], sources: list[str]) -> list[PartJob]:
    """The jobs, with an exact division of sources whose splits could be empty if each document went by its digest.

    Usually only the first documents of a source of several parts are read.

    Args:
        jobs: All jobs of `list_jobs`.
        sources: Name of each source.

    Raises:
        InputError: A split has no documents.
    """
    divided = []
    for (source, _), group in itertools.groupby(jobs, key=lambda job: (job.source, job.source_split)):
        parts = list(group)
        division = _divide(parts, sources[source])
        divided += [replace(job, divided=division) for job in parts]
    return divided


def _divide(jobs: list[PartJob], source: str) -> Division | None:
    """Divides a split of a source exactly as `hfgpt.data.sources` does; None: it has many documents in several parts.

    Both choose the documents with the smallest digests for validation, but the exact number of documents is known only
    after all parts have been read.
    """
    by_digest, fraction, report = jobs[0].division, jobs[0].rules.validation_fraction, DataReport()
    digests, splits, characters = array.array("Q"), set(), 0
    # Fewer than this are divided exactly; a given split only needs to be known to have more than one.
    many = 2 if fraction is None else math.ceil(20 / min(fraction, 1 - fraction))
    for text, digest in itertools.chain.from_iterable(_read_documents(job, report) for job in jobs):
        characters = len(text)
        digests.append(digest)
        splits.add(digest < by_digest.limit)
        if len(digests) >= many and (fraction is None or (len(jobs) > 1 and len(splits) > 1)):
            return None
    if not digests:
        raise _empty_split(jobs[0].source_split, source, report)
    if fraction is None:
        return replace(by_digest, single=(jobs[0].source_split,))
    if len(digests) == 1:
        return Division(cut=cut_document(characters, fraction), single=SPLITS)
    values = np.array(digests, dtype=np.uint64)
    held_out = divide_documents(values, fraction, source)
    sides = {"train": values[~held_out], "validation": values[held_out]}
    single = tuple(split for split, side in sides.items() if len(side) == 1)
    return Division(chosen=frozenset(sides["validation"].tolist()), single=single)


def _empty_split(split: str, source: str, report: DataReport | None) -> InputError:
    rows = f" ({report.reasons})" if report else ""
    return InputError(
        f"the {split} split of {source} is empty{rows}: add text, set data.validation_split, or check data.text_column"
    )


def start_preparation(folder: Folder, preparation: Preparation, tokenizer: PreTrainedTokenizerBase):
    """Writes what the data is made from, and the tokenizer; or checks that an earlier process prepared the same.

    Raises:
        InputError: It did not.
    """
    folder.remove_leftovers()
    if earlier := read_preparation(folder):
        preparation.compare(earlier, str(folder))
        if folder.exists(f"{TOKENIZER_FOLDER}/tokenizer.json"):
            return
    with tempfile.TemporaryDirectory() as copy:
        tokenizer.save_pretrained(copy)
        for path in sorted(Path(copy).iterdir()):
            folder.write(f"{TOKENIZER_FOLDER}/{path.name}", path.read_bytes())
    folder.write_record(Preparation.FILE, preparation)


def tokenize_part(output: OutputSettings, job: PartJob) -> PartRecord:
    """Writes the token files of a part, and then its record.

    Raises:
        InputError: The part cannot be read or tokenized.
        OSError: The disk is full or not writable.
    """
    folder, report = Folder(output.out), DataReport()
    digests = {split: array.array("Q") for split in SPLITS}
    with contextlib.ExitStack() as stack:
        writers = {split: stack.enter_context(_open_writer(folder, output, job, split)) for split in SPLITS}
        for split, text, digest in _assign_documents(job, report):
            writers[split].add(text)
            if digest is not None:
                digests[split].append(digest)
        files = {split: writer.finish() for split, writer in writers.items()}
    # The files are complete now.
    record = PartRecord(
        name=job.name,
        preparation=output.preparation,
        rows_read=report.rows_read,
        dropped=report.dropped,
        files={split: file for split, file in files.items() if file},
        source=job.source,
    )
    buffer = io.BytesIO()
    np.savez(buffer, **{split: np.array(values, dtype=np.uint64) for split, values in digests.items()})
    folder.write(f"{RECORDS_FOLDER}/{job.name}.npz", buffer.getvalue())
    folder.write_record(f"{RECORDS_FOLDER}/{job.name}.json", record)
    return record


def read_training_texts(jobs: list[PartJob]) -> Iterator[str]:
    """The texts of the training split."""
    return (text for job in jobs if job.source_split == "train" for split, text in read_texts(job) if split == "train")


def read_texts(job: PartJob) -> Iterator[tuple[str, str]]:
    """Split and text of each document of a part."""
    for split, text, _ in _assign_documents(job, DataReport()):
        yield split, text


def sign_part(job: PartJob) -> np.ndarray:
    """Signatures of the documents of a part, from which `find_repeated` finds duplicates, or near-duplicates."""
    if job.rules.deduplicate == "exact":
        return read_digests(job)[:, None]
    signatures, texts, characters = [np.empty((0, BANDS), dtype=np.uint64)], [], 0
    for text, _ in _read_documents(job, DataReport()):
        texts.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            signatures.append(sign_texts(texts))
            texts, characters = [], 0
    return np.concatenate([*signatures, sign_texts(texts)])


def read_digests(job: PartJob) -> np.ndarray:
    """The uint64 digest of each usable document of a part."""
    return np.array(array.array("Q", (digest for _, digest in _read_documents(job, DataReport()))), dtype=np.uint64)


def _read_documents(job: PartJob, report: DataReport) -> Iterator[tuple[str, int]]:
    """The documents of a part, with their digests; other rows are counted as dropped."""
    repeated, number = set(job.repeated.tolist()), 0
    for row in job.part.read():
        value = row.get(job.rules.column)
        value = value if isinstance(value, str) and is_unicode(value) else None
        report.rows_read += 1
        if reason := unusable_reason(value):
            report.drop(reason)
            continue
        if number in repeated:
            report.drop(REASONS[job.rules.deduplicate])
        else:
            yield value, int.from_bytes(seeded_digest(value, job.rules.seed), "little")
        number += 1


def _assign_documents(job: PartJob, report: DataReport) -> Iterator[tuple[str, str, int | None]]:
    """Split, text and digest of each document; if a single document is divided, its second half has no digest."""
    division = job.division
    for text, digest in _read_documents(job, report):
        if division.cut is not None:
            yield "train", text[: division.cut], digest
            yield "validation", text[division.cut :], None
        else:
            yield "validation" if digest < division.limit or digest in division.chosen else "train", text, digest


class _Writer:
    """Writes one token file; `finish` before its context ends."""

    def __init__(self, path: Path, name: str, output: OutputSettings, append_eos: bool):
        self._path, self._name, self._append_eos = path, name, append_eos
        self._encoding, self._unknown_id = output.encoding, output.unknown_id
        self._texts: list[str] = []
        self._characters = 0
        self._writer = pa.ipc.new_stream(str(path), output.encoding.schema)
        self._sizes = dict.fromkeys(SIZES, 0)

    def add(self, text: str):
        self._texts.append(text)
        self._characters += len(text)
        if self._characters >= BATCH_CHARACTERS:
            self._flush()

    def finish(self) -> TokenFile | None:
        """Completes the file; None if it has no documents."""
        self._flush()
        self._writer.close()
        if not self._sizes["documents"]:
            self._path.unlink()
            return None
        return TokenFile(file=self._name, size=self._path.stat().st_size, sha256=hash_file(self._path), **self._sizes)

    def _flush(self):
        if not self._texts:
            return
        table = self._encoding.encode(self._texts, self._append_eos)
        self._writer.write_table(table)
        tokens = table.column("input_ids").combine_chunks().flatten()
        unknown = 0 if self._unknown_id is None else int(np.count_nonzero(tokens.to_numpy() == self._unknown_id))
        size = sum(len(text.encode()) for text in self._texts)
        for name, count in zip(SIZES, (len(self._texts), self._characters, size, len(tokens), unknown), strict=True):
            self._sizes[name] += count
        self._texts, self._characters = [], 0


@contextlib.contextmanager
def _open_writer(folder: Folder, output: OutputSettings, job: PartJob, split: str) -> Iterator[_Writer]:
    name = f"{split}/{job.name}.arrow"
    with folder.new_file(name) as path:
        yield _Writer(path, name, output, split not in job.division.single)


def finish_preparation(folder: Folder, preparation: Preparation, report: DataReport) -> Manifest | None:
    """Writes the manifest when all parts are finished; None if some are not.

    Args:
        folder: The folder of the parts.
        preparation: What they are made from.
        report: The data report, with what is known of the source; updated in place.

    Raises:
        InputError: A split is empty.
    """
    # In this order: another process may finish meanwhile, which removes the records after it wrote the manifest.
    new, earlier = read_part_records(folder, preparation), read_manifest(folder)
    parts = (earlier.parts if earlier else {}) | new
    if len(parts) < sum(preparation.parts.values()):
        return None
    if earlier is None or parts != earlier.parts:
        manifest = Manifest(preparation=preparation, report=report, parts=dict(sorted(parts.items())))
        _count_rows(manifest, earlier.report if earlier else None, folder)
        _check_splits(manifest)
        card = "".join(f"  - split: {split}\n    path: {split}/*.arrow\n" for split in SPLITS)
        folder.write("README.md", CARD.format(files=card))
        folder.write_record(Manifest.FILE, manifest)
        earlier = manifest
    folder.remove(RECORDS_FOLDER)
    return earlier


def _count_rows(manifest: Manifest, earlier: DataReport | None, folder: Folder):
    """Adds up the rows of all parts in the report; copies were counted before if some parts are only repaired."""
    report = manifest.report
    report.source, report.split_by = manifest.preparation.source, manifest.preparation.split_by
    for record in manifest.parts.values():
        report.rows_read += record.rows_read
        for reason, rows in record.dropped.items():
            report.drop(reason, rows)
        for split, file in record.files.items():
            sizes = report.split(split)
            for name in SIZES:
                setattr(sizes, name, getattr(sizes, name) + getattr(file, name))
    report.rows_kept = report.rows_read - sum(report.dropped.values())
    if report.split_by == "documents" and report.rows_kept == 1:
        report.split_by = "position"
    report.sha256 = _hash_parts(manifest)
    if earlier:
        report.duplicated, report.leaked = earlier.duplicated, earlier.leaked
    else:
        _count_copies(folder, manifest)


def _check_splits(manifest: Manifest):
    preparation, report = manifest.preparation, manifest.report
    for split, (index, source) in itertools.product(SPLITS, enumerate(preparation.sources)):
        if not sum(file.tokens for file in manifest.files(split, index)):
            raise _empty_split(split, source, report if len(preparation.sources) == 1 else None)


def _hash_parts(manifest: Manifest) -> str:
    """SHA-256 of the checksums of all token files, in the format of `sha256sum`."""
    files = [file for split in SPLITS for file in manifest.files(split)]
    return hashlib.sha256("".join(f"{file.sha256}  {file.file}\n" for file in files).encode()).hexdigest()


def _count_copies(folder: Folder, manifest: Manifest):
    """Counts texts that occur more than once, and those of the validation split that are also in training."""
    digests: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for name in manifest.parts:
        content = folder.read(f"{RECORDS_FOLDER}/{name}.npz")
        if content is None:
            raise InputError(f"another process is finishing {folder}: run the same command again")
        kept = np.load(io.BytesIO(content), allow_pickle=False)
        for split in SPLITS:
            digests[split].append(kept[split])
    for bucket in range(BUCKETS):
        in_bucket = {
            split: np.concatenate([part[part >> 60 == bucket] for part in parts]) for split, parts in digests.items()
        }
        together = np.concatenate(list(in_bucket.values()))
        manifest.report.duplicated += len(together) - len(np.unique(together))
        manifest.report.leaked += int(np.isin(in_bucket["validation"], in_bucket["train"]).sum())
