"""A token stream -> fixed-length blocks.

A block of T predictions reads T + 1 tokens, so that neighbouring blocks share one token and no prediction between them
is lost.
"""

import numpy as np
import torch

from hfgpt.data.report import DataReport, counted
from hfgpt.data.streams import TokenStream
from hfgpt.errors import InputError

IGNORED = -100


class BlockDataset(torch.utils.data.Dataset):
    """Fixed-length blocks of a token stream: block i predicts `tokens[i * S + 1 : i * S + T + 1]`.

    An item has `input_ids` [T], `labels` [T] (the same ids: Hugging Face's models shift them, and so lose the last
    prediction), `shift_labels` [T] (the targets themselves, all T of them, which the loss prefers) and, with
    `document_boundaries`, `position_ids` [T]; all int64. Ignored targets are -100 in both kinds of labels.

    Args:
        stream: The tokens.
        block_size: T, predictions per block.
        stride: S, tokens between the starts of blocks; None: T, so that each token is predicted once.
        document_boundaries: Positions restart at 0 at each document (and at each block), and the first token of a
            document is never a target, since nothing before it is its own.
        keep_tail: For evaluation: every token but the first is predicted exactly once. A last block is moved back to
            end with the stream; targets that an earlier block predicted are ignored and serve as context. A stream of
            at most T + 1 tokens is one block, of its own length.
        name: What error messages call the text.

    Raises:
        InputError: The stream is shorter than a block, or a size is out of range.
    """

    def __init__(
        self,
        stream: TokenStream,
        block_size: int,
        stride: int | None = None,
        *,
        document_boundaries: bool = False,
        keep_tail: bool = False,
        name: str = "data",
    ):
        stride = block_size if stride is None else stride
        stride_key = "evaluation.stride" if keep_tail else "data.stride"
        for key, value in (("data.block_size", block_size), (stride_key, stride)):
            if value < 1:
                raise InputError(f"{key} is {value}, the least is 1: unset it to use the model's context length")
        if keep_tail and stride > block_size:
            raise InputError(
                f"a stride of {stride} tokens leaves tokens out between blocks of {block_size}, so not every token is "
                f"predicted: lower {stride_key} to at most {block_size}"
            )
        needed = 2 if keep_tail else block_size + 1
        if len(stream) < needed:
            remedy = "add text" if keep_tail else "lower data.block_size or add text"
            raise InputError(f"{name} has {counted(len(stream), 'tokens')}, one block needs {needed}: {remedy}")
        self.stream = stream
        self.block_size = min(block_size, len(stream) - 1)
        self.stride = stride
        self.document_boundaries = document_boundaries
        self.keep_tail = keep_tail
        room = len(stream) - 1 - self.block_size
        self.num_blocks = 1 + (-(-room // stride) if keep_tail else room // stride)

    def __len__(self) -> int:
        return self.num_blocks

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index = range(self.num_blocks)[index]
        size = self.block_size
        start = min(index * self.stride, len(self.stream) - 1 - size)
        tokens = self.stream[start : start + size + 1].astype(np.int64)
        labels, shift_labels = tokens[:-1].copy(), tokens[1:].copy()
        item = {"input_ids": tokens[:-1], "labels": labels, "shift_labels": shift_labels}
        if self.keep_tail and index and (predicted := (index - 1) * self.stride + size - start):
            labels[: predicted + 1] = IGNORED
            shift_labels[:predicted] = IGNORED
        if self.document_boundaries:
            offsets = self.stream.offsets
            first, last = np.searchsorted(offsets, (start, start + size + 1))
            starts = offsets[first:last] - start
            positions = np.zeros(size, dtype=np.int64)
            positions[starts[starts < size]] = starts[starts < size]
            item["position_ids"] = np.arange(size) - np.maximum.accumulate(positions)
            labels[starts[starts < size]] = IGNORED
            shift_labels[starts[starts > 0] - 1] = IGNORED
        return {key: torch.from_numpy(value) for key, value in item.items()}

    @property
    def tail_tokens(self) -> int:
        """Tokens at the end of the stream that no block predicts."""
        return 0 if self.keep_tail else len(self.stream) - 1 - (self.num_blocks - 1) * self.stride - self.block_size

    @property
    def predicted_tokens(self) -> int:
        """Targets that are not ignored, over all blocks; those in two blocks count twice (once with `keep_tail`)."""
        total = len(self.stream) - 1 if self.keep_tail else self.num_blocks * self.block_size
        if not self.document_boundaries:
            return total
        starts = np.unique(self.stream.offsets)
        starts = starts[(starts > 0) & (starts < len(self.stream))]
        if self.keep_tail:
            return total - len(starts)
        # Blocks first, ..., last hold a start among their targets: i * S < start <= i * S + T.
        last = np.minimum((starts - 1) // self.stride, self.num_blocks - 1)
        first = np.maximum(-((self.block_size - starts) // self.stride), 0)
        return total - int(np.maximum(last - first + 1, 0).sum())


def count_blocks(blocks: BlockDataset, unknown_id: int | None, report: DataReport, split: str) -> None:
    """Writes the sizes of a split's stream and blocks into the report.

    Args:
        blocks: The blocks an epoch goes through.
        unknown_id: The tokenizer's id for what it cannot express; None if there is nothing such.
        report: Filled in place.
        split: The split's name, such as `train`.

    Raises:
        InputError: Nothing in the split is predicted.
    """
    sizes = report.split(split)
    sizes.tokens = len(blocks.stream)
    if unknown_id is not None:
        sizes.unknown_tokens = blocks.stream.count(unknown_id)
    sizes.blocks = len(blocks)
    sizes.predicted_tokens = blocks.predicted_tokens
    if sizes.predicted_tokens < 1:
        raise InputError(
            f"nothing is predicted in the {split} split of {report.source}: each of its documents is one token; add "
            "text, or set data.document_boundaries to false"
        )
    sizes.tail_tokens = blocks.tail_tokens
