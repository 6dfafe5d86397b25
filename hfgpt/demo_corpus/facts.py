"""Facts and their splits: what keeps the rows of a test split apart from all training rows.

Every message and instruction is made of facts, words that belong together in it, such as (kite, red). A hash of the
fact, not of the seed, says whether it belongs to train, validation or test. So a row of the test split holds no fact
that any training row of any seed holds, while all of its words and phrases occur there.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache

from hfgpt.demo_corpus.world import pick

SPLITS = ("train",) * 8 + ("validation", "test")  # of each ten facts


def generate_rows(write: Callable, number: int, name: str, seed: int, split: str) -> Iterator[dict[str, str]]:
    """Generate the rows that `write(rng, split)` returns, each of a generator of its own.

    Raises:
        ValueError: `number`, which is called `name`, is negative, or the split is unknown.
    """
    if number < 0:
        raise ValueError(f"{name} is {number}; it must be 0 or more")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(dict.fromkeys(SPLITS))}")
    return (write(random.Random(f"{seed}:{split}:{i}"), split) for i in range(number))


def draw_facts(rng: random.Random, split: str, count: int, *columns: Sequence) -> list[tuple]:
    """Return facts of the split, nothing twice in them; each has one of every column, a word or a row of the world."""
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
