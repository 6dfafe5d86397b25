"""Measuring a saved model again before it is published, on the rows that its run held out."""

import datetime
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from hfgpt.data.files import find_files, is_url, looks_local
from hfgpt.errors import InputError
from hfgpt.hub.folder import FolderRecords, explained_records
from hfgpt.models import find_device, find_model
from hfgpt.recipe import Recipe, load_recipe, parse_sections
from hfgpt.records import RECIPE_FILE, is_checkpoint
from hfgpt.runs.evaluation import refuse_unused
from hfgpt.tasks import TASKS

# How far a measurement may be from that at the end of the run: another machine rounds otherwise, no more.
TOLERANCE = 1e-3
# Options that say where and how the data is read here, and not which rows are measured.
OF_THIS_MACHINE = ("--data.path", "--data.cache_dir", "--data.num_proc")


def measure_again(folder: Path, records: FolderRecords, overrides: Sequence[str], console: Console) -> str:
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
        return _measure_what_is_named(folder, records, overrides, now, console)
    with explained_records(folder):
        recipe = _find_rows(records, overrides)
    if recipe is None:
        kept = "its metrics are those of the end of the run" if records.metrics else "nothing is measured"
        return f"{kept}: its data is no longer at '{_source(records)}'"
    task = TASKS[recipe.task]
    with console.status("measuring the weights"):
        data = task.load(recipe, _run_folder(folder))
        model = find_model(str(folder)).load().to(find_device())
        measured = task.measure(model, data, recipe, console)
    if records.data and data.report.sha256 != records.data.sha256:
        raise InputError(
            f"the data at '{recipe.data.path}' is not that of the run (its sha256 is another): put that back, or name "
            "it with --data.path"
        )
    as_before = ", and found as at the end of the run" if records.metrics else ""
    records.metrics = _compare(records.metrics, measured.metrics, measured.allowed)
    records.run.measured_again = now
    return f"measured again on {records.measured_on}{as_before}"


def _find_rows(records: FolderRecords, overrides: Sequence[str]) -> Recipe | None:
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
    recipe = load_recipe(str(_run_folder(records.folder) / RECIPE_FILE), overrides)
    if "--data.path" in options:
        return recipe
    source = _source(records)
    if looks_local(source) and not find_files(source):
        return None
    recipe.data.path = source
    return recipe


def _source(records: FolderRecords) -> str:
    """Where the data was: as it was found, or else as it was written, with what signs its user in."""
    written = records.recipe["data"]["path"]
    return written if is_url(written) else records.run.data_source or written


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


def _measure_what_is_named(
    folder: Path, records: FolderRecords, overrides: Sequence[str], now: str, console: Console
) -> str:
    """`hfgpt evaluate` on what the command line names, for a model of which no recipe says what it was kept from."""
    others = _chosen_rows(overrides)
    if not any(override.partition("=")[0] == "--data.path" for override in overrides):
        return "nothing is measured: it is not recorded on what to"
    saved = find_model(str(folder))
    task = "classify" if saved.is_classifier else "pretrain"
    sections = parse_sections(list(overrides), task, ["data", "evaluation", "hub"])
    data = sections["data"]
    refuse_unused(task, overrides, data)
    source = str(Path(data.path).resolve()) if Path(data.path).exists() else data.path
    records.metrics = TASKS[task].evaluate(saved, data, sections["evaluation"], console)
    records.run.data_source, records.run.measured_again = source, now
    if others:
        records.run.measured_with = " ".join(others)
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
