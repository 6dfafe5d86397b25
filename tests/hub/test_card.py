"""The example cards: up to date with the template, every number measured, and valid for the Hub."""

import ast
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from render_examples import FOLDERS, render

from hfgpt.data.report import DataReport
from hfgpt.hub import HubArguments
from hfgpt.hub.card import METRICS, Card
from hfgpt.hub.folder import FolderRecords, read_records, without_paths
from hfgpt.hub.usage import Place, usage_code
from hfgpt.records import MergeRecord, RunRecord, TrainingRecord

LABELS = ("ham", "spam", "invitation", "lost", "thanks", "trick")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_an_example_card_is_up_to_date(folder):
    kept = (folder / "README.md").read_text(encoding="utf-8")
    assert render(folder) == kept, "run: python model_cards/render_examples.py"


def test_there_is_an_example_of_each_kind():
    records = {folder.name: read_records(folder) for folder in FOLDERS}
    kinds = {(record.task, bool(record.adapter)) for record in records.values()}
    assert {("pretrain", False), ("classify", False), ("instruct", False), ("classify", True)} <= kinds


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_hub_reads_the_metadata(folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.model_name == folder.name
    assert {"hfgpt", read_records(folder).task} <= {*card.data.tags}
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    metrics = read_records(folder).metrics
    assert results == {kind: metrics[name] for name, (_, kind) in METRICS.items() if kind and name in metrics}
    entries = parse_eval_result_entries(yaml.safe_load((folder / ".eval_results/hfgpt.yaml").read_text()))
    assert {entry.task_id: entry.value for entry in entries} == results


def card_of(records: FolderRecords, **hub) -> str:
    return Card(records, HubArguments(**hub), Place("user/x")).render()


def rows_of(card: str, heading: str) -> dict[str, str]:
    """The rows of the table under a heading."""
    return dict(re.findall(r"^\| (.*) \| (.*) \|$", card.split(f"# {heading}\n")[1].split("\n#")[0], re.MULTILINE))


def numbers_of(text: str) -> set[str]:
    """The numbers in a text that are not part of a word, a name or a hash."""
    return set(re.findall(r"(?<![\w.\-`/])\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?%?(?![\w-])", text))


def values_of(tree) -> list:
    if isinstance(tree, dict):
        return [value for pair in tree.items() for inner in pair for value in values_of(inner)]
    if isinstance(tree, list):
        return [value for inner in tree for value in values_of(inner)]
    return [tree]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_number_of_a_card_was_measured(folder):
    records = read_records(folder)
    known = values_of([records.run.to_dict(), records.metrics, records.data.to_dict(), records.recipe])
    figures = [value for value in known if isinstance(value, int | float) and not isinstance(value, bool)]
    figures.append(records.run.actual["peak_memory_bytes"] / 2**20)  # the card shows MiB
    texts = " ".join(value for value in known if isinstance(value, str))
    texts = numbers_of(re.sub(r"(?<=\d)[-:+T](?=\d)", " ", texts))  # split dates and times into their numbers

    def is_known(number: str) -> bool:
        share, digits = number.endswith("%"), number.rstrip("%").replace(",", "").rstrip(".")
        places = len(digits.partition(".")[2])
        matching = [
            value for value in figures if abs(value * (100 if share else 1) - float(digits)) <= 0.5001 * 10**-places
        ]
        return bool(matching) or number in texts

    card = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)[2]
    found = numbers_of(card.replace("95% confidence interval", ""))
    assert len(found) > 25
    assert {number for number in found if not is_known(number)} == set()
    assert is_known("123456789") is False


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_number_of_the_evaluation_has_the_right_label(folder):
    rows = rows_of((folder / "README.md").read_text(encoding="utf-8"), "Evaluation")
    assert rows.pop("metric") == "value"
    metrics = read_records(folder).metrics
    names = {label: name for name, (label, _) in METRICS.items()}
    names |= {f"{kind} of `{label}`": f"eval_{kind}_{label}" for kind in ("precision", "recall") for label in LABELS}
    assert len(rows) == len(metrics)
    for label, shown in rows.items():
        value = metrics[names[label]]
        number = float(shown.replace(",", "").rstrip("%")) / (100 if shown.endswith("%") else 1)
        assert number == pytest.approx(value, abs=0.6e-4 * max(1, abs(value)))


def test_times_of_a_resumed_run_are_those_since_it_was_resumed():
    records = read_records(FOLDERS[-1])
    records.run.resumed_from_step = 1390
    rows = rows_of(card_of(records), "Training procedure")
    assert "training time, s, since the run was resumed at step 1,390" in rows
    assert "training time, s" not in rows
    assert "optimizer steps" in rows


@pytest.mark.parametrize(
    ("name", "count", "said"),
    [
        ("eval_tokens", 12, "With only 12 tokens, these figures are not reliable."),
        ("eval_tokens", 999, "With only 999 tokens, these figures are not reliable."),
        ("eval_rows", 99, "With only 99 rows, these figures are not reliable."),
        ("eval_tokens", 1000, ""),
        ("eval_rows", 100, ""),
    ],
)
def test_figures_from_too_few_tokens_or_rows_have_a_warning(name, count, said):
    records = read_records(FOLDERS[-1])
    records.metrics = {"eval_loss": 1.0, name: count}
    (measured_on,) = re.findall("^Measured on .*$", card_of(records), re.MULTILINE)
    assert measured_on.partition(". ")[2] == said


def test_a_first_pass_is_listed_separately():
    records = read_records(FOLDERS[-2])
    actual = {"training_seconds": 61.25, "tokens_per_second": 6687.3}
    records.run.first_pass = TrainingRecord(steps=200, tokens=409_600, resumed_from_step=0, actual=actual)
    rows = rows_of(card_of(records), "Training procedure")
    assert rows["first pass: optimizer steps"] == "200"
    assert rows["first pass: tokens seen"] == "409,600"
    assert rows["first pass: training time, s"] == "61.2"
    assert rows["second pass: tokens seen"] == f"{records.run.tokens:,}"
    assert rows["total time with data and evaluation, s"] == f"{records.run.actual['total_seconds']:,.1f}"
    assert not {"tokens seen", "optimizer steps", "training time, s"} & rows.keys()


def test_sizes_of_a_split_are_singular_or_plural():
    records = read_records(FOLDERS[-1])
    sizes = records.data.splits["validation"]
    sizes.documents = sizes.unknown_tokens = sizes.tail_tokens = 1
    shown = rows_of(card_of(records), "Training data")["validation"]
    assert shown.startswith("1 document, 122,555 characters, ")
    assert "33,644 tokens, 1 unknown token, " in shown
    assert shown.endswith(", 1 token left over (dropped)")


def test_a_citation_has_the_author_and_the_url_of_the_recipe():
    records = read_records(FOLDERS[-1])
    assert card_of(records).count("author = ") == card_of(records).count("url = ") == 0
    cited = card_of(records, author="Ada Lovelace and Charles Babbage", url="https://example.org/stories")
    assert (
        "```bibtex\n@misc{x,\n  author = {Ada Lovelace and Charles Babbage},\n  title = {x},\n"
        "  note = {Trained with hfgpt},\n  year = {2026},\n  url = {https://example.org/stories},\n}\n```\n"
    ) in cited


def test_blank_lines_of_a_sample_are_kept():
    records = read_records(FOLDERS[-1])
    records.run.samples.texts = ["one\n\n\n\ntwo ```"]
    assert "```text\none\n\n\n\ntwo '''\n```\n" in card_of(records)


def test_a_base_model_in_a_folder_is_not_a_repository(tmp_path):
    """Even if its name is that of a Hub repository."""
    records = read_records(FOLDERS[-1])
    (tmp_path / "gpt2").mkdir()
    records.run.base_model = str(tmp_path / "gpt2")
    assert Card(records, HubArguments(), Place("user/x")).metadata.base_model is None
    records.run.base_model = "gpt2"
    assert Card(records, HubArguments(), Place("user/x")).metadata.base_model == "gpt2"


def test_local_paths_are_not_published():
    tree = {"data": {"path": "/home/me/data.txt", "columns": 1}, "output_dir": "~/x/y", "answers": "/a/b"}
    assert without_paths(tree) == {"data": {"path": "data.txt", "columns": 1}, "output_dir": "y", "answers": "b"}
    machine = {"training": {"deepspeed": "/a/zero3.json", "fsdp_config": {"min_num_params": 0}}}
    assert without_paths(machine) == {"training": {"deepspeed": "zero3.json", "fsdp_config": {"min_num_params": 0}}}
    kept = {"path": "me/model", "source": "synthetic:stories", "prompts": ["/help me and/or you", "~"]}
    assert without_paths(kept) == kept
    for url in ("https://me:SECRET@host/folder/a.txt?key=SECRET", "s3://bucket/folder/a.txt"):
        assert without_paths({"path": url}) == {"path": "a.txt"}
    run = RunRecord(data_source="/home/me/data.txt", base_model="me/model", recipe="/not/a/place")
    assert run.publishable() == {"data_source": "data.txt", "base_model": "me/model", "recipe": "/not/a/place"}
    merge = MergeRecord(adapter="../up/z", base_model="gpt2", difference=0, largest_logit=1, tokens=2)
    assert (merge.publishable()["adapter"], merge.publishable()["base_model"]) == ("z", "gpt2")
    report = DataReport(source="/x/y.txt", near_duplicate_examples=[["mine", "other"]], unused_files=["salaries.txt"])
    assert {"near_duplicate_examples", "unused_files"} & report.publishable().keys() == set()
    assert report.publishable()["source"] == "y.txt"


@pytest.mark.parametrize("name", ["text", "classes", "adapter", "answers"])
def test_the_card_of_a_run_has_no_local_path(runs, name):
    recipe, card = ((runs / name / file).read_text(encoding="utf-8") for file in ("recipe.yaml", "README.md"))
    assert f"output_dir: {runs / name}" in recipe
    assert f"output_dir: {name}" in card
    assert str(runs) not in card
    assert f'from_pretrained("{name}"' in card or f'model="{name}"' in card


def test_the_card_of_a_folder_has_its_path_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Place.of_folder(Path("runs/x")) == Place.of_folder(tmp_path / "runs" / "x") == Place("runs/x")
    assert Place.of_folder(tmp_path.parent / "x", native=True) == Place("x", native=True)
    assert Place.of_folder(Path("../x")) == Place("x")
    assert Place.of_folder(Path(".")) == Place(tmp_path.name)


@pytest.mark.parametrize("name", ["runs/my run", 'a "quoted" run', "back\\slash"])
def test_the_code_of_a_card_quotes_any_path(name):
    for adapter in ({}, {"r": 2}):
        records = FolderRecords(Path(name), {}, RunRecord(), {}, None, None, None, adapter, {}, has_tokenizer=True)
        code = ast.parse(usage_code(records, Place(name)))
        assert name in [node.value for node in ast.walk(code) if isinstance(node, ast.Constant)]
