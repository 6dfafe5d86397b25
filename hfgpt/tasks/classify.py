"""Stage 7.1, classification: from labelled texts to a classifier that anyone can load, in labelled steps."""

import dataclasses
import functools
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from hfgpt.building import check_base_model
from hfgpt.data.blocks import BlockDataset
from hfgpt.data.classification import (
    SPLITS,
    ClassificationDataArguments,
    LabelledTexts,
    class_weights,
    encode_texts,
    load_all_labelled_texts,
    load_labelled_texts,
)
from hfgpt.data.report import DataReport
from hfgpt.errors import InputError
from hfgpt.evaluation.classification import (
    ClassifierResult,
    baseline_accuracy,
    classification_loss,
    majority_accuracy,
    measure_classifier,
    plot_confusion,
    predict_probabilities,
)
from hfgpt.evaluation.generation import unknown_token_id
from hfgpt.loading import check_vocabulary, classifies, load_model, load_model_tokenizer
from hfgpt.recipe import Recipe
from hfgpt.saving import quote_path, write_json
from hfgpt.tasks.first_pass import build_blocks, describe_first_pass, model_after_first_pass, run_first_pass
from hfgpt.tasks.messages import describe_choices, describe_classification, render_summary
from hfgpt.tasks.run_folder import begin_run, check_run_folder, holds_run_folder
from hfgpt.tasks.training_run import (
    Training,
    build_recipe_model,
    check_publication,
    context_length,
    describe_run,
    end_run,
    find_tokenizer,
    padding_collator,
    plan_rows,
    publish_run,
    run_training,
    save_run,
    sorted_by_length,
    warn_of_small_vocabulary,
)
from hfgpt.tokenizer import wrap_in_end_of_text
from hfgpt.training.callbacks import log_result, plot_loss, stderr_console
from hfgpt.training.hardware import find_device
from hfgpt.training.trainer import HfGPTTrainer


@dataclass
class ClassificationData:
    """What a classifier learns from and is measured on.

    Args:
        texts: The rows as they were read.
        encoded: Split -> token ids and label ids.
        tokenizer: What made them.
        report: What became of the rows.
        weights: Of the classes in the loss; None: all 1.
    """

    texts: LabelledTexts
    encoded: dict[str, Dataset]
    tokenizer: PreTrainedTokenizerBase
    report: DataReport
    weights: list[float] | None

    @property
    def labels(self) -> list[str]:
        return self.texts.labels


@dataclass
class Prediction:
    """What a classifier says of a text: the likeliest label, its probability, and those of all labels."""

    text: str
    label: str
    score: float
    probabilities: dict[str, float]


@holds_run_folder
def classify(recipe: Recipe, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Trains a sequence classifier from labelled texts and leaves a complete run folder.

    Args:
        recipe: See `hfgpt.recipe.load_recipe`.
        resume: Go on from the last checkpoint in `training.output_dir`.
        console: Where to report; None: standard error.

    Returns:
        The content of `metrics.json`.

    Raises:
        InputError: Something in the recipe, the data or the run folder has to be mended first.
        Interrupted: Ctrl-C; the run can be resumed.
    """
    console = console or stderr_console(quiet=recipe.training.process_index > 0)
    started = time.perf_counter()

    # 1. The run folder: free, or that of the run to go on with; and the Hub, if it goes there.
    checkpoint = check_run_folder(recipe, resume, console)
    check_publication(recipe)
    folder = Path(recipe.training.output_dir)

    # 2. Rows to splits to tokens, and the model, so that what is wrong with it is known before anything is written.
    data = load_classification_data(recipe, folder if resume else None)
    model = build_classifier(recipe, data)
    blocks = first_pass_blocks(recipe, data)
    PartialState().wait_for_everyone()  # all have seen the folder free
    if recipe.training.process_index == 0:
        begin_run(recipe, data.tokenizer, data.report, checkpoint)
    console.print(data.report.summary(), highlight=False)

    # 3. A first pass over the texts without their labels, if the recipe has one; the model then begins there.
    if blocks is not None:
        run_first_pass(recipe, blocks, data.tokenizer, console)
        model = build_classifier(dataclasses.replace(recipe, model=model_after_first_pass(recipe)), data)

    # 4. What it will cost, and what was chosen.
    estimate = plan_rows(model, recipe, data.encoded["train"], seconds=0.5)
    console.print(describe_choices(model, recipe, estimate), highlight=False)

    # 5. Train.
    trainer = HfGPTTrainer(
        model=model,
        args=recipe.training,
        train_dataset=data.encoded["train"],
        eval_dataset=data.encoded["validation"],
        processing_class=data.tokenizer,
        data_collator=padding_collator(data.tokenizer),
        compute_loss_func=classification_loss(data.weights, recipe.training.label_smoothing_factor),
        measure=functools.partial(measure_classifier, labels=data.labels),
    )
    training = run_training(trainer, estimate, checkpoint, started, console, recipe.hub)
    return finish_run(recipe, training, data, console) if trainer.is_world_process_zero() else {}


def finish_run(recipe: Recipe, training: Training, data: ClassificationData, console: Console) -> dict[str, Any]:
    """Saves the trained classifier, measures it, and writes down what happened; returns what `metrics.json` holds."""
    folder, trainer = Path(recipe.training.output_dir), training.trainer

    # 6. Save, then measure the weights as they were saved: on the test split once.
    save_run(trainer, folder)
    saved = load_model(str(folder), auto_class=AutoModelForSequenceClassification).to(recipe.training.device)
    metrics, tested = measure_splits(saved, data, recipe.training.per_device_eval_batch_size)
    write_json(folder / "metrics.json", metrics)
    logged = {re.sub("^eval_", "test_", name): value for name, value in metrics.items()}  # eval_ is validation's there
    log_result(folder, {"step": trainer.state.global_step, "epoch": trainer.state.epoch, **logged})

    # 7. What happened, for whoever repeats it or asks; and what is to be compared with, which may take a while.
    tokens = round(trainer.state.epoch * sum(data.encoded["train"]["length"]))
    samples = sample(saved, data.tokenizer, recipe)
    run = describe_run(recipe, training, tokens, samples)
    write_json(folder / "run.json", run | describe_first_pass(recipe))
    plot_loss(folder, len(data.labels), "row")
    plot_confusion(tested, folder / "confusion.png", f"{recipe.name}, test split")
    if recipe.evaluation.baseline:
        metrics["baseline_accuracy"] = measure_baseline(data)
        write_json(folder / "metrics.json", metrics)
    end_run(recipe)
    measured, following = (
        f"on the test split {describe_classification(metrics)}",
        f"hfgpt classify {quote_path(folder)} 'your text'",
    )
    console.print(render_summary(folder, measured, samples["texts"], training, following), highlight=False)
    publish_run(recipe, training, console)
    return metrics


def measure_splits(
    model: PreTrainedModel, data: ClassificationData, batch_size: int
) -> tuple[dict[str, Any], ClassifierResult]:
    """What `metrics.json` holds of a classifier but for the baseline, and the test split's predictions."""
    validated, tested = (
        measure(model, data.tokenizer, data.encoded[split], data.labels, batch_size)
        for split in ("validation", "test")
    )
    metrics = tested.to_dict()
    metrics["validation_accuracy"] = validated.to_dict("validation")["validation_accuracy"]
    labels = [list(data.texts.splits[split]["label"]) for split in ("train", "test")]
    metrics["majority_accuracy"] = majority_accuracy(*labels)
    return metrics, tested


def measure_baseline(data: ClassificationData) -> float:
    """The test accuracy of a logistic regression on the same rows."""
    splits = [data.texts.splits[split] for split in ("train", "test")]
    pairs = [(list(split["text"]), list(split["label"])) for split in splits]
    return baseline_accuracy(*pairs, balanced=data.weights is not None)


def load_classification_data(recipe: Recipe, tokenizer_folder: Path | None = None) -> ClassificationData:
    """Reads the rows, divides them, trains or loads the tokenizer (with a model its own), and encodes the texts.

    Args:
        recipe: Its sections `data`, `tokenizer` and `model`.
        tokenizer_folder: A run to resume, whose tokenizer is taken rather than trained again.

    Raises:
        InputError: The rows or the tokenizer cannot be used.
    """
    if tokenizer_folder is None:
        check_base_model(recipe.model)
    report = DataReport()
    texts = load_labelled_texts(recipe.data, recipe.training.seed, report)
    tokenizer = find_tokenizer(recipe, tokenizer_folder, [*texts.splits["train"]["text"], *texts.unlabelled])
    warn_of_small_vocabulary(recipe, tokenizer, report)
    if recipe.data.end_of_text:
        wrap_in_end_of_text(tokenizer)
    elif tokenizer.pad_token is None:  # GPT-2's has none, and pipelines then cannot batch; the mask tells it apart
        tokenizer.pad_token = tokenizer.eos_token
    context = context_length(recipe)
    length = recipe.data.max_length or context
    if length > context:
        raise InputError(f"data.max_length is {length}, but the context of the model is {context}: lower it")
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
    weights = class_weights(texts.splits["train"], texts.labels) if recipe.data.balance == "weights" else None
    return ClassificationData(texts, encoded, tokenizer, report, weights)


def build_classifier(recipe: Recipe, data: ClassificationData) -> PreTrainedModel:
    """The classifier to train: a new head, and the seed's weights where there are none to go on from.

    Raises:
        InputError: As `build_recipe_model`; or one of the texts to classify at the end is empty.
    """
    read_texts(recipe.evaluation.prompts or ["any"], None)
    set_seed(recipe.training.seed)
    return build_recipe_model(recipe, data.tokenizer, data.labels)


def first_pass_blocks(recipe: Recipe, data: ClassificationData) -> BlockDataset | None:
    """What a first pass reads: the training texts and those left out to balance the classes; None if there is none."""
    if recipe.pretraining is None:
        return None
    return build_blocks(recipe, [*data.texts.splits["train"]["text"], *data.texts.unlabelled], data.tokenizer)


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    labels: list[str],
    batch_size: int,
) -> ClassifierResult:
    """Predicts the rows of a split, those of like length together."""
    loader = DataLoader(sorted_by_length(rows), batch_size=batch_size, collate_fn=padding_collator(tokenizer))
    return measure_classifier(model, loader, labels)


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> dict[str, Any]:
    """The recipe's prompts, classified."""
    predictions = predict(model, tokenizer, recipe.evaluation.prompts)
    return {"texts": [f"{found.text}: {found.label} ({found.score:.3f})" for found in predictions]}


def evaluate_classifier(path: str, data: ClassificationDataArguments) -> dict[str, Any]:
    """Measures a saved classifier on all rows of a source.

    Args:
        path: A folder or Hub id.
        data: The source; `test_split`, if named, restricts it.

    Returns:
        Metrics under the names of `metrics.json`.

    Raises:
        InputError: No classifier, no rows, or a label that the classifier does not know.
    """
    model, tokenizer, labels = load_classifier(path)
    report = DataReport()
    rows = load_all_labelled_texts(data, labels, report)
    context = model.config.max_position_embeddings
    length = min(data.max_length or context, tokenizer.model_max_length, context)
    encoded, cut = encode_texts(rows, tokenizer, labels, length)
    metrics = measure(model, tokenizer, encoded, labels, batch_size=32).to_dict()
    return metrics | {"eval_truncated": cut} if cut else metrics


def load_classifier(path: str, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """A saved classifier on this machine's device, its tokenizer, and its classes in the order of their ids.

    Args:
        path: A folder or Hub id.
        options: Those of `load_model`.

    Raises:
        InputError: There is none, or it is a language model.
    """
    if not classifies(path):
        raise InputError(f"'{path}' is a language model, not a classifier: train one with task: classify")
    tokenizer = load_model_tokenizer(path)
    model = load_model(path, auto_class=AutoModelForSequenceClassification, **options).to(find_device())
    check_vocabulary(model, tokenizer)
    return model, tokenizer, [model.config.id2label[index] for index in range(model.config.num_labels)]


def read_texts(texts: Sequence[str], file: Path | None) -> list[str]:
    """Texts of the command line, then the lines of a file; `-` is standard input.

    Raises:
        InputError: There is none, one is empty, or the file cannot be read.
    """
    named = [(f"text {number}", text) for number, text in enumerate(texts, start=1)]
    if file is not None:
        place = "standard input" if file == Path("-") else file
        content = sys.stdin.buffer.read() if file == Path("-") else file.read_bytes()
        try:
            lines = content.decode().replace("\r\n", "\n").rstrip("\n").split("\n") if content.strip() else []
        except UnicodeDecodeError as error:
            raise InputError(f"{place} is not UTF-8 at byte {error.start}: convert it") from error
        named += [(f"{place}, line {number}", line) for number, line in enumerate(lines, start=1)]
    if not named:
        raise InputError("there is no text to classify: give some, or a file with a text per line (--file)")
    for place, text in named:
        if not text.strip():
            raise InputError(f"{place} is empty: leave it out")
    return [text for _, text in named]


def predict(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Prediction]:
    """Classifies texts as `transformers.pipeline("text-classification")` does, cut to what the model can read.

    Raises:
        InputError: A text is empty.
    """
    length = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    rows = []
    for number, text in enumerate(texts, start=1):
        ids = tokenizer(text, truncation=True, max_length=length)["input_ids"]
        if not ids:
            raise InputError(f"text {number} is {text!r}, which has no token: leave it out")
        rows.append({"input_ids": ids})
    batches = DataLoader(rows, batch_size=16, collate_fn=padding_collator(tokenizer)) if rows else []
    labels = model.config.id2label
    predictions = []
    for text, probabilities in zip(texts, predict_probabilities(model, batches), strict=True):
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        named = {labels[index]: value for index, value in enumerate(probabilities)}
        predictions.append(Prediction(text, labels[best], probabilities[best], named))
    return predictions
