"""Compares the logits of two models: on random and real tokens, in single and double precision.

In float32, two correct implementations differ by rounding errors; in float64 these vanish, and what remains is a bug.
The models run one after the other, so that only one is in memory at a time.
"""

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

# Relative to the largest logit, or to 1 if all logits are smaller.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}
# In both precisions, if weights of the result were recomputed (by merging or folding).
ROUNDED_TOLERANCE = 1e-5

# Token ids (B, T) and a precision -> logits: (B, T, V) for a language model, (B, labels) for a classifier.
ComputeLogits = Callable[[torch.Tensor, torch.dtype], torch.Tensor]


@dataclass
class Recording:
    """The outputs of a model for some rows of tokens.

    Args:
        logits: (name of the rows, precision) -> logits.
        continuation: Greedy continuation of the last row; None for a classifier.
    """

    logits: dict[tuple[str, torch.dtype], torch.Tensor]
    continuation: list[int] | None = None


@dataclass
class Difference:
    """Largest difference of two models' logits on some rows, absolute and relative to the largest logit."""

    rows: str
    dtype: str
    absolute: float
    relative: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.relative <= self.tolerance  # False for NaN


@dataclass
class Parity:
    """The parity report of a conversion.

    Args:
        source: The converted model.
        format: The source or target format.
        parameters: Number of parameters of the result, tied ones counted once.
        source_parameters: Number of parameters of the source, tied ones counted once.
        differences: Differences of the logits, for each kind of rows and precision.
        greedy_equal: Whether greedy decoding gives the same tokens; None for a classifier.
        notes: Weights that were filled, dropped, tied, cut or merged.
    """

    source: str
    format: str
    parameters: int
    source_parameters: int
    differences: list[Difference]
    greedy_equal: bool | None
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(difference.passed for difference in self.differences) and self.greedy_equal is not False

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}

    def render(self) -> str:
        """The report as printed by `hfgpt import` and `hfgpt export`."""
        counts = f"{self.source_parameters:,} parameters, converted: {self.parameters:,}"
        lines = [f"{self.source} ({self.format}): {counts}"]
        lines += [f"  {note}" for note in self.notes]
        lines += [
            f"  {row.rows} tokens, {row.dtype}: largest logit difference {row.absolute:.2e}, relative "
            f"{row.relative:.2e} (tolerance {row.tolerance:g})"
            for row in self.differences
        ]
        if self.greedy_equal is not None:
            lines.append(f"  greedy continuation: {'identical' if self.greedy_equal else 'different'}")
        return "\n".join([*lines, f"parity: {'passed' if self.passed else 'FAILED'}"])


@torch.no_grad()
def record(
    compute: ComputeLogits,
    rows: dict[str, torch.Tensor],
    greedy_tokens: int | None,
    dtypes: Iterable[torch.dtype] = TOLERANCES,
) -> Recording:
    """Runs a model on rows of tokens.

    Args:
        compute: The model.
        rows: Name -> (B, T) token ids.
        greedy_tokens: Number of tokens at the end of the last row to replace by greedy decoding; None for a
            classifier.
        dtypes: Precisions to run it in.
    """
    logits = {(name, dtype): compute(ids, dtype) for name, ids in rows.items() for dtype in dtypes}
    if greedy_tokens is None:
        return Recording(logits)
    text = list(rows.values())[-1][-1:]
    text = text[:, : max(1, text.shape[1] - greedy_tokens)]
    start = text.shape[1]
    for _ in range(greedy_tokens):
        text = torch.cat([text, compute(text, torch.float32)[:, -1:].argmax(-1)], dim=-1)
    return Recording(logits, text[0, start:].tolist())


def compare(
    reference: Recording, ours: Recording, tolerance: float | None = None
) -> tuple[list[Difference], bool | None]:
    """The differences of two recordings of the same rows, and whether their greedy continuations are the same.

    Args:
        reference: Recording of the source.
        ours: Recording of the result.
        tolerance: Tolerance if weights of the result were rounded; None: they are exact.
    """
    differences = []
    for (rows, dtype), expected in reference.logits.items():
        got = ours.logits[rows, dtype]
        if got.shape != expected.shape:
            got = torch.full_like(expected, torch.nan)
        absolute = (got - expected).abs().max().item()
        scale = max(1.0, expected.abs().max().item())
        name = str(dtype).removeprefix("torch.")
        differences.append(Difference(rows, name, absolute, absolute / scale, tolerance or TOLERANCES[dtype]))
    greedy_equal = None if reference.continuation is None else reference.continuation == ours.continuation
    return differences, greedy_equal


def compute_with(model: PreTrainedModel) -> ComputeLogits:
    """A function for the logits of a transformers model, in any precision without a second copy of its weights."""

    def compute(input_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        with _layers_in(model, dtype):
            # Row by row: GPT-2's classifier supports batches only with a padding token.
            parts = [input_ids] if model.can_generate() else input_ids.split(1)
            return torch.cat([model(input_ids=part, use_cache=False).logits for part in parts])

    return compute


@contextmanager
def _layers_in(model: nn.Module, dtype: torch.dtype):
    """Casts the weights of each layer when it is called, and restores them afterwards."""
    kept = {}

    def convert(module, *_):
        kept[module] = [(parameter, parameter.data) for parameter in module.parameters(recurse=False)]
        module.to(dtype)

    def restore(module, *_):
        for parameter, data in kept.pop(module):
            parameter.data = data

    handles = []
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            handles += [module.register_forward_pre_hook(convert), module.register_forward_hook(restore)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
