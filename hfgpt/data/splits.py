"""Seeded splits of texts: all rows with the same text stay together, so that no text is in more than one split."""

import collections
import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from hfgpt.data.report import counted
from hfgpt.errors import InputError


def seeded_digest(text: str, seed: int) -> bytes:
    """An 8-byte sort key that depends only on the text and the seed."""
    return hashlib.blake2b(text.encode(), digest_size=8, salt=(seed % 2**64).to_bytes(8, "little")).digest()


def count_texts(texts: Iterable[str], seed: int) -> dict[str, int]:
    """Distinct text -> number of rows, in seeded order."""
    copies = collections.Counter(texts)
    return {text: copies[text] for text in sorted(copies, key=lambda text: seeded_digest(text, seed))}


def divide_texts(texts: Iterable[str], fractions: Mapping[str, float], seed: int) -> dict[str, str]:
    """Assigns each text to a split.

    Args:
        texts: The text of every row; needs more distinct texts than `fractions`.
        fractions: Split -> fraction of the rows; the rest goes to `train`.
        seed: Seed of the order in which texts are chosen.
    """
    copies, names = count_texts(texts, seed), ["train", *fractions]
    sides = divide(list(copies.values()), list(fractions.values()))
    return {text: names[side] for text, side in zip(copies, sides, strict=True)}


def divide(copies: Sequence[int], fractions: Sequence[float]) -> np.ndarray:
    """Fills each split in turn with distinct texts until it has its fraction of the rows.

    Args:
        copies: Number of rows of each distinct text, in order of choice; needs more texts than fractions.
        fractions: Fraction of the rows for each split.

    Returns:
        int8 [texts]: i for split i of `fractions`, counted from 1, and 0 for training. Every split gets a text.
    """
    copies = np.asarray(copies)
    sides, rows = np.zeros(len(copies), dtype=np.int8), int(copies.sum())
    for split, fraction in enumerate(fractions, start=1):
        free = np.flatnonzero(sides == 0)
        # If every text has more rows than the split may have, it gets the one with the fewest.
        chosen = take(copies[free], max(round(rows * fraction), 1)) or [int(copies[free].argmin())]
        needed = len(fractions) - split + 1  # one text each for training and the following splits
        sides[free[chosen[: len(free) - needed]]] = split
    return sides


def divide_documents(digests: np.ndarray, fraction: float, source: str) -> np.ndarray:
    """Divides whole documents, with all copies of a text in the same split.

    Args:
        digests: uint64 [documents], of text and seed.
        fraction: Fraction of the documents for validation.
        source: Name of the source, for the error.

    Returns:
        bool [documents]: whether each is for validation. Both splits get a document.

    Raises:
        InputError: All have the same text.
    """
    _, text_of, copies = np.unique(digests, return_inverse=True, return_counts=True)
    if len(copies) == 1:
        raise InputError(
            f"all {len(digests):,} documents of data.path {source!r} have the same text, so validation would repeat "
            "training: add other texts, or set data.validation_split"
        )
    return divide(copies, [fraction])[text_of] == 1


def cut_document(characters: int, fraction: float) -> int:
    """The length of the training split, if a single document is divided at a character; its end is for validation.

    Raises:
        InputError: A split would be empty.
    """
    cut = int(characters * (1 - fraction))
    if not 0 < cut < characters:
        raise InputError(
            f"data.validation_fraction {fraction} of one document of {counted(characters, 'characters')} leaves the "
            f"{'validation' if cut else 'train'} split empty: add text or change the fraction"
        )
    return cut


def take(copies: Sequence[int], rows: int) -> list[int]:
    """Indices of the first texts with at most `rows` rows in total, skipping any that would exceed it."""
    taken = []
    for text, count in enumerate(copies):
        if count <= rows:
            taken.append(text)
            rows -= int(count)
        if not rows:
            break
    return taken
