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
    """Pads rows on the right to the longest in the batch; the attention mask, not the id, marks padding.

    A row has `input_ids` and may have `labels` (one per token, or one for the row), `shift_labels` and `position_ids`;
    other columns are dropped. Only the labels decide which tokens are learned: the padding token may be the
    end-of-text token, which stays a target where it ends a text.

    Args:
        pad_token_id: Fills `input_ids`; labels are filled with -100, positions with 0.
        pad_to_multiple_of: Rounds the padded length up.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Rows of different lengths -> tensors (B, T); labels (B) if there is one per row."""
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
    """A collator that pads with the tokenizer's padding token, or any other if it does not have one."""
    token = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return PaddingCollator(token or 0)


def sorted_by_length(rows: Dataset) -> Dataset:
    """The rows sorted by `length`, so that batches have little padding."""
    lengths = rows["length"]
    return rows.select(sorted(range(len(rows)), key=lambda index: lengths[index]))
