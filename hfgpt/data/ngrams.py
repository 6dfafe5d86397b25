"""How predictable a text is: the loss of n-gram models, measured within a second, without training a network."""

import numpy as np
from torch.utils.data import Dataset

TRAIN, HELD_OUT = 50_000, 50_000  # tokens
ORDER = 5


def measure_ngrams(train: Dataset, held_out: Dataset) -> list[float]:
    """The held-out losses of interpolated n-gram models of orders 1 to `ORDER`, in nats per token.

    Source: Witten and Bell, "The zero-frequency problem" (1991), method C; each order is interpolated with the one
    below, and the first with a uniform distribution.

    Args:
        train, held_out: Rows with `input_ids`; evenly spaced ones are used, up to `TRAIN` and `HELD_OUT` tokens.
    """
    seen, unseen = _take(train, TRAIN), _take(held_out, HELD_OUT)
    probability = np.full(len(unseen), 1.0 / (1 + max(seen.max(), unseen.max())))
    context_seen, context_unseen = np.zeros(len(seen), np.uint64), np.zeros(len(unseen), np.uint64)
    losses = []
    for before in range(ORDER):
        if before:
            context_seen = _hash(context_seen, np.roll(seen, before))
            context_unseen = _hash(context_unseen, np.roll(unseen, before))
        pair_seen, pair_unseen = _hash(context_seen, seen), _hash(context_unseen, unseen)
        pairs, places, counts = np.unique(pair_seen, return_index=True, return_counts=True)
        contexts, totals = np.unique(context_seen, return_counts=True)
        _, kinds = np.unique(context_seen[places], return_counts=True)  # different tokens after each context
        count = _look_up(pairs, counts, pair_unseen)
        total, kind = _look_up(contexts, totals, context_unseen), _look_up(contexts, kinds, context_unseen)
        probability = np.where(total, (count + kind * probability) / np.maximum(total + kind, 1), probability)
        losses.append(float(-np.log(probability).mean()))
    return losses


def _take(rows: Dataset, tokens: int) -> np.ndarray:
    """The tokens of evenly spaced rows; neighbors are treated as one text, though some may not be."""
    length = len(rows[0]["input_ids"])
    number = min(max(tokens // length, 1), len(rows))
    indices = np.linspace(0, len(rows) - 1, number).astype(int)
    return np.concatenate([rows[index]["input_ids"].numpy() for index in indices.tolist()]).astype(np.uint64)


def _hash(context: np.ndarray, token: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each context with one more token."""
    mixed = (context ^ (token + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xD6E8FEB86659FD93)
    return mixed ^ (mixed >> np.uint64(32))


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key; 0 for keys that are not there."""
    places = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)
