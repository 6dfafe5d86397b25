"""Whether two models compute the same: on random and on real tokens, in single and in double precision.

In float32 two right implementations differ by roundings; in float64 those vanish, and what is left is a mistake. One
model is recorded after the other, so that both are never in memory.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

# Of the largest logit, or of 1 if that is smaller.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}
# In either precision, where weights of the result were rounded: merged or folded ones.
ROUNDED_TOLERANCE = 1e-5

# (B, T) token ids and a precision -> logits, (B, T, V) of a language model or (B, labels) of a classifier.
ComputeLogits = Callable[[torch.Tensor, torch.dtype], torch.Tensor]


@dataclass
class Recording:
    """What a model computes on some rows of tokens.

    Args:
        logits: (name of the rows, precision) -> logits.
        continuation: Greedy tokens after the first row; None for a classifier.
    """

    logits: dict[tuple[str, torch.dtype], torch.Tensor]
    continuation: list[int] | None = None


@dataclass
class Difference:
    """How far two models' logits are apart on some rows: at most, in all, and relative to the largest logit."""

    rows: str
    dtype: str
    absolute: float
    relative: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.relative <= self.tolerance  # and not for NaN


@dataclass
class Parity:
    """The parity report of a conversion.

    Args:
        source: What was converted.
        format: From or to which layout.
        parameters: Parameters of our model, tied ones once.
        source_parameters: Of the source, counted alike.
        differences: Of the logits, on each kind of rows in each precision.
        greedy_equal: Whether both continue the same text with the same tokens; None for a classifier.
        notes: What was filled, dropped, tied, cut or merged.
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
        """The lines that `hfgpt import` and `export` end with."""
        lines = [f"{self.source} ({self.format}): {self.source_parameters:,} parameters, here {self.parameters:,}"]
        lines += [f"  {note}" for note in self.notes]
        lines += [
            f"  {row.rows} tokens, {row.dtype}: largest difference of logits {row.absolute:.2e}, relative "
            f"{row.relative:.2e} (at most {row.tolerance:g})"
            for row in self.differences
        ]
        if self.greedy_equal is not None:
            lines.append(f"  greedy continuation: {'the same' if self.greedy_equal else 'different'}")
        return "\n".join([*lines, f"parity: {'passed' if self.passed else 'FAILED'}"])


@torch.no_grad()
def record(compute: ComputeLogits, rows: dict[str, torch.Tensor], greedy_tokens: int | None) -> Recording:
    """Runs a model over rows of tokens.

    Args:
        compute: The model.
        rows: Name -> (B, T) token ids.
        greedy_tokens: How many tokens at the end of the last row to replace, one by one, with the likeliest; None for
            a classifier.
    """
    logits = {(name, dtype): compute(ids, dtype) for name, ids in rows.items() for dtype in TOLERANCES}
    if greedy_tokens is None:
        return Recording(logits)
    text = list(rows.values())[-1][-1:]
    text = text[:, : max(1, text.shape[1] - greedy_tokens)]
    start = text.shape[1]
    for _ in range(greedy_tokens):
        text = torch.cat([text, compute(text, torch.float32)[:, -1:].argmax(-1)], dim=-1)
    return Recording(logits, text[0, start:].tolist())


def compare(reference: Recording, ours: Recording, recomputed: bool = False) -> tuple[list[Difference], bool | None]:
    """The differences of two recordings of the same rows, and whether their continuations are the same.

    Args:
        reference: Of the source.
        ours: Of the result.
        recomputed: Whether weights of the result were computed anew, and so rounded.
    """
    differences = []
    for (rows, dtype), expected in reference.logits.items():
        got = ours.logits[rows, dtype]
        if got.shape != expected.shape:
            got = torch.full_like(expected, torch.nan)
        absolute = (got - expected).abs().max().item()
        scale = max(1.0, expected.abs().max().item())
        name = str(dtype).removeprefix("torch.")
        tolerance = ROUNDED_TOLERANCE if recomputed else TOLERANCES[dtype]
        differences.append(Difference(rows, name, absolute, absolute / scale, tolerance))
    greedy_equal = None if reference.continuation is None else reference.continuation == ours.continuation
    return differences, greedy_equal


def compute_with(model: PreTrainedModel) -> ComputeLogits:
    """The logits of a transformers model, in any precision without a second copy of its weights."""

    def compute(input_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        with _layers_in(model, dtype):
            # Row by row: GPT-2's classifier takes several only with a padding token.
            parts = [input_ids] if model.can_generate() else input_ids.split(1)
            return torch.cat([model(input_ids=part, use_cache=False).logits for part in parts])

    return compute


@contextmanager
def _layers_in(model: nn.Module, dtype: torch.dtype):
    """Converts each layer when it is called, and gives it back its own weights afterwards."""
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
