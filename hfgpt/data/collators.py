"""Rows -> tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

IGNORED = -100


@dataclass
class PaddingCollator:
    """Pads rows on the right to the longest of the batch, and marks by a mask what is padding, whatever id it has.

    A row has `input_ids`, and may have `labels` (one id a token, or one for the row), `shift_labels` and
    `position_ids`; other columns are left out. Which tokens are learned is the labels' matter alone: the padding token
    may be the end-of-text token, which stays a target where it ends a text.

    Args:
        pad_token_id: What fills `input_ids`; labels are filled with -100, positions with 0.
        pad_to_multiple_of: Rounds the length up, for hardware that likes it.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Rows of any lengths -> tensors (B, T) or, for one label a row, (B)."""
        longest = max(len(row["input_ids"]) for row in rows)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        padding = {"input_ids": self.pad_token_id, "labels": IGNORED, "shift_labels": IGNORED, "position_ids": 0}
        batch = {}
        for name in padding.keys() & rows[0].keys():
            values = [row[name] for row in rows]
            if not isinstance(values[0], int):
                values = [[*value, *[padding[name]] * (length - len(value))] for value in values]
            batch[name] = torch.tensor(values)
        real = torch.tensor([len(row["input_ids"]) for row in rows])
        batch["attention_mask"] = (torch.arange(length) < real[:, None]).long()
        return batch


def padding_collator(tokenizer: PreTrainedTokenizerBase) -> PaddingCollator:
    """Pads with the tokenizer's padding token, or with any other where it has none: the mask marks the padding."""
    token = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return PaddingCollator(token or 0)


def sorted_by_length(rows: Dataset) -> Dataset:
    """The rows in order of their `length`, so that a batch of neighbours has little padding."""
    lengths = rows["length"]
    return rows.select(sorted(range(len(rows)), key=lambda index: lengths[index]))
