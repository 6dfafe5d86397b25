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
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainerCallback
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


@dataclass
class StepBatches(Sampler[np.ndarray]):
    """The batches of one process: a step is divided into batches, and each process takes consecutive ones.

    Batch i of a step has the same rows for any number of processes. On several processes, each takes a power of two of
    batches, so that sums of gradients are those of a single process (see `hfgpt.training.gradients`). A process that
    has fewer batches takes a row whose index is inverted (~index) and whose labels are ignored instead.

    Args:
        order: The order of the rows.
        batch_size: Most rows in a batch.
        rows_per_step: Rows of an optimizer step, in all processes.
        processes: Number of processes.
        index: Index of this process.
        drop_last: Whether to leave out the rows at the end of an epoch that do not fill a batch.
    """

    order: RowOrder
    batch_size: int
    rows_per_step: int
    processes: int = 1
    index: int = 0
    drop_last: bool = False
    epoch: int = 0

    def set_epoch(self, epoch: int):
        """Selects the epoch whose batches are iterated over."""
        self.epoch = epoch

    @property
    def steps(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-self.rows // self.rows_per_step)

    @property
    def rows(self) -> int:
        """Rows of an epoch."""
        return self.order.rows // self.batch_size * self.batch_size if self.drop_last else self.order.rows

    def __len__(self) -> int:
        steps, rest = divmod(self.rows, self.rows_per_step)
        return steps * self._rounds(self.rows_per_step) + self._rounds(rest)

    def __iter__(self) -> Iterator[np.ndarray]:
        order = self.order.of_epoch(self.epoch)[: self.rows]
        for start in range(0, self.rows, self.rows_per_step):
            step = order[start : start + self.rows_per_step]
            rounds = self._rounds(len(step))
            for batch in range(self.index * rounds, (self.index + 1) * rounds):
                first = batch * self.batch_size
                yield step[first : first + self.batch_size] if first < len(step) else ~step[:1]

    def _rounds(self, rows: int) -> int:
        return count_rounds(rows, self.batch_size, self.processes)


def count_rounds(rows: int, batch_size: int, processes: int) -> int:
    """Number of batches that each process takes for a step of `rows` rows."""
    rounds = -(-rows // (batch_size * processes))
    return rounds if processes == 1 or not rounds else 1 << (rounds - 1).bit_length()


class StepRows(Dataset):
    """Rows by index; an inverted index gives the row with all labels ignored."""

    def __init__(self, rows: Any):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: np.ndarray) -> list[Mapping[str, Any]]:
        if indices[0] < 0:
            return [_without_labels(self.rows[int(~index)]) for index in indices]
        if hasattr(self.rows, "__getitems__"):
            return self.rows.__getitems__(indices.tolist())
        return [self.rows[index] for index in indices.tolist()]


class EpochCallback(TrainerCallback):
    """Sets the epoch by the optimizer steps taken; Trainer counts batches, which depend on the number of processes.

    Args:
        steps: Optimizer steps in an epoch.
    """

    def __init__(self, steps: int):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        epochs, steps = divmod(state.global_step - 1, self.steps)
        state.epoch = epochs + (steps + 1) / self.steps


class StepLoader(DataLoader):
    """A DataLoader over `StepRows` whose batches depend on the epoch."""

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


def _without_labels(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _ignored(value) if name in ("labels", "shift_labels") else value for name, value in row.items()}


def _ignored(value: Any) -> Any:
    if torch.is_tensor(value):
        return torch.full_like(value, IGNORED)
    return [IGNORED] * len(value) if isinstance(value, Sequence) else IGNORED
