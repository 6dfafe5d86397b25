"""Metrics of a classifier: accuracy, macro F1, and precision and recall of each class.

Source: computed with scikit-learn (Pedregosa et al., JMLR 2011).
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

DESCRIPTION = "Accuracy, macro F1, and precision, recall and F1 of each class."
INPUTS = """
Args:
    predictions: Predicted class ids.
    references: True class ids.
    num_classes: Number of classes; ids are 0, ..., num_classes - 1.

Returns:
    `accuracy` and `macro_f1`, between 0 and 1; `precision`, `recall` and `f1`, lists with one value per class, 0 for
    a class without predictions or references; `confusion`, with true classes in rows and predicted ones in columns.

Example:
    >>> ClassificationMetrics(keep_in_memory=True).compute(predictions=[0, 1], references=[0, 0], num_classes=2)
"""


class ClassificationMetrics(evaluate.Metric):
    """scikit-learn's classification metrics as an `evaluate` metric."""

    def _info(self):
        features = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[int], num_classes: int) -> dict[str, Any]:
        classes = list(range(num_classes))
        precision, recall, f1, _ = precision_recall_fscore_support(
            references, predictions, labels=classes, zero_division=0
        )
        return {
            "accuracy": float(accuracy_score(references, predictions)),
            "macro_f1": float(f1.mean()),
            "precision": precision.tolist(),
            "recall": recall.tolist(),
            "f1": f1.tolist(),
            "confusion": confusion_matrix(references, predictions, labels=classes).tolist(),
        }
