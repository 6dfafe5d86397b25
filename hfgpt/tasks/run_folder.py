"""The folder of a run: refused if it holds another one, filled with what makes the run repeatable."""

import datetime
import importlib.metadata
import platform
import shutil
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

import hfgpt
from hfgpt.data.report import DataReport
from hfgpt.errors import InputError
from hfgpt.recipe import Recipe, first_difference, render_recipe
from hfgpt.saving import check_writable, explain_full_disk, staged_files, write_json, write_text
from hfgpt.training.trainer import find_last_checkpoint

RECIPE_FILE = "recipe.yaml"
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "safetensors", "numpy")


def check_run_folder(recipe: Recipe, resume: bool) -> Path | None:
    """Checks that the run folder is free, or that the run in it is the one to go on with; writes nothing.

    Args:
        recipe: Its `training.output_dir` is the folder.
        resume: Whether to go on from the last checkpoint there.

    Returns:
        The checkpoint to go on from, or None to start.

    Raises:
        InputError: The folder holds another run, or there is nothing to resume.
    """
    folder = Path(recipe.training.output_dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"training.output_dir '{folder}' is a file: name a folder")
    check_writable(folder)
    occupied = folder.is_dir() and any(folder.iterdir())
    if not resume:
        if occupied:
            raise InputError(
                f"training.output_dir '{folder}' already holds {_describe(folder)}: pass --resume to go on with it, "
                "or name another with --training.output_dir"
            )
        return None
    if not (folder / RECIPE_FILE).is_file():
        raise InputError(f"there is no run to resume in '{folder}': leave out --resume to start one")
    old = yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8"))
    if key := first_difference(old, recipe.values):
        raise InputError(
            f"the run in '{folder}' has another {key} than this recipe, so going on would train neither: use the same "
            "recipe and overrides, or another --training.output_dir"
        )
    if (folder / "README.md").is_file():  # written last
        raise InputError(f"the run in '{folder}' is finished: there is nothing to resume")
    return find_last_checkpoint(folder)


def begin_run(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, report: DataReport):
    """Writes what is known before training: the recipe, the tokenizer and the data report, all or none of them."""
    folder = Path(recipe.training.output_dir)
    existed = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with explain_full_disk(folder), staged_files(folder) as staging:
            write_text(staging / RECIPE_FILE, render_recipe(recipe))
            tokenizer.save_pretrained(staging)
            report.save(staging / "data_report.json")
            write_json(staging / "run.json", describe_sources(recipe, report))
    except BaseException:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _describe(folder: Path) -> str:
    if (folder / RECIPE_FILE).is_file():
        state = "finished" if (folder / "metrics.json").is_file() else "unfinished"
        return f"a run ({state})"
    return f"other files ({sorted(path.name for path in folder.iterdir())[0]}, ...)"


def describe_sources(recipe: Recipe, report: DataReport) -> dict[str, Any]:
    """What a run is made from, for `run.json`: known before it starts, and of its checkpoints all that is known."""
    place = Path(recipe.data.path)
    sources = {
        "task": recipe.task,
        "recipe": recipe.name,
        "seed": recipe.training.seed,
        "data_source": str(place.resolve()) if place.exists() else recipe.data.path,
        "data_sha256": report.sha256,
    }
    if base := recipe.model.path:
        sources["base_model"] = str(Path(base).resolve()) if Path(base).is_dir() else base
    return sources


def describe_environment() -> dict[str, Any]:
    """Versions and date, for `run.json`."""
    return {
        "hfgpt": hfgpt.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
