"""`hfgpt evaluate` takes keys of the sections `data` and `evaluation`, and refuses those that change nothing there."""

from collections.abc import Sequence

from hfgpt.data.files import family, find_files
from hfgpt.data.rows import SourceArguments
from hfgpt.errors import InputError
from hfgpt.tasks import TASKS


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
