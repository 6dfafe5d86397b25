"""Metrics of a classifier on held-out rows, with a majority-class and a logistic-regression baseline.

Sources: Wilson, "Probable inference" (1927), for the interval; scikit-learn for the regression on TF-IDF weighted
character n-grams, a strong baseline for a small text classifier.
"""

import collections
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfgpt.data.collators import padding_collator
from hfgpt.errors import InputError
from hfgpt.evaluation.perplexity import in_double
from hfgpt.evaluation.spread import Map
from hfgpt.output import drawable


@dataclass
class ClassifierResult:
    """Predictions over a set of rows.

    Args:
        nll: Summed negative log-likelihood of the true classes, in nats.
        predictions: Predicted class of each row.
        references: True class of each row.
        labels: Class names in the order of their ids.
    """

    nll: float
    predictions: list[int]
    references: list[int]
    labels: list[str]

    def compute(self) -> dict[str, Any]:
        """The result of `ClassificationMetrics`."""
        from hfgpt.evaluation.metrics.classification import ClassificationMetrics

        return ClassificationMetrics(keep_in_memory=True).compute(
            predictions=self.predictions, references=self.references, num_classes=len(self.labels)
        )

    def to_dict(self, prefix: str = "eval") -> dict[str, Any]:
        """Loss, accuracy with its 95% interval, macro F1, and precision and recall of each class."""
        computed, rows = self.compute(), len(self.references)
        low, high = accuracy_interval(round(computed["accuracy"] * rows), rows)
        metrics = {
            "loss": self.nll / rows,
            "accuracy": computed["accuracy"],
            "accuracy_low": low,
            "accuracy_high": high,
            "macro_f1": computed["macro_f1"],
            "rows": rows,
        }
        for name in ("precision", "recall"):
            metrics |= {f"{name}_{label}": value for label, value in zip(self.labels, computed[name], strict=True)}
        return {f"{prefix}_{name}": value for name, value in metrics.items()}


@dataclass
class Prediction:
    """Prediction for a text: the most likely label, its probability, and the probabilities of all labels."""

    text: str
    label: str
    score: float
    probabilities: dict[str, float]


def classification_loss(
    weights: Sequence[float] | None = None, label_smoothing: float = 0.0
) -> Callable[..., torch.Tensor]:
    """A loss for Trainer that does not depend on how a batch is divided for gradient accumulation.

    Args:
        weights: Class weights; None: all 1.
        label_smoothing: Probability mass spread evenly over all classes.

    Returns:
        A function of the model's outputs, the labels (B) and the number of rows in the whole batch.
    """

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
        logits = outputs.logits.float()  # (B, classes)
        weight = None if weights is None else torch.tensor(weights, device=logits.device)
        # The mean reduction would divide by the summed class weights of this micro-batch.
        summed = nn.functional.cross_entropy(logits, labels, weight, reduction="sum", label_smoothing=label_smoothing)
        return summed / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    return loss


@torch.no_grad()
def measure_classifier(
    model: nn.Module,
    batches: Iterable[dict[str, torch.Tensor]],
    labels: list[str],
    spread: Map = map,
) -> ClassifierResult:
    """Predicts every row, in evaluation mode.

    Args:
        model: A sequence classifier; its training mode is restored.
        batches: `input_ids`, `attention_mask` and `labels` (B), on any device.
        labels: Class names in the order of their ids.
        spread: Applies the model to the batches, in one process or several.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    nll, predictions, references = 0.0, [], []

    def classify(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch = {name: value.to(device) for name, value in batch.items()}
        right = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits.float()  # (B, classes)
        losses = in_double(nn.functional.cross_entropy(logits, right, reduction="none"))
        return losses, logits.argmax(-1), right

    for losses, predicted, right in spread(classify, batches):
        nll += losses.sum().item()
        predictions += predicted.tolist()
        references += right.tolist()
    model.train(was_training)
    return ClassifierResult(nll, predictions, references, labels)


@torch.no_grad()
def predict_probabilities(model: nn.Module, batches: Iterable[dict[str, torch.Tensor]]) -> list[list[float]]:
    """The class probabilities of each row."""
    probabilities: list[list[float]] = []
    for batch in batches:
        batch = {name: value.to(model.device) for name, value in batch.items()}
        probabilities += model(**batch, use_cache=False).logits.float().softmax(-1).tolist()
    return probabilities


def check_texts(texts: Sequence[str]):
    """Checks that no text is empty.

    Raises:
        InputError: Gives the number of the empty text.
    """
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise InputError(f"text {number} is empty: leave it out")


def predict(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Prediction]:
    """Classifies texts like `transformers.pipeline("text-classification")`, truncated to the context length.

    Raises:
        InputError: A text is empty.
    """
    length = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    rows = []
    for number, text in enumerate(texts, start=1):
        ids = tokenizer(text, truncation=True, max_length=length)["input_ids"]
        if not ids:
            raise InputError(f"text {number} is {text!r}, which has no tokens: leave it out")
        rows.append({"input_ids": ids})
    batches = DataLoader(rows, batch_size=16, collate_fn=padding_collator(tokenizer)) if rows else []
    labels = model.config.id2label
    predictions = []
    for text, probabilities in zip(texts, predict_probabilities(model, batches), strict=True):
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        named = {labels[index]: value for index, value in enumerate(probabilities)}
        predictions.append(Prediction(text, labels[best], probabilities[best], named))
    return predictions


def accuracy_interval(right: int, rows: int) -> tuple[float, float]:
    """The 95% Wilson interval of the accuracy if `right` of `rows` predictions are correct."""
    from scipy.stats import binomtest

    interval = binomtest(right, rows).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def majority_accuracy(train: Sequence[str], test: Sequence[str]) -> float:
    """The majority-class baseline: accuracy of always predicting the most frequent training label."""
    counts = collections.Counter(train)
    largest = max(sorted(counts), key=counts.get)
    return sum(label == largest for label in test) / len(test)


def baseline_accuracy(
    train: tuple[Sequence[str], Sequence[str]], test: tuple[Sequence[str], Sequence[str]], balanced: bool = False
) -> float:
    """The accuracy of a logistic regression on TF-IDF weighted character n-grams within words, n from 1 to 5.

    Args:
        train: Texts and labels to fit.
        test: Texts and labels to evaluate.
        balanced: Whether to weight all classes equally when fitting.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 5), sublinear_tf=True, max_features=300_000)
    regression = LogisticRegression(C=100, max_iter=1000, class_weight="balanced" if balanced else None)
    return float(make_pipeline(vectorizer, regression).fit(*train).score(*test))


def plot_confusion(result: ClassifierResult, path: Path, title: str):
    """Plots the confusion matrix: true classes in rows, predicted classes in columns, counts and row percentages."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    confusion = result.compute()["confusion"]
    size = min(2.2 + 0.8 * len(result.labels), 20)  # inches
    figure, axes = pyplot.subplots(figsize=(size + 0.6, size), dpi=120, layout="constrained")
    largest = max(map(max, confusion))
    axes.imshow(confusion, cmap="Blues", vmin=0, vmax=largest)
    for row, counts in enumerate(confusion if len(confusion) <= 30 else []):  # otherwise the numbers do not fit
        for column, count in enumerate(counts):
            color = "white" if count > largest / 2 else "black"
            share = f"{count:,}\n{count / max(sum(counts), 1):.0%}"
            axes.text(column, row, share, ha="center", va="center", color=color, fontsize=9)
    places = range(len(result.labels))
    labels = [drawable(label, f"class {index}") for index, label in enumerate(result.labels)]
    axes.set_xticks(places, labels, rotation=30 if len(labels) > 3 else 0)
    axes.set_yticks(places, labels)
    axes.set(xlabel="predicted", ylabel="true", title=drawable(title, "test split"))
    figure.savefig(path)
    pyplot.close(figure)
