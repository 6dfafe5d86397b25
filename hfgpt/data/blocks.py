"""A token stream -> fixed-length blocks.

A block with T predictions spans T + 1 tokens: neighboring blocks share one token, so no prediction at a block
boundary is lost.
"""

import bisect
import itertools
from collections.abc import Sequence

import numpy as np
import torch

from hfgpt.data.report import DataReport, ShareReport, counted
from hfgpt.data.streams import TokenStream
from hfgpt.errors import InputError

IGNORED = -100
MOST_REPEATS = 1000  # of a source of a mixture, per epoch


class BlockDataset(torch.utils.data.Dataset):
    """Fixed-length blocks of a token stream: block i predicts `tokens[i * S + 1 : i * S + T + 1]`.

    An item has `input_ids` [T], `labels` [T] (the same ids; Hugging Face models shift them and so lose the last
    prediction), `shift_labels` [T] (all T targets, already shifted; the loss uses them if present) and, with
    `document_boundaries`, `position_ids` [T]; all int64. Ignored targets are -100 in both.

    Args:
        stream: The tokens.
        block_size: T, predictions per block.
        stride: S, tokens between the starts of consecutive blocks; None: T, so that each token is predicted once.
        document_boundaries: Reset positions to 0 at the start of each document (and block), and never use the first
            token of a document as a target, since none of its context is from the same document.
        keep_tail: For evaluation: predict every token but the first exactly once. The last block is moved back to end
            with the stream; targets that an earlier block predicts are ignored and serve as context only. A stream of
            at most T + 1 tokens becomes a single, shorter block.
        name: Name of the text in error messages.

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
                raise InputError(f"{key} is {value}; it must be at least 1 (unset: the model's context length)")
        if keep_tail and stride > block_size:
            raise InputError(
                f"{stride_key} is {stride}, larger than the block size of {block_size}, so some tokens would not be "
                f"predicted: lower it to at most {block_size}"
            )
        needed = 2 if keep_tail else block_size + 1
        if len(stream) < needed:
            remedy = "add text" if keep_tail else "lower data.block_size or add text"
            raise InputError(f"{name} has {counted(len(stream), 'tokens')}, but one block needs {needed}: {remedy}")
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

    def first_tokens(self) -> list[int]:
        """The first token, which is never predicted."""
        return self.stream[:1].tolist()

    def largest_id(self) -> int:
        """The largest token id; must be below the model's vocabulary size."""
        return self.stream.largest_id()

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
        # Blocks first, ..., last have a document start among their targets: i * S < start <= i * S + T.
        last = np.minimum((starts - 1) // self.stride, self.num_blocks - 1)
        first = np.maximum(-((self.block_size - starts) // self.stride), 0)
        return total - int(np.maximum(last - first + 1, 0).sum())


class MixedBlocks(torch.utils.data.Dataset):
    """Blocks of several sources, one after the other.

    Args:
        sources: The blocks of each source.
        names: The name of each source, for messages and the report.
        weights: The share of each source. Every block occurs at least once, and those of a source that is smaller than
            its share several times, spread evenly. None: every block occurs once.

    Raises:
        InputError: A source is shorter than a block.
    """

    def __init__(self, sources: Sequence[BlockDataset], names: Sequence[str], weights: Sequence[float] | None = None):
        self.sources, self.names = sources, names
        self.block_size = max(blocks.block_size for blocks in sources)
        for name, blocks in zip(names, sources, strict=True):
            if blocks.block_size < self.block_size:
                raise InputError(
                    f"the validation text of {name} has only {len(blocks.stream):,} tokens, less than a block of "
                    f"{self.block_size}: add text, or lower data.block_size"
                )
        self.sizes = [len(blocks) for blocks in sources]
        if weights is not None:
            shares = np.array(weights) / sum(weights)
            total = max(size / share for size, share in zip(self.sizes, shares, strict=True))
            for name, size, share in zip(names, self.sizes, shares, strict=True):
                if total * share > MOST_REPEATS * size:
                    raise InputError(
                        f"the weights of data.mixture repeat {name} {total * share / size:,.0f} times per epoch, the "
                        f"limit is {MOST_REPEATS:,}: lower its weight, or add text"
                    )
            self.sizes = [max(round(total * share), size) for size, share in zip(self.sizes, shares, strict=True)]
        self._ends = list(itertools.accumulate(self.sizes))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index = range(len(self))[index]
        source = bisect.bisect_right(self._ends, index)
        blocks, size = self.sources[source], self.sizes[source]
        return blocks[(index - self._ends[source] + size) * len(blocks) // size]

    def first_tokens(self) -> list[int]:
        """The first token of each source, which is never predicted."""
        return [token for blocks in self.sources for token in blocks.first_tokens()]

    def largest_id(self) -> int:
        """The largest token id; must be below the model's vocabulary size."""
        return max(blocks.largest_id() for blocks in self.sources)


def count_mixture(blocks: MixedBlocks, report: DataReport, split: str):
    """Records the sizes of a mixture's streams and blocks in the report; see `count_blocks`.

    Args:
        blocks: The blocks of one epoch.
        report: Updated in place.
        split: Name of the split, such as `train`.
    """
    sizes = report.split(split)
    sizes.tokens = sizes.predicted_tokens = sizes.tail_tokens = 0
    for number, (name, source, size) in enumerate(
        zip(blocks.names, blocks.sources, blocks.sizes, strict=True), start=1
    ):
        own, repeats = DataReport(source=report.source), size / len(source)
        count_blocks(source, own, split)
        sizes.tokens += own.split(split).tokens
        # With document boundaries, blocks differ in this, and some may be repeated once more than others.
        sizes.predicted_tokens += round(own.split(split).predicted_tokens * repeats)
        sizes.tail_tokens += own.split(split).tail_tokens
        if split == "train":
            share = ShareReport(name, len(source.stream), size / len(blocks), size, repeats)
            report.mixture[str(number)] = share
    sizes.blocks = len(blocks)


def count_blocks(blocks: BlockDataset, report: DataReport, split: str):
    """Records the sizes of a split's token stream and blocks in the report.

    Args:
        blocks: The blocks of one epoch.
        report: Updated in place.
        split: Name of the split, such as `train`.

    Raises:
        InputError: The split has no targets.
    """
    sizes = report.split(split)
    sizes.tokens = len(blocks.stream)
    sizes.blocks = len(blocks)
    sizes.predicted_tokens = blocks.predicted_tokens
    if sizes.predicted_tokens < 1:
        raise InputError(
            f"the {split} split of {report.source} has no tokens to predict, since each document is a single token: "
            "add text, or set data.document_boundaries to false"
        )
    sizes.tail_tokens = blocks.tail_tokens
