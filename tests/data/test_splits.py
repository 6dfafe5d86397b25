"""Texts go to splits whole, by the seed alone, and every split gets one. All checks are exact."""

import collections

from hypothesis import given
from hypothesis import strategies as st

from hfgpt.data.splits import count_texts, divide, divide_texts, take

FRACTIONS = st.lists(st.floats(0.01, 0.45), min_size=1, max_size=2)


@given(st.lists(st.integers(1, 9), min_size=3, max_size=40), FRACTIONS)
def test_every_split_gets_whole_texts_and_hardly_more_than_its_share(copies, fractions):
    sides = divide(copies, fractions)
    assert set(sides.tolist()) == set(range(len(fractions) + 1))
    rows = collections.Counter()
    for side, count in zip(sides.tolist(), copies, strict=True):
        rows[side] += count
    for split, fraction in enumerate(fractions, start=1):
        wanted = max(round(sum(copies) * fraction), 1)
        # More than its share only if every text that was left has more rows than that.
        assert rows[split] <= wanted or (sides == split).sum() == 1


def test_the_first_texts_that_fit_are_taken():
    assert take([3, 1, 2, 1], 4) == [0, 1]
    assert take([3, 2, 1, 1], 4) == [0, 2]
    assert take([5, 6], 4) == []
    assert divide([5, 6, 7], [0.1]).tolist() == [1, 0, 0], "the rarest, where all are too many"
    assert divide([1, 1, 1], [0.4, 0.4]).tolist() == [1, 2, 0]
    assert divide([1, 1, 1, 1], [0.9]).tolist() == [1, 1, 1, 0], "one is left to train on"


def test_the_order_depends_on_the_texts_and_the_seed_alone():
    texts = [f"text {number % 7}" for number in range(20)]
    assert count_texts(texts, 0) == count_texts(texts[::-1], 0)
    assert list(count_texts(texts, 0)) == list(count_texts(sorted(texts), 0)) != list(count_texts(texts, 1))
    assert count_texts(texts, -1)["text 6"] == 2, "any integer is a seed"
    split_of = divide_texts(texts, {"validation": 0.2, "test": 0.2}, 3)
    assert split_of == divide_texts(texts[::-1], {"validation": 0.2, "test": 0.2}, 3)
    assert set(split_of.values()) == {"train", "validation", "test"}
