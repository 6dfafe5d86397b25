"""Which texts validate and test: chosen by a seed, all rows of one text together, so that no text is in two splits."""

import collections
import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np


def seeded_digest(text: str, seed: int) -> bytes:
    """8 bytes by which texts are sorted into an order that depends on nothing but them and the seed."""
    return hashlib.blake2b(text.encode(), digest_size=8, salt=(seed % 2**64).to_bytes(8, "little")).digest()


def count_texts(texts: Iterable[str], seed: int) -> dict[str, int]:
    """The different texts in seeded order, each with the number of its rows."""
    copies = collections.Counter(texts)
    return {text: copies[text] for text in sorted(copies, key=lambda text: seeded_digest(text, seed))}


def divide_texts(texts: Iterable[str], fractions: Mapping[str, float], seed: int) -> dict[str, str]:
    """The split of each text.

    Args:
        texts: The text of every row; at least one more different ones than `fractions`.
        fractions: Split -> its share of the rows. `train` gets the others.
        seed: Of the order in which texts are chosen.
    """
    copies, names = count_texts(texts, seed), ["train", *fractions]
    sides = divide(list(copies.values()), list(fractions.values()))
    return {text: names[side] for text, side in zip(copies, sides, strict=True)}


def divide(copies: Sequence[int], fractions: Sequence[float]) -> np.ndarray:
    """Chooses whole texts for each split in turn, until its share of the rows is reached.

    Args:
        copies: Rows of each different text, in the order of choice; more texts than fractions.
        fractions: The share of each split.

    Returns:
        int8 [texts]: i for split i of `fractions`, counted from 1, and 0 for training. Every split gets a text.
    """
    copies = np.asarray(copies)
    sides, rows = np.zeros(len(copies), dtype=np.int8), int(copies.sum())
    for split, fraction in enumerate(fractions, start=1):
        free = np.flatnonzero(sides == 0)
        # If every text has more rows than the split may get, it gets the rarest.
        chosen = take(copies[free], max(round(rows * fraction), 1)) or [int(copies[free].argmin())]
        needed = len(fractions) - split + 1  # a text for training and for each split that follows
        sides[free[chosen[: len(free) - needed]]] = split
    return sides


def take(copies: Sequence[int], rows: int) -> list[int]:
    """The first texts that together have at most so many rows; those that would be too many are skipped."""
    taken = []
    for text, count in enumerate(copies):
        if count <= rows:
            taken.append(text)
            rows -= int(count)
        if not rows:
            break
    return taken
