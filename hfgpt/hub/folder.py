"""The records in a model's folder, and the public names of its data and of its base model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import yaml

from hfgpt.data.report import FEWEST, DataReport
from hfgpt.errors import InputError
from hfgpt.records import (
    END,
    LABELS_FILE,
    RECIPE_FILE,
    REMEDY,
    Benchmark,
    ConversionRecord,
    Environment,
    KnownAnswers,
    MergeRecord,
    Number,
    RunRecord,
    is_checkpoint,
    public_name,
    read_benchmarks,
    read_metrics,
    read_object,
)

# Keys of recipes whose values may be local paths.
PLACES = (
    *("path", "output_dir", "cache_dir", "answers", "resume_from_checkpoint"),
    *("deepspeed", "fsdp_config", "accelerator_config"),
)


@dataclass
class FolderRecords:
    """The records in a model's folder.

    Args:
        folder: The folder.
        recipe, metrics: recipe.yaml, and metrics.json without benchmarks; empty if the file does not exist.
        run: run.json; without entries if the file does not exist.
        data, merge, conversion: data_report.json, merge.json and conversion.json; None if there is no such file.
        adapter: adapter_config.json; empty if the folder does not have an adapter.
        labels: Class id -> label of a classifier.
        has_tokenizer: Whether the folder has a tokenizer.
        has_answers: Whether it has known answers.
        benchmarks: The results of benchmarks in metrics.json.
    """

    folder: Path
    recipe: dict[str, Any]
    run: RunRecord
    metrics: dict[str, Number]
    data: DataReport | None
    merge: MergeRecord | None
    conversion: ConversionRecord | None
    adapter: dict[str, Any]
    labels: dict[int, str]
    has_tokenizer: bool
    has_answers: bool = False
    benchmarks: dict[str, Benchmark] = field(default_factory=dict)

    @property
    def task(self) -> str | None:
        """`pretrain`, `classify` or `instruct`; None: unknown, for a language model without a recipe."""
        return self.recipe.get("task") or ("classify" if self.labels else None)

    @property
    def origin(self) -> Environment:
        """The record of how the model was made, with versions and date: its run, conversion or merge."""
        found = (record for record in (self.run, self.conversion, self.merge) if record and record.versions)
        return next(found, self.run)

    @property
    def prompts(self) -> list[str]:
        return self.recipe.get("evaluation", {}).get("prompts", [])

    @property
    def data_name(self) -> str:
        """The data that the model was trained or measured on: a Hub id, or a file name without its path."""
        # The report of a run names the text that prepared data was made from.
        reported = self.data.source if self.recipe and self.data else None
        source = reported or self.run.data_source or self.recipe.get("data", {}).get("path")
        return public_name(source or "unknown data")

    @property
    def base(self) -> str | None:
        """The base model as given, a folder or a Hub id; None: there is none."""
        return (
            self.adapter.get("base_model_name_or_path")
            or (self.merge and self.merge.base_model)
            or self.run.base_model
            or self.recipe.get("model", {}).get("path")
        )

    @property
    def measured_on(self) -> str:
        """The rows of the data that the metrics were measured on."""
        if not self.recipe:
            options = self.run.measured_with
            return f"the rows selected by `{options}`" if options else "all rows"
        return "the whole validation split" if self.task == "pretrain" else "the test split"

    @property
    def small_counts(self) -> list[tuple[int, str]]:
        """Numbers of measured tokens or rows that are too small for reliable metrics, each with its unit."""
        sizes = {"eval_tokens": "tokens", "eval_rows": "rows", "eval_answers": "rows"}
        found = [(self.metrics[name], unit) for name, unit in sizes.items() if name in self.metrics]
        return [(count, unit) for count, unit in found if count < FEWEST[unit]]

    @property
    def is_exported(self) -> bool:
        """Whether the weights were exported from the evaluated ones."""
        return bool(self.conversion) and self.conversion.format.startswith("to ")


@contextmanager
def explained_records(folder: Path) -> Iterator[None]:
    """Reports records with unexpected content in one line.

    Args:
        folder: Their folder.

    Raises:
        InputError: Instead of any error that they cause.
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
        jinja2.TemplateError,
    ) as error:
        fact = " ".join(str(error).split())[:200]
        raise InputError(
            f"the records in '{folder}' (run.json, recipe.yaml, ...) are damaged or were edited "
            f"({type(error).__name__}: {fact}): restore the ones saved with the model, or delete them"
        ) from error


def read_records(folder: Path) -> FolderRecords:
    """Reads the records in a model's folder; for a checkpoint, also those of its run.

    Raises:
        InputError: A file cannot be read, or has invalid content.
    """
    with explained_records(folder):
        return _collect(folder)


def _collect(folder: Path) -> FolderRecords:
    run_folder = folder.parent if is_checkpoint(folder) else folder
    run = RunRecord.read(run_folder) or RunRecord()
    if is_checkpoint(folder):
        run = run.without(END)
        run.checkpoint, run.steps = True, read_object(folder / "trainer_state.json")["global_step"]
    config = read_object(folder / "config.json") or {}
    classifies = any("SequenceClassification" in name for name in config.get("architectures") or [])
    labels = read_object(folder / LABELS_FILE) or (config if classifies else {})
    return FolderRecords(
        folder,
        recipe=read_recipe(run_folder / RECIPE_FILE),
        run=run,
        metrics=read_metrics(folder),
        data=DataReport.read(run_folder),
        merge=MergeRecord.read(folder),
        conversion=ConversionRecord.read(folder),
        adapter=read_object(folder / "adapter_config.json") or {},
        labels={int(index): label for index, label in (labels.get("id2label") or {}).items()},
        has_tokenizer=any(
            (folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json", "vocab.json")
        ),
        has_answers=(folder / KnownAnswers.FILE).is_file(),
        benchmarks=read_benchmarks(folder),
    )


def read_recipe(path: Path) -> dict[str, Any]:
    """Reads the recipe that a run saved; empty if there is none.

    Raises:
        InputError: It cannot be read, or has no task or an invalid section.
    """
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"'{path}' cannot be read ({' '.join(str(error).split())[:200]}): {REMEDY}") from error
    if not isinstance(content, dict) or "task" not in content:
        raise InputError(f"'{path}' has no task: {REMEDY}")
    for name, section in content.items():
        if name != "task" and not isinstance(section, dict):
            raise InputError(f"'{path}' has an invalid section: {name} is {section!r}; {REMEDY}")
    return content


def without_paths(value: Any, key: str = "") -> Any:
    """A copy of a recipe in which each local path is reduced to its last part."""
    if isinstance(value, dict):
        return {name: without_paths(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_paths(inner, key) for inner in value]
    return public_name(value) if isinstance(value, str) and key in PLACES else value
