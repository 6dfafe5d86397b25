"""Exact perplexity of a language model: summed negative log-likelihood divided by the number of tokens.

Trainer's own evaluation averages batch means, which gives tokens in short batches more weight than in long ones; the
exponential of that is not a perplexity.

Source: Jelinek et al., "Perplexity: a measure of the difficulty of speech recognition tasks" (1977).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from hfgpt.evaluation.spread import Map


@dataclass
class Perplexity:
    """How well a model predicts a text.

    Args:
        nll: Summed negative log-likelihood, in nats.
        tokens: Number of predicted tokens.
        bytes: UTF-8 bytes of these tokens; None if unknown.
    """

    nll: float
    tokens: int
    bytes: int | None = None

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood, in nats per token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf  # exp overflows a double above 709

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers, unlike loss and perplexity."""
        return self.nll / math.log(2) / self.bytes if self.bytes else None

    def to_dict(self, prefix: str = "eval") -> dict:
        metrics = {"loss": self.loss, "perplexity": self.perplexity, "tokens": self.tokens}
        if self.bytes:
            metrics |= {"bits_per_byte": self.bits_per_byte, "bytes": self.bytes}
        return {f"{prefix}_{name}": value for name, value in metrics.items()}


def row_nll(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of each row of a batch.

    Args:
        model: Returns `logits` (B, T, V).
        batch: Arguments of its forward, and `shift_labels` (B, T; the target at each position, or -100) or `labels`
            (B, T; shifted here).

    Returns:
        (B) summed nats, in float64 if the device supports it, and (B) number of targets.
    """
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "shift_labels")}
    targets = batch.get("shift_labels")
    if targets is None:
        targets = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    logits = model(**inputs, use_cache=False).logits.float()
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
    return in_double(losses.view_as(targets)).sum(-1), (targets != -100).sum(-1)


def in_double(values: torch.Tensor) -> torch.Tensor:
    """The values in float64, or unchanged on devices without it (mps)."""
    return values if values.device.type == "mps" else values.double()


@torch.no_grad()
def measure_perplexity(
    model: nn.Module,
    batches: Iterable[dict[str, torch.Tensor]],
    spread: Map = map,
) -> Perplexity:
    """Measures the perplexity of a model over batches of blocks, in evaluation mode.

    Args:
        model: A causal language model; its training mode is restored.
        batches: See `row_nll`, on any device.
        spread: Applies `row_nll` to the batches, in one process or several.

    Raises:
        ValueError: There are no tokens to predict.
    """
    was_training = model.training
    model.eval()
    nll, tokens = 0.0, 0
    device = next(model.parameters()).device

    def measure(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return row_nll(model, {name: value.to(device) for name, value in batch.items()})

    for row_sums, row_tokens in spread(measure, batches):
        nll += row_sums.sum().item()
        tokens += int(row_tokens.sum())
    model.train(was_training)
    if tokens == 0:
        raise ValueError("the evaluation data has no tokens to predict")
    return Perplexity(nll, tokens)
