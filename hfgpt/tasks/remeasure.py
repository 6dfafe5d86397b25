"""Measuring a saved model again before it is published, on the rows that its run held out."""

import datetime
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoModelForSequenceClassification

from hfgpt.data.files import find_files, looks_local
from hfgpt.errors import InputError
from hfgpt.evaluation.classification import ClassifierResult
from hfgpt.hub.records import Records, explained_records, is_checkpoint
from hfgpt.loading import classifies, load_model
from hfgpt.recipe import Recipe, load_recipe, parse_sections
from hfgpt.tasks import classify, instruct, pretrain
from hfgpt.tasks.evaluate import refuse_unused
from hfgpt.training.hardware import find_device

# How far a measurement may be from that at the end of the run: another machine rounds otherwise, no more.
TOLERANCE = 1e-3
# Where two answers to a row are almost equally likely, rounding decides which is given. So what is counted may differ
# by such rows: this share of them, or one. Weights and tokenizer are by then known to be those of the record, and what
# is published is what was measured now; this only tells another machine from metrics that somebody has changed.
FLIPPING = 0.01
# Options that say where and how the data is read here, and not which rows are measured.
OF_THIS_MACHINE = ("--data.path", "--data.cache_dir", "--data.num_proc")


def measure_again(folder: Path, records: Records, overrides: Sequence[str], console: Console) -> str:
    """Measures the weights that are to be published, on the rows that the run held out, or on those that are named.

    Args:
        folder: Of the model.
        records: Of that folder; gets the metrics, and in `run` when and on what they were measured.
        overrides: Of the sections `data` and `evaluation`.
        console: Where to show progress.

    Returns:
        What was done, in a line.

    Raises:
        InputError: The data is not that of the run, or the metrics are not.
    """
    now = datetime.datetime.now(datetime.UTC).date().isoformat()  # publishing twice on a day changes nothing
    if not records.recipe:
        return _measure_what_is_named(folder, records, overrides, now)
    with explained_records(folder):
        recipe = _find_rows(records, overrides)
    if recipe is None:
        kept = "its metrics are those of the end of the run" if records.metrics else "nothing is measured"
        return f"{kept}: its data is no longer at '{_source(records)}'"
    measure: Callable = {"pretrain": _measure_text, "classify": _measure_classes, "instruct": _measure_answers}[
        recipe.task
    ]
    run_folder = _run_folder(folder)
    with console.status("measuring the weights"):
        metrics, allowed, sha = measure(recipe, folder, run_folder, console)
    if records.data and sha != records.data["sha256"]:
        raise InputError(
            f"the data at '{recipe.data.path}' is not that of the run (its sha256 is another): put that back, or name "
            "it with --data.path"
        )
    as_before = ", and found as at the end of the run" if records.metrics else ""
    records.metrics = _compare(records.metrics, metrics, allowed)
    records.run["measured_again"] = now
    return f"measured again on {records.measured_on}{as_before}"


def _find_rows(records: Records, overrides: Sequence[str]) -> Recipe | None:
    """The recipe of the run with its data where it now is; None: it is gone."""
    options = [
        override.partition("=")[0] for override in overrides if override.startswith(("--data.", "--evaluation."))
    ]
    if others := [option for option in options if option not in OF_THIS_MACHINE]:
        raise InputError(
            f"{others[0]} would measure other rows than the run held out: leave it out; only --data.path, where the "
            "data now is, can be given"
        )
    # Nothing is trained or reported: a machine without the run's bfloat16 or its reporting tool measures it as well.
    unneeded = ("--training.bf16=null", "--training.tf32=null", "--training.report_to=none")
    overrides = [*overrides, *unneeded]
    recipe = load_recipe(str(_run_folder(records.folder) / "recipe.yaml"), overrides)
    if "--data.path" in options:
        return recipe
    source = _source(records)
    if looks_local(source) and not find_files(source):
        return None
    recipe.data.path = source
    return recipe


def _source(records: Records) -> str:
    """Where the data was: as it was found, or else as it was written."""
    return records.run.get("data_source") or records.recipe["data"]["path"]


def _run_folder(folder: Path) -> Path:
    return folder.parent if is_checkpoint(folder) else folder


def _compare(before: dict[str, Any], after: dict[str, Any], allowed: dict[str, float]) -> dict[str, Any]:
    """What was measured now, and what a judge said at the end of the run.

    Args:
        before, after: Metrics of the same rows.
        allowed: How far those that are counted may differ.

    Raises:
        InputError: metrics.json says something else, or something that is not measured.
    """
    for name, value in before.items():
        if name.startswith("eval_judge"):  # whoever judged is not asked again
            after[name] = value
        elif name not in after:
            raise InputError(f"metrics.json has {name}, which is not measured of such a model: take it out")
        elif not math.isclose(after[name], value, rel_tol=TOLERANCE, abs_tol=max(TOLERANCE, allowed.get(name, 0))):
            raise InputError(
                f"metrics.json says {name} {value:.6g}, but the weights give {after[name]:.6g} on the same rows: "
                "metrics, tokenizer or the configuration was changed; train again"
            )
    return after


def _flips(rows: int) -> float:
    """How many of so many rows may come out otherwise on another machine."""
    return max(1, rows * FLIPPING) * (1 + 1e-9)


Measurement = tuple[dict[str, Any], dict[str, float], str]  # metrics, how far some may differ, sha256 of the data


def _measure_text(recipe: Recipe, folder: Path, run_folder: Path, console: Console) -> Measurement:
    data = pretrain.load_pretraining_data(recipe, run_folder)
    saved = load_model(str(folder)).to(find_device())
    batch_size = recipe.training.per_device_eval_batch_size
    return pretrain.measure(saved, data.tokenizer, data.validation, data.report, batch_size), {}, data.report.sha256


def _measure_classes(recipe: Recipe, folder: Path, run_folder: Path, console: Console) -> Measurement:
    data = classify.load_classification_data(recipe, run_folder)
    saved = load_model(str(folder), auto_class=AutoModelForSequenceClassification).to(find_device())
    metrics, result = classify.measure_splits(saved, data, recipe.training.per_device_eval_batch_size)
    if recipe.evaluation.baseline:
        metrics["baseline_accuracy"] = classify.measure_baseline(data)
    return metrics, allowed_for_classes(result, len(data.encoded["validation"])), data.report.sha256


def allowed_for_classes(result: ClassifierResult, validation_rows: int) -> dict[str, float]:
    """How far the metrics of a classifier may differ: by what the rows that may flip change at most.

    Args:
        result: The predictions of the test split.
        validation_rows: Rows of the validation split.
    """
    rows, labels = len(result.references), result.labels
    share = _flips(rows) / rows
    allowed = {"eval_accuracy": share, "baseline_accuracy": share}
    # The ends of Wilson's interval move up to twice as fast as the accuracy.
    allowed |= {"eval_accuracy_low": 2 * share, "eval_accuracy_high": 2 * share}
    allowed["validation_accuracy"] = _flips(validation_rows) / validation_rows
    # A row that flips changes precision and recall by at most one in the rows of the class, or in those taken for it.
    counts = [[ids.count(index) for ids in (result.references, result.predictions)] for index in range(len(labels))]
    of_class = [_flips(rows) / max(1, min(count)) for count in counts]
    for label, value in zip(labels, of_class, strict=True):
        allowed |= {f"eval_precision_{label}": value, f"eval_recall_{label}": value}
    allowed["eval_macro_f1"] = sum(of_class) / len(of_class)
    return allowed


def _measure_answers(recipe: Recipe, folder: Path, run_folder: Path, console: Console) -> Measurement:
    data = instruct.load_instruction_data(recipe, run_folder)
    saved = load_model(str(folder)).to(find_device())
    batch_size = recipe.training.per_device_eval_batch_size
    metrics = instruct.measure(saved, data.tokenizer, data.encoded["test"], batch_size)
    answers = instruct.answer(saved, data.tokenizer, data.conversations["test"], recipe.evaluation, console)
    flips = _flips(len(answers))
    allowed = dict.fromkeys(("eval_exact_match", "eval_normalised_match"), flips / len(answers))
    allowed["eval_unfinished_answers"] = flips
    return metrics | instruct.match_answers(answers), allowed, data.report.sha256


def _measure_what_is_named(folder: Path, records: Records, overrides: Sequence[str], now: str) -> str:
    """`hfgpt evaluate` on what the command line names, for a model of which no recipe says what it was kept from."""
    others = _chosen_rows(overrides)
    if not any(override.partition("=")[0] == "--data.path" for override in overrides):
        return "nothing is measured: it is not recorded on what to"
    task = "classify" if classifies(str(folder)) else "pretrain"
    sections = parse_sections(list(overrides), task, ["data", "evaluation", "hub"])
    data = sections["data"]
    refuse_unused(task, overrides, data)
    source = str(Path(data.path).resolve()) if Path(data.path).exists() else data.path
    if task == "classify":
        records.metrics = classify.evaluate_classifier(str(folder), data)
    else:
        records.metrics = pretrain.evaluate_model(str(folder), data, sections["evaluation"])
    records.run |= {"data_source": source, "measured_again": now}
    if others:
        records.run["measured_with"] = " ".join(others)
    return f"measured on {records.measured_on} of {source}"


def _chosen_rows(overrides: Sequence[str]) -> list[str]:
    """The overrides of the section `data` that say which rows are measured, as they were written."""
    given, kept = list(overrides), []
    while given:
        option = given.pop(0)
        value = [] if "=" in option or not given or given[0].startswith("--") else [given.pop(0)]
        if option.startswith("--data.") and option.partition("=")[0] not in OF_THIS_MACHINE:
            kept += [option, *value]
    return kept
