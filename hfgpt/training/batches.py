"""The rows of each optimizer step: a function of seed, epoch and step, for any number of processes.

Trainer's own batches depend on the number of processes: accelerate repeats rows at the end of an epoch until all
processes have equally many batches, and `group_by_length` draws from the global random state.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from hfgpt.data.blocks import IGNORED


@dataclass
class RowOrder:
    """The order of the training rows in an epoch.

    Args:
        rows: Number of rows.
        seed: Seed of the random order.
        strategy: `random`, `sequential` or `group_by_length`.
        lengths: Number of tokens of each row, for `group_by_length`.
        rows_per_step: Rows of similar length to group together, for `group_by_length`.
    """

    rows: int
    seed: int
    strategy: str = "random"
    lengths: Sequence[int] | None = None
    rows_per_step: int = 1

    def of_epoch(self, epoch: int) -> np.ndarray:
        """The indices of all rows."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        if self.strategy == "sequential":
            return np.arange(self.rows)
        if self.strategy == "group_by_length":
            return np.array(get_length_grouped_indices(self.lengths, self.rows_per_step, generator=generator))
        return torch.randperm(self.rows, generator=generator).numpy()


class StepBatches(Sampler[list[int]]):
    """The batches of one process: a step is divided into batches, and each process takes consecutive ones.

    Batch i of a step has the same rows for any number of processes. A process that has fewer batches than the others
    takes the first row of the step in place of each missing one; its loss must not count.

    Args:
        order: The order of the rows.
        arguments: An `HfGPTTrainingArguments`: batch size, rows per step, number of processes.
    """

    def __init__(self, order: RowOrder, arguments: TrainingArguments):
        self.order, self.arguments, self.epoch = order, arguments, 0
        left_out = order.rows % arguments.per_device_train_batch_size if arguments.dataloader_drop_last else 0
        self.rows = order.rows - left_out
        self.steps = -(-self.rows // arguments.rows_per_step)

    def set_epoch(self, epoch: int):
        """Selects the epoch whose batches are iterated over."""
        self.epoch = epoch

    def __len__(self) -> int:
        steps, rest = divmod(self.rows, self.arguments.rows_per_step)
        rounds = [count_rounds(self.arguments, rows) for rows in (self.arguments.rows_per_step, rest)]
        return steps * rounds[0] + rounds[1]

    def __iter__(self) -> Iterator[list[int]]:
        order, size = self.order.of_epoch(self.epoch)[: self.rows], self.arguments.per_device_train_batch_size
        for start in range(0, self.rows, self.arguments.rows_per_step):
            step = order[start : start + self.arguments.rows_per_step]
            rounds = count_rounds(self.arguments, len(step))
            first = self.arguments.data_index * rounds * size
            for place in range(first, first + rounds * size, size):
                yield (step[place : place + size] if place < len(step) else step[:1]).tolist()

    def count_batches(self, step: int) -> int:
        """Number of batches with different rows in an optimizer step of the run, over all processes."""
        start = step % self.steps * self.arguments.rows_per_step
        rows = min(self.rows - start, self.arguments.rows_per_step)
        return -(-rows // self.arguments.per_device_train_batch_size)


def count_rounds(arguments: TrainingArguments, rows: int) -> int:
    """Number of batches that each process takes for a step of `rows` rows.

    With a global batch size, on a CPU, it is a power of two, so that the sums of gradients are those of one process
    (see `hfgpt.training.gradients`).
    """
    processes = arguments.data_processes
    rounds = -(-rows // (arguments.per_device_train_batch_size * processes))
    if rounds and processes > 1 and arguments.global_batch_size is not None and arguments.device.type == "cpu":
        return 1 << (rounds - 1).bit_length()
    return rounds


def ignore_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch without labels to learn."""
    names = {"labels", "shift_labels"} & batch.keys()
    return {**batch, **{name: torch.full_like(batch[name], IGNORED) for name in names}}


class EpochCallback(TrainerCallback):
    """Sets the epoch by the optimizer steps taken; Trainer counts batches, which depend on the number of processes.

    Args:
        steps: Optimizer steps in an epoch.
        rows: The dataset, which may depend on the epoch.
    """

    def __init__(self, steps: int, rows: Any):
        self.steps, self.rows = steps, rows

    def on_epoch_begin(self, args, state, control, **kwargs):
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(state.global_step // self.steps)

    def on_step_end(self, args, state, control, **kwargs):
        epochs, steps = divmod(state.global_step - 1, self.steps)
        state.epoch = epochs + (steps + 1) / self.steps


class StepLoader(DataLoader):
    """A DataLoader whose batches depend on the epoch."""

    def set_epoch(self, epoch: int):
        """Selects the epoch whose batches are iterated over."""
        self.batch_sampler.set_epoch(epoch)


def draw_seed(seed: int, step: int, batch: int) -> int:
    """The seed of dropout and other draws for one batch of an optimizer step.

    Args:
        seed: Seed of the run.
        step: Steps before this one.
        batch: Index of the batch in its step, over all processes.
    """
    digest = hashlib.blake2b(f"{seed}:{step}:{batch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1  # torch takes 63 bits
