"""What a saved folder says of itself, and the names by which strangers may know its data and its base model."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

# Entries of run.json that are true of its checkpoints, too: the others are of its end.
OF_EVERY_CHECKPOINT = (
    *(
        "task",
        "recipe",
        "seed",
        "data_source",
        "data_sha256",
        "tokenizer_sha256",
        "architecture",
        "trained_parameters",
    ),
    *(
        "labels",
        "base_model",
        "base_weights_sha256",
        "device",
        "processes",
        "precision",
        "hfgpt",
        "python",
        "versions",
    ),
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
            return "all rows"
        return "the whole validation split" if self.task == "pretrain" else "the test split"


def read_records(folder: Path) -> Records:
    """Reads what lies beside the weights in a saved folder; beside a checkpoint, what is known of its run."""

    def read(name: str, folder: Path = folder) -> dict[str, Any]:
        path = folder / name
        content = path.read_text(encoding="utf-8") if path.is_file() else "{}"
        return json.loads(content) if path.suffix == ".json" else yaml.safe_load(content)

    run_folder = folder.parent if is_checkpoint(folder) else folder
    run = read("run.json", run_folder)
    if is_checkpoint(folder):
        run = {name: run[name] for name in OF_EVERY_CHECKPOINT if name in run}
        run |= {"checkpoint": True, "steps": read("trainer_state.json")["global_step"]}
    config, adapter = read("config.json"), read("adapter_config.json")
    classifies = any("SequenceClassification" in name for name in config.get("architectures") or [])
    labels = read("labels.json").get("id2label") or (config.get("id2label") if classifies else None) or {}
    return Records(
        folder,
        recipe=read("recipe.yaml", run_folder),
        run=run,
        metrics=read("metrics.json"),
        data=read("data_report.json", run_folder),
        merge=read("merge.json"),
        conversion=read("conversion.json"),
        adapter=adapter,
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


def without_paths(value: Any) -> Any:
    """A record whose texts are no paths of this machine: of each the last part alone is left."""
    if isinstance(value, dict):
        return {key: without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_paths(inner) for inner in value]
    if isinstance(value, str) and re.match(r"(/|~|\.\.?/|[A-Za-z]:\\)[^\n]*$", value) and len(value) < 4096:
        return Path(value).name or value
    return value
