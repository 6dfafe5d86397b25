"""What a saved folder says of itself, and the names by which strangers may know its data and its base model."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hfgpt.data.report import FEWEST
from hfgpt.errors import InputError

# Entries of run.json that are of its end; a checkpoint has the others in common with its run.
OF_THE_END = (
    *("weights_sha256", "saved_parameters", "steps", "tokens", "resumed_from_step", "actual", "samples", "finished"),
    *("plan", "platform", "measured_again"),
)
# What a record must hold to be one of hfgpt's.
REQUIRED = {
    "data_report.json": {"sha256", "rows_read", "rows_kept", "dropped", "splits"},
    "conversion.json": {"format", "source", "differences"},
    "merge.json": {"adapter", "base_model", "difference", "tokens", "largest_logit"},
    "recipe.yaml": {"task"},
}
# Keys of recipes and records whose values are places on this machine, or Hub ids.
PLACES = (
    *("path", "output_dir", "cache_dir", "logging_dir", "resume_from_checkpoint"),
    *("data_source", "base_model", "adapter", "source"),
)


@dataclass
class Records:
    """What lies in a saved folder beside its weights: the content of its files, empty where there is none.

    Args:
        folder: Where.
        recipe, run, metrics, data, merge, conversion: recipe.yaml, run.json, metrics.json, data_report.json,
            merge.json and conversion.json.
        adapter: adapter_config.json; not empty: the folder holds an adapter.
        labels: The classes of a classifier by their ids.
        has_tokenizer: Whether a tokenizer is there.
    """

    folder: Path
    recipe: dict[str, Any]
    run: dict[str, Any]
    metrics: dict[str, Any]
    data: dict[str, Any]
    merge: dict[str, Any]
    conversion: dict[str, Any]
    adapter: dict[str, Any]
    labels: dict[int, str]
    has_tokenizer: bool

    @property
    def task(self) -> str | None:
        """`pretrain`, `classify` or `instruct`; None where it is not known what a language model was trained for."""
        return self.recipe.get("task") or ("classify" if self.labels else None)

    @property
    def origin(self) -> dict[str, Any]:
        """The record of how the folder came about, with versions and date: its run, merge or conversion."""
        return self.run if "versions" in self.run else {**self.merge, **self.conversion}

    @property
    def prompts(self) -> list[str]:
        return self.recipe.get("evaluation", {}).get("prompts", [])

    @property
    def data_name(self) -> str:
        """The data it was trained or measured on: a Hub id, or the name of a file or folder without where it lies."""
        source = self.run.get("data_source") or self.recipe.get("data", {}).get("path") or self.data.get("source")
        return public_name(source or "its data")

    @property
    def base(self) -> str | None:
        """The base model as it was named: a folder or a Hub id; None: it has none."""
        return (
            self.adapter.get("base_model_name_or_path")
            or self.merge.get("base_model")
            or self.run.get("base_model")
            or self.recipe.get("model", {}).get("path")
        )

    @property
    def measured_on(self) -> str:
        """Which rows of the data the metrics are of."""
        if not self.recipe:
            options = self.run.get("measured_with")
            return f"what `{options}` chooses" if options else "all rows"
        return "the whole validation split" if self.task == "pretrain" else "the test split"

    @property
    def caution(self) -> str:
        """A sentence, after a blank, that the metrics are of too little to say much; empty where they are not."""
        sizes = {"eval_tokens": "tokens", "eval_rows": "rows", "eval_answers": "rows"}
        found = [(self.metrics[name], unit) for name, unit in sizes.items() if name in self.metrics]
        few = " and ".join(f"{count:,} {unit}" for count, unit in found if count < FEWEST[unit])
        return f" That is {few} only: too few for these figures to say much." if few else ""


@contextmanager
def explained_records(folder: Path) -> Iterator[None]:
    """Turns what comes of records whose entries are of other types than hfgpt writes into one line.

    Args:
        folder: Where they lie.

    Raises:
        InputError: They are.
    """
    try:
        yield
    except InputError:
        raise
    except (
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        yaml.YAMLError,
    ) as error:
        fact = " ".join(str(error).split())[:200]
        raise InputError(
            f"the records in '{folder}' (run.json, recipe.yaml and the like) are not as hfgpt writes them "
            f"({type(error).__name__}: {fact}): take those that were saved with the model, or move them away"
        ) from error


def read_records(folder: Path) -> Records:
    """Reads what lies beside the weights in a saved folder; beside a checkpoint, what is known of its run.

    Raises:
        InputError: A file cannot be read, or is none of hfgpt's.
    """
    with explained_records(folder):
        return _collect(folder)


def _collect(folder: Path) -> Records:
    run_folder = folder.parent if is_checkpoint(folder) else folder
    run, metrics = _read(run_folder / "run.json"), _read(folder / "metrics.json")
    if is_checkpoint(folder):
        run = {name: value for name, value in run.items() if name not in OF_THE_END}
        run |= {"checkpoint": True, "steps": _read(folder / "trainer_state.json")["global_step"]}
    if wrong := [name for name, value in metrics.items() if not isinstance(value, int | float)]:
        raise InputError(f"{wrong[0]} in '{folder / 'metrics.json'}' is no number: take the one that the run wrote")
    config = _read(folder / "config.json")
    classifies = any("SequenceClassification" in name for name in config.get("architectures") or [])
    labels = _read(folder / "labels.json").get("id2label") or (config.get("id2label") if classifies else None) or {}
    return Records(
        folder,
        recipe=_read(run_folder / "recipe.yaml"),
        run=run,
        metrics=metrics,
        data=_read(run_folder / "data_report.json"),
        merge=_read(folder / "merge.json"),
        conversion=_read(folder / "conversion.json"),
        adapter=_read(folder / "adapter_config.json"),
        labels={int(index): label for index, label in labels.items()},
        has_tokenizer=any(
            (folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json", "vocab.json")
        ),
    )


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is the resumable state of a run."""
    return (folder / "trainer_state.json").is_file()


def is_hub_id(name: str) -> bool:
    """Whether a model or a source of data is named by its Hub id, and not by a place on this machine."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*|gpt2(-medium|-large|-xl)?", name)) and not Path(name).exists()


def public_name(name: str) -> str:
    """A Hub id or a generated source as it is; of a path on this machine the last part alone."""
    return name if is_hub_id(name) or name.startswith("synthetic:") else Path(name).name


def without_paths(value: Any, key: str = "") -> Any:
    """A recipe or a record in which no place of this machine is named: of each the last part alone is left."""
    if isinstance(value, dict):
        return {name: without_paths(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_paths(inner, key) for inner in value]
    return public_name(value) if isinstance(value, str) and key in PLACES else value


def _read(path: Path) -> dict[str, Any]:
    """What a record holds; nothing, if it is not there."""
    if not path.is_file():
        return {}
    remedy = "take the one that was saved with the model, or move it away"
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"'{path}' cannot be read ({' '.join(str(error).split())[:200]}): {remedy}") from error
    lacking = REQUIRED.get(path.name, set()) - content.keys() if isinstance(content, dict) else {"a mapping"}
    if lacking:
        raise InputError(f"'{path}' is not as hfgpt writes it, it lacks {', '.join(sorted(lacking))}: {remedy}")
    return content
