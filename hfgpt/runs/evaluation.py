"""`hfgpt evaluate`: a saved model measured on all rows of a source; keys that change nothing there are refused."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from hfgpt.data.files import family, find_files
from hfgpt.data.rows import SourceArguments
from hfgpt.errors import InputError
from hfgpt.recipe import parse_sections
from hfgpt.tasks import TASKS


def evaluate(path: str, task: str, overrides: Sequence[str], console: Console | None = None) -> dict[str, Any]:
    """Measures a saved model on all rows of a source.

    Args:
        path: A folder or Hub id.
        task: What it is measured for: `pretrain`, `classify` or `instruct`.
        overrides: `--data.path FILE` and other keys of the sections `data` and `evaluation`.
        console: Where to show progress; None: standard error.

    Returns:
        Metrics under the names of `metrics.json`.

    Raises:
        InputError: A key is unknown or has no effect here, or as `Task.evaluate`.
    """
    sections = parse_sections(list(overrides), task, ["data", "evaluation"])
    refuse_unused(task, overrides, sections["data"])
    return TASKS[task].evaluate(path, sections["data"], sections["evaluation"], console)


def refuse_unused(task: str, overrides: Sequence[str], data: SourceArguments):
    """Refuses overrides that would not change what `hfgpt evaluate` measures.

    Args:
        task: What the model is measured for.
        overrides: `--section.key value` or `--section.key=value`.
        data: What they make of the section `data`.

    Raises:
        InputError: One would not.
    """
    given = [override.removeprefix("--").partition("=")[0] for override in overrides if override.startswith("--")]
    unused = TASKS[task].only_for_training | _unused_by(data)
    if "evaluation.judge.base_url" not in given:
        judge = ("model", "timeout", "max_answers")
        unused |= {f"evaluation.judge.{key}": "no evaluation.judge.base_url names a judge" for key in judge}
    for key in given:
        if key in unused:
            raise InputError(f"--{key} has no effect on evaluate: {unused[key]}; leave it out")


def _unused_by(data: SourceArguments) -> dict[str, str]:
    """Keys that do nothing for a source of this kind, and why."""
    if not data.path:
        return {}
    unused, source = {}, f"data.path {data.path!r}"
    generated, files = data.path.startswith("synthetic:"), find_files(data.path)
    if generated or files:
        unused |= dict.fromkeys(("data.name", "data.revision"), f"{source} is not a Hub data set")
    if generated or len(files) == 1:
        unused["data.train_split"] = f"{source} has no splits to choose from"
    if files and family(files[0]) == "text":
        unused["data.text_column"] = f"{source} is text without columns"
    else:
        unused["data.sample_by"] = f"{source} is not a .txt or .md file"
    return unused
