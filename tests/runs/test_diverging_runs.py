"""Runs that diverge: stopped or rolled back, on one process or two; and processes whose disk is full."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hfgpt.errors import InputError, Interrupted
from hfgpt.records import RunRecord
from hfgpt.saving import hash_file
from hfgpt.training.callbacks import read_log
from hfgpt.training.checkpoints import list_checkpoints
from hfgpt.training.trainer import HfGPTTrainer

ROLLBACK = "training.on_divergence=rollback"
STEPS = 9


@pytest.fixture
def diverging(monkeypatch):
    """The loss of step 6 is NaN; checkpoints are saved every 4 steps."""
    compute_loss = HfGPTTrainer.compute_loss

    def diverge(self, *arguments, **options):
        loss = compute_loss(self, *arguments, **options)
        return loss * math.nan if self.state.global_step + 1 == 6 else loss

    monkeypatch.setattr(HfGPTTrainer, "compute_loss", diverge)


def stop_at(step: int):
    return lambda running: signal.raise_signal(signal.SIGTERM) if running == step else None


def learned(folder: Path) -> list[dict]:
    """The log without times."""
    kept = [entry for entry in read_log(folder) if {"loss", "eval_loss", "rollback_to_step"} & entry.keys()]
    return [{key: entry[key] for key in entry if not re.match("train_|.*_runtime", key)} for entry in kept]


def test_a_run_that_diverges_stops_and_can_be_resumed_with_rollback(diverging, train, tmp_path):
    options = [f"training.max_steps={STEPS}", "training.save_total_limit=9"]
    whole = train(tmp_path / "whole", *options, ROLLBACK)
    assert "step 6: training diverged; restored the weights and the optimizer state of step 4\n" in whole.shown
    assert RunRecord.read(whole.folder).rollbacks == [{"from_step": 6, "to_step": 4}]
    assert [entry["rollback_to_step"] for entry in read_log(whole.folder) if entry["step"] == 6] == [4]
    assert "| rolled back after divergence | from step 6 to step 4 |" in (whole.folder / "README.md").read_text()
    assert "on_divergence: rollback" in (whole.folder / "recipe.yaml").read_text()

    run = tmp_path / "run"
    said = rf"^the loss is nan at step 6: .* --model.path {run}/checkpoint-4, or pass --resume --training.on_div"
    with pytest.raises(InputError, match=said) as error:
        train(run, *options)
    assert "\n" not in str(error.value)
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-4"]
    with pytest.raises(Interrupted, match="stopped at step 5 of 9"):
        train(run, *options, ROLLBACK, resume=True, during=stop_at(5))
    train(run, *options, ROLLBACK, resume=True)
    assert hash_file(run / "model.safetensors") == hash_file(whole.folder / "model.safetensors")
    assert RunRecord.read(run).rollbacks == RunRecord.read(whole.folder).rollbacks
    assert learned(run) == learned(whole.folder)


RECIPE = """
task: pretrain
tokenizer: {kind: char}
model: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 32}
data: {path: "synthetic:stories", max_documents: 9, num_proc: 1, cache_dir: cache}
training: {global_batch_size: 8, per_device_train_batch_size: 2, max_steps: 8, learning_rate: 0.01, save_steps: 3,
  eval_strategy: "no", logging_steps: 1, use_cpu: true, bf16: false, on_divergence: rollback}
evaluation: {prompts: ["The"], max_new_tokens: 4}
"""
# Forks share one import of torch. The loss of step 5 is NaN in the last process only; a full disk is that of one
# process: the weights and the optimizer are written by the first, the random state by each.
SCRIPT = """
import errno, math, os, sys
import torch
from rich.console import Console
from hfgpt.errors import InputError
from hfgpt.recipe import load_recipe
from hfgpt.runs import run as runs
from hfgpt.training import estimate
from hfgpt.training.trainer import HfGPTTrainer

probe = estimate.probe_tokens_per_second
estimate.probe_tokens_per_second = lambda *args, **kwargs: probe(*args[:3], seconds=0.02)
runs.plot_loss = lambda *args: None
compute_loss, save = HfGPTTrainer.compute_loss, torch.save


def diverge(self, *args, **kwargs):
    loss = compute_loss(self, *args, **kwargs)
    is_last = self.args.process_index == self.args.world_size - 1
    return loss * math.nan if is_last and self.state.global_step + 1 == 5 else loss


HfGPTTrainer.compute_loss = diverge


def train(folder, resume=False, full=None):
    def fail(content, path, *args, **kwargs):
        if full and full in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return save(content, path, *args, **kwargs)

    torch.save = fail
    recipe, said = load_recipe("tiny.yaml", [f"--training.output_dir={folder}"]), ""
    try:
        runs.run(recipe, resume, Console(quiet=True))
    except (InputError, OSError) as error:
        said = f"{type(error).__name__}: {error}"
    with open(f"{full}.{recipe.training.process_index}.txt".replace("/", "-"), "w") as file:
        file.write(said)


def train_on(processes, port, *args, **kwargs):
    children = []
    for rank in range(processes):
        if child := os.fork():
            children.append(child)
            continue
        status = 1
        try:
            if processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            train(*args, **kwargs)
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * processes


train_on(1, None, "one")
train_on(2, sys.argv[1], "two", full="checkpoint-6/optimizer.pt")
train_on(2, sys.argv[2], "two", resume=True, full="checkpoint-6/rng_state_1.pth")
assert os.listdir("two").count("checkpoint-3") == 1 and "checkpoint-6" not in os.listdir("two")
train_on(1, None, "two", resume=True)
"""


def free_ports(number: int) -> list[str]:
    with_ports = [socket.socket() for _ in range(number)]
    for free in with_ports:
        free.bind(("127.0.0.1", 0))
    ports = [str(free.getsockname()[1]) for free in with_ports]
    for free in with_ports:
        free.close()
    return ports


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    (folder / "tiny.yaml").write_text(RECIPE)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *free_ports(2)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_processes_roll_back_together_again_and_again_and_on_another_number_of_them(folder):
    """The run is interrupted twice after its rollback at step 5, by a full disk, and resumed from step 3."""
    assert (folder / "None.0.txt").read_text() == ""
    one, two = (RunRecord.read(folder / name) for name in ("one", "two"))
    assert one.rollbacks == two.rollbacks == [{"from_step": 5, "to_step": 3}]
    assert (one.processes, two.resumed_from_step) == (1, 3)
    assert one.weights_sha256 == two.weights_sha256 == hash_file(folder / "two" / "model.safetensors")
    state = json.loads((folder / "two" / "checkpoint-6" / "trainer_state.json").read_text())
    assert [row["rollback_to_step"] for row in state["log_history"] if row["step"] == 5] == [3]


@pytest.mark.parametrize(("rank", "file"), [(0, "optimizer.pt"), (1, "rng_state_1.pth")])
def test_if_the_disk_of_one_process_is_full_all_stop_with_the_reason(rank, file, folder):
    said = [(folder / f"checkpoint-6-{file}.{process}.txt").read_text() for process in range(2)]
    path = f"two/checkpoint-6/{file}"
    assert said[rank] == f"OSError: [Errno 28] No space left on device: '{path}'"
    assert said[1 - rank] == (
        f"InputError: process {rank} could not save its part of the checkpoint: No space left on device: {path}"
    )
