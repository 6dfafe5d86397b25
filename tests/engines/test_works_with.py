"""The code on the page of what works with what runs, and has the results that the page states."""

import contextlib
import functools
import importlib.metadata
import json
import math
import re
import shlex
import shutil
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hfgpt import cli

pytestmark = pytest.mark.engine

PAGE = (Path(__file__).parents[2] / "docs" / "works-with.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^##+ (.*?)\n(.*?)(?=^##+ |\Z)", PAGE, re.DOTALL | re.MULTILINE))
PROMPT = "Once upon a time, there was a little fox."


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="session", autouse=True)
def trackio_folder(tmp_path_factory):
    """Read when trackio is first imported, which TRL may do."""
    folder = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder))
        yield folder


@pytest.fixture
def run(story_model, tmp_path, monkeypatch):
    """Runs the code of a section in a folder with a copy of the story model, and returns its variables."""
    shutil.copytree(story_model, tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)

    def run_section(name: str, *changes: tuple[str, str], options: tuple[str, ...] = ()) -> SimpleNamespace:
        for command in blocks(SECTIONS[name], "bash"):
            cli.app([*shlex.split(command)[1:], *options], standalone_mode=False)
        variables = {"__name__": "page"}
        code = "".join([blocks(PAGE, "python")[0], *blocks(SECTIONS[name], "python")])
        for old, new in changes:
            assert old in code
            code = code.replace(old, new)
        exec(compile(code, "works-with.md", "exec"), variables)
        return SimpleNamespace(**variables)

    return run_section


def first_loss(trainer) -> float:
    return trainer.state.log_history[0]["loss"]


@functools.cache
def original(folder: str):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def likelihood(model, tokenizer, prompt: str, completion: str) -> float:
    """The log-likelihood of a completion, with its end-of-text token."""
    before, after = tokenizer.encode(prompt), [*tokenizer.encode(completion), tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model.eval()(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    return logits.double().log_softmax(-1).gather(1, torch.tensor(after)[:, None]).sum().item()


def test_sft(run, story_model):
    page = run("SFT", ("max_steps=20", "max_steps=20, warmup_steps=0, seed=1"))
    model = original(str(story_model))
    batch = next(iter(page.trainer.get_train_dataloader()))
    labels = batch["labels"][batch["labels"] != -100]
    end = [*page.tokenizer.encode(" It slept."), page.tokenizer.eos_token_id]
    assert labels.tolist() == end * len(batch["labels"]), "only the completion and its end have a loss"
    rows = [likelihood(model, page.tokenizer, row["prompt"], row["completion"]) for row in page.rows]
    assert first_loss(page.trainer) == pytest.approx(-sum(rows) / len(rows) / len(end), rel=0.05)
    saved = original("runs/sft")
    ids = page.tokenizer("Fox 99 was tired.", return_tensors="pt")
    text = page.tokenizer.decode(saved.generate(**ids, max_new_tokens=20, do_sample=False)[0])
    assert text == "Fox 99 was tired. It slept.<|endoftext|>"


def test_dpo(run, story_model):
    page = run("DPO")
    assert first_loss(page.trainer) == pytest.approx(math.log(2), abs=1e-5)
    preferences = [
        likelihood(model, page.tokenizer, "Fox 5", " slept.")
        - likelihood(model, page.tokenizer, "Fox 5", " ran away.")
        for model in (original(str(story_model)), original("runs/dpo"))
    ]
    assert preferences[1] > preferences[0] + 1


def test_reward_models(run):
    from transformers import AutoModelForSequenceClassification

    page = run("Reward models")
    assert 0.3 < first_loss(page.trainer) < 1.5
    model = AutoModelForSequenceClassification.from_pretrained("runs/reward").eval()

    def reward(text: str) -> float:
        ids = torch.tensor([[*page.tokenizer.encode(text), page.tokenizer.eos_token_id]])
        return model(ids).logits.item()

    assert all(reward(row["chosen"]) > reward(row["rejected"]) + 1 for row in page.rows)


def test_grpo(run):
    page = run("GRPO")
    rewards = [entry["reward"] for entry in page.trainer.state.log_history if "reward" in entry]
    assert len(rewards) == 20
    assert sum(rewards[-5:]) > sum(rewards[:5])


def test_grpo_with_its_default_length(run):
    page = run("GRPO", ("max_completion_length=24, max_steps=20", "max_steps=1"))
    assert page.trainer.state.global_step == 1


def test_lm_evaluation_harness(run, tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "next_word.yaml").write_text(blocks(SECTIONS["lm-evaluation-harness"], "yaml")[0])
    (row,) = re.findall(r"`(\{.*?\})`", SECTIONS["lm-evaluation-harness"])
    (tmp_path / "tasks" / "next_word.jsonl").write_text(row + "\n")
    run("lm-evaluation-harness")
    assert json.loads(Path("runs/demo/metrics.json").read_text())["benchmarks"]["next_word"]["metrics"]["acc"] == 1


def test_onnx_runtime(run):
    page = run("ONNX Runtime")
    with torch.no_grad():
        expected = page.model.eval()(torch.tensor(page.ids)).logits[..., : len(page.tokenizer)]
    assert torch.tensor(page.logits).allclose(expected, atol=1e-4)


def test_aotinductor(run):
    page = run("AOTInductor")
    for text in ("Once", PROMPT, PROMPT * 4):
        ids = page.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert page.compiled(ids, use_cache=False).logits.allclose(page.model(ids).logits, atol=1e-4)


@pytest.mark.parametrize(("name", "largest"), [("torchao", 0.2), ("bitsandbytes", 3.0)])
def test_quantized_weights(run, name, largest):
    page = run(name)
    ids = page.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    layers = [layer for layer in page.quantized.model.layers.modules() if isinstance(layer, torch.nn.Linear)]
    assert len(layers) == 12
    assert all(type(layer.weight).__name__ in ("Int8Tensor", "Params4bit") for layer in layers)
    with torch.no_grad():
        difference = (page.quantized.eval()(ids).logits.float() - page.model.eval()(ids).logits).abs().max()
    assert 0 < difference < largest
    page.quantized.generate(ids, max_new_tokens=5, do_sample=False)


def test_tensorboard_and_trackio(run, trackio_folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    few = ("--data.max_documents", "200", "--evaluation.max_new_tokens", "4")
    run("TensorBoard and trackio", options=("--training.output_dir", "runs/watched", *few))
    (events,) = Path("runs/watched").rglob("events.out.tfevents*")
    found = EventAccumulator(str(events.parent)).Reload()
    log = [json.loads(line) for line in Path("runs/watched/training_log.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in log if "loss" in row}
    assert losses.keys() == {5, 10, 15, 20}
    assert {event.step: event.value for event in found.Scalars("train/loss")} == pytest.approx(losses, abs=1e-4)
    (database,) = trackio_folder.glob("*.db")
    with contextlib.closing(sqlite3.connect(database)) as connection:
        rows = [json.loads(text) for (text,) in connection.execute("select metrics from metrics")]
    assert {row["train/global_step"]: row["train/loss"] for row in rows if "train/loss" in row} == losses


def test_versions_are_those_that_were_run():
    names = {"TRL": "trl", "lm-evaluation-harness": "lm_eval", "ONNX Runtime": "onnxruntime", "AOTInductor": "torch"}
    names |= {"torchao": "torchao", "bitsandbytes": "bitsandbytes"}
    for title, package in names.items():
        (version,) = re.findall(rf"^\| \[{title}\].*? \| (?:PyTorch )?([\d.]+) \|", PAGE, re.MULTILINE)
        assert importlib.metadata.version(package).partition("+")[0] == version
