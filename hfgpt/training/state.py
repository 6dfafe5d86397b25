"""The state of Trainer in a checkpoint, checked when it is loaded."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState

from hfgpt.errors import InputError
from hfgpt.models import fact_of
from hfgpt.training.checkpoints import step_of
from hfgpt.training.optimizers import MuonWithAdamW


@contextmanager
def readable_checkpoint(checkpoint: str | None) -> Iterator[None]:
    """Turns errors of torch, safetensors and json on an invalid checkpoint into one line."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, OSError):
        raise  # errors of the machine
    # Hand-made files, checksums included, can raise anything.
    except Exception as error:
        raise InputError(
            f"cannot resume from the checkpoint '{checkpoint}' ({fact_of(error)}): remove it to resume from the "
            "previous one"
        ) from error


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The settings of each parameter group that come from the recipe; the learning rate comes from the schedule."""
    varying = ("params", "lr", "initial_lr")
    return [{name: value for name, value in group.items() if name not in varying} for group in optimizer.param_groups]


def check_schedule(scheduler: torch.optim.lr_scheduler.LRScheduler, rates: list[float]):
    """Checks that a loaded schedule gives the learning rates of the recipe; `rates` are its base rates."""
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):  # its rates depend on metrics
        return
    if scheduler.base_lrs != rates:
        raise ValueError(f"base_lrs of its schedule is {scheduler.base_lrs!r}, not {rates}")
    factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    scheduled = [rate * factor for rate, factor in zip(rates, factors, strict=True)]
    saved = [group["lr"] for group in scheduler.optimizer.param_groups]
    for name, found in (("lr of its optimizer", saved), ("_last_lr of its schedule", scheduler.get_last_lr())):
        if not all(map(math.isclose, found, scheduled)) or len(found) != len(scheduled):
            raise ValueError(f"{name} is {found!r}, not {scheduled}")


def check_moments(optimizer: torch.optim.Optimizer):
    """Checks the shapes of the optimizer state, which Adam's fused kernel reads without checking."""
    if not isinstance(optimizer, torch.optim.Adam | MuonWithAdamW):
        return
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            shape = () if name == "step" else parameter.shape
            if value.shape != shape or not (value.is_contiguous() or value.stride() == parameter.stride()):
                raise ValueError(f"{name} of its optimizer has the shape {tuple(value.shape)}, not {tuple(shape)}")


def read_state(checkpoint: Path) -> TrainerState:
    """The validated trainer state in a checkpoint."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if state.global_step != step_of(checkpoint):
        raise ValueError(f"global_step in trainer_state.json is {state.global_step}, not {step_of(checkpoint)}")
    for name in ("logging_steps", "eval_steps", "save_steps", "epoch", "total_flos", "num_input_tokens_seen"):
        value = getattr(state, name)
        if not _is_number(value) or not 0 <= value < math.inf or (value == 0 and name.endswith("_steps")):
            raise ValueError(f"{name} in trainer_state.json is {value!r}")
    for name in ("best_metric", "best_global_step", "train_batch_size"):
        if not (getattr(state, name) is None or _is_number(getattr(state, name))):
            raise ValueError(f"{name} in trainer_state.json is {getattr(state, name)!r}")
    if not isinstance(state.stateful_callbacks, dict) or "TrainerControl" not in state.stateful_callbacks:
        raise ValueError("stateful_callbacks in trainer_state.json has no TrainerControl")
    if not isinstance(state.best_model_checkpoint, str | None):
        raise ValueError(f"best_model_checkpoint in trainer_state.json is {state.best_model_checkpoint!r}")
    for row in state.log_history:
        if not all(map(_is_number, [row["step"], *row.values()])):
            raise ValueError(f"log_history in trainer_state.json has the entry {row!r}")
    return state


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
