"""Perplexity of a language model, exactly: summed negative log-likelihood over counted tokens.

A mean of batch means, which is what Trainer's own evaluation computes, weighs the tokens of a short batch more than
those of a long one; its exponential is then no perplexity of anything.

Source: Jelinek et al., "Perplexity: a measure of the difficulty of speech recognition tasks" (1977).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Perplexity:
    """How well a model predicts a text.

    Args:
        nll: Summed negative log-likelihood, in nats.
        tokens: Tokens it is summed over.
        bytes: UTF-8 bytes these tokens stand for; None where unknown.
    """

    nll: float
    tokens: int
    bytes: int | None = None

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood, nats a token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf  # exp overflows a double past 709

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers, as loss and perplexity are not."""
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
        batch: Arguments of its forward, and `shift_labels` (B, T), the target of each position, -100 for none; or
            `labels` (B, T), which are shifted here.

    Returns:
        (B) summed nats, float64 where the device has it, and (B) counted targets.
    """
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "shift_labels")}
    targets = batch.get("shift_labels")
    if targets is None:
        targets = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    logits = model(**inputs, use_cache=False).logits.float()
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
    return in_double(losses.view_as(targets)).sum(-1), (targets != -100).sum(-1)


def in_double(values: torch.Tensor) -> torch.Tensor:
    """The values in float64, or as they are where the device has none (Apple's)."""
    return values if values.device.type == "mps" else values.double()


@torch.no_grad()
def measure_perplexity(
    model: nn.Module,
    batches: Iterable[dict[str, torch.Tensor]],
    gather: Callable | None = None,
    on_batch: Callable[[], None] | None = None,
) -> Perplexity:
    """Measures the perplexity of a model over batches of blocks, without dropout.

    Args:
        model: A causal language model; its training mode is restored.
        batches: As `row_nll` takes them, on any device.
        gather: Joins per-row tensors over processes and drops repeated rows (`Accelerator.gather_for_metrics`).
        on_batch: Called after each batch, for a progress bar.

    Raises:
        ValueError: There is no token to predict.
    """
    was_training = model.training
    model.eval()
    nll, tokens = 0.0, 0
    device = next(model.parameters()).device
    for batch in batches:
        rows = row_nll(model, {name: value.to(device) for name, value in batch.items()})
        row_sums, row_tokens = gather(rows) if gather else rows
        nll += row_sums.sum().item()
        tokens += int(row_tokens.sum())
        if on_batch:
            on_batch()
    model.train(was_training)
    if tokens == 0:
        raise ValueError("there is no token to predict in the evaluation data")
    return Perplexity(nll, tokens)
