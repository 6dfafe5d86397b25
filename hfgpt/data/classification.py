"""Rows of text and label -> balanced, divided without leaks, encoded.

All rows of one text are on one side of every division: the usual split by rows of the SMS Spam Collection has 37 of
its 300 test rows in training too, word for word, and its accuracies are higher for it.
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
    """The recipe's section `data` for classification, beside where the rows come from.

    Args:
        test_split: Split to test on, or the word in the names of a folder's test files. None: `test` if there is one,
            otherwise `test_fraction` of the training split.
        validation_fraction: Part of the rows that validates, where the source gives no split for it.
        test_fraction: Part of the rows that tests, where the source gives no split for it.
        text_column: Column or key that holds the text; of a .csv or .tsv without header line, its position from 0.
        label_column: Column or key that holds the label, likewise.
        column_names: Names of the columns of a .csv or .tsv file without a header line; used if its first line is a
            row and has no such columns.
        balance: `none`; `undersample`, which leaves out rows of the larger classes before dividing (from the training
            split alone where the others are given); or `weights`, which weighs the loss of a row by the rarity of its
            class.
        max_rows: Read only the first N rows of each split; for synthetic rows, how many to generate.
        max_length: Tokens a text is cut to; None: the context length of the model.
        end_of_text: Begin and end each text with the end-of-text token: the head then reads a token that means the
            same in every text. The saved tokenizer does it, too.
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
                raise InputError(f"data.{name} is {getattr(self, name)}, the least is 1: unset it for no limit")
        for name in ("validation_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"data.{name} is {getattr(self, name)}, it must be above 0 and below 1: try 0.1")
        if self.validation_fraction + self.test_fraction >= 1:
            raise InputError(
                f"data.validation_fraction {self.validation_fraction} and data.test_fraction {self.test_fraction} "
                "leave nothing to train on: lower one"
            )


@dataclass
class LabelledTexts:
    """Rows of text and label.

    Args:
        splits: `train`, `validation` and `test`, each with the columns `text` and `label` (the name).
        labels: The names of the classes in the order of their ids.
        unlabelled: Texts that were left out to balance the classes and are in no other split.
    """

    splits: datasets.DatasetDict
    labels: list[str]
    unlabelled: list[str]


def load_labelled_texts(arguments: ClassificationDataArguments, seed: int, report: DataReport) -> LabelledTexts:
    """Reads rows of text and label, balances them, and divides them so that no text is on two sides.

    Args:
        arguments: What to read.
        seed: Chooses which rows are left out, validate and test.
        report: Filled in place.

    Raises:
        InputError: The source cannot be read, a label is missing everywhere, there is one class only, or a class is
            unseen in training or too small to divide.
    """
    given = _read_splits(arguments, seed, report)
    rows = _drop_leaks(_drop_contradictions(given, report), report)
    if empty := [split for split, found in rows.items() if split != "train" and not found]:
        raise InputError(
            f"the {empty[0]} split of data.path {arguments.path!r} has no row with a text and a label of its own "
            f"({report.reasons}): name another in data.{empty[0]}_split, or take only the files of the others"
        )
    report.sha256 = report.sha256 or _hash_rows(rows)
    labels = _sort_labels({row["label"] for row in rows["train"]})
    if len(labels) < 2:
        found = f"one class only, '{labels[0]}'" if labels else "no row with a text and a label"
        raise InputError(
            f"data.path {arguments.path!r} has {found} ({report.reasons}): a classifier needs two classes; check "
            "data.label_column"
        )
    unlabelled: list[Row] = []
    if arguments.balance == "undersample":
        rows["train"], unlabelled = _undersample(rows["train"], seed)
        if unlabelled:
            report.drop("left out to balance the classes", len(unlabelled))
            report.rows_kept -= len(unlabelled)
    missing = {"validation": arguments.validation_fraction, "test": arguments.test_fraction}
    missing = {split: fraction for split, fraction in missing.items() if split not in rows}
    report.split_by = "rows" if missing else "given"
    rows |= _divide(rows["train"], missing, seed, arguments.path)
    for split in ("validation", "test"):
        if unseen := {row["label"] for row in rows[split]} - {row["label"] for row in rows["train"]}:
            raise InputError(f"the label '{min(unseen)}' of the {split} split is not in the training split: add rows")
    for split in SPLITS:
        _count(rows[split], report, split)
    evaluated = {row["text"] for split in ("validation", "test") for row in rows[split]}
    return LabelledTexts(
        datasets.DatasetDict({split: datasets.Dataset.from_list(rows[split]) for split in SPLITS}),
        labels,
        [row["text"] for row in unlabelled if row["text"] not in evaluated],
    )


def load_all_labelled_texts(
    arguments: ClassificationDataArguments, labels: list[str], report: DataReport
) -> datasets.Dataset:
    """Reads rows of text and label to measure a classifier on: all there are, or `test_split` where one is named.

    Args:
        arguments: What to read.
        labels: The classes the classifier knows.
        report: Filled in place; the sizes are those of the split `test`.

    Returns:
        The columns `text` and `label`.

    Raises:
        InputError: The source cannot be read, has no usable row, or has a label the classifier does not know.
    """
    given = _read_splits(arguments, 0, report)
    rows = given["test"] if arguments.test_split else list(itertools.chain(*given.values()))
    report.sha256 = report.sha256 or _hash_rows({"test": rows})
    if not rows:
        raise InputError(f"data.path {arguments.path!r} has no row with a text and a label: check data.label_column")
    if unknown := {row["label"] for row in rows} - set(labels):
        raise InputError(
            f"the label '{min(unknown)}' of data.path {arguments.path!r} is not one of the model's classes "
            f"({', '.join(labels)}): rename it, or name the right column in data.label_column"
        )
    _count(rows, report, "test")
    return datasets.Dataset.from_list(rows)


def encode_texts(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, labels: list[str], max_length: int
) -> tuple[datasets.Dataset, int]:
    """Texts and label names -> token ids and label ids.

    Args:
        rows: The columns `text` and `label`.
        tokenizer: Its special tokens, if it adds any, stay when a text is cut.
        labels: The names of the classes in the order of their ids.
        max_length: Tokens a text is cut to, at its end.

    Returns:
        The columns `input_ids`, `labels` (an id) and `length`; and the number of texts that were cut.

    Raises:
        InputError: A text has no token.
    """
    ids = {label: number for number, label in enumerate(labels)}

    def encode(batch: dict[str, list]) -> dict[str, list]:
        short = tokenizer(batch["text"], truncation=True, max_length=max_length)["input_ids"]
        whole = tokenizer(batch["text"])["input_ids"]  # the last: the tokenizer keeps, and saves, how it was called
        for text, tokens in zip(batch["text"], short, strict=True):
            if not tokens:
                raise InputError(f"the text {text!r} has no token that the tokenizer knows: drop it")
        return {
            "input_ids": short,
            "labels": [ids[label] for label in batch["label"]],
            "length": [len(tokens) for tokens in short],
            "is_cut": [len(tokens) > max_length for tokens in whole],
        }

    fingerprint = f"{rows._fingerprint}-encoded"  # to find one, datasets would pickle the tokenizer
    with progress_bar(len(rows) > 10_000):
        encoded = rows.map(
            encode, batched=True, remove_columns=rows.column_names, keep_in_memory=True, new_fingerprint=fingerprint
        )
    return encoded.remove_columns("is_cut"), sum(encoded["is_cut"])


def class_weights(rows: datasets.Dataset, labels: list[str]) -> list[float]:
    """The weight of each class by which every class counts the same; 1 on average over the rows.

    Args:
        rows: The training split, with the column `label`.
        labels: The names of the classes in the order of their ids.
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
    """Without the rows whose text has another label elsewhere: whatever the model says of them is right and wrong."""
    labels, copies = collections.defaultdict(set), collections.Counter()
    for row in itertools.chain(*splits.values()):
        labels[row["text"]].add(row["label"])
    kept = {name: [row for row in rows if len(labels[row["text"]]) == 1] for name, rows in splits.items()}
    if dropped := sum(map(len, splits.values())) - sum(map(len, kept.values())):
        report.drop("one text, several labels", dropped)
    copies.update(row["text"] for row in itertools.chain(*kept.values()))
    report.duplicated = sum(count - 1 for count in copies.values())
    report.rows_kept = sum(copies.values())
    return kept


def _undersample(rows: list[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """As many rows of each class as the smallest has, whole texts at a time; and those that were left out."""
    by_label = _by_label(rows)
    least, chosen = min(map(len, by_label.values())), set()
    for texts in by_label.values():
        copies = count_texts(texts, seed)
        names = list(copies)
        chosen.update(names[index] for index in take(list(copies.values()), least))
    return [row for row in rows if row["text"] in chosen], [row for row in rows if row["text"] not in chosen]


def _divide(rows: list[Row], fractions: dict[str, float], seed: int, path: str) -> dict[str, list[Row]]:
    """Each class divided by itself into the splits named and the training split, whole texts at a time."""
    split_of = {}
    for label, texts in _by_label(rows).items():
        if fractions and len(set(texts)) <= len(fractions):
            raise InputError(
                f"the label '{label}' of data.path {path!r} has {counted(len(set(texts)), 'different texts')}, too "
                f"few for {len(fractions) + 1} splits: add rows, or drop them"
            )
        split_of |= divide_texts(texts, fractions, seed)
    return {split: [row for row in rows if split_of[row["text"]] == split] for split in ("train", *fractions)}


def _by_label(rows: list[Row]) -> dict[str, list[str]]:
    """Label -> the text of each of its rows."""
    grouped: dict[str, list[str]] = {}
    for row in rows:
        grouped.setdefault(row["label"], []).append(row["text"])
    return {label: grouped[label] for label in sorted(grouped)}


def _drop_leaks(given: dict[str, list[Row]], report: DataReport) -> dict[str, list[Row]]:
    """Validation without the texts of the test split, and training without those of both, where a source divides."""
    kept, taken = {}, set()
    for split in ("test", "validation", "train"):
        if split in given:
            kept[split] = [row for row in given[split] if row["text"] not in taken]
            taken |= {row["text"] for row in kept[split]}
            if leaked := len(given[split]) - len(kept[split]):
                report.drop(f"{split} row that is in another split, too", leaked)
                report.rows_kept -= leaked
    return kept


def _sort_labels(labels: set[str]) -> list[str]:
    """By name, or by value where all are whole numbers."""
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
