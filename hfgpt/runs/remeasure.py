"""Re-evaluates a saved model on the held-out rows of its run before it is published."""

import datetime
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel

from hfgpt.data.files import find_files, has_tokens, is_url, looks_local
from hfgpt.errors import InputError
from hfgpt.hub.folder import FolderRecords, explained_records
from hfgpt.models import find_device, find_model
from hfgpt.recipe import Recipe, load_recipe, parse_sections
from hfgpt.records import RECIPE_FILE, is_checkpoint
from hfgpt.runs.evaluation import refuse_unused
from hfgpt.tasks import TASKS

# Allowed difference from the metrics at the end of the run, because machines round differently.
TOLERANCE = 1e-3
# Options for the location and reading of the data on this machine, which do not affect the rows.
OF_THIS_MACHINE = ("--data.path", "--data.cache_dir", "--data.num_proc")


def measure_again(model: PreTrainedModel, records: FolderRecords, overrides: Sequence[str], console: Console) -> str:
    """Evaluates the weights to publish, on the held-out rows of the run, or on the rows given by overrides.

    Args:
        model: The loaded model.
        records: The records of its folder; updated with the metrics, the date and the data.
        overrides: For the sections `data` and `evaluation`.
        console: Shows progress.

    Returns:
        What was done, in one line.

    Raises:
        InputError: The data or the metrics do not match those of the run.
    """
    now = datetime.datetime.now(datetime.UTC).date().isoformat()  # so that publishing twice on one day changes nothing
    if not records.recipe:
        return _measure_what_is_named(records, overrides, now, console)
    with explained_records(records.folder):
        recipe = _find_rows(records, overrides)
    if recipe is None:
        kept = "not re-evaluated, metrics are from the end of the run" if records.metrics else "not evaluated"
        return f"{kept}: the data is no longer at '{_source(records)}'"
    task = TASKS[recipe.task]
    with console.status("evaluating the weights"):
        data = task.load(recipe, _run_folder(records.folder))
        measured = task.measure(model.to(find_device()), data, recipe, console)
    if records.data and data.report.sha256 != records.data.sha256:
        raise InputError(
            f"the data at '{recipe.data.path}' is not the data of the run (different sha256): restore it, or set "
            "--data.path"
        )
    as_before = ", with the same results as at the end of the run" if records.metrics else ""
    records.metrics = _compare(records.metrics, measured.metrics, measured.allowed)
    records.run.measured_again = now
    return f"re-evaluated on {records.measured_on}{as_before}"


def _find_rows(records: FolderRecords, overrides: Sequence[str]) -> Recipe | None:
    """The recipe of the run with the current location of its data; None if the data is gone."""
    options = [
        override.partition("=")[0] for override in overrides if override.startswith(("--data.", "--evaluation."))
    ]
    if others := [option for option in options if option not in OF_THIS_MACHINE]:
        raise InputError(
            f"{others[0]} would evaluate rows that the run did not hold out: leave it out; only --data.path, the "
            "current location of the data, can be set"
        )
    # Evaluation does not need the bfloat16 or the reporting integration of the run.
    unneeded = ("--training.bf16=null", "--training.tf32=null", "--training.report_to=none")
    overrides = [*overrides, *unneeded]
    recipe = load_recipe(str(_run_folder(records.folder) / RECIPE_FILE), overrides)
    if "--data.path" in options:
        return recipe
    source = _source(records)
    if looks_local(source) and not (find_files(source) or has_tokens(source)):
        return None
    recipe.data.path = source
    return recipe


def _source(records: FolderRecords) -> str:
    """The location of the run's data: resolved, or as written in the recipe; a URL as written, with its query."""
    written = records.recipe["data"]["path"]
    return written if is_url(written) else records.run.data_source or written


def _run_folder(folder: Path) -> Path:
    return folder.parent if is_checkpoint(folder) else folder


def _compare(before: dict[str, Any], after: dict[str, Any], allowed: dict[str, float]) -> dict[str, Any]:
    """The new metrics, plus the judge's metrics from the end of the run, which are not repeated.

    Args:
        before, after: Metrics of the same rows.
        allowed: Allowed differences of counted metrics.

    Raises:
        InputError: metrics.json has different values, or unknown metrics.
    """
    for name, value in before.items():
        if name.startswith("eval_judge"):
            after[name] = value
        elif name not in after:
            raise InputError(f"metrics.json has {name}, which is not a metric of this model: remove it")
        elif not math.isclose(after[name], value, rel_tol=TOLERANCE, abs_tol=max(TOLERANCE, allowed.get(name, 0))):
            raise InputError(
                f"metrics.json has {name} {value:.6g}, but the weights give {after[name]:.6g} on the same rows: the "
                "metrics, the tokenizer or the configuration has changed; restore it, or train again"
            )
    return after


def _measure_what_is_named(records: FolderRecords, overrides: Sequence[str], now: str, console: Console) -> str:
    """Evaluates a model without a recipe on the data given on the command line, like `hfgpt evaluate`."""
    others = _chosen_rows(overrides)
    if not any(override.partition("=")[0] == "--data.path" for override in overrides):
        return "not evaluated: the model's data is not recorded (set --data.path)"
    saved = find_model(str(records.folder))
    task = "classify" if saved.is_classifier else "pretrain"
    sections = parse_sections(list(overrides), task, ["data", "evaluation", "hub"])
    data = sections["data"]
    refuse_unused(task, overrides, data)
    source = str(Path(data.path).resolve()) if Path(data.path).exists() else data.path
    records.metrics = TASKS[task].evaluate(saved, data, sections["evaluation"], console)
    records.run.data_source, records.run.measured_again = source, now
    if others:
        records.run.measured_with = " ".join(others)
    return f"evaluated on {records.measured_on} of {source}"


def _chosen_rows(overrides: Sequence[str]) -> list[str]:
    """The overrides of the section `data` that affect which rows are evaluated, as written."""
    given, kept = list(overrides), []
    while given:
        option = given.pop(0)
        value = [] if "=" in option or not given or given[0].startswith("--") else [given.pop(0)]
        if option.startswith("--data.") and option.partition("=")[0] not in OF_THIS_MACHINE:
            kept += [option, *value]
    return kept
