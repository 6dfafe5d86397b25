"""Classifier runs: the files they write, metrics that match the saved weights, and what is refused."""

import io
import json
import re
import shutil
import signal
import warnings
from dataclasses import fields
from functools import partial

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from hfgpt.commands.classify import read_texts
from hfgpt.commands.merge import merge
from hfgpt.commands.plan import plan_recipe
from hfgpt.data.classification import ClassificationDataArguments
from hfgpt.errors import InputError, Interrupted
from hfgpt.evaluation import ClassifierEvaluationArguments
from hfgpt.evaluation.classification import predict
from hfgpt.models import find_model, load_classifier, load_model
from hfgpt.recipe import load_recipe
from hfgpt.runs.first_pass import build_arguments
from hfgpt.runs.run import run as run_recipe
from hfgpt.saving import hash_file
from hfgpt.tasks import TASKS
from hfgpt.training import estimate
from hfgpt.training.callbacks import ProgressCallback, read_log

RECIPE = """
task: classify
tokenizer: {kind: char}
model: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, max_position_embeddings: 32}
data: {path: rows.jsonl}
training:
  per_device_train_batch_size: 8
  num_train_epochs: 3
  learning_rate: 0.01
  logging_steps: 1
  eval_strategy: epoch
  save_steps: 4
  use_cpu: true
  bf16: false
evaluation: {prompts: ["red apple"]}
"""
BASED = (
    "".join(line for line in RECIPE.splitlines(keepends=True) if not line.startswith(("model:", "tokenizer:")))
    + "model: {path: finished/pretrained}\n"
)
LABELS = ["blue", "green", "red"]
# With three epochs at twice this rate the result depends on rounding: six seeds gave accuracies of 0.33 to 1.
LONGER = ("training.num_train_epochs=10", "training.learning_rate=0.005", "training.save_steps=50")


def evaluate(path, data):
    return TASKS["classify"].evaluate(find_model(path), data, ClassifierEvaluationArguments())


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The working directory of the tests in this file, with rows and recipes."""
    folder = tmp_path_factory.mktemp("classify")
    rows = [{"text": f"{label} {thing} {i}", "label": label} for label in LABELS for i, thing in
            enumerate(["apple", "boat", "cup", "door", "egg"] * 5)]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny.yaml").write_text(RECIPE)
    (folder / "based.yaml").write_text(BASED)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        probe = estimate.probe_tokens_per_second
        patch.setattr(estimate, "probe_tokens_per_second", lambda *args, **kwargs: probe(*args[:3], seconds=0.02))
        yield folder


def run(output_dir, *overrides, recipe="tiny", resume=False):
    console = Console(file=io.StringIO(), width=500)
    overrides = [f"--{override}" for override in (f"training.output_dir={output_dir}", *overrides)]
    metrics = run_recipe(load_recipe(f"{recipe}.yaml", overrides), resume, console)
    return metrics, console.file.getvalue()


@pytest.fixture(scope="module")
def finished(here):
    """A finished run with a first pass. Tests must not change its folder."""
    return run("finished", "pretraining.max_steps=5", "pretraining.block_size=16", *LONGER)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_run_writes_all_files_and_its_metrics_match_the_saved_weights(here, finished):
    metrics, shown = finished
    folder = here / "finished"
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "recipe.yaml", "run.json", "metrics.json", "loss.png",
            "data_report.json", "training_log.jsonl", "confusion.png", "pretrained"} <= names  # fmt: skip
    assert not any(name.endswith((".bin", ".pt")) for name in names)
    assert read(folder / "metrics.json") == metrics
    assert metrics["eval_accuracy"] > 0.6
    assert metrics["majority_accuracy"] == pytest.approx(1 / 3)
    assert metrics["baseline_accuracy"] == 1.0
    record = read(folder / "run.json")
    assert record["weights_sha256"] == hash_file(folder / "model.safetensors")
    assert record["task"] == "classify"
    for split, rows in (("validation", 6), ("test", 15)):
        assert f"  warning: the {split} split has only {rows} rows, and metrics on fewer than 100" in shown
    stream = int(re.search(r"first pass \(section pretraining\): language modeling on (\d+) tokens", shown)[1])
    first, blocks = record["first_pass"], (stream - 1) // 16
    assert 32 < blocks < 48, "three batches of 16, the last one short"
    assert (first["steps"], first["tokens"]) == (5, (4 * 16 + blocks % 16) * 16)
    assert 0 < first["actual"]["training_seconds"] < record["actual"]["total_seconds"]
    assert f"| first pass: tokens seen | {first['tokens']:,} |" in (folder / "README.md").read_text()
    assert "trainable: " in shown
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert list(model.config.id2label.values()) == LABELS
    report = read(folder / "data_report.json")
    assert report["splits"]["test"]["labels"] == dict.fromkeys(LABELS, 5)


def test_predictions_match_the_pipeline(here, finished):
    texts = ["red apple 3", "green", "a blue egg " * 10]
    model, tokenizer, labels = load_classifier(find_model("finished"))
    ours = predict(model, tokenizer, texts)
    theirs = pipeline("text-classification", model="finished")(texts, truncation=True)
    assert [(found.label, pytest.approx(found.score, abs=1e-6)) for found in ours] == [
        (found["label"], found["score"]) for found in theirs
    ]
    assert labels == LABELS
    for found in ours:
        assert sum(found.probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert max(found.probabilities, key=found.probabilities.get) == found.label


def test_two_runs_give_the_same_weights_even_if_one_is_stopped_and_resumed(here, monkeypatch):
    run("one")
    begin = ProgressCallback.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 5:
            signal.raise_signal(signal.SIGINT)
        return begin(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ProgressCallback, "on_step_end", interrupt)
        with pytest.raises(Interrupted, match=r"in two: rerun the command with --resume"):
            run("two")
    metrics, _ = run("two", resume=True)
    assert read(here / "two" / "run.json")["resumed_from_step"] >= 5
    assert hash_file(here / "one" / "model.safetensors") == hash_file(here / "two" / "model.safetensors")
    assert metrics == read(here / "one" / "metrics.json")


def test_a_stopped_first_pass_is_resumed(here, finished, monkeypatch):
    begin = ProgressCallback.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 3:
            signal.raise_signal(signal.SIGINT)
        return begin(self, args, state, control, **kwargs)

    overrides = ("pretraining.max_steps=5", "pretraining.block_size=16", *LONGER)
    with monkeypatch.context() as patch:
        patch.setattr(ProgressCallback, "on_step_end", interrupt)
        with pytest.raises(Interrupted, match="stopped at step 3 of 5"):
            run("stopped", *overrides)
    run("stopped", *overrides, resume=True)
    record = read(here / "stopped" / "run.json")["first_pass"]
    assert record == read(here / "stopped" / "pretrained" / "run.json")
    whole = read(here / "finished" / "run.json")["first_pass"]
    assert (record["steps"], record["tokens"], record["resumed_from_step"]) == (5, whole["tokens"], 3)
    for name in ("model.safetensors", "pretrained/model.safetensors"):
        assert hash_file(here / "stopped" / name) == hash_file(here / "finished" / name)


@pytest.mark.parametrize(
    ("override", "trained"),
    [
        ("training.trainable=head", {"score"}),
        ("training.trainable=last_blocks", {"score", "model.norm", "model.layers.1"}),
        (
            "training.trainable=all",
            {"score", "model.norm", "model.layers.0", "model.layers.1", "model.embed_tokens", "model.embed_positions"},
        ),
    ],
)
def test_frozen_parameters_do_not_change(here, finished, override, trained):
    run("frozen", override, "training.max_steps=2", "evaluation.baseline=false", recipe="based")
    after = load_model("frozen", auto_class=AutoModelForSequenceClassification).state_dict()
    before = load_model("finished/pretrained").state_dict()
    moved = {name for name, value in after.items() if name not in before or not torch.equal(value, before[name])}
    shutil.rmtree("frozen")
    for part in trained:
        assert any(name.startswith(part) for name in moved), part
    assert all(name.startswith(tuple(trained)) for name in moved)


def test_evaluate_reads_every_key_it_accepts(here, finished, read_keys):
    read = read_keys(partial(evaluate, "finished"), data=ClassificationDataArguments(path="rows.jsonl"))
    of_splits = {"data.name", "data.revision", "data.train_split"}  # only read for Hub data sets and folders
    keys = {f"data.{field.name}" for field in fields(ClassificationDataArguments)}
    assert keys - read - of_splits <= TASKS["classify"].only_for_training.keys()
    evaluation = {f"evaluation.{field.name}" for field in fields(ClassifierEvaluationArguments)}
    assert evaluation <= TASKS["classify"].only_for_training.keys(), "evaluate uses none of them"


def test_an_adapter_run_saves_only_the_adapter_and_can_be_merged(here, finished):
    longer = ("training.num_train_epochs=30", "training.learning_rate=0.005")  # accuracy at least 0.93 with six seeds
    seldom = ("training.save_steps=90", "training.eval_strategy=no", "training.logging_steps=10")
    metrics, shown = run("adapter", "adapters.r=4", *longer, *seldom, recipe="based")
    folder = here / "adapter"
    assert (folder / "adapter_model.safetensors").is_file()
    assert not (folder / "model.safetensors").exists()
    assert not (folder / "config.json").exists(), "transformers would take the folder for a full model"
    for place in (folder, next(folder.glob("checkpoint-*"))):
        assert read(place / "labels.json") == {"id2label": dict(zip("012", LABELS, strict=True))}
    assert 'id2label={0: "blue", 1: "green", 2: "red"}' in (folder / "README.md").read_text()
    assert metrics["eval_accuracy"] > 0.6
    record = read(folder / "run.json")
    assert record["base_weights_sha256"] == hash_file(here / "finished" / "pretrained" / "model.safetensors")
    trained = 2 * 4 * (4 * (32 + 32) + 2 * (32 + 128)) + 3 * 32
    assert f"trainable: {trained:,} of" in shown
    (folder / "recipe.yaml").chmod(0o444)
    merged = merge("adapter", here / "merged", console=Console(file=io.StringIO()))
    assert merged.difference <= 1e-5
    assert (here / "merged" / "recipe.yaml").stat().st_mode & 0o200, "copied files are writable"
    arguments = ClassificationDataArguments(path="rows.jsonl")
    assert evaluate("merged", arguments) == pytest.approx(evaluate("adapter", arguments), abs=1e-5)
    theirs = pipeline("text-classification", model="merged")("red cup")[0]["label"]
    model, tokenizer, _ = load_classifier(find_model("adapter"))
    assert predict(model, tokenizer, ["red cup"])[0].label == theirs
    with pytest.raises(InputError, match=r"merged' already exists: choose a new folder"):
        merge("adapter", here / "merged")
    with pytest.raises(InputError, match=r"'merged' is not an adapter"):
        merge("merged", here / "again")
    with pytest.raises(InputError, match=r"so nothing was written: use the adapter without merging it"):
        merge("adapter", here / "again", tolerance=0.0)
    assert not (here / "again").exists()
    with pytest.raises(InputError, match=r"model.path 'adapter' is an adapter: merge it first"):
        run("third", "model.path=adapter", recipe="based")


def test_labels_are_logged_unchanged(here):
    rows = [{"text": f"{label} {i}", "label": label} for label in ("eval_set", "other") for i in range(12)]
    (here / "sets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics, _ = run("sets", "data.path=sets.jsonl", "training.max_steps=1", "evaluation.baseline=false")
    tested = read_log("sets")[-1]
    for name in ("eval_recall_eval_set", "eval_accuracy"):
        assert tested[name.replace("eval", "test", 1)] == metrics[name]


def test_a_first_pass_uses_the_optimizer_of_the_run(here):
    overrides = ["--pretraining.weight_decay=0.5", "--training.adam_beta2=0.9", "--training.optim=adamw_torch"]
    with warnings.catch_warnings(action="error"):
        arguments = build_arguments(load_recipe("tiny.yaml", overrides))
    assert (arguments.weight_decay, arguments.adam_beta2, arguments.optim.value) == (0.5, 0.9, "adamw_torch")


def test_an_adapter_on_the_first_pass_of_the_same_run(here):
    run("both", "pretraining.max_steps=3", "pretraining.block_size=16", "adapters.r=2", "training.max_steps=2")
    assert read(here / "both" / "adapter_config.json")["base_model_name_or_path"] == str(here / "both" / "pretrained")
    assert load_classifier(find_model("both"))[2] == LABELS


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path=none.jsonl"], "data.path 'none.jsonl' does not exist"),
        (["data.max_length=33"], "data.max_length is 33, but the model's context length is 32: lower it"),
        (["training.trainable=adapters"], "the recipe has no section adapters: add one"),
        (["adapters.r=2"], "an adapter needs a model to adapt: set model.path"),
        (["adapters.r=2", "training.trainable=head"], "training.trainable is 'head': remove one of them"),
        (["training.trainable=last_blocks", "training.last_blocks=3"], "but num_hidden_layers is 2: lower it"),
        (["pretraining.max_steps=2", "model.num_attention_heads=3"], "model: "),
        (
            ["pretraining.max_steps=2", "pretraining.block_size=33"],
            "pretraining.block_size is 33, but the model's context length",
        ),
        (["pretraining.max_steps=2", "adapters.target_modules=[c_attn]"], "cannot be adapted"),
        (["evaluation.prompts=['x', ' ']"], "text 2 is empty: leave it out"),
        (["model.load_in_4bit=true"], "4-bit weights cannot be trained: add a section adapters"),
    ],
)
def test_a_refused_recipe_leaves_no_files(here, overrides, message):
    with pytest.raises(InputError, match=message):
        run("refused", *overrides)
    assert not (here / "refused").exists()


def test_a_base_model_with_another_tokenizer_or_other_classes(here, finished, tmp_path):
    shutil.copytree("finished", tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained("finished")
    ids = {token: len(tokenizer) - 1 - index for token, index in tokenizer.get_vocab().items()}
    state = read(tmp_path / "other" / "tokenizer.json")
    state["model"]["vocab"] = ids
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(state | {"added_tokens": []}))
    with pytest.raises(
        InputError, match=r"the tokenizer does not match that of 'finished/pretrained': .* use the model's own"
    ):
        run("refused", f"tokenizer.path={tmp_path / 'tokenizer'}", recipe="based")
    rows = [{"text": f"{label} {i}", "label": label} for label in "xyz" for i in range(9)]
    (tmp_path / "xyz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"'finished' has the classes blue, green, red, but the data has x, y, z"):
        run("refused", "model.path=finished", f"data.path={tmp_path / 'xyz.jsonl'}", recipe="based")
    with pytest.raises(InputError, match=r"has the label 'x', which is not one of the model's classes"):
        evaluate("finished", ClassificationDataArguments(path=str(tmp_path / "xyz.jsonl")))
    with pytest.raises(InputError, match=r"'finished/pretrained' is a language model, not a classifier"):
        load_classifier(find_model("finished/pretrained"))


def test_training_continues_from_a_classifier_without_a_problem_type(here, finished, tmp_path):
    model = load_model("finished", auto_class=AutoModelForSequenceClassification)
    model.config.problem_type = None
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained("finished").save_pretrained(tmp_path / "base")
    metrics, _ = run("further", f"model.path={tmp_path / 'base'}", "training.max_steps=2", recipe="based")
    assert metrics["eval_rows"] == 15


def test_an_adapter_can_be_moved_with_its_base_model(here, finished):
    run("before", "pretraining.max_steps=2", "pretraining.block_size=16", "adapters.r=2", "training.max_steps=2")
    card = (here / "before" / "README.md").read_text()
    assert "for `pretrained`, a GPT of" in card
    assert str(here) not in card
    ours = predict(*load_classifier(find_model("before"))[:2], ["red cup"])
    (here / "before").rename(here / "after")
    assert predict(*load_classifier(find_model("after"))[:2], ["red cup"]) == ours


def test_texts_to_classify(tmp_path):
    (tmp_path / "texts").write_text("a\nb\r\n c \n\n\r\n")
    assert read_texts(["x"], tmp_path / "texts") == ["x", "a", "b", " c "]
    (tmp_path / "texts").write_text("a\n\nb\n")
    with pytest.raises(InputError, match="texts, line 2 is empty: leave it out"):
        read_texts([], tmp_path / "texts")
    with pytest.raises(InputError, match="text 2 is empty"):
        read_texts(["x", " "], None)
    with pytest.raises(InputError, match="no text to classify"):
        read_texts([], None)
    (tmp_path / "texts").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="is not valid UTF-8 at byte 3: convert it to UTF-8"):
        read_texts([], tmp_path / "texts")


def test_a_plan_refuses_an_empty_prompt_like_the_run(here):
    recipe = load_recipe("tiny.yaml", ["--evaluation.prompts", "['red cup', ' ']"])
    with pytest.raises(InputError, match="text 2 is empty: leave it out"):
        plan_recipe(recipe)
