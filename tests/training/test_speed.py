"""Speed, MFU, memory and remaining time of a training."""

import time
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerState

from hfgpt.runs import training
from hfgpt.training.flops import training_flops_per_token
from hfgpt.training.hardware import PEAK_TFLOPS, PRECISIONS, find_peak_flops, process_memory_bytes
from hfgpt.training.speed import SpeedMeter, describe_speed, describe_time_left

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """The value of `time.perf_counter`, set by the test."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(time, "perf_counter", lambda: now.seconds)
    return now


def test_speed_is_that_since_the_last_logging_step(clock):
    meter = SpeedMeter(tokens_per_step=512, flops_per_token=1e6, peak_flops=1e9, device=CPU)
    meter.on_train_begin(None, TrainerState(global_step=6), None)  # resumed
    clock.seconds += 4
    values = meter.measure(8, max_steps=16)
    assert values["train_tokens_per_second"] == 2 * 512 / 4
    assert values["train_mfu"] == 256 * 1e6 / 1e9
    assert values["train_seconds_left"] == 4 / 2 * 8
    assert values["train_peak_memory_bytes"] >= process_memory_bytes() / 2
    # An evaluation of 3 seconds is not part of the speed of training, but of the remaining time.
    clock.seconds += 3
    meter.leave_out(3)
    clock.seconds += 2
    values = meter.measure(12, max_steps=16)
    assert values["train_tokens_per_second"] == 4 * 512 / 2
    assert values["train_seconds_left"] == (4 + 3 + 2) / 6 * 4


def test_mfu_is_not_available_without_a_peak(clock):
    meter = SpeedMeter(tokens_per_step=512, flops_per_token=1e6, peak_flops=None, device=CPU)
    meter.on_train_begin(None, TrainerState(), None)
    clock.seconds += 1
    values = meter.measure(1, max_steps=3601)
    assert "train_mfu" not in values
    values["train_peak_memory_bytes"] = 3 * 2**29
    assert describe_speed(values) == "512 tokens/s  MFU n/a  memory 1.50 GiB"
    assert describe_speed(values | {"train_mfu": 0.4567}) == "512 tokens/s  MFU 45.7%  memory 1.50 GiB"
    assert describe_time_left(values) == "1:00:00 left"
    assert describe_speed({"loss": 1.0}) == describe_time_left({"loss": 1.0}) == ""


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H200", "tf32", 494.7),
        ("NVIDIA A100-SXM4-80GB", "float32", 19.5),
        ("A100-PCIE-40GB", "bfloat16", 312),
        ("NVIDIA L4", "float16", 121),
        ("NVIDIA L40S", "float16", 362),
        ("Tesla T4", "float16", 65),
        ("Tesla T4", "bfloat16", None),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("AMD Instinct MI300X", "bfloat16", 1307.4),
    ],
)
def test_the_peak_of_a_device(name, precision, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = find_peak_flops(torch.device("cuda"), precision)
    assert peak == (tflops and pytest.approx(tflops * 1e12))


def test_the_peak_of_a_cpu_is_unknown():
    assert find_peak_flops(CPU, "float32") is None


@pytest.mark.parametrize("frozen", [False, True])
def test_mfu_is_relative_to_all_devices_and_needs_all_weights_to_be_trained(
    frozen, make_model, make_trainer, monkeypatch
):
    monkeypatch.setattr(training, "find_peak_flops", lambda device, precision: {"bfloat16": 5e12}[precision])
    trainer = make_trainer(make_model(), bf16=True)
    trainer.model.model.norm.weight.requires_grad = not frozen
    monkeypatch.setattr(type(trainer.args), "world_size", 4)
    meter = training.build_meter(trainer, SimpleNamespace(tokens_per_step=7, flops_per_token=8.0))
    assert (meter.tokens_per_step, meter.flops_per_token) == (7, 8.0)
    assert meter.peak_flops == (None if frozen else 4 * 5e12)


def test_each_device_is_listed_once_and_narrower_types_are_not_slower():
    names = [name for group in PEAK_TFLOPS for name in group]
    assert len(names) == len(set(names))
    for peaks in PEAK_TFLOPS.values():
        bfloat16, float16, tf32, float32 = dict(zip(PRECISIONS, peaks, strict=True)).values()
        assert float16 > float32 > 0
        assert bfloat16 in (0, float16)
        assert tf32 == 0 or float32 <= tf32 <= float16


def test_a_trainer_logs_the_speed_of_its_steps(make_model, make_blocks, make_trainer, clock):
    """Each step takes 2 seconds, and each evaluation 10, which are only part of the remaining time."""

    def measure(*arguments, **options):
        clock.seconds += 10
        return SimpleNamespace(to_dict=lambda prefix: {f"{prefix}_loss": 1.0})

    model, blocks = make_model(), make_blocks(300)
    options = {"max_steps": 6, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(model, blocks, eval_dataset=blocks, per_device_train_batch_size=2, **options)
    flops = training_flops_per_token(model.config, 16)
    trainer.measure, trainer.speed = measure, SpeedMeter(32, flops, peak_flops=1e12, device=CPU)
    trainer.add_callback(trainer.speed)
    step = trainer.training_step

    def slow_step(*arguments, **options):
        clock.seconds += 2
        return step(*arguments, **options)

    trainer.training_step = slow_step
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4, 6]
    assert [entry["train_tokens_per_second"] for entry in entries] == [16, 16, 16]
    assert [entry["train_mfu"] for entry in entries] == [16 * flops / 1e12] * 3
    assert [entry["train_seconds_left"] for entry in entries] == [4 / 2 * 4, (4 + 10 + 4) / 4 * 2, 0]
