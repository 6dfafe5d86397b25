"""Runs on several processes: the same weights on 1, 2 and 4 of them, also if a run is stopped and resumed on more.

With FSDP, the sums of gradients are in another order, so the weights are only close.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hfgpt.models import find_model
from hfgpt.records import RunRecord
from hfgpt.saving import hash_file
from hfgpt.training.checkpoints import find_damage

TRAINING = (
    "training: {global_batch_size: 8, per_device_train_batch_size: 2, max_steps: 6, learning_rate: 0.01, "
    "eval_strategy: steps, eval_steps: 3, save_steps: 3, logging_steps: 1, use_cpu: true, bf16: false, "
    "ddp_timeout: 3, load_best_model_at_end: true}"
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
import os, signal, sys, time, traceback
from functools import partial
import torch, transformers
from packaging import version
from rich.console import Console
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.distributed import DistributedConfig
from hfgpt import modeling_hfgpt
from hfgpt.errors import InputError, Interrupted
from hfgpt.evaluation.perplexity import Perplexity
from hfgpt.evaluation.spread import map_over_processes
from hfgpt.recipe import load_recipe
from hfgpt.runs import run as runs
from hfgpt.training import estimate, optimizers
from hfgpt.training.arguments import HfGPTTrainingArguments
from hfgpt.training.trainer import HfGPTTrainer

probe = estimate.probe_tokens_per_second
estimate.probe_tokens_per_second = lambda *args, **kwargs: probe(*args[:3], seconds=0.02)
runs.plot_loss = lambda *args: None
modeling_hfgpt.CHUNK_OF_LOGITS = 4 * 300 * 20
# In bfloat16, Muon turns a difference in the last digit of a gradient into one of 1e-4.
optimizers.has_native_bf16 = lambda device: False


class Slow(type(runs.TASKS["pretrain"])):
    def load(self, recipe, *args, **kwargs):
        training = recipe.training
        if training.output_dir == "many/pretrain" and (training.world_size, training.process_index) == (2, 0):
            time.sleep(4)  # longer than the others would wait for anything else
        return super().load(recipe, *args, **kwargs)


runs.TASKS["pretrain"] = Slow()


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == args.world_size - 1:
            signal.raise_signal(signal.SIGTERM)


class Shares(TrainerCallback):
    def on_train_begin(self, args, state, control, model, **kwargs):
        if not args.is_sharded:
            return
        weights = list(model.parameters())
        assert all(isinstance(weight, DTensor) for weight in weights)
        held = sum(weight.to_local().numel() for weight in weights)
        replicated = 1.02 if args.is_fully_sharded else 1.3  # also the positions, which are many here
        assert held <= replicated * sum(weight.numel() for weight in weights) / args.world_size, held

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        if args.is_sharded:
            moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
            assert moments and all(isinstance(value, DTensor) for value in moments)


def train(task, folder, *overrides, stop=None, resume=False):
    modeling_hfgpt.MANY_LOGITS = 0 if task == "pretrain" else 2**25  # the loss in chunks of 20 rows
    recipe = load_recipe(f"{task}.yaml", [f"--training.output_dir={folder}/{task}", *overrides])
    try:
        runs.run(recipe, resume, Console(quiet=True), [Shares(), *([Stop(stop)] if stop else [])])
    except Interrupted as error:
        assert stop, error


def train_divided(*args, **kwargs):
    \"""Tensor parallelism as a machine file asks for it.\"""
    os.environ |= {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}
    train(*args, **kwargs)


def train_all(*args, **kwargs):
    for task in ("pretrain", "classify", "instruct"):
        train(task, *args, **kwargs)


def count_rows():
    for rows in range(1, 10):
        seen = []

        def measure(model, batches, spread):
            seen.extend(row for rows in spread(lambda batch: batch["row"], batches) for row in rows.tolist())
            return Perplexity(0.0, 1)

        arguments = HfGPTTrainingArguments("none", use_cpu=True, bf16=False, per_device_eval_batch_size=2)
        dataset = [{"row": row} for row in range(rows)]
        HfGPTTrainer(torch.nn.Linear(1, 1), arguments, eval_dataset=dataset, measure=measure).evaluate()
        assert sorted(seen) == list(range(rows)), "no row twice, none lost"
        assert list(map_over_processes(str, range(rows))) == list(map(str, range(rows)))


def divide_heads():
    \"""Tensor parallelism by the plan of the model.\"""
    ids = torch.arange(40).view(2, 20)
    options = {"attention_mask": torch.ones(2, 8, dtype=torch.long), "max_new_tokens": 12}
    whole = AutoModelForCausalLM.from_pretrained("one/pretrain").eval()
    plan = DistributedConfig(tp_size=2)
    divided = AutoModelForCausalLM.from_pretrained("one/pretrain", distributed_config=plan).eval()
    weights = dict(divided.named_parameters())
    for name in ("model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"):
        weight = weights[f"{name}.weight"]
        assert weight.to_local().numel() * 2 == weight.numel(), name
    with torch.no_grad():
        torch.testing.assert_close(divided(ids).logits, whole(ids).logits, rtol=0, atol=1e-5)
    for sampling in ({"do_sample": False}, {"do_sample": True, "top_k": 0}):
        torch.manual_seed(1)
        expected = whole.generate(ids[:, :8], **options, **sampling)
        torch.manual_seed(1)
        assert torch.equal(divided.generate(ids[:, :8], **options, **sampling), expected)
    try:
        HfGPTTrainer(divided, HfGPTTrainingArguments("none", use_cpu=True, bf16=False))
        raise AssertionError("the processes would see different rows")
    except InputError as error:
        assert "not supported in training" in str(error), error


def run_on(processes, port, *functions):
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
            for function in functions:
                function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * processes


whole = ("--training.muon_learning_rate=0.02", "--training.learning_rate=0.001", "--training.weight_decay=0.1")
parts = (*whole, "--training.fsdp=true")
run_on(1, None, partial(train_all, "one"), partial(train, "pretrain", "whole", *whole))
run_on(2, sys.argv[1], partial(train_all, "many", stop=3), count_rows, divide_heads)
run_on(4, sys.argv[2], partial(train_all, "many", resume=True))
run_on(
    2,
    sys.argv[3],
    partial(train, "pretrain", "parts", *parts, stop=1),
    partial(train, "classify", "parts", "--training.fsdp=true"),
    partial(train, "instruct", "parts", "--training.fsdp=true"),
)
run_on(4, sys.argv[4], partial(train, "pretrain", "parts", *parts, stop=3, resume=True))
run_on(1, None, partial(train, "pretrain", "parts", *whole, resume=True))
# In attention, each process draws dropout for its own heads.
same = (*whole, "--model.attn_pdrop=0")
if version.parse(transformers.__version__) >= version.parse("5.23"):
    run_on(1, None, partial(train, "pretrain", "undivided", *same))
    run_on(2, sys.argv[5], partial(train_divided, "pretrain", "divided", *same, stop=1))
    run_on(1, None, partial(train, "pretrain", "divided", *same, stop=3, resume=True))
    run_on(2, sys.argv[6], partial(train_divided, "pretrain", "divided", *same, resume=True))
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
        [sys.executable, "-c", SCRIPT, *(free_port() for _ in range(6))],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
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
    assert (folder / "one" / task / "metrics.json").read_bytes() == (
        folder / "many" / task / "metrics.json"
    ).read_bytes()
    name = "adapter_model.safetensors" if task == "instruct" else "model.safetensors"
    assert hash_file(folder / "one" / task / name) == hash_file(folder / "many" / task / name)


def read_losses(folder: Path) -> dict[tuple[str, int], float]:
    """The logged losses of a run, by their names and steps."""
    entries = map(json.loads, (folder / "training_log.jsonl").read_text().splitlines())
    names = ("loss", "eval_loss", "eval_tokens", "eval_rows", "grad_norm")
    return {(name, entry["step"]): entry[name] for entry in entries for name in names if name in entry}


@pytest.mark.parametrize("task", RECIPES)
def test_each_validation_row_counts_once_on_any_number_of_processes(task, folder):
    one, many = (read_losses(folder / name / task) for name in ("one", "many"))
    counted = "eval_rows" if task == "classify" else "eval_tokens"
    assert {(counted, 3), (counted, 6), ("eval_loss", 6), ("loss", 1)} <= one.keys()
    assert many == pytest.approx(one, rel=1e-6)
    assert all(many[key] == value for key, value in one.items() if key[0] == counted)


def test_a_run_with_fsdp_is_close_to_one_without_on_any_number_of_processes(folder):
    whole, parts = (folder / name / "pretrain" for name in ("whole", "parts"))
    record = RunRecord.read(parts)
    assert (record.processes, record.resumed_from_step) == (1, 4), "stopped on two, on four, and finished on one"
    assert read_losses(parts) == pytest.approx(read_losses(whole), abs=1e-5)
    expected, found = (load_file(run / "model.safetensors") for run in (whole, parts))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    checkpoint = parts / "checkpoint-4"
    shards = sorted((checkpoint / "optimizer").glob("*.safetensors"))
    assert len(shards) == 4, "each process saved its part of the optimizer state"
    assert find_damage(checkpoint) is None
    shards[-1].write_bytes(shards[-1].read_bytes()[:-1] + b"?")
    assert find_damage(checkpoint) == f"optimizer/{shards[-1].name} does not match its checksum"
    assert find_model(str(checkpoint)).load().num_parameters() == sum(map(torch.numel, found.values())), "all weights"


def test_a_run_with_tensor_parallelism_is_close_to_one_without(folder):
    pytest.importorskip("transformers", "5.23")
    whole, divided = (folder / name / "pretrain" for name in ("undivided", "divided"))
    record = RunRecord.read(divided)
    assert (record.processes, record.resumed_from_step) == (2, 4), "stopped on two, on one, and finished on two"
    assert read_losses(divided) == pytest.approx(read_losses(whole), abs=1e-5)
    expected, found = (load_file(run / "model.safetensors") for run in (whole, divided))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("task", ["classify", "instruct"])
def test_fine_tuning_with_fsdp_is_close_to_that_without(task, folder):
    one, parts = (folder / name / task for name in ("one", "parts"))
    assert read_losses(parts) == pytest.approx(read_losses(one), abs=1e-5)
    measured = [json.loads((run / "metrics.json").read_text())["eval_loss"] for run in (one, parts)]
    assert measured[0] == pytest.approx(measured[1], abs=1e-5)
    assert {path.name for path in one.iterdir()} == {path.name for path in parts.iterdir()}
