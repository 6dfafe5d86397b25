"""`hfgpt train`: trains a recipe, and publishes the result if the recipe sets `hub.repo_id`."""

from pathlib import Path
from typing import Any

from rich.console import Console

from hfgpt.commands.publish import PublishArguments, check_base, publish
from hfgpt.durations import Budget
from hfgpt.errors import InputError
from hfgpt.hub.background import CheckpointPushes
from hfgpt.hub.upload import check_login
from hfgpt.output import stderr_console
from hfgpt.recipe import Recipe
from hfgpt.records import RunRecord
from hfgpt.runs.run import run
from hfgpt.saving import quote_path
from hfgpt.training.callbacks import append_log


def train(
    recipe: Recipe, resume: bool = False, console: Console | None = None, budget: Budget | None = None
) -> dict[str, Any]:
    """Runs a recipe, and publishes the result if the recipe sets `hub.repo_id`.

    Args, returns and raises as `hfgpt.runs.run.run`; in addition:

    Raises:
        InputError: The run cannot be published, or it is finished but an upload failed.
    """
    hub, is_main = recipe.hub, recipe.training.process_index == 0
    if hub is None or hub.repo_id is None:
        return run(recipe, resume, console, budget=budget)
    console = console or stderr_console(quiet=not is_main)
    check_publication(recipe)
    pushes = CheckpointPushes(hub, console) if hub.strategy == "checkpoints" and is_main else None
    try:
        metrics = run(recipe, resume, console, [pushes] if pushes else [], budget)
    finally:
        if pushes:
            pushes.stop()
    if is_main:
        publish_run(recipe, pushes, console)
    return metrics


def check_publication(recipe: Recipe):
    """Checks before training that the run can be published.

    Raises:
        InputError: There is no valid Hub token, or the base model of the adapter is only a local folder.
    """
    if recipe.adapters is not None:
        # Without a path, the base model is the first pass of this run.
        check_base(recipe.model.path or str(Path(recipe.training.output_dir).resolve()), recipe.hub)
    check_login(recipe.hub.repo_id)


def publish_run(recipe: Recipe, pushes: CheckpointPushes | None, console: Console):
    """Publishes a finished run, after waiting for the uploads of its checkpoints.

    Raises:
        InputError: An upload failed; the run itself is finished.
    """
    hub, folder = recipe.hub, Path(recipe.training.output_dir)
    failed = []
    for step, reason in (pushes.finish() if pushes else {}).items():
        append_log(folder, {"step": step, "hub_error": reason})
        failed.append(f"checkpoint {step}: {reason}")
    try:
        # The weights have just been evaluated.
        code = publish(str(folder), hub.repo_id, PublishArguments(private=hub.private, measure=False), (), console)
        console.print(code, highlight=False, markup=False)
    except InputError as error:
        append_log(folder, {"step": RunRecord.read(folder).steps, "hub_error": str(error)})
        failed.append(f"the finished model: {error}")
    if failed:
        raise InputError(
            f"the run in {folder} is finished, but not all of it was published: {'; '.join(failed)}; publish it with: "
            f"hfgpt publish {quote_path(folder)} {hub.repo_id}"
        )
