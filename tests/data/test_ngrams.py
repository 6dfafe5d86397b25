"""The losses of n-gram models, compared with their definition computed from dictionaries of counts."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from hfgpt.data import ngrams
from hfgpt.data.ngrams import measure_ngrams


def rows_of(tokens: list[int], length: int) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.tensor(tokens[start : start + length])} for start in range(0, len(tokens), length)]


def defined_losses(train: list[int], held_out: list[int], orders: int) -> list[float]:
    """Witten and Bell's method C from its definition; the text is a circle, so that each token has a context."""
    losses, vocabulary = [], 1 + max(*train, *held_out)
    probabilities = [1 / vocabulary] * len(held_out)
    for order in range(orders):
        counts = defaultdict(Counter)
        for place, token in enumerate(train):
            counts[tuple(train[place - back] for back in range(1, order + 1))][token] += 1
        for place, token in enumerate(held_out):
            seen = counts.get(tuple(held_out[place - back] for back in range(1, order + 1)))
            if seen:
                weight = len(seen) / (len(seen) + seen.total())
                probabilities[place] = (1 - weight) * seen[token] / seen.total() + weight * probabilities[place]
        losses.append(-sum(map(math.log, probabilities)) / len(held_out))
    return losses


def test_losses_follow_the_definition():
    generator = np.random.default_rng(0)
    tokens = np.cumsum(generator.integers(0, 3, 1200)) % 7  # each token depends on the one before
    train, held_out = tokens[:1000].tolist(), tokens[1000:].tolist()
    found = measure_ngrams(rows_of(train, 50), rows_of(held_out, 50))
    assert found == pytest.approx(defined_losses(train, held_out, ngrams.ORDER), rel=1e-12)
    assert found[1] < found[0]  # a bigram model knows more


def test_an_unpredictable_text_has_the_loss_of_a_uniform_distribution():
    generator = np.random.default_rng(0)
    train, held_out = (generator.integers(0, 64, size).tolist() for size in (50_000, 5_000))
    assert measure_ngrams(rows_of(train, 100), rows_of(held_out, 100))[0] == pytest.approx(math.log(64), rel=0.005)


def test_large_texts_are_sampled_evenly(monkeypatch):
    monkeypatch.setattr(ngrams, "TRAIN", 40)
    rows = rows_of(list(range(1000)), 10)
    assert ngrams._take(rows, 40).tolist()[::10] == [0, 330, 660, 990]
