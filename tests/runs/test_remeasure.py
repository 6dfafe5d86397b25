"""Which differences the rounding of another machine may cause in re-evaluated metrics, and which it may not."""

import random

import pytest

from hfgpt.errors import InputError
from hfgpt.evaluation.classification import ClassifierResult
from hfgpt.runs.remeasure import _compare
from hfgpt.tasks.classify import allowed_for_classes


@pytest.mark.parametrize(("rows", "flips"), [(40, 1), (150, 1), (300, 3)])
def test_rows_that_flip_stay_within_the_tolerance(rows, flips):
    generator = random.Random(0)
    for _ in range(8):
        references = [generator.choice([0, 0, 0, 1, 2]) for _ in range(rows)]
        predictions = [generator.choice([right, right, right, 0, 1]) for right in references]
        before, after = (ClassifierResult(1.0, list(predictions), references, ["a", "b", "c"]) for _ in range(2))
        for index in generator.sample(range(rows), flips):
            after.predictions[index] = (after.predictions[index] + generator.choice([1, 2])) % 3
        _compare(before.to_dict(), after.to_dict(), allowed_for_classes(after, rows))


def test_an_accuracy_better_than_the_measured_one_is_refused():
    right = ClassifierResult(300.0, [0] * 294 + [1] * 6, [0] * 300, ["a", "b"])  # 98 %
    allowed = allowed_for_classes(right, 300)
    measured = right.to_dict()
    for accuracy, match in ((0.995, "eval_accuracy 0.995"), (0.965, "eval_accuracy 0.965"), (float("nan"), "nan")):
        with pytest.raises(InputError, match=match):
            _compare({"eval_accuracy": accuracy}, dict(measured), allowed)
    assert _compare({"eval_accuracy": 0.98 + 3 / 300}, dict(measured), allowed) == measured, "the newly measured value"
    with pytest.raises(InputError, match=r"eval_loss 0\.99, but the weights give 1 "):
        _compare({"eval_loss": 0.99}, dict(measured), allowed)
