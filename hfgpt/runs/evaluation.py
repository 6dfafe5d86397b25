"""Rejects keys of the sections `data` and `evaluation` that have no effect on `hfgpt evaluate`."""

from collections.abc import Sequence

from hfgpt.data.files import family, find_files, has_tokens
from hfgpt.data.rows import SourceArguments
from hfgpt.errors import InputError
from hfgpt.tasks import TASKS


def refuse_unused(task: str, overrides: Sequence[str], data: SourceArguments):
    """Rejects overrides that have no effect on `hfgpt evaluate`.

    Args:
        task: Name of the task.
        overrides: `--section.key value` or `--section.key=value`.
        data: The resulting section `data`.

    Raises:
        InputError: An override has no effect.
    """
    given = [override.removeprefix("--").partition("=")[0] for override in overrides if override.startswith("--")]
    unused = TASKS[task].only_for_training | _unused_by(data)
    if "evaluation.judge.base_url" not in given:
        judge = ("model", "timeout", "max_answers")
        unused |= {f"evaluation.judge.{key}": "evaluation.judge.base_url is not set" for key in judge}
    for key in given:
        if key in unused:
            raise InputError(f"--{key} has no effect on evaluate: {unused[key]}; leave it out")


def _unused_by(data: SourceArguments) -> dict[str, str]:
    """Keys without effect for this type of source -> reason."""
    if not data.path:
        return {}
    unused, source = {}, f"data.path {data.path!r}"
    if has_tokens(data.path):
        keys = ("name", "revision", "train_split", "text_column", "sample_by", "max_documents", "deduplicate")
        return dict.fromkeys((f"data.{key}" for key in keys), f"{source} has tokens")
    generated, files = data.path.startswith("synthetic:"), find_files(data.path)
    if generated or files:
        unused |= dict.fromkeys(("data.name", "data.revision"), f"{source} is not a Hub dataset")
    if generated or len(files) == 1:
        unused["data.train_split"] = f"{source} does not have multiple splits"
    if files and family(files[0]) == "text":
        unused["data.text_column"] = f"{source} is text without columns"
    else:
        unused["data.sample_by"] = f"{source} is not a .txt or .md file"
    return unused
