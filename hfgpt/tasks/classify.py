"""Stage 7.1, classification: train a sequence classifier on labeled texts."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from hfgpt.building import find_base_model
from hfgpt.data.classification import (
    SPLITS,
    ClassificationDataArguments,
    class_weights,
    encode_texts,
    load_all_labeled_texts,
    load_labeled_texts,
)
from hfgpt.data.collators import padding_collator, sorted_by_length
from hfgpt.data.report import DataReport, counted
from hfgpt.errors import InputError
from hfgpt.evaluation import ClassifierEvaluationArguments
from hfgpt.evaluation.classification import (
    ClassifierResult,
    baseline_accuracy,
    check_texts,
    classification_loss,
    majority_accuracy,
    measure_classifier,
    plot_confusion,
    predict,
)
from hfgpt.evaluation.generation import unknown_token_id
from hfgpt.evaluation.spread import Map
from hfgpt.models import SavedModel, load_classifier
from hfgpt.recipe import Recipe
from hfgpt.tasks.preparation import build_recipe_model, context_length, find_tokenizer, warn_of_small_vocabulary
from hfgpt.tasks.task import ALL_ROWS, NO_TEXTS, Data, Measured, flips
from hfgpt.tokenizer import wrap_in_end_of_text


@dataclass(kw_only=True)
class ClassificationData(Data):
    """Labeled rows of token ids.

    Args:
        rows: Split -> texts and labels.
        weights: Class weights in the loss; None: all 1.
    """

    rows: dict[str, Dataset]
    weights: list[float] | None


class Classification:
    """Trains a sequence classifier on labeled texts; see `hfgpt.tasks.task.Task` for the methods."""

    measured_split = "test"
    only_for_training: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("data.validation_fraction", "data.test_fraction"), ALL_ROWS),
        "data.balance": "all rows of all classes are evaluated",
        "data.end_of_text": "it is a setting of the model's tokenizer",
        "evaluation.baseline": "a baseline is fitted on training rows",
        "evaluation.prompts": NO_TEXTS.format("classify"),
    }

    def check(self, recipe: Recipe):
        pass

    def load(
        self, recipe: Recipe, tokenizer_folder: Path | None = None, characters: int | None = None
    ) -> ClassificationData:
        base = find_base_model(recipe.model)
        report = DataReport()
        texts = load_labeled_texts(recipe.data, recipe.training.seed, report)
        trained_on = [*texts.splits["train"]["text"], *texts.unlabeled]
        tokenizer = find_tokenizer(recipe, base, tokenizer_folder, trained_on)
        warn_of_small_vocabulary(recipe, tokenizer, report)
        if recipe.data.end_of_text:
            wrap_in_end_of_text(tokenizer)
        elif tokenizer.pad_token is None:  # as in GPT-2: pipelines need one for batches; the mask marks the padding
            tokenizer.pad_token = tokenizer.eos_token
        context = context_length(recipe, base)
        length = recipe.data.max_length or context
        if length > context:
            raise InputError(f"data.max_length is {length}, but the model's context length is {context}: lower it")
        tokenizer.model_max_length = length
        encoded = {}
        for split in SPLITS:
            encoded[split], cut = encode_texts(texts.splits[split], tokenizer, texts.labels, length)
            report.truncated += cut
            report.split(split).tokens = sum(encoded[split]["length"])
            unknown = unknown_token_id(tokenizer)
            report.split(split).unknown_tokens = sum(ids.count(unknown) for ids in encoded[split]["input_ids"])
        for split in ("validation", "test"):
            report.warn_if_small(split, "rows")
        return ClassificationData(
            splits=encoded,
            tokenizer=tokenizer,
            report=report,
            labels=texts.labels,
            base=base,
            pretraining_texts=trained_on if recipe.pretraining else [],
            rows=texts.splits,
            weights=class_weights(texts.splits["train"], texts.labels) if recipe.data.balance == "weights" else None,
        )

    def build(self, recipe: Recipe, data: ClassificationData) -> PreTrainedModel:
        check_texts(recipe.evaluation.prompts)
        set_seed(recipe.training.seed)
        return build_recipe_model(recipe, data)

    def trainer_arguments(self, recipe: Recipe, data: ClassificationData) -> dict[str, Any]:
        return {
            "data_collator": padding_collator(data.tokenizer),
            "compute_loss_func": classification_loss(data.weights, recipe.training.label_smoothing_factor),
            "measure": functools.partial(measure_classifier, labels=data.labels),
        }

    def measure(
        self, model: PreTrainedModel, data: ClassificationData, recipe: Recipe, console: Console, spread: Map = map
    ) -> Measured:
        batch_size = recipe.training.per_device_eval_batch_size
        validated, tested = (
            measure_rows(model, data.tokenizer, data.splits[split], data.labels, batch_size, spread)
            for split in ("validation", "test")
        )
        metrics = tested.to_dict()
        metrics["validation_accuracy"] = validated.to_dict("validation")["validation_accuracy"]
        train, test = (list(data.rows[split]["label"]) for split in ("train", "test"))
        metrics["majority_accuracy"] = majority_accuracy(train, test)
        if recipe.evaluation.baseline:
            texts = (list(data.rows[split]["text"]) for split in ("train", "test"))
            pairs = zip(texts, (train, test), strict=True)
            metrics["baseline_accuracy"] = baseline_accuracy(*pairs, balanced=data.weights is not None)
        return Measured(
            metrics,
            allowed_for_classes(tested, len(data.splits["validation"])),
            keep=lambda folder: plot_confusion(
                tested, folder / "confusion.png", f"{Path(recipe.training.output_dir).name}, test split"
            ),
        )

    def sample(self, model: PreTrainedModel, data: ClassificationData, recipe: Recipe) -> dict[str, Any]:
        """The recipe's prompts, classified."""
        predictions = predict(model, data.tokenizer, recipe.evaluation.prompts)
        return {"texts": [f"{found.text}: {found.label} ({found.score:.3f})" for found in predictions]}

    def evaluate(
        self,
        saved: SavedModel,
        data: ClassificationDataArguments,
        evaluation: ClassifierEvaluationArguments,
        console: Console | None = None,
    ) -> dict[str, Any]:
        model, tokenizer, labels = load_classifier(saved)
        rows = load_all_labeled_texts(data, labels, DataReport())
        context = model.config.max_position_embeddings
        length = min(data.max_length or context, tokenizer.model_max_length, context)
        encoded, cut = encode_texts(rows, tokenizer, labels, length)
        metrics = measure_rows(model, tokenizer, encoded, labels, batch_size=32).to_dict()
        return metrics | {"eval_truncated": cut} if cut else metrics

    def describe(self, metrics: Mapping[str, Any]) -> str:
        compared = [f"majority class {metrics['majority_accuracy']:.2%}"] if "majority_accuracy" in metrics else []
        if "baseline_accuracy" in metrics:
            compared.append(f"logistic regression on character n-grams {metrics['baseline_accuracy']:.2%}")
        return (
            f"test accuracy {metrics['eval_accuracy']:.2%} (95% interval {metrics['eval_accuracy_low']:.2%} to "
            f"{metrics['eval_accuracy_high']:.2%}), macro F1 {metrics['eval_macro_f1']:.4f} over "
            f"{counted(metrics['eval_rows'], 'rows')}" + (f"; baselines: {', '.join(compared)}" if compared else "")
        )

    def following(self, folder: str) -> str:
        return f"hfgpt classify {folder} 'your text'"


def measure_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    labels: list[str],
    batch_size: int,
    spread: Map = map,
) -> ClassifierResult:
    """Predicts the rows of a split in batches of similar length."""
    loader = DataLoader(sorted_by_length(rows), batch_size=batch_size, collate_fn=padding_collator(tokenizer))
    return measure_classifier(model, loader, labels, spread)


def allowed_for_classes(result: ClassifierResult, validation_rows: int) -> dict[str, float]:
    """Upper bounds on how much each metric can differ between machines, see `flips`.

    Args:
        result: Predictions on the test split.
        validation_rows: Number of rows in the validation split.
    """
    rows, labels = len(result.references), result.labels
    share = flips(rows) / rows
    allowed = {"eval_accuracy": share, "baseline_accuracy": share}
    # The bounds of the Wilson interval change at most twice as fast as the accuracy.
    allowed |= {"eval_accuracy_low": 2 * share, "eval_accuracy_high": 2 * share}
    allowed["validation_accuracy"] = flips(validation_rows) / validation_rows
    # A flipped row changes recall by at most 1 / rows of the class, precision by at most 1 / rows predicted as it.
    counts = [[ids.count(index) for ids in (result.references, result.predictions)] for index in range(len(labels))]
    of_class = [flips(rows) / max(1, min(count)) for count in counts]
    for label, value in zip(labels, of_class, strict=True):
        allowed |= {f"eval_precision_{label}": value, f"eval_recall_{label}": value}
    allowed["eval_macro_f1"] = sum(of_class) / len(of_class)
    return allowed
