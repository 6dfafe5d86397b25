"""All copies of a text go to one split, determined by the seed alone; no split is empty. All checks are exact."""

import collections

from hypothesis import given
from hypothesis import strategies as st

from hfgpt.data.splits import count_texts, divide, divide_texts, take

FRACTIONS = st.lists(st.floats(0.01, 0.45), min_size=1, max_size=2)


@given(st.lists(st.integers(1, 9), min_size=3, max_size=40), FRACTIONS)
def test_texts_are_not_divided_and_splits_hardly_exceed_their_share(copies, fractions):
    sides = divide(copies, fractions)
    assert set(sides.tolist()) == set(range(len(fractions) + 1))
    rows = collections.Counter()
    for side, count in zip(sides.tolist(), copies, strict=True):
        rows[side] += count
    for split, fraction in enumerate(fractions, start=1):
        wanted = max(round(sum(copies) * fraction), 1)
        # A split exceeds its share only if every remaining text has more rows than that.
        assert rows[split] <= wanted or (sides == split).sum() == 1


def test_the_first_texts_that_fit_are_taken():
    assert take([3, 1, 2, 1], 4) == [0, 1]
    assert take([3, 2, 1, 1], 4) == [0, 2]
    assert take([5, 6], 4) == []
    assert divide([5, 6, 7], [0.1]).tolist() == [1, 0, 0], "the rarest, if all have too many rows"
    assert divide([1, 1, 1], [0.4, 0.4]).tolist() == [1, 2, 0]
    assert divide([1, 1, 1, 1], [0.9]).tolist() == [1, 1, 1, 0], "one text is left for training"


def test_the_order_depends_only_on_the_texts_and_the_seed():
    texts = [f"text {number % 7}" for number in range(20)]
    assert count_texts(texts, 0) == count_texts(texts[::-1], 0)
    assert list(count_texts(texts, 0)) == list(count_texts(sorted(texts), 0)) != list(count_texts(texts, 1))
    assert count_texts(texts, -1)["text 6"] == 2, "any integer is a seed"
    split_of = divide_texts(texts, {"validation": 0.2, "test": 0.2}, 3)
    assert split_of == divide_texts(texts[::-1], {"validation": 0.2, "test": 0.2}, 3)
    assert set(split_of.values()) == {"train", "validation", "test"}
