"""Estimates compared with real runs: weights, optimizer state, steps, FLOPs; and probes without side effects."""

import contextlib
import copy
import math
import os
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import set_seed

from hfgpt.commands.plan import render_plan
from hfgpt.configuration_hfgpt import HfGPTConfig
from hfgpt.errors import InputError
from hfgpt.modeling_hfgpt import HfGPTForCausalLM
from hfgpt.training import estimate as module
from hfgpt.training import hardware
from hfgpt.training.arguments import HfGPTTrainingArguments
from hfgpt.training.estimate import describe_steps, describe_time, estimate_run, plan_run, probe_tokens_per_second
from hfgpt.training.flops import count_matrix_parameters, training_flops_per_token


@pytest.fixture
def make_arguments(tmp_path):
    def build(**arguments) -> HfGPTTrainingArguments:
        defaults = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "bf16": False}
        return HfGPTTrainingArguments(**{**defaults, **arguments})

    return build


def test_flops_follow_the_published_convention():
    # Six FLOPs per weight except position embeddings (123.65M), plus attention: 0.855 GFLOP per token.
    layers, width, length = 12, 768, 1024
    convention = 6 * 123_653_376 + 12 * layers * width * length
    assert convention == pytest.approx(0.855e9, rel=1e-3)
    # The convention also counts biases and norms, which are not matrices but added or multiplied once: 0.1 %.
    vectors = layers * (3 * width + width + 4 * width + width + 4 * width) + 2 * width
    config = HfGPTConfig()
    assert 6 * vectors < 0.001 * convention
    assert training_flops_per_token(config, length) + 6 * vectors == convention
    with torch.device("meta"):
        model = HfGPTForCausalLM(config)
    assert model.num_parameters() == count_matrix_parameters(config) + vectors + 1024 * width


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": False, "intermediate_size": 48}])
def test_flops_equal_those_counted_by_pytorch(fields, make_model):
    # Eager attention, because fused kernels compute some products twice in the backward pass.
    model = make_model(attn_implementation="eager", **fields)
    ids = torch.zeros(3, 20, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    assert counter.get_total_flops() == ids.numel() * training_flops_per_token(model.config, 20)


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": False}])
@pytest.mark.parametrize("muon", [None, 0.02])
def test_parameters_and_optimizer_state_are_those_of_a_run(fields, muon, make_model, make_trainer, make_arguments):
    model = make_model(**fields)
    model.model.embed_positions.weight.requires_grad_(False)
    estimate = estimate_run(model, make_arguments(muon_learning_rate=muon), 16, 100)
    trainable = {id(p): p for p in model.parameters() if p.requires_grad}
    assert estimate.parameters == sum(p.numel() for p in trainable.values())
    optimizer = make_trainer(model, muon_learning_rate=muon).create_optimizer()
    ids = torch.arange(16)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert estimate.weights_bytes == sum(p.nbytes for p in model.parameters())
    assert estimate.gradients_bytes == sum(p.grad.nbytes for p in trainable.values())
    states = [item for state in optimizer.state.values() for item in state.items()]
    averages = [tensor for name, tensor in states if name != "step"]  # a single number per parameter tensor
    assert estimate.optimizer_bytes == sum(tensor.nbytes for tensor in averages)


@pytest.mark.parametrize("fields", [{}, {"attn_implementation": "eager"}, {"num_hidden_layers": 6}], ids=str)
def test_activations_are_about_what_autograd_saves(fields, make_model, make_arguments):
    model = make_model(**fields)
    estimate = estimate_run(model, make_arguments(per_device_train_batch_size=4), 32, 100)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.zeros(4, 32, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    assert loss.requires_grad
    # A rule of thumb for planning: within 30 %.
    assert estimate.activations_bytes == pytest.approx(sum(kept.values()), rel=0.3)


@pytest.mark.parametrize(
    "options",
    [
        {"num_train_epochs": 1},
        {"num_train_epochs": 3, "per_device_train_batch_size": 4},
        {"num_train_epochs": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"num_train_epochs": 2, "per_device_train_batch_size": 4, "dataloader_drop_last": True},
        {"num_train_epochs": 1.5, "per_device_train_batch_size": 4},
        {
            "num_train_epochs": 1,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "dataloader_drop_last": True,
        },
        {"per_device_train_batch_size": 64, "num_train_epochs": 2},
        {"max_steps": 7},
    ],
    ids=str,
)
def test_steps_are_those_trainer_takes(options, make_model, make_blocks, make_trainer):
    blocks = make_blocks(11 * 16 + 1)
    assert len(blocks) == 11
    trainer = make_trainer(make_model(), blocks, **options)
    estimate = estimate_run(trainer.model, trainer.args, 16, len(blocks))
    taken = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    assert estimate.steps == taken
    # On average over an epoch, whose last step has fewer rows.
    sizes = [batch["input_ids"].numel() for batch in trainer.get_train_dataloader()]
    steps_per_epoch = -(-len(sizes) // trainer.args.gradient_accumulation_steps)
    assert estimate.tokens_per_step == round(sum(sizes) / steps_per_epoch)
    assert estimate.tokens == taken * estimate.tokens_per_step


def test_derived_numbers(make_model, make_arguments):
    model, arguments = make_model(), make_arguments(max_steps=5, per_device_train_batch_size=2)
    estimate = estimate_run(model, arguments, 16, 100)
    assert estimate.seconds is None
    assert estimate.device is None
    assert estimate.flops_per_token == training_flops_per_token(model.config, 16)
    assert estimate.flops == 5 * 2 * 16 * estimate.flops_per_token
    estimate.tokens_per_second = 32.0
    assert estimate.seconds == 5
    parts = ("weights", "gradients", "optimizer", "activations")
    written = estimate.to_dict()
    assert written["memory_bytes"] == sum(written[f"{part}_bytes"] for part in parts)
    assert (written["tokens"], written["seconds"], written["flops"]) == (160, 5, estimate.flops)


@pytest.mark.parametrize("options", [{}, {"muon_learning_rate": 0.02}, {"eval_strategy": "steps"}], ids=str)
def test_probe_changes_nothing(options, make_model, make_arguments):
    model, arguments = make_model(embd_pdrop=0.1).eval(), make_arguments(max_steps=5, **options)
    set_seed(3)
    weights, before = copy.deepcopy(model.state_dict()), (model.config.to_dict(), arguments.to_dict())
    random_states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    speed = probe_tokens_per_second(model, arguments, 16, seconds=0.05)
    assert 0 < speed < math.inf
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training
    assert (model.config.to_dict(), arguments.to_dict()) == before
    found = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    unchanged = [state == other for state, other in zip(found, random_states, strict=True)]
    assert dict(zip(("random", "numpy", "torch"), unchanged, strict=True)) == dict.fromkeys(
        ("random", "numpy", "torch"), True
    )
    # Trainer creates the run folder when it is constructed; a plan writes nothing.
    assert not Path(arguments.output_dir).exists()


def test_the_first_batch_of_each_size_is_a_warm_up(monkeypatch):
    now, sizes = [0.0], []
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    class Model:
        device, config = torch.device("cpu"), SimpleNamespace(vocab_size=8, problem_type=None)

        def __call__(self, input_ids, **kwargs):
            rows = len(input_ids)
            now[0] += rows * (0.01 if rows in sizes else 1)
            sizes.append(rows)
            return SimpleNamespace(loss=torch.ones((), requires_grad=True))

    trainer = SimpleNamespace(
        args=SimpleNamespace(per_device_train_batch_size=6),
        accelerator=SimpleNamespace(autocast=contextlib.nullcontext),
        skips_logits=True,
    )
    assert module._time_row(trainer, Model(), 4, seconds=0.3) == pytest.approx(0.01)
    assert sizes == [1, 1, 2, 2, 4, 4, 6, 6]
    now[0], sizes[:] = 0, []
    assert module._time_row(trainer, Model(), 4, seconds=0.1) == pytest.approx(0.01)
    assert sizes == [1, 1, 2, 2]


def test_a_plan_combines_an_estimate_and_a_probe(make_model, make_arguments, monkeypatch):
    given = []
    monkeypatch.setattr(module, "probe_tokens_per_second", lambda *arguments: given.append(arguments) or 100.0)
    model, arguments = make_model(), make_arguments(max_steps=5)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    monkeypatch.setattr(module, "process_memory_bytes", lambda: 500_000_000 + weights)
    plan, estimate = plan_run(model, arguments, 16, 100, seconds=0.25), estimate_run(model, arguments, 16, 100)
    assert given == [(model, arguments, 16, 0.25)]
    assert plan.tokens_per_second == 100
    assert plan.device == hardware.describe_device(torch.device("cpu"))
    assert plan.process_bytes == 500_000_000
    assert plan.memory_bytes == estimate.memory_bytes + 500_000_000
    estimate.tokens_per_second, estimate.device = plan.tokens_per_second, plan.device
    estimate.process_bytes = plan.process_bytes
    assert plan == estimate


def test_a_plan_says_what_its_memory_includes(make_model, make_arguments):
    estimate = estimate_run(make_model(), make_arguments(max_steps=5), 16, 100)
    estimate.tokens_per_second, estimate.device = 100.0, "CPU"
    on_device = re.sub(" +", " ", render_plan(estimate))
    assert f"memory: total {estimate.memory_bytes / 2**20:.1f} MiB on the device, excluding its context" in on_device
    assert "libraries" not in on_device
    estimate.process_bytes = 600 * 2**20
    shown = re.sub(" +", " ", render_plan(estimate))
    assert "memory: libraries and data 600.0 MiB (this process now)" in shown
    assert f"memory: total {estimate.memory_bytes / 2**20:.1f} MiB\n" in shown


def test_a_plan_says_what_each_process_holds(make_model, make_arguments, monkeypatch):
    model = make_model()
    fields = {"global_batch_size": 24, "per_device_train_batch_size": 4}
    alone = estimate_run(model, make_arguments(**fields), 16, 100)
    assert (alone.processes, alone.rows_per_process, alone.gathered_bytes) == (1, 24, 0)
    monkeypatch.setattr(HfGPTTrainingArguments, "world_size", 4)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    whole, part = (estimate_run(model, make_arguments(fsdp=fsdp, **fields), 16, 100) for fsdp in (False, True))
    assert (whole.processes, whole.rows_per_process) == (part.processes, part.rows_per_process) == (4, 8)
    for name in ("weights_bytes", "gradients_bytes", "optimizer_bytes"):
        assert getattr(whole, name) == getattr(alone, name) == 4 * getattr(part, name)
    assert (part.steps, part.activations_bytes) == (whole.steps, whole.activations_bytes)
    assert part.gathered_bytes == whole.weights_bytes, "both of its blocks, the embeddings and the last norm"
    deep = make_model(num_hidden_layers=6)
    outside = deep.num_parameters() - sum(weight.numel() for weight in deep.model.layers.parameters())
    block = sum(weight.numel() for weight in deep.model.layers[0].parameters())
    assert estimate_run(deep, make_arguments(fsdp=True), 16, 100).gathered_bytes == 4 * (outside + 2 * block)

    monkeypatch.setattr(module, "probe_tokens_per_second", lambda *args: 100.0)
    shown = re.sub(" +", " ", render_plan(plan_run(model, make_arguments(**fields), 16, 100)))
    assert "processes 4, each with the whole model; memory is that of each\n" in shown
    assert "rows per step at most 8 in each process\n" in shown
    assert "gathered" not in shown
    # If the benchmark has no memory for the whole model, the run may still have enough for its part.
    monkeypatch.setattr(module, "probe_tokens_per_second", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError))
    estimate = plan_run(model, make_arguments(fsdp=True, **fields), 16, 100)
    assert (estimate.tokens_per_second, estimate.seconds) == (None, None)
    shown = re.sub(" +", " ", render_plan(estimate))
    assert "processes 4, each with a part of the model; memory is that of each\n" in shown
    assert "memory: gathered weights 0." in shown
    assert "speed unknown on" in shown
    assert "time unknown, not including" in shown
    assert describe_time(estimate).startswith("time unknown, since the benchmark needs the whole model on one device")
    with pytest.raises(InputError, match="has too little memory for 4 rows at once: set training"):
        plan_run(model, make_arguments(**fields), 16, 100)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 4},
            "has too little memory for 6 rows at once: set training.per_device_train_batch_size to 3 and "
            "training.global_batch_size to 24, without gradient_accumulation_steps, for steps of as many rows; or set "
            "training.gradient_checkpointing to true; or train a smaller model or shorter rows",
        ),
        (
            {"per_device_train_batch_size": 1, "gradient_checkpointing": True},
            "has too little memory for 1 row at once: train a smaller model or shorter rows",
        ),
    ],
)
def test_too_little_memory_is_explained(fields, message, make_arguments):
    for allocate in (lambda: torch.empty(2**60, dtype=torch.uint8), lambda: b" " * 2**60):
        with pytest.raises(InputError) as caught, module.explained_memory(make_arguments(**fields)):
            allocate()
        assert str(caught.value).endswith(message)
    with pytest.raises(RuntimeError, match=r"^another$"), module.explained_memory(make_arguments()):
        raise RuntimeError("another")


@pytest.mark.parametrize(
    ("capabilities", "native"),
    [
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True, "avx512_bf16": False}, True),
        ({"bf16": True}, True),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, False),
        ({}, False),
    ],
    ids=str,
)
def test_native_bf16_on_a_cpu(capabilities, native, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert hardware.has_native_bf16(torch.device("cpu")) is native
    # Without oneDNN nothing uses the instructions.
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert hardware.has_native_bf16(torch.device("cpu")) is False


def test_native_bf16_on_other_devices(monkeypatch):
    asked = {}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: asked.update(options) or True)
    assert hardware.has_native_bf16(torch.device("cuda")) is True
    assert asked == {"including_emulation": False}
    assert hardware.has_native_bf16(torch.device("mps")) is False


def test_devices_have_names(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "AMD EPYC"})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert hardware.describe_device(torch.device("cpu")) == "CPU AMD EPYC, 2 threads"
    assert hardware.describe_device(torch.device("mps")) == "mps"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert hardware.describe_device(torch.device("cuda")) == "NVIDIA H200"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux shows the same number elsewhere")
def test_peak_memory_is_that_of_the_process():
    found = hardware.peak_memory_bytes(torch.device("cpu"))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    # The kernel updates its counters with a delay, and a new process inherits the peak of its parent.
    assert 0.99 < found / (int(status["VmHWM"].split()[0]) * 1024) < 100
    now = hardware.process_memory_bytes()
    assert now <= found


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux can reset the peak")
def test_the_peak_can_be_reset():
    assert len(b"x" * 2**28) == 2**28
    before = hardware.peak_memory_bytes(torch.device("cpu"))
    assert hardware.reset_peak_memory(torch.device("cpu"))
    assert hardware.peak_memory_bytes(torch.device("cpu")) < before - 2**27


def test_if_the_peak_cannot_be_reset_it_is_that_of_the_process(monkeypatch):
    """As on macOS."""
    monkeypatch.setattr(hardware.sys, "platform", "darwin")
    monkeypatch.setattr(hardware.Path, "write_text", lambda self, text: (_ for _ in ()).throw(FileNotFoundError))
    assert not hardware.reset_peak_memory(torch.device("cpu"))
    assert hardware.process_memory_bytes() == hardware.peak_memory_bytes(torch.device("cpu")) > 0


def test_a_time_limit_allows_the_steps_of_the_measured_speed(make_model, make_arguments, monkeypatch):
    monkeypatch.setattr(module, "probe_tokens_per_second", lambda *args: 3200.0)
    estimate = plan_run(make_model(), make_arguments(max_seconds=20.0), block_size=16, blocks=100)
    assert estimate.tokens_per_step == 123  # 13 steps of at most 8 rows per epoch of 100
    assert estimate.steps == round(20 * 3200 / 123)
    assert estimate.seconds == pytest.approx(20, rel=0.01)
    assert describe_steps(estimate) == "520 steps of 123 tokens on average"
