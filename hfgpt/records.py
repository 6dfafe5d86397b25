"""The JSON files saved with the weights as typed records, with rules for which entries are published.

Records are read and written only here. Invalid content is an error that names the file and the entry; unknown entries
are ignored.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import platform
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self
from urllib.parse import urlsplit

from huggingface_hub.dataclasses import type_validator

import hfgpt
from hfgpt.errors import InputError
from hfgpt.saving import write_json

RECIPE_FILE, CARD_FILE, LOG_FILE, METRICS_FILE = "recipe.yaml", "README.md", "training_log.jsonl", "metrics.json"
BENCHMARKS = "benchmarks"  # the entry of metrics.json for benchmarks
LABELS_FILE, ANSWERS_FILE, JUDGEMENTS_FILE = "labels.json", "answers.jsonl", "judgements.jsonl"
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "safetensors", "numpy")
Number = float | int
REMEDY = "restore the original, or remove it"


# Marks of entries, see `Annotated` below.
PLACE = "place"  # a local path or a Hub id; only the last part of a path is published
PRIVATE = "private"  # not published
END = "end"  # describes the end of a run, not its checkpoints
ADAPTER = "adapter"  # describes an adapter's weights, not the merged model
REQUIRED = "required"  # must be in every file, even if it has a default


class Record:
    """A JSON object with typed entries; subclasses are dataclasses with the name of their file."""

    FILE: ClassVar[str]

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The record in a folder; None if there is no file.

        Raises:
            InputError: It is not valid JSON, or an entry is missing or invalid.
        """
        content = read_object(folder / cls.FILE)
        return None if content is None else cls.from_dict(content, folder / cls.FILE)

    @classmethod
    def from_dict(cls, content: dict[str, Any], path: Path) -> Self:
        """The record in a JSON object; `path` is for error messages."""
        kinds, marks = typing.get_type_hints(cls), cls._marks()
        if lacking := sorted(name for name in marks if REQUIRED in marks[name] and name not in content):
            raise InputError(f"'{path}' is incomplete, it does not have {', '.join(lacking)}: {REMEDY}")
        known = {name: _with_records(content[name], kinds[name], path) for name in marks if name in content}
        for name, value in known.items():
            try:
                type_validator(name, value, kinds[name])
            except TypeError as error:
                value = json.dumps(content[name])[:100]
                raise InputError(f"'{path}' has an invalid value, {name} is {value}: {REMEDY}") from error
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """The entries that are not None, ready for JSON."""
        return {name: _plain(value) for name, value in vars(self).items() if value is not None}

    def publishable(self) -> dict[str, Any]:
        """The entries to publish: nothing private, and no local paths."""
        kept = self.to_dict()
        for name, marks in self._marks().items():
            if PRIVATE in marks:
                kept.pop(name, None)
            elif PLACE in marks and name in kept:
                kept[name] = public_name(kept[name])
        return kept

    def write(self, folder: Path):
        """Writes the record into a folder, atomically."""
        write_json(folder / self.FILE, self.to_dict())

    def without(self, mark: str) -> Self:
        """A copy without the entries marked `END` or `ADAPTER`."""
        return dataclasses.replace(self, **{name: None for name, marks in self._marks().items() if mark in marks})

    @classmethod
    def _marks(cls) -> dict[str, tuple[str, ...]]:
        hints = typing.get_type_hints(cls, include_extras=True)
        return {f.name: getattr(hints[f.name], "__metadata__", ()) for f in dataclasses.fields(cls)}


def _with_records(value: Any, kind: Any, path: Path) -> Any:
    """A value with nested records, according to its type."""
    if typing.get_origin(kind) is types.UnionType:
        kind = typing.get_args(kind)[0]
    if not isinstance(value, dict):
        return value
    if typing.get_origin(kind) is dict:
        return {key: _with_records(item, typing.get_args(kind)[1], path) for key, item in value.items()}
    return kind.from_dict(value, path) if isinstance(kind, type) and issubclass(kind, Record) else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.to_dict() if isinstance(value, Record) else value


@dataclass(kw_only=True)
class Environment(Record):
    """Software versions, platform and time."""

    hfgpt: str | None = None
    python: str | None = None
    platform: Annotated[str | None, END] = None
    versions: dict[str, str] | None = None
    finished: Annotated[str | None, END] = None

    def stamp(self) -> Self:
        """Sets versions, platform and time to their current values; returns the record."""
        self.hfgpt, self.python, self.platform = hfgpt.__version__, platform.python_version(), platform.platform()
        self.versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        self.finished = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return self


@dataclass(kw_only=True)
class TrainingRecord(Record):
    """Planned and actual cost of a training: run.json of a first pass, and part of that of a run."""

    FILE: ClassVar[str] = "run.json"

    steps: Annotated[int | None, END] = None
    tokens: Annotated[int | None, END] = None
    resumed_from_step: Annotated[int | None, END] = None
    plan: Annotated[dict[str, Any] | None, END] = None
    actual: Annotated[dict[str, Number | str] | None, END] = None


@dataclass(kw_only=True)
class Samples(Record):
    """Texts that a model generated, and the sampling settings."""

    texts: Annotated[list[str], REQUIRED]
    seed: int | None = None
    temperature: Number | None = None
    top_k: int | None = None
    max_new_tokens: int | None = None


@dataclass(kw_only=True)
class Forecast(Record):
    """The validation loss that was expected before a training, in nats per token, and the limits of an interval."""

    loss: Annotated[float, REQUIRED]
    low: Annotated[float, REQUIRED]
    high: Annotated[float, REQUIRED]

    def describe(self) -> str:
        """The forecast as in `1.850 nats per token (1.750 to 1.950)`."""
        return f"{self.loss:.3f} nats per token ({self.low:.3f} to {self.high:.3f})"


@dataclass(kw_only=True)
class RunRecord(TrainingRecord, Environment):
    """run.json: what the weights of a run depend on, the cost of training, and what the model card shows.

    The first entries are written before training and compared when a run is resumed; publishing adds the last ones.
    """

    task: str | None = None
    recipe: str | None = None
    seed: int | None = None
    data_source: Annotated[str | None, PLACE] = None
    data_sha256: str | None = None
    tokenizer_sha256: str | None = None
    tokenizer_vocab_size: int | None = None
    precision: str | None = None
    processes: int | None = None
    rows_per_step: int | None = None
    rows_per_batch: int | None = None
    forecast: Annotated[Forecast | None, END] = None
    base_model: Annotated[str | None, PLACE] = None
    base_weights_sha256: str | None = None
    architecture: dict[str, Any] | None = None
    trained_parameters: int | None = None
    saved_parameters: Annotated[int | None, END, ADAPTER] = None
    weights_sha256: Annotated[str | None, END, ADAPTER] = None
    labels: dict[str, str] | None = None
    device: str | None = None
    attn_implementation: str | None = None
    first_pass: TrainingRecord | None = None
    rollbacks: Annotated[list[dict[str, int]] | None, END] = None
    samples: Annotated[Samples | None, END, ADAPTER] = None
    checkpoint: bool | None = None
    measured_again: Annotated[str | None, END] = None
    measured_with: str | None = None


@dataclass(kw_only=True)
class MergeRecord(Environment):
    """merge.json: numerical difference from merging an adapter into its base model.

    Args:
        adapter, base_model: The adapter and the base model.
        difference: Largest absolute difference of the logits in float32.
        largest_logit: Largest absolute logit of the unmerged model.
        tolerance: Largest allowed difference, relative to `largest_logit` if that is above 1.
        tokens: Number of random tokens compared.
        weights_sha256: SHA-256 of the merged model's weights.
    """

    FILE: ClassVar[str] = "merge.json"

    adapter: Annotated[str, PLACE, REQUIRED]
    base_model: Annotated[str, PLACE, REQUIRED]
    difference: Annotated[Number, REQUIRED]
    largest_logit: Annotated[Number, REQUIRED]
    tolerance: Number | None = None
    tokens: Annotated[int, REQUIRED]
    weights_sha256: str | None = None

    @property
    def limit(self) -> float:
        return self.tolerance * max(1.0, self.largest_logit)


@dataclass(kw_only=True)
class ConversionRecord(Environment):
    """conversion.json: source of converted weights, and the differences between both models' logits.

    Args:
        source: The converted model.
        format: The source or target format.
        parameters, source_parameters: Number of parameters of the result and of the source, tied ones counted once.
        differences: See `hfgpt.conversion.parity.Difference`.
        greedy_equal: Whether greedy decoding gives the same tokens; None for a classifier.
        notes: Weights that were filled, dropped, tied, cut or merged.
        passed: Whether all differences are within their tolerances.
        architecture: Architecture of the result, for its model card.
        weights_sha256: SHA-256 of the result's weights.
    """

    FILE: ClassVar[str] = "conversion.json"

    source: Annotated[str, PLACE, REQUIRED]
    format: Annotated[str, REQUIRED]
    parameters: int | None = None
    source_parameters: int | None = None
    differences: Annotated[list[dict[str, Any]], REQUIRED]
    greedy_equal: bool | None = None
    notes: list[str] | None = None
    passed: bool | None = None
    architecture: dict[str, Any] | None = None
    weights_sha256: str | None = None


@dataclass(kw_only=True)
class Answer(Record):
    """What a model computes for one prompt, in float64, see `hfgpt.known_answers`.

    Args:
        text, ids: The prompt and its token ids.
        positions: Positions in `ids`; not of a classifier, as all up to `gaps`.
        top_ids: For each position, the most likely next tokens.
        log_probabilities: Their log-probabilities.
        continuation: The greedy continuation of the prompt.
        gaps: How much likelier each of its tokens is than the next likely one, in nats.
        probabilities: Of the classes; not of a language model.
    """

    text: Annotated[str, REQUIRED]
    ids: Annotated[list[int], REQUIRED]
    positions: list[int] | None = None
    top_ids: list[list[int]] | None = None
    log_probabilities: list[list[float]] | None = None
    continuation: list[int] | None = None
    gaps: list[float] | None = None
    probabilities: list[float] | None = None


@dataclass(kw_only=True)
class KnownAnswers(Record):
    """known_answers.json: what the saved model computes, to recognize it in any form and engine.

    Args:
        measured: Date.
        hfgpt: Version.
        weights_sha256, tokenizer_sha256: Hashes of the model that was measured.
        answers: For each prompt.
        limits: Precision -> the largest difference from the answers that is due to rounding.
    """

    FILE: ClassVar[str] = "known_answers.json"

    measured: Annotated[str, REQUIRED]
    hfgpt: str | None = None
    weights_sha256: str | None = None
    tokenizer_sha256: str | None = None
    answers: Annotated[dict[str, Answer], REQUIRED]
    limits: Annotated[dict[str, float], REQUIRED] = field(default_factory=dict)


@dataclass(kw_only=True)
class Benchmark(Record):
    """The result of a benchmark of lm-evaluation-harness, an entry of `benchmarks` in metrics.json.

    Args:
        metrics: Name -> value, with `acc_stderr` for the standard error of `acc`.
        dataset, subset: The data: a Hub id or a file, and the configuration of a Hub dataset.
        rows, of_rows: Number of rows evaluated, and of all rows.
        num_fewshot: Examples in each prompt.
        chat_template: Whether prompts were formatted with the chat template.
        truncated: Number of requests whose prompt was truncated to the context.
        shortened: Number of requests with fewer new tokens than the benchmark asks for.
        unknown_tokens: Tokens of the texts that stand for characters the tokenizer does not know.
        version, lm_eval: Version of the benchmark, and of the harness.
        weights_sha256: SHA-256 of the weights.
        finished: Time.
    """

    metrics: Annotated[dict[str, Number], REQUIRED]
    dataset: Annotated[str | None, PLACE] = None
    subset: str | None = None
    rows: int | None = None
    of_rows: int | None = None
    num_fewshot: int | None = None
    chat_template: bool | None = None
    truncated: int | None = None
    shortened: int | None = None
    unknown_tokens: int | None = None
    version: str | None = None
    lm_eval: str | None = None
    weights_sha256: str | None = None
    finished: str | None = None

    @property
    def measured(self) -> list[tuple[str, Number, Number | None]]:
        """The metrics: name (with a filter of the answers, if any), value, and standard error or None."""
        errors = {name.replace("_stderr", "", 1): value for name, value in self.metrics.items() if "_stderr" in name}
        return [(name, value, errors.get(name)) for name, value in self.metrics.items() if "_stderr" not in name]


# Records with a hash of the weights. A model derived from a run may still have its run.json, so that comes last.
OF_WEIGHTS = (ConversionRecord, MergeRecord, RunRecord)


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no file.

    Raises:
        InputError: It is not valid JSON, or not an object.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"'{path}' cannot be read ({' '.join(str(error).split())[:200]}): {REMEDY}") from error
    if not isinstance(content, dict):
        raise InputError(f"'{path}' is not a JSON object: {REMEDY}")
    return content


def read_metrics(folder: Path) -> dict[str, Number]:
    """The metrics in metrics.json, without benchmarks; empty if the file does not exist.

    Raises:
        InputError: It cannot be read, or has a value that is not a number.
    """
    metrics = read_object(folder / METRICS_FILE) or {}
    metrics.pop(BENCHMARKS, None)
    if wrong := [name for name, value in metrics.items() if not isinstance(value, int | float)]:
        raise InputError(f"'{folder / METRICS_FILE}' has an invalid value, {wrong[0]} is not a number: {REMEDY}")
    return metrics


def read_benchmarks(folder: Path) -> dict[str, Benchmark]:
    """Name -> result of each benchmark in metrics.json.

    Raises:
        InputError: It cannot be read, or an entry is invalid.
    """
    path = folder / METRICS_FILE
    found = (read_object(path) or {}).get(BENCHMARKS, {})
    if not isinstance(found, dict) or not all(isinstance(result, dict) for result in found.values()):
        raise InputError(f"'{path}' has an invalid value, {BENCHMARKS} is not an object of objects: {REMEDY}")
    return {name: Benchmark.from_dict(result, path) for name, result in found.items()}


def write_metrics(folder: Path, metrics: dict[str, Number], benchmarks: dict[str, Benchmark] | None = None):
    """Writes metrics.json, atomically."""
    found = {name: result.to_dict() for name, result in (benchmarks or {}).items()}
    write_json(folder / METRICS_FILE, {**metrics, **({BENCHMARKS: found} if found else {})})


def is_run(folder: Path) -> bool:
    """Whether a folder contains a run, finished or not."""
    return (folder / RECIPE_FILE).is_file()


def is_finished(folder: Path) -> bool:
    """Whether the run in a folder is finished: its model card is written last."""
    return is_run(folder) and (folder / CARD_FILE).is_file()


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a run."""
    return (folder / "trainer_state.json").is_file()


def is_hub_id(name: str) -> bool:
    """Whether the name of a model or dataset is a Hub id rather than a local path."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*|gpt2(-medium|-large|-xl)?", name)) and not Path(name).exists()


def public_name(name: str) -> str:
    """The name to publish: Hub ids and synthetic sources unchanged, only the file name of local paths and URLs."""
    if is_hub_id(name) or name.startswith("synthetic:"):
        return name
    return Path(urlsplit(name).path if "://" in name else name).name
