"""Facts and their splits: no row of the test split shares a fact with a training row.

Every message and instruction is built from facts: words that occur together in it, such as (kite, red). A hash of the
fact, independent of the seed, assigns it to train, validation or test. A row of the test split therefore has no fact
of any training row of any seed, while all of its words and phrases occur in training rows.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache

from hfgpt.demo_corpus.world import pick

SPLITS = ("train",) * 8 + ("validation", "test")  # per ten facts


def generate_rows(write: Callable, number: int, name: str, seed: int, split: str) -> Iterator[dict[str, str]]:
    """Generate the rows that `write(rng, split)` returns, each with its own random generator.

    Raises:
        ValueError: `number` (the argument `name` of the caller) is negative, or the split is unknown.
    """
    if number < 0:
        raise ValueError(f"{name} is {number}; it must be 0 or more")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(dict.fromkeys(SPLITS))}")
    return (write(random.Random(f"{seed}:{split}:{i}"), split) for i in range(number))


def draw_facts(rng: random.Random, split: str, count: int, *columns: Sequence) -> list[tuple]:
    """Draw facts of the split without repeated items; each has one item, a word or a world row, from every column."""
    facts, names = [], []
    while len(facts) < count:
        fact = tuple([pick(rng, column) for column in columns])
        new = tuple([getattr(item, "name", item) for item in fact])
        if _split_of(new) == split and len({*names, *new}) == len(names) + len(new):
            facts.append(fact)
            names += new
    return facts


@cache
def _split_of(fact: tuple[str, ...]) -> str:
    digest = hashlib.sha256("|".join(fact).encode()).digest()
    return SPLITS[int.from_bytes(digest[:8], "big") % len(SPLITS)]
