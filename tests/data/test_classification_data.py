"""Labeled texts: reading, dropping, balancing and splitting. All checks are exact."""

import collections
import itertools
import json
import random
from dataclasses import replace

import datasets
import pytest

from hfgpt.data.classification import (
    SPLITS,
    ClassificationDataArguments,
    class_weights,
    encode_texts,
    load_all_labeled_texts,
    load_labeled_texts,
)
from hfgpt.data.report import DataReport
from hfgpt.errors import InputError
from hfgpt.recipe import load_recipe
from hfgpt.tokenizer import train_tokenizer


@pytest.fixture
def load(tmp_path):
    """Loads rows written as JSON Lines; returns splits as lists of (text, label), the labels, and the report."""

    def load(rows, seed=0, **arguments):
        if rows is not None:
            (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        arguments = {"path": str(tmp_path / "rows.jsonl"), **arguments}
        report = DataReport()
        loaded = load_labeled_texts(ClassificationDataArguments(**arguments), seed, report)
        splits = {name: list(zip(split["text"], split["label"], strict=True)) for name, split in loaded.splits.items()}
        return splits, loaded, report

    return load


def make_rows(number, labels="ab", copies=1):
    return [{"text": f"{label}{index // copies}", "label": label} for label in labels for index in range(number)]


def test_every_row_is_in_one_split_and_splits_are_stratified(load):
    splits, loaded, report = load(make_rows(50))
    assert loaded.labels == ["a", "b"]
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 70, "validation": 10, "test": 20}
    assert sorted(itertools.chain(*splits.values())) == sorted((row["text"], row["label"]) for row in make_rows(50))
    for name in SPLITS:
        half = len(splits[name]) // 2
        assert report.splits[name].labels == {"a": half, "b": half}
    assert (report.rows_read, report.rows_kept, report.split_by, report.kept_together) == (100, 100, "rows", 0)


def test_the_splits_depend_only_on_the_seed_and_the_texts(load):
    rows = make_rows(50)
    first, again = load(rows)[0], load(rows)[0]
    random.Random(0).shuffle(rows)
    shuffled, other = load(rows)[0], load(rows, seed=1)[0]
    assert first == again
    assert {name: sorted(split) for name, split in shuffled.items()} == {k: sorted(v) for k, v in first.items()}
    assert sorted(other["test"]) != sorted(first["test"])


@pytest.mark.parametrize("balance", ["none", "undersample", "weights"])
def test_identical_texts_are_in_the_same_split(load, balance):
    rows = make_rows(60, copies=3) + make_rows(31, labels="c", copies=2)
    splits, loaded, report = load(rows, balance=balance)
    sides = collections.defaultdict(set)
    for name, split in splits.items():
        for text, _ in split:
            sides[text].add(name)
    assert all(len(names) == 1 for names in sides.values())
    shared = sum(1 for split in splits.values() for text, _ in split if sum(text == t for t, _ in split) > 1)
    assert report.kept_together == shared > 0
    # Rows dropped from a class are read, but are not in any split.
    assert not set(loaded.unlabeled) & sides.keys()


def test_undersampling_takes_the_same_number_per_class_and_counts_the_rest(load):
    splits, loaded, report = load(make_rows(100, "a") + make_rows(30, "b"), balance="undersample")
    counts = collections.Counter(label for split in splits.values() for _, label in split)
    assert counts == {"a": 30, "b": 30}
    assert report.dropped == {"left out to balance the classes": 70}
    assert (len(loaded.unlabeled), report.rows_kept) == (70, 60)
    for name in SPLITS:
        assert len(set(report.splits[name].labels.values())) == 1, "validation and test are balanced too"


def test_class_weights_make_all_classes_count_equally(load):
    loaded = load(make_rows(100, "a") + make_rows(30, "b"), balance="weights")[1]
    train = loaded.splits["train"]
    weights = dict(zip(loaded.labels, class_weights(train, loaded.labels), strict=True))
    sums = collections.Counter()
    for label in train["label"]:
        sums[label] += weights[label]
    assert sums["a"] == pytest.approx(sums["b"])
    assert sum(sums.values()) == pytest.approx(len(train)), "1 on average"


def test_unusable_rows_are_dropped_and_counted(load):
    bad = [
        {"text": "", "label": "a"},
        {"text": " \n", "label": "a"},
        {"text": None, "label": "a"},
        {"text": 7, "label": "a"},
        {"text": "x", "label": None},
        {"text": "x", "label": " "},
        {"text": "\ud800", "label": "a"},
        {"text": "said of both", "label": "a"},
        {"text": "said of both", "label": "b"},
    ]
    report = load(make_rows(10) + bad)[2]
    assert report.dropped == {"no text": 4, "no label": 2, "not Unicode": 1, "same text with different labels": 2}
    assert (report.rows_read, report.rows_kept) == (29, 20)


def test_labels_are_sorted_by_name_and_numeric_ones_by_value(load):
    assert load(make_rows(5, ["b", "B", "a"]))[1].labels == ["B", "a", "b"]
    rows = [{"text": f"{label} {index}", "label": label} for label in (10, 9, 1) for index in range(5)]
    assert load(rows)[1].labels == ["1", "9", "10"]
    assert load(make_rows(5, ["01", "1", "-3"]))[1].labels == ["-3", "01", "1"]
    assert load(make_rows(5, ["--1", "1"]))[1].labels == ["--1", "1"]


def test_a_table_without_header_with_literal_quotes(load, tmp_path):
    lines = [f'{label}\tsay "{label}{index} and go' for label in ("ham", "spam") for index in range(9)]
    (tmp_path / "sms.tsv").write_text("\n".join(lines))
    splits, loaded, report = load(None, path=str(tmp_path / "sms.tsv"), text_column="1", label_column="0")
    assert (report.rows_kept, loaded.labels) == (18, ["ham", "spam"])
    assert ('say "ham3 and go', "ham") in itertools.chain(*splits.values())


def test_given_splits_are_used_and_their_texts_removed_from_training(load, tmp_path):
    for name, numbers in {"train": range(10), "valid": range(8, 12), "test": range(12, 16)}.items():
        rows = [{"text": f"{label}{index}", "label": label} for label in "ab" for index in numbers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits, _, report = load(None, path=str(tmp_path))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 16, "validation": 8, "test": 8}
    assert report.dropped == {"train row also in another split": 4}
    assert (report.split_by, report.rows_kept) == ("given", 32)


def test_validation_does_not_overlap_with_a_given_test_split(load, tmp_path):
    for name, numbers in {"train": range(40), "test": range(30, 60)}.items():
        rows = [{"text": f"{label}{index}", "label": label} for label in "ab" for index in numbers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits, _, report = load(None, path=str(tmp_path), balance="undersample")
    texts = [{text for text, _ in splits[name]} for name in SPLITS]
    assert sum(map(len, texts)) == len(set.union(*texts))
    assert report.dropped == {"train row also in another split": 20}
    assert len(set(report.splits["train"].labels.values())) == 1, "balanced after removing the overlap"


def test_a_given_split_without_labels_is_reported(load, tmp_path):
    for name, label in {"train": "a", "test": None}.items():
        rows = [{"text": f"{name} {index}", "label": label or None} for index in range(9)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"the test split of .* has no usable row .*9 no label"):
        load(None, path=str(tmp_path))


def test_a_validation_split_that_is_the_test_split_is_reported(load, tmp_path):
    for name in ("train", "valid", "test"):
        rows = [{"text": f"{name} {i}", "label": "ab"[i % 2]} for i in range(9)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "valid.jsonl").write_bytes((tmp_path / "test.jsonl").read_bytes())
    with pytest.raises(InputError, match=r"the validation split of .* has no usable row .*9 validation row also in"):
        load(None, path=str(tmp_path))


def test_the_labels_of_a_hub_data_set_keep_their_names(load, monkeypatch):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"text": [f"t{index}" for index in range(20)] + ["unlabeled"], "label": [0, 1] * 10 + [-1]}
    split = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict({"train": split}))
    _, loaded, report = load(None, path="hub/set")
    assert loaded.labels == ["no", "yes"]
    assert report.dropped == {"no label": 1}


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (
            make_rows(9, "a"),
            {},
            "has only one class, 'a' .9 rows read; dropped: none., but a classifier needs at least two",
        ),
        ([{"text": "x", "label": None}], {}, "has no row with a text and a label .1 row read"),
        (
            make_rows(9) + make_rows(2, "c"),
            {},
            "has 2 distinct texts with the label 'c', but 3 splits need at least 3",
        ),
        ([{"txt": "x", "label": "a"}], {}, "data.text_column 'text' is not a column of .*, which has: 'txt', 'label'"),
        (
            [{"text": "x", "class": "a"}],
            {},
            "data.label_column 'label' is not a column of .*, which has: 'text', 'class'",
        ),
        (None, {"path": "synthetic:stories"}, "label"),
        (None, {"path": None}, "data.path is not set: give a Hub id, a file, a folder or synthetic:messages"),
    ],
)
def test_data_that_cannot_be_learned_is_refused(load, rows, arguments, message):
    with pytest.raises(InputError, match=message):
        load(rows, **arguments)


SMS = "ham\tOk lar...\nspam\tFree entry in a wkly comp to win\n"


@pytest.mark.parametrize("name", ["SMSSpamCollection", "SMSSpamCollection.tsv", "messages.tsv"])
def test_the_recipe_reads_the_unmodified_sms_spam_collection(load, tmp_path, name):
    (tmp_path / name).write_text("".join(SMS.replace("\t", f"\t{index} ") for index in range(9)))
    recipe = load_recipe("spam", ["--data.path", str(tmp_path / name)]).data
    rows = load_all_labeled_texts(recipe, ["ham", "spam"], DataReport())
    assert rows[:2] == {"text": ["0 Ok lar...", "0 Free entry in a wkly comp to win"], "label": ["ham", "spam"]}
    assert len(rows) == 18
    header = tmp_path / "header.tsv"
    header.write_text("label\tsms\n" + (tmp_path / name).read_text())
    assert load_all_labeled_texts(replace(recipe, path=str(header)), ["ham", "spam"], DataReport())[:] == rows[:]


@pytest.mark.parametrize(
    ("text", "arguments", "positions"),
    [
        (SMS * 2, {}, "--data.text_column 1 --data.label_column 0"),
        (SMS * 2, {"column_names": ["kind", "words"]}, "--data.text_column 1 --data.label_column 0"),
        (SMS * 2, {"column_names": ["label", "text", "more"]}, "--data.text_column 1 --data.label_column 0"),
        (f"{'long' * 11}\tno\tx\nb\tyes\tx\n", {}, "--data.text_column 0 --data.label_column 2"),
    ],
)
def test_a_table_without_a_header_line_is_refused_with_the_positions_of_its_columns(
    load, tmp_path, text, arguments, positions
):
    (tmp_path / "a.tsv").write_text(text)
    with pytest.raises(InputError) as error:
        load(None, path=str(tmp_path / "a.tsv"), **arguments)
    assert str(error.value).endswith(f"; it seems to have no header line: give column indices from 0 ({positions})")


def test_the_error_names_the_key_with_the_unknown_column(load, tmp_path):
    (tmp_path / "a.tsv").write_text(SMS * 2)
    with pytest.raises(
        InputError, match=r"data.label_column 'class' is not a column of .*, which has: 'label', 'text'$"
    ):
        load(None, path=str(tmp_path / "a.tsv"), column_names=["label", "text"], label_column="class")


def test_a_header_line_with_other_names_is_not_read_as_a_row(load, tmp_path):
    (tmp_path / "a.tsv").write_text("Category\tMessage\n" + SMS * 2)
    with pytest.raises(InputError, match=r"which has: 'Category', 'Message'$"):
        load(None, path=str(tmp_path / "a.tsv"), column_names=["label", "text"])


def test_a_text_file_has_no_labels(load, tmp_path):
    (tmp_path / "a.txt").write_text(SMS)
    with pytest.raises(InputError, match=r"data.label_column is 'label', but .*a.txt is a text file"):
        load(None, path=str(tmp_path / "a.txt"))


@pytest.mark.parametrize("fractions", [(0.9, 0.05), (0.05, 0.9), (0.01, 0.01)])
@pytest.mark.parametrize("copies", [1, 6])
def test_each_split_gets_a_text_of_each_class_if_possible(load, fractions, copies):
    validation, test = fractions
    splits = load(make_rows(3 * copies, copies=copies), validation_fraction=validation, test_fraction=test)[0]
    assert [sorted({label for _, label in splits[name]}) for name in SPLITS] == [["a", "b"]] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_rows": 0}, "data.max_rows is 0; it must be at least 1"),
        ({"test_fraction": 1.0}, "data.test_fraction is 1.0; it must be above 0 and below 1"),
        ({"test_fraction": 0.6, "validation_fraction": 0.4}, "leave no training data"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(InputError, match=message):
        ClassificationDataArguments(path="x", **arguments)


def test_a_class_missing_from_training_is_reported(load, tmp_path):
    for name, labels in {"train": "ab", "test": "abc"}.items():
        rows = [{"text": f"{name} {label} {index}", "label": label} for label in labels for index in range(9)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="the test split has the label 'c', but the training split does not"):
        load(None, path=str(tmp_path))


def test_evaluation_uses_all_rows_or_one_split_with_its_labels(tmp_path):
    for name, labels in {"train": "ab", "test": "a"}.items():
        rows = [{"text": f"{name} {label} {index}", "label": label} for label in labels for index in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = {"path": str(tmp_path)}
    assert len(load_all_labeled_texts(ClassificationDataArguments(**arguments), ["a", "b"], DataReport())) == 9
    arguments["test_split"] = "test"
    assert len(load_all_labeled_texts(ClassificationDataArguments(**arguments), ["a", "b"], DataReport())) == 3
    with pytest.raises(InputError, match=r"has the label 'a', which is not one of the model's classes .no, yes."):
        load_all_labeled_texts(ClassificationDataArguments(**arguments), ["no", "yes"], DataReport())


def test_long_texts_are_truncated_and_counted():
    tokenizer = train_tokenizer(["abcdefghij"], kind="char")
    rows = datasets.Dataset.from_dict({"text": ["abc", "abcdefghij", "j"], "label": ["x", "y", "x"]})
    encoded, cut = encode_texts(rows, tokenizer, ["x", "y"], max_length=4)
    assert [tokenizer.decode(ids) for ids in encoded["input_ids"]] == ["abc", "abcd", "j"]
    assert (encoded["labels"][:], encoded["length"][:], cut) == ([0, 1, 0], [3, 4, 1], 1)
