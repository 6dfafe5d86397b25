"""Training: the bare step (forward, backward, fused AdamW), and the whole loop of Trainer."""

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hfgpt.bench.measuring import (
    GPT2,
    HFGPT,
    Comparison,
    measure_in_turns,
    repetitions_within,
    run_python,
    synchronize,
)
from hfgpt.bench.models import BABY, GPT2_SMALL, SMALL, Shape, build_models, draw_ids, loss_of
from hfgpt.models import find_device
from hfgpt.training.arguments import HfGPTTrainingArguments
from hfgpt.training.flops import training_flops_per_token
from hfgpt.training.hardware import has_native_bf16
from hfgpt.training.trainer import HfGPTTrainer

SECONDS = 1.0  # of a measurement
WARM_UP = 3  # steps
LOOP = """
import json, sys
from hfgpt.bench.models import Shape
from hfgpt.bench.train import run_loop
name, shape, precision = json.loads(sys.argv[1])
print(run_loop(name, Shape(**shape), precision))
"""


class Clock(TrainerCallback):
    """Records when each step ends."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, *args, **kwargs):
        self.ends.append(time.perf_counter())


class BareStep:
    """Training steps of one contender, without Trainer.

    Args:
        model: The model.
        ids: A batch (B, T + 1).
        bf16: Mixed precision.
        compiled: Whether to compile the model, as is usual on an accelerator, where it takes a minute.
    """

    def __init__(self, model: nn.Module, ids: torch.Tensor, bf16: bool, compiled: bool = False):
        self.model, self.ids, self.bf16 = model.train(), ids, bf16
        if compiled:
            self.model.compile()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def take(self):
        precision = torch.autocast(self.ids.device.type, torch.bfloat16) if self.bf16 else nullcontext()
        with precision:
            loss = loss_of(self.model, self.ids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def measure(self, steps: int) -> float:
        """Tokens per second."""
        begun = time.perf_counter()
        for _ in range(steps):
            self.take()
        synchronize(self.ids.device)
        return steps * (self.ids.numel() - len(self.ids)) / (time.perf_counter() - begun)


def choose_shapes(device: torch.device) -> list[Shape]:
    """The shapes to train: on an accelerator, GPT-2 at its full context."""
    large = GPT2_SMALL if device.type == "cpu" else replace(GPT2_SMALL, length=1024, rows=16)
    return [SMALL, BABY, large]


def precisions(device: torch.device) -> list[str]:
    """float32, and the default of `hfgpt train` on this device."""
    return ["float32", "bfloat16"] if has_native_bf16(device) else ["float32"]


def loop_cases(device: torch.device) -> dict[str, dict[str, str]]:
    """Case -> contender -> precision: the same for both; and if hfgpt's default is not float32, each with its own."""
    known = precisions(device)
    same = {precision: dict.fromkeys((HFGPT, GPT2), precision) for precision in known}
    return same if len(known) == 1 else same | {"defaults": {HFGPT: "bfloat16", GPT2: "float32"}}


def measure_step(
    shape: Shape, precision: str, flops: float, device: torch.device, nanogpt: Path | None, advance: Callable
) -> list[Comparison]:
    """Compares the bare step with GPT-2's and, with the exact GELU of nanoGPT, with nanoGPT's.

    Args:
        shape: Model and batch.
        precision: float32, or bfloat16 (mixed).
        flops: FLOP/s of matrix products on this machine.
        device: Device.
        nanogpt: A checkout of nanoGPT.
        advance: Called after each measurement.
    """
    found = [_compare_steps(build_models(shape, device), shape, precision, flops, advance)]
    if nanogpt is not None:
        shape = replace(shape, name=f"{shape.name}, exact GELU", activation="gelu")
        models = build_models(shape, device, nanogpt)
        del models[GPT2]
        found.append(_compare_steps(models, shape, precision, flops, advance))
    return found


def _compare_steps(
    models: dict[str, nn.Module], shape: Shape, precision: str, flops: float, advance: Callable
) -> Comparison:
    device, bf16 = next(models[HFGPT].parameters()).device, precision == "bfloat16"
    ids = draw_ids(shape, device)
    steps = {name: BareStep(model, ids, bf16, compiled=device.type != "cpu") for name, model in models.items()}
    number = min(repetitions_within(SECONDS, step.take) for step in steps.values())
    values = measure_in_turns({name: partial(step.measure, number) for name, step in steps.items()}, advance)
    limit = flops / training_flops_per_token(shape.config(), shape.length)
    return Comparison("train", f"step, {shape.name}, {precision}", "tokens/s", values, limit=limit)


def measure_loop(
    shape: Shape, case: str, precisions: dict[str, str], flops: float, advance: Callable
) -> list[Comparison]:
    """Compares GPT-2 trained by `Trainer` with hfgpt trained by `HfGPTTrainer`, each in its own process.

    In one process, a trainer would use the memory that an earlier one has kept.

    Args:
        shape: Model and batch.
        case: Name of the comparison.
        precisions: Contender -> float32, or bfloat16 (mixed).
        flops: FLOP/s of matrix products on this machine, in the precision of hfgpt.
        advance: Called after each measurement.
    """

    def measure(name: str) -> float:
        return run_python(LOOP, json.dumps([name, asdict(shape), precisions[name]]))

    values = measure_in_turns({name: partial(measure, name) for name in precisions}, advance)
    limit = flops / training_flops_per_token(shape.config(), shape.length)
    return [Comparison("train", f"Trainer, {shape.name}, {case}", "tokens/s", values, limit=limit)]


def run_loop(name: str, shape: Shape, precision: str) -> float:
    """Trains one contender, and returns its tokens per second at the median time of a step."""
    device = find_device()
    model, clock = build_models(shape, device, only=name)[name], Clock()
    rows = torch.randint(shape.vocabulary, (64 * shape.rows, shape.length))
    data = [{"input_ids": row, "labels": row} for row in rows]
    number = min(repetitions_within(SECONDS, BareStep(model, draw_ids(shape, device), False).take), 40)
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder,
            "max_steps": WARM_UP + max(number, 3),
            "per_device_train_batch_size": shape.rows,
            "bf16": precision == "bfloat16",
            "torch_compile": device.type != "cpu",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "learning_rate": 1e-5,
            "use_cpu": device.type == "cpu",
            "dataloader_pin_memory": device.type != "cpu",
        }
        if name == HFGPT:
            arguments = HfGPTTrainingArguments(**settings)
            trainer = HfGPTTrainer(model, arguments, train_dataset=data, callbacks=[clock])
        else:
            arguments = TrainingArguments(**settings)
            trainer = Trainer(model, arguments, default_data_collator, data, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    seconds = statistics.median(after - before for before, after in itertools.pairwise(clock.ends[WARM_UP - 1 :]))
    return shape.rows * shape.length / seconds
