"""Time-limited training, with a learning-rate schedule that follows the clock."""

import copy
import time

import torch
from accelerate import PartialState
from torch import distributed
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainingArguments

from hfgpt.errors import InputError

PARTS = 1_000_000  # of the time, which the schedule counts instead of optimizer steps
MOST_STEPS = 1 << 31  # Trainer needs a limit


def without_step_limit(arguments: TrainingArguments, is_stream: bool) -> TrainingArguments:
    """The arguments for a Trainer that is to take as many steps as the time allows.

    Raises:
        InputError: The dataset is a stream, which Trainer would take for one endless epoch.
    """
    if is_stream:
        raise InputError("training.max_seconds needs a dataset with a length: set training.max_steps instead")
    arguments = copy.copy(arguments)
    arguments.max_steps = MOST_STEPS
    return arguments


class TimeLimit(TrainerCallback):
    """Stops training after the step that ends closest to `seconds`; evaluations and checkpoints in between count.

    The schedule is one of `PARTS` steps, whose current step is set by the clock; a checkpoint contains it, and so the
    time that was used before it. In several processes, the slowest clock counts.

    Args:
        seconds: Time from the first step to the last one, added up over the run and each time it was resumed.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.group = distributed.new_group(backend="gloo") if PartialState().num_processes > 1 else None

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        if not isinstance(lr_scheduler, LambdaLR):
            raise InputError(
                f"training.max_seconds is set, but the schedule {args.lr_scheduler_type.value} depends on more than "
                "the step: set training.lr_scheduler_type to another, such as linear"
            )
        self.first_step, self.used = state.global_step, lr_scheduler.last_epoch / PARTS * self.seconds
        self.began = time.monotonic() - self.used
        state.max_steps = state.global_step + 1  # at least; the next step tells more

    def on_optimizer_step(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        """Sets the schedule to the current time, and `max_steps` to the number of steps that the time allows."""
        elapsed = torch.tensor(time.monotonic() - self.began, dtype=torch.float64)
        if self.group is not None:
            distributed.all_reduce(elapsed, distributed.ReduceOp.MAX, self.group)
        step = state.global_step + 1  # Trainer counts it, and advances the schedule by one, after this
        if not getattr(optimizer, "step_was_skipped", False):  # in float16; Trainer then leaves the schedule as it is
            lr_scheduler.last_epoch = min(int(elapsed / self.seconds * PARTS), PARTS) - 1
        step_seconds = (elapsed.item() - self.used) / (step - self.first_step)
        state.max_steps = step + max(round((self.seconds - elapsed.item()) / step_seconds), 0)
