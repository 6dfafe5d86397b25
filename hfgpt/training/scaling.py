"""A scaling law: the expected loss of a new language model, from its size and the number of training tokens.

The numbers below are fitted by `benchmarks/scaling.py` to the runs in `benchmarks/scaling.jsonl`, which have the batch
sizes of this file and, before rounding, its learning rates.
"""

import math
from dataclasses import dataclass
from typing import Any

# Blocks and hidden size, from small to large.
SHAPES = (
    *((2, 64), (2, 96), (2, 128), (3, 128), (4, 128), (4, 192), (4, 256), (6, 256), (6, 384), (8, 512), (10, 640)),
    *((12, 768), (18, 896), (24, 1024), (30, 1280)),
)
# loss = n-gram loss * FACTOR * (context / 128) ** CONTEXT * (1 + WEIGHTS + TOKENS), where the last two are
# factor * millions ** -exponent.
FACTOR, CONTEXT = 0.5111, 0.097
WEIGHTS, TOKENS = (0.121, 0.356), (0.323, 0.502)
SPREAD = 0.157  # the 95% prediction interval for another text is the loss divided, and multiplied, by 1 + SPREAD
LEAST_NGRAMS = 0.5  # of the unigram loss: the measured texts have 0.60 to 0.84, and generated ones as little as 0.16
MOST_WEIGHTS, MOST_TOKENS = 3e7, 8e7  # ten times those of the largest measured runs
# Epochs after which repeating the text adds little: Muennighoff et al., "Scaling Data-Constrained Language Models"
# (2023), equation 5.
REPEATS = 15

# The keys of a recipe that are the same in all measured runs.
FIXED = {
    "model.preset": None,
    "model.intermediate_size": None,  # four times the hidden size
    "model.attn_pdrop": 0.0,  # attention with dropout is slow on a CPU
    "training.gradient_accumulation_steps": 1,
    "training.global_batch_size": None,
    "training.max_steps": -1,
    "training.weight_decay": 0.0,
    "training.warmup_steps": 0.03,
    "training.max_grad_norm": 0.0,  # the updates of both optimizers do not depend on the scale of the gradient
    "training.label_smoothing_factor": 0.0,
    "training.lr_scheduler_type": "linear",
    "training.lr_scheduler_kwargs": None,
    "training.eval_strategy": "no",
    "training.load_best_model_at_end": False,
}


@dataclass(frozen=True)
class Outlook:
    """What the expected loss of a run depends on, apart from how predictable its text is.

    Args:
        layers, width: Blocks and hidden size.
        context: Tokens per row.
        tokens: Tokens of training.
        unique: Tokens of the text.
    """

    layers: int
    width: int
    context: int
    tokens: float
    unique: float = math.inf

    @property
    def rows(self) -> int:
        """Rows per step, so that the tokens of a step grow with the square root of all tokens."""
        return max(round(1024 * math.sqrt(self.tokens / 1e6) / self.context), 1)

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return max(round(self.tokens / (self.rows * self.context)), 1)

    @property
    def weights(self) -> int:
        """Weights of the matrices in the blocks."""
        return 12 * self.layers * self.width**2

    @property
    def dropout(self) -> float:
        """Grows with the number of epochs and the size of the model relative to the text; 0: little overfitting."""
        overfitting = self.tokens / self.unique * self.weights / self.unique
        return 0.0 if overfitting < 8 else 0.1 if overfitting < 50 else 0.2

    def values(self) -> dict[str, Any]:
        """The keys of a recipe that follow from it, by their dotted names."""
        return {
            "model.num_hidden_layers": self.layers,
            "model.hidden_size": self.width,
            "model.num_attention_heads": None,  # by the hidden size
            "model.embd_pdrop": self.dropout,
            "model.resid_pdrop": self.dropout,
            "training.per_device_train_batch_size": self.rows,
            "training.muon_learning_rate": 0.03,
            "training.muon_momentum": 0.9,  # 0.95 averages over 20 steps, too many for a short run
            "training.learning_rate": float(f"{0.01 * (128 / self.width) ** 0.8:.2g}"),
            **FIXED,
        }

    def expect_loss(self, ngrams: float) -> float:
        """The expected loss in nats per token.

        Args:
            ngrams: The best loss of an n-gram model, see `hfgpt.data.ngrams`.
        """
        repeats = max(self.tokens / self.unique - 1, 0.0)
        tokens = self.tokens if not repeats else self.unique * (1 + REPEATS * (1 - math.exp(-repeats / REPEATS)))
        factors = zip((WEIGHTS, TOKENS), (self.weights, tokens), strict=True)
        excess = sum(factor * (number / 1e6) ** -exponent for (factor, exponent), number in factors)
        return ngrams * FACTOR * (self.context / 128) ** CONTEXT * (1 + excess)
