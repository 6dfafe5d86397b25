"""Runs on several processes: the same weights on 1, 2 and 4 of them, also if a run is stopped and resumed on more."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hfgpt.records import RunRecord
from hfgpt.saving import hash_file

TRAINING = (
    "training: {global_batch_size: 8, per_device_train_batch_size: 2, max_steps: 6, learning_rate: 0.01, "
    "eval_strategy: steps, eval_steps: 3, save_steps: 3, logging_steps: 1, use_cpu: true, bf16: false, ddp_timeout: 3}"
)
# Dropout everywhere. The epochs end with steps of 1 row (of 169), 6 (of 30) and 2 (of 42, of different lengths).
RECIPES = {
    "pretrain": """
task: pretrain
tokenizer: {kind: bpe, vocab_size: 300}
model: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 192}
data: {path: "synthetic:stories", max_documents: 9, num_proc: 1, cache_dir: cache, block_size: 32}
evaluation: {prompts: ["The"], max_new_tokens: 4}
""",
    "classify": """
task: classify
tokenizer: {kind: char}
model: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 64}
data: {path: "synthetic:messages", max_rows: 30}
pretraining: {max_steps: 4, per_device_train_batch_size: 8, dropout: 0.1}
evaluation: {baseline: false}
""",
    "instruct": """
task: instruct
model: {path: one/pretrain}
adapters: {r: 4, lora_dropout: 0.1}
data: {path: "synthetic:instructions", max_rows: 42}
evaluation: {max_answers: 2, max_new_tokens: 4}
""",
}
# Forks share one import of torch.
SCRIPT = """
import os, signal, sys, time
from rich.console import Console
from transformers import TrainerCallback
from hfgpt.errors import Interrupted
from hfgpt.recipe import load_recipe
from hfgpt.runs import run as runs
from hfgpt.training import estimate

probe = estimate.probe_tokens_per_second
estimate.probe_tokens_per_second = lambda *args, **kwargs: probe(*args[:3], seconds=0.02)
runs.plot_loss = lambda *args: None


class Slow(type(runs.TASKS["pretrain"])):
    def load(self, recipe, *args, **kwargs):
        if recipe.training.world_size == 2 and recipe.training.process_index == 0:
            time.sleep(4)  # longer than the others would wait for anything else
        return super().load(recipe, *args, **kwargs)


runs.TASKS["pretrain"] = Slow()


class Stop(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3 and args.process_index == 1:
            signal.raise_signal(signal.SIGTERM)


def train(task, folder, stop=False, resume=False):
    recipe = load_recipe(f"{task}.yaml", [f"--training.output_dir={folder}/{task}"])
    try:
        runs.run(recipe, resume, Console(quiet=True), [Stop()] if stop else [])
    except Interrupted as error:
        assert stop, error


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
            for task in ("pretrain", "classify", "instruct"):
                train(task, *args, **kwargs)
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * processes


train_on(1, None, "one")
train_on(2, sys.argv[1], "many", stop=True)
train_on(4, sys.argv[2], "many", resume=True)
"""


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The runs on one process in `one`; in `many` those stopped after 4 steps on two processes, resumed on four."""
    folder = tmp_path_factory.mktemp("processes")
    for task, recipe in RECIPES.items():
        (folder / f"{task}.yaml").write_text(recipe + TRAINING)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, free_port(), free_port()],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("task", RECIPES)
def test_a_run_has_the_same_weights_on_any_number_of_processes(task, folder):
    one, many = (RunRecord.read(folder / name / task) for name in ("one", "many"))
    assert (one.processes, many.processes, many.resumed_from_step) == (1, 4, 4)
    assert (one.rows_per_step, one.rows_per_batch) == (many.rows_per_step, many.rows_per_batch) == (8, 2)
    assert one.tokens == many.tokens
    assert one.weights_sha256 == many.weights_sha256
    name = "adapter_model.safetensors" if task == "instruct" else "model.safetensors"
    assert hash_file(folder / "one" / task / name) == hash_file(folder / "many" / task / name)
