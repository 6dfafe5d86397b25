"""Rows of text and label -> balanced, split without leakage, encoded.

All rows with the same text go to the same split. Splitting the SMS Spam Collection by rows, as is usual, leaves exact
copies of 37 of its 300 test rows in training, which inflates the accuracy.
"""

import collections
import hashlib
import itertools
import re
from dataclasses import dataclass
from typing import Any, Literal

import datasets
from transformers import PreTrainedTokenizerBase

from hfgpt.data.cache import progress_bar
from hfgpt.data.report import DataReport, counted
from hfgpt.data.rows import Reading, Row, SourceArguments, is_unicode, open_rows
from hfgpt.data.splits import count_texts, divide_texts, take
from hfgpt.errors import InputError

SPLITS = ("train", "validation", "test")


@dataclass
class ClassificationDataArguments(SourceArguments):
    """The recipe's section `data` for classification, in addition to the source of the rows.

    Args:
        test_split: Split to test on, or the word in the names of a folder's test files. None: `test` if the source
            has one, else `test_fraction` of the training split.
        validation_fraction: Fraction of the rows held out for validation if the source has no validation split.
        test_fraction: Fraction of the rows held out for testing if the source has no test split.
        text_column: Column or key of the text; for a .csv or .tsv file without a header line, its index from 0.
        label_column: Column or key of the label, likewise.
        column_names: Column names for a .csv or .tsv file without a header line; ignored if the file has one.
        balance: `none`; `undersample`: drop rows of the larger classes before splitting (only from the training split
            if the source has the others); or `weights`: weight the loss by inverse class frequency.
        max_rows: Read only the first N rows of each split; for synthetic data, the number of rows to generate.
        max_length: Maximum number of tokens per text, longer texts are truncated; None: the model's context length.
        end_of_text: Wrap each text in end-of-text tokens, so that the head always reads the same token. The saved
            tokenizer does this too.
    """

    test_split: str | None = None
    validation_fraction: float = 0.1
    test_fraction: float = 0.2
    text_column: str = "text"
    label_column: str = "label"
    column_names: list[str] | None = None
    balance: Literal["none", "undersample", "weights"] = "none"
    max_rows: int | None = None
    max_length: int | None = None
    end_of_text: bool = False

    def __post_init__(self):
        for name in ("max_rows", "max_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"data.{name} is {getattr(self, name)}; it must be at least 1 (unset: no limit)")
        for name in ("validation_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"data.{name} is {getattr(self, name)}; it must be above 0 and below 1, such as 0.1")
        if self.validation_fraction + self.test_fraction >= 1:
            raise InputError(
                f"data.validation_fraction {self.validation_fraction} and data.test_fraction {self.test_fraction} "
                "leave no training data: lower one of them"
            )


@dataclass
class LabeledTexts:
    """Rows of text and label.

    Args:
        splits: `train`, `validation` and `test`, each with the columns `text` and `label` (the name).
        labels: Class names in the order of their ids.
        unlabeled: Texts that were dropped to balance the classes and are not in another split.
    """

    splits: datasets.DatasetDict
    labels: list[str]
    unlabeled: list[str]


def load_labeled_texts(arguments: ClassificationDataArguments, seed: int, report: DataReport) -> LabeledTexts:
    """Reads rows of text and label, balances them, and splits them so that no text is in more than one split.

    Args:
        arguments: What to read.
        seed: Chooses the rows to drop and those for validation and test.
        report: Updated in place.

    Raises:
        InputError: The source cannot be read, has no labels or only one class, or a class is missing from the
            training split or too small to split.
    """
    given = _read_splits(arguments, seed, report)
    rows = _drop_leaks(_drop_contradictions(given, report), report)
    if empty := [split for split, found in rows.items() if split != "train" and not found]:
        raise InputError(
            f"the {empty[0]} split of data.path {arguments.path!r} has no usable row ({report.reasons}): "
            f"set data.{empty[0]}_split to another split, or leave out its files"
        )
    report.sha256 = report.sha256 or _hash_rows(rows)
    labels = _sort_labels({row["label"] for row in rows["train"]})
    if len(labels) < 2:
        found = f"only one class, '{labels[0]}'" if labels else "no row with a text and a label"
        raise InputError(
            f"data.path {arguments.path!r} has {found} ({report.reasons}), but a classifier needs at least two "
            "classes: check data.label_column"
        )
    unlabeled: list[Row] = []
    if arguments.balance == "undersample":
        rows["train"], unlabeled = _undersample(rows["train"], seed)
        if unlabeled:
            report.drop("left out to balance the classes", len(unlabeled))
            report.rows_kept -= len(unlabeled)
    missing = {"validation": arguments.validation_fraction, "test": arguments.test_fraction}
    missing = {split: fraction for split, fraction in missing.items() if split not in rows}
    report.split_by = "rows" if missing else "given"
    rows |= _divide(rows["train"], missing, seed, arguments.path)
    for split in ("validation", "test"):
        if unseen := {row["label"] for row in rows[split]} - {row["label"] for row in rows["train"]}:
            raise InputError(
                f"the {split} split has the label '{min(unseen)}', but the training split does not: add rows"
            )
    for split in SPLITS:
        _count(rows[split], report, split)
    evaluated = {row["text"] for split in ("validation", "test") for row in rows[split]}
    return LabeledTexts(
        datasets.DatasetDict({split: datasets.Dataset.from_list(rows[split]) for split in SPLITS}),
        labels,
        [row["text"] for row in unlabeled if row["text"] not in evaluated],
    )


def load_all_labeled_texts(
    arguments: ClassificationDataArguments, labels: list[str], report: DataReport
) -> datasets.Dataset:
    """Reads rows of text and label to evaluate a classifier: all rows, or only `test_split` if it is set.

    Args:
        arguments: What to read.
        labels: The classes of the classifier.
        report: Updated in place; sizes are recorded for the split `test`.

    Returns:
        The columns `text` and `label`.

    Raises:
        InputError: The source cannot be read, does not have a usable row, or has a label the classifier does not know.
    """
    given = _read_splits(arguments, 0, report)
    rows = given["test"] if arguments.test_split else list(itertools.chain(*given.values()))
    report.sha256 = report.sha256 or _hash_rows({"test": rows})
    if not rows:
        raise InputError(f"data.path {arguments.path!r} has no row with a text and a label: check data.label_column")
    if unknown := {row["label"] for row in rows} - set(labels):
        raise InputError(
            f"data.path {arguments.path!r} has the label '{min(unknown)}', which is not one of the model's classes "
            f"({', '.join(labels)}): rename it, or check data.label_column"
        )
    _count(rows, report, "test")
    return datasets.Dataset.from_list(rows)


def encode_texts(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, labels: list[str], max_length: int
) -> tuple[datasets.Dataset, int]:
    """Texts and label names -> token ids and label ids.

    Args:
        rows: The columns `text` and `label`.
        tokenizer: Special tokens that it adds are kept when a text is truncated.
        labels: Class names in the order of their ids.
        max_length: Longer texts are truncated to this many tokens.

    Returns:
        The columns `input_ids`, `labels` (an id) and `length`; and the number of truncated texts.

    Raises:
        InputError: A text has no tokens.
    """
    ids = {label: number for number, label in enumerate(labels)}

    def encode(batch: dict[str, list]) -> dict[str, list]:
        short = tokenizer(batch["text"], truncation=True, max_length=max_length)["input_ids"]
        whole = tokenizer(batch["text"])["input_ids"]  # called last: the tokenizer saves the truncation it used last
        for text, tokens in zip(batch["text"], short, strict=True):
            if not tokens:
                raise InputError(f"the tokenizer produces no tokens for the text {text!r}: drop it")
        return {
            "input_ids": short,
            "labels": [ids[label] for label in batch["label"]],
            "length": [len(tokens) for tokens in short],
            "is_cut": [len(tokens) > max_length for tokens in whole],
        }

    fingerprint = f"{rows._fingerprint}-encoded"  # to compute one, datasets would pickle the tokenizer
    with progress_bar(len(rows) > 10_000):
        encoded = rows.map(
            encode, batched=True, remove_columns=rows.column_names, keep_in_memory=True, new_fingerprint=fingerprint
        )
    return encoded.remove_columns("is_cut"), sum(encoded["is_cut"])


def class_weights(rows: datasets.Dataset, labels: list[str]) -> list[float]:
    """Class weights by inverse frequency, so that all classes count equally; 1 on average over the rows.

    Args:
        rows: The training split, with the column `label`.
        labels: Class names in the order of their ids.
    """
    counts = collections.Counter(rows["label"])
    return [len(rows) / (len(labels) * counts[label]) for label in labels]


def _read_splits(arguments: ClassificationDataArguments, seed: int, report: DataReport) -> dict[str, list[Row]]:
    if not arguments.path:
        raise InputError("data.path is not set: give a Hub id, a file, a folder or synthetic:messages")
    reading = Reading(
        columns={"text_column": arguments.text_column, "label_column": arguments.label_column},
        splits={"validation": arguments.validation_split, "test": arguments.test_split},
        limit=arguments.max_rows,
        sample_by="line",
        seed=seed,
        column_names=arguments.column_names,
    )
    splits = {}
    for name, rows in open_rows(arguments, reading, report).items():
        splits[name] = []
        for row in rows:
            report.rows_read += 1
            text, label = row.get(arguments.text_column), row.get(arguments.label_column)
            if not isinstance(text, str) or not text.strip():
                report.drop("no text")
            elif label is None or not str(label).strip():
                report.drop("no label")
            elif not is_unicode(text):
                report.drop("not Unicode")
            else:
                splits[name].append({"text": text, "label": str(label).strip()})
    return splits


def _drop_contradictions(splits: dict[str, list[Row]], report: DataReport) -> dict[str, list[Row]]:
    """Drops rows whose text also occurs with a different label."""
    labels, copies = collections.defaultdict(set), collections.Counter()
    for row in itertools.chain(*splits.values()):
        labels[row["text"]].add(row["label"])
    kept = {name: [row for row in rows if len(labels[row["text"]]) == 1] for name, rows in splits.items()}
    if dropped := sum(map(len, splits.values())) - sum(map(len, kept.values())):
        report.drop("same text with different labels", dropped)
    copies.update(row["text"] for row in itertools.chain(*kept.values()))
    report.duplicated = sum(count - 1 for count in copies.values())
    report.rows_kept = sum(copies.values())
    return kept


def _undersample(rows: list[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """As many rows of each class as the smallest has, keeping rows of the same text together; and the dropped rows."""
    by_label = _by_label(rows)
    least, chosen = min(map(len, by_label.values())), set()
    for texts in by_label.values():
        copies = count_texts(texts, seed)
        names = list(copies)
        chosen.update(names[index] for index in take(list(copies.values()), least))
    return [row for row in rows if row["text"] in chosen], [row for row in rows if row["text"] not in chosen]


def _divide(rows: list[Row], fractions: dict[str, float], seed: int, path: str) -> dict[str, list[Row]]:
    """Stratified split: divides each class separately, keeping rows of the same text together."""
    split_of = {}
    for label, texts in _by_label(rows).items():
        if fractions and len(set(texts)) <= len(fractions):
            raise InputError(
                f"data.path {path!r} has {counted(len(set(texts)), 'distinct texts')} with the label '{label}', but "
                f"{len(fractions) + 1} splits need at least {len(fractions) + 1}: add rows, or drop the label"
            )
        split_of |= divide_texts(texts, fractions, seed)
    return {split: [row for row in rows if split_of[row["text"]] == split] for split in ("train", *fractions)}


def _by_label(rows: list[Row]) -> dict[str, list[str]]:
    """Label -> texts of its rows."""
    grouped: dict[str, list[str]] = {}
    for row in rows:
        grouped.setdefault(row["label"], []).append(row["text"])
    return {label: grouped[label] for label in sorted(grouped)}


def _drop_leaks(given: dict[str, list[Row]], report: DataReport) -> dict[str, list[Row]]:
    """Drops validation rows that are in the test split, and training rows that are in either."""
    kept, taken = {}, set()
    for split in ("test", "validation", "train"):
        if split in given:
            kept[split] = [row for row in given[split] if row["text"] not in taken]
            taken |= {row["text"] for row in kept[split]}
            if leaked := len(given[split]) - len(kept[split]):
                report.drop(f"{split} row also in another split", leaked)
                report.rows_kept -= leaked
    return kept


def _sort_labels(labels: set[str]) -> list[str]:
    """Sorts by name, or numerically if all labels are integers."""
    numbers = all(re.fullmatch(r"-?[0-9]+", label) for label in labels)
    return sorted(labels, key=lambda label: (int(label), label)) if numbers else sorted(labels)


def _hash_rows(splits: dict[str, list[Row]]) -> str:
    digest = hashlib.sha256()
    for value in (part for rows in splits.values() for row in rows for part in row.values()):
        digest.update(len(value.encode()).to_bytes(8, "little"))
        digest.update(value.encode())
    return digest.hexdigest()


def _count(rows: list[Any], report: DataReport, split: str) -> None:
    sizes, copies = report.split(split), collections.Counter(row["text"] for row in rows)
    sizes.documents = len(rows)
    sizes.characters = sum(len(row["text"]) for row in rows)
    sizes.bytes = sum(len(row["text"].encode()) for row in rows)
    sizes.labels = dict(sorted(collections.Counter(row["label"] for row in rows).items()))
    report.kept_together += sum(count for count in copies.values() if count > 1)
