"""Records are read as they were written; an invalid entry is an error that names it."""

import json

import pytest

from hfgpt.data.report import DataReport
from hfgpt.errors import InputError
from hfgpt.records import (
    ADAPTER,
    END,
    ConversionRecord,
    MergeRecord,
    RunRecord,
    Samples,
    TrainingRecord,
    is_finished,
    is_run,
    read_metrics,
)

RUN = RunRecord(
    task="classify",
    seed=1,
    data_source="/home/me/x.txt",
    labels={"0": "a"},
    steps=3,
    plan={"parameters": 5, "device": "CPU"},
    actual={"training_seconds": 1.5, "peak_memory_bytes": 7, "peak_memory_of": "training"},
    first_pass=TrainingRecord(steps=2, actual={"training_seconds": 1}),
    samples=Samples(texts=["é"], temperature=1, top_k=0),
    weights_sha256="0",
)
REPORT = DataReport(source="x.txt", rows_read=2)
REPORT.split("train").documents = 2
REPORT.drop("empty")
RECORDS = [
    RUN,
    REPORT,
    MergeRecord(adapter="a", base_model="b", difference=0.0, largest_logit=2.0, tolerance=0.5, tokens=9).stamp(),
    ConversionRecord(source="a", format="gpt2", differences=[{"rows": "random", "absolute": 0.0}], notes=[]).stamp(),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.FILE)
def test_a_record_is_read_as_it_was_written(record, tmp_path):
    assert type(record).read(tmp_path) is None
    record.write(tmp_path)
    assert type(record).read(tmp_path) == record
    content = json.loads((tmp_path / record.FILE).read_text())
    (tmp_path / record.FILE).write_text(json.dumps(content | {"of a later version": 1}))
    assert type(record).read(tmp_path) == record


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": "1"}, 'seed is "1"'),
        ({"seed": True}, "seed is true"),
        ({"labels": ["a"]}, r'labels is \["a"\]'),
        ({"actual": {"training_seconds": [1]}}, "actual is"),
        ({"first_pass": 5}, "first_pass is 5"),
        ({"first_pass": {"steps": "2"}}, 'steps is "2"'),
        ({"samples": {}}, "does not have texts"),
        ({"samples": {"texts": [None]}}, r"texts is \[null\]"),
        ({"versions": "1"}, 'versions is "1"'),
    ],
)
def test_an_entry_of_the_wrong_type_is_named(change, named, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(RUN.to_dict() | change))
    with pytest.raises(
        InputError, match=rf"run\.json' (has an invalid value|is incomplete), .*{named}.*: restore the original"
    ):
        RunRecord.read(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "5", "[" * 100_000, '"\ud800"'.encode("utf-8", "surrogatepass")])
def test_what_is_not_a_json_object_is_refused(content, tmp_path):
    (tmp_path / "run.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=r"run\.json' (cannot be read|is not a JSON object)"):
        RunRecord.read(tmp_path)


def test_metrics_are_numbers(tmp_path):
    assert read_metrics(tmp_path) == {}
    (tmp_path / "metrics.json").write_text('{"eval_loss": "1"}')
    with pytest.raises(InputError, match="eval_loss is not a number"):
        read_metrics(tmp_path)


def test_a_record_without_the_entries_of_the_end_or_the_adapter():
    shared = RUN.without(END)
    assert (shared.seed, shared.data_source, shared.first_pass) == (RUN.seed, RUN.data_source, RUN.first_pass)
    assert (shared.steps, shared.samples, shared.weights_sha256, shared.actual) == (None, None, None, None)
    merged = RUN.without(ADAPTER)
    assert (merged.steps, merged.samples, merged.weights_sha256) == (RUN.steps, None, None)


def test_a_run_is_finished_if_it_has_a_card(tmp_path):
    assert not is_run(tmp_path)
    (tmp_path / "README.md").touch()
    assert not is_finished(tmp_path), "a user's notes"
    (tmp_path / "recipe.yaml").touch()
    assert is_run(tmp_path)
    assert is_finished(tmp_path)
