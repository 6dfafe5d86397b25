"""Speed of a training: tokens per second, model FLOPs utilization (MFU), memory and remaining time."""

import time
from collections.abc import Mapping
from datetime import timedelta

import torch
from transformers import TrainerCallback

from hfgpt.training.hardware import peak_memory_bytes


class SpeedMeter(TrainerCallback):
    """Measures between two logging steps, by the clock alone: Trainer then waits for the device to read the loss.

    Args:
        tokens_per_step: Tokens predicted per optimizer step, over all devices, on average.
        flops_per_token: FLOPs of the model per token, forward and backward.
        peak_flops: Peak FLOP/s of all devices together; None: unknown.
        device: The device of this process, whose memory is reported.
    """

    def __init__(self, tokens_per_step: int, flops_per_token: float, peak_flops: float | None, device: torch.device):
        self.tokens_per_step, self.flops_per_token = tokens_per_step, flops_per_token
        self.peak_flops, self.device = peak_flops, device

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step = self.last_step = state.global_step
        self.began = self.since = time.perf_counter()

    def leave_out(self, seconds: float):
        """Leaves out the time of an evaluation or of a checkpoint, except in the remaining time."""
        self.since += seconds

    def measure(self, step: int, max_steps: int) -> dict[str, float]:
        """The values to log, since the last call; names as in transformers' `speed_metrics`, with `train_`.

        Args:
            step: Optimizer steps taken.
            max_steps: Optimizer steps of the run.

        Returns:
            Tokens per second over all devices, MFU as a fraction (left out if the peak is unknown), peak memory of
            this process in bytes, and the remaining seconds, with evaluations and checkpoints.
        """
        now = time.perf_counter()
        rate = (step - self.last_step) * self.tokens_per_step / max(now - self.since, 1e-9)
        values = {
            "train_tokens_per_second": rate,
            "train_peak_memory_bytes": peak_memory_bytes(self.device),
            "train_seconds_left": (now - self.began) / max(step - self.first_step, 1) * (max_steps - step),
        }
        if self.peak_flops:
            values["train_mfu"] = rate * self.flops_per_token / self.peak_flops
        self.last_step, self.since = step, now
        return values


def describe_speed(values: Mapping[str, float]) -> str:
    """Logged speed and memory in one line; empty if they were not measured."""
    if "train_tokens_per_second" not in values:
        return ""
    mfu = f"{values['train_mfu']:.1%}" if "train_mfu" in values else "n/a"
    memory = values["train_peak_memory_bytes"] / 2**30
    return f"{values['train_tokens_per_second']:,.0f} tokens/s  MFU {mfu}  memory {memory:.2f} GiB"


def describe_time_left(values: Mapping[str, float]) -> str:
    """The remaining time as in `1:02:03 left`; empty if it was not measured."""
    if "train_seconds_left" not in values:
        return ""
    return f"{timedelta(seconds=round(values['train_seconds_left']))} left"
