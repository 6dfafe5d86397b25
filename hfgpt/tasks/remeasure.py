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
from hfgpt.hub.records import Records
from hfgpt.loading import classifies, load_model
from hfgpt.recipe import Recipe, load_recipe, parse_sections
from hfgpt.tasks import classify, instruct, pretrain
from hfgpt.training.hardware import find_device

# How far a measurement may be from that at the end of the run: another machine rounds otherwise, no more.
TOLERANCE = 1e-3


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
    named = any(override.startswith("--data.path") for override in overrides)
    now = datetime.datetime.now(datetime.UTC).date().isoformat()  # publishing twice on a day changes nothing
    if not records.recipe:
        if not named:
            return "nothing is measured: it is not recorded on what to"
        records.metrics, source = _measure_on_named(folder, overrides)
        records.run |= {"data_source": source, "measured_again": now}
        return f"measured on all rows of {source}"
    run_folder = folder if (folder / "recipe.yaml").is_file() else folder.parent
    recipe = load_recipe(str(run_folder / "recipe.yaml"), list(overrides))
    source = records.run.get("data_source") or recipe.data.path  # there as it was found, here as it was written
    if not named:
        if looks_local(source) and not find_files(source):
            return f"its metrics are those of the end of the run: its data is no longer at '{source}'"
        recipe.data.path = source
    measure: Callable = {"pretrain": _measure_text, "classify": _measure_classes, "instruct": _measure_answers}[
        recipe.task
    ]
    with console.status("measuring the weights"):
        metrics, sha = measure(recipe, folder, run_folder, console)
    if records.data and sha != records.data["sha256"]:
        raise InputError(
            f"the data at '{recipe.data.path}' is not that of the run (its sha256 is another): put that back, or name "
            "it with --data.path"
        )
    for name, before in records.metrics.items():
        after = metrics.setdefault(name, before)  # what is not of the weights: baselines, a judge's scores
        if not math.isclose(after, before, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            raise InputError(
                f"metrics.json says {name} {before:.6g}, but the weights give {after:.6g} on the same rows: metrics, "
                "tokenizer or the configuration was changed; train again"
            )
    as_before = ", and found as at the end of the run" if records.metrics else ""
    records.metrics = metrics
    records.run["measured_again"] = now
    return f"measured again on {records.measured_on}{as_before}"


def _measure_text(recipe: Recipe, folder: Path, run_folder: Path, console: Console) -> tuple[dict[str, Any], str]:
    data = pretrain.load_pretraining_data(recipe, run_folder)
    saved = load_model(str(folder)).to(find_device())
    batch_size = recipe.training.per_device_eval_batch_size
    return pretrain.measure(saved, data.tokenizer, data.validation, data.report, batch_size), data.report.sha256


def _measure_classes(recipe: Recipe, folder: Path, run_folder: Path, console: Console) -> tuple[dict[str, Any], str]:
    data = classify.load_classification_data(recipe, run_folder)
    saved = load_model(str(folder), auto_class=AutoModelForSequenceClassification).to(find_device())
    batch_size = recipe.training.per_device_eval_batch_size
    tested = classify.measure(saved, data.tokenizer, data.encoded["test"], data.labels, batch_size)
    return tested.to_dict(), data.report.sha256


def _measure_answers(recipe: Recipe, folder: Path, run_folder: Path, console: Console) -> tuple[dict[str, Any], str]:
    data = instruct.load_instruction_data(recipe, run_folder)
    saved = load_model(str(folder)).to(find_device())
    batch_size = recipe.training.per_device_eval_batch_size
    metrics = instruct.measure(saved, data.tokenizer, data.encoded["test"], batch_size)
    answers = instruct.answer(saved, data.tokenizer, data.conversations["test"], recipe.evaluation, console)
    return metrics | instruct.match_answers(answers), data.report.sha256


def _measure_on_named(folder: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], str]:
    """`hfgpt evaluate` on what the command line names."""
    task = "classify" if classifies(str(folder)) else "pretrain"
    sections = parse_sections(list(overrides), task, ["data", "evaluation", "hub"])
    data = sections["data"]
    source = str(Path(data.path).resolve()) if Path(data.path).exists() else data.path
    if task == "classify":
        return classify.evaluate_classifier(str(folder), data), source
    return pretrain.evaluate_model(str(folder), data, sections["evaluation"]), source
