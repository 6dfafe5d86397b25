"""How many answers are the right ones: to the letter, and without case, punctuation, articles and spaces.

Source of the normalisation: Rajpurkar et al., "SQuAD" (2016), section 6.1.
"""

import re
import string
from collections.abc import Sequence

import datasets
import evaluate

DESCRIPTION = "Exact and normalised match of answers."
INPUTS = """
Args:
    predictions: Answers.
    references: The right answers.

Returns:
    `exact_match` and `normalised_match`, parts between 0 and 1. Spaces around an answer do not count in either.

Example:
    >>> AnswerMatch(keep_in_memory=True).compute(predictions=["The cat."], references=["cat"])
"""
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """Lower case, without punctuation and articles, one space between words."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split())


class AnswerMatch(evaluate.Metric):
    """The parts of the answers that match."""

    def _info(self):
        features = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        pairs = list(zip(predictions, references, strict=True))
        exact = sum(answer.strip() == right.strip() for answer, right in pairs)
        normalised = sum(normalise_answer(answer) == normalise_answer(right) for answer, right in pairs)
        return {"exact_match": exact / len(pairs), "normalised_match": normalised / len(pairs)}
