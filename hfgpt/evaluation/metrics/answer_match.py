"""Exact match of answers, and match ignoring case, punctuation, articles and whitespace.

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
    predictions: Predicted answers.
    references: Reference answers.

Returns:
    `exact_match` and `normalised_match`, between 0 and 1. Both ignore leading and trailing whitespace.

Example:
    >>> AnswerMatch(keep_in_memory=True).compute(predictions=["The cat."], references=["cat"])
"""
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """Lowercases, removes punctuation and articles, and collapses whitespace."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split())


class AnswerMatch(evaluate.Metric):
    """Fractions of exactly matching and normalised matching answers."""

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
