"""Classification metrics equal scikit-learn's, and the loss does not depend on how rows are batched."""

import errno
import socket
import sys

import evaluate
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from sklearn import metrics as sklearn_metrics
from torch import nn

from hfgpt.data.collators import PaddingCollator
from hfgpt.evaluation.classification import (
    ClassifierResult,
    accuracy_interval,
    baseline_accuracy,
    classification_loss,
    majority_accuracy,
    measure_classifier,
    plot_confusion,
    predict_probabilities,
)
from hfgpt.evaluation.metrics import classification as module
from hfgpt.modeling_hfgpt import HfGPTForSequenceClassification

LABELS = ["a", "b", "c"]


@pytest.fixture
def classifier(tiny_config):
    torch.manual_seed(0)
    return HfGPTForSequenceClassification(tiny_config(num_labels=3, problem_type="single_label_classification"))


def make_rows(number, seed=0):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 20, number)
    return [
        {"input_ids": random.integers(1, 64, length).tolist(), "labels": int(random.integers(3))} for length in lengths
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_every_metric_equals_scikit_learns(seed, classes):
    random = np.random.default_rng(seed)
    predictions, references = random.integers(0, classes, (2, 40)).tolist()
    if seed == 4:
        predictions = [0] * 40  # classes that are never predicted
    labels = [f"l{index}" for index in range(classes)]
    found = ClassifierResult(4.0, predictions, references, labels).to_dict()
    report = sklearn_metrics.classification_report(
        references, predictions, labels=range(classes), target_names=labels, output_dict=True, zero_division=0
    )
    assert found["eval_accuracy"] == sklearn_metrics.accuracy_score(references, predictions)
    assert found["eval_macro_f1"] == pytest.approx(report["macro avg"]["f1-score"], abs=1e-15)
    for label in labels:
        assert found[f"eval_precision_{label}"] == report[label]["precision"]
        assert found[f"eval_recall_{label}"] == report[label]["recall"]
    assert (found["eval_rows"], found["eval_loss"]) == (40, 0.1)


def test_the_metric_loads_by_path_without_network(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # evaluate adds that folder there
    asked = []

    def refuse(self, address):
        asked.append(address)
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    metric = evaluate.load(module.__file__, cache_dir=str(tmp_path))
    assert type(metric).__module__.startswith("evaluate_modules."), "the copy made by evaluate"
    found = metric.compute(predictions=[0, 1, 1], references=[0, 0, 1], num_classes=2)
    assert found["accuracy"] == 0.6666666666666666
    assert asked == []
    assert isinstance(module.ClassificationMetrics(keep_in_memory=True), evaluate.Metric)


def test_the_interval_is_the_wilson_interval():
    # Newcombe (1998), table I: 81 of 263.
    low, high = accuracy_interval(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert accuracy_interval(10, 10)[1] == 1.0
    assert accuracy_interval(0, 10)[0] == 0.0


def test_the_majority_class_is_that_of_the_training_split():
    assert majority_accuracy(["a", "a", "b"], ["b", "b", "a", "b"]) == 0.25
    assert majority_accuracy(["b", "a"], ["a", "a", "b"]) == pytest.approx(2 / 3), "ties: the first by name"


def test_the_baseline_regression_learns_spelling_features():
    texts = [f"win a prize {i}" for i in range(20)] + [f"see you at home {i}" for i in range(20)]
    labels = ["spam"] * 20 + ["ham"] * 20
    assert baseline_accuracy((texts, labels), (["win prizes", "come home"], ["spam", "ham"])) == 1.0
    assert baseline_accuracy((texts, labels), (["win prizes", "come home"], ["ham", "spam"])) == 0.0


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_does_not_depend_on_how_rows_are_batched(classifier, weights, smoothing):
    """1e-5: float32 sums in another order."""
    rows, loss = make_rows(12), classification_loss(weights, smoothing)
    gradients, losses = [], []
    for size, multiple in ((12, 1), (4, 1), (1, 1), (5, 16)):
        classifier.zero_grad()
        total = 0.0
        for start in range(0, 12, size):
            batch = PaddingCollator(0, multiple)(rows[start : start + size])
            labels = batch.pop("labels")
            part = loss(classifier(**batch, use_cache=False), labels, num_items_in_batch=12)
            part.backward()
            total += part.item()
        losses.append(total)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in classifier.parameters()]))
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-5)
    for gradient in gradients[1:]:
        assert torch.allclose(gradient, gradients[0], atol=1e-5)
    batch = PaddingCollator(0)(rows)
    labels = batch.pop("labels")
    logits = classifier(**batch).logits
    weight = None if weights is None else torch.tensor(weights)
    each = nn.functional.cross_entropy(logits, labels, weight, reduction="none", label_smoothing=smoothing)
    assert losses[0] == pytest.approx(each.mean().item(), abs=1e-5)


def test_evaluation_covers_every_row_without_dropout(classifier, tiny_config):
    classifier.model.embd_dropout.p = 0.5
    classifier.train()
    rows = make_rows(30)
    whole, pieces = (
        measure_classifier(
            classifier, [PaddingCollator(0)(rows[i : i + size]) for i in range(0, 30, size)], ["a", "b", "c"]
        )
        for size in (30, 7)
    )
    assert classifier.training, "the mode is restored"
    assert whole.predictions == pieces.predictions
    assert whole.references == [row["labels"] for row in rows]
    assert whole.nll == pytest.approx(pieces.nll, abs=1e-5)
    probabilities = predict_probabilities(classifier.eval(), [PaddingCollator(0)(rows)])
    assert [max(range(3), key=row.__getitem__) for row in probabilities] == whole.predictions
    right = [row[reference] for row, reference in zip(probabilities, whole.references, strict=True)]
    assert whole.nll == pytest.approx(-np.log(right).sum(), abs=1e-4)


def test_the_confusion_matrix_is_drawn(tmp_path):
    plot_confusion(ClassifierResult(1.0, [0, 1, 2, 1], [0, 1, 1, 1], LABELS), tmp_path / "c.png", "title")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_labels_that_cannot_be_drawn_are_numbered(tmp_path, monkeypatch, recwarn):
    labels = ["\u043f\u043b\u043e\u0445\u043e", "\u597d", "$1 or $2"]
    close, drawn = pyplot.close, []
    monkeypatch.setattr(pyplot, "close", lambda figure: (drawn.append(figure), close(figure)))
    plot_confusion(
        ClassifierResult(1.0, [0, 1, 2, 1], [0, 1, 1, 1], labels), tmp_path / "c.png", "\u6545\u4e8b, test split"
    )
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [labels[0], "class 1", r"\$1 or \$2"]
    assert axes.get_title() == "test split"
    assert [str(warning.message) for warning in recwarn] == []
