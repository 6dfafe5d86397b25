"""What is written beside the weights: the files of a run folder, each a typed record, and who may read what of them.

A record is read and written here only. What is not as hfgpt writes it is refused with the name of the file and of the
entry; entries that this version does not know are left out.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import platform
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self
from urllib.parse import urlsplit

from huggingface_hub.dataclasses import type_validator

import hfgpt
from hfgpt.errors import InputError
from hfgpt.saving import write_json

RECIPE_FILE, CARD_FILE, LOG_FILE, METRICS_FILE = "recipe.yaml", "README.md", "training_log.jsonl", "metrics.json"
LABELS_FILE, ANSWERS_FILE, JUDGEMENTS_FILE = "labels.json", "answers.jsonl", "judgements.jsonl"
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "safetensors", "numpy")
Number = float | int
REMEDY = "take the one that was saved with the model, or move it away"


# Marks of entries, see `Annotated` below.
PLACE = "place"  # names something on this machine, or a Hub id; of a place only the last part is published
PRIVATE = "private"  # is not published
END = "end"  # of the end of a run: a checkpoint does not share it with its run
ADAPTER = "adapter"  # of an adapter's weights: the model that it is merged into does not share it
REQUIRED = "required"  # in every file, whatever its default


class Record:
    """A JSON object with typed entries; subclasses are dataclasses, and name the file that they are kept in."""

    FILE: ClassVar[str]

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The record in a folder; None: there is none.

        Raises:
            InputError: It is not JSON, or not as hfgpt writes it.
        """
        content = read_object(folder / cls.FILE)
        return None if content is None else cls.from_dict(content, folder / cls.FILE)

    @classmethod
    def from_dict(cls, content: dict[str, Any], path: Path) -> Self:
        """The record that a JSON object holds; `path` names it in errors."""
        kinds, marks = typing.get_type_hints(cls), cls._marks()
        if lacking := sorted(name for name in marks if REQUIRED in marks[name] and name not in content):
            raise InputError(f"'{path}' is not as hfgpt writes it, it lacks {', '.join(lacking)}: {REMEDY}")
        known = {name: _with_records(content[name], kinds[name], path) for name in marks if name in content}
        for name, value in known.items():
            try:
                type_validator(name, value, kinds[name])
            except TypeError as error:
                value = json.dumps(content[name])[:100]
                raise InputError(f"'{path}' is not as hfgpt writes it: {name} is {value}; {REMEDY}") from error
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """The entries that are there, ready for JSON."""
        return {name: _plain(value) for name, value in vars(self).items() if value is not None}

    def publishable(self) -> dict[str, Any]:
        """The entries for others to read: nothing private, and no place of this machine."""
        kept = self.to_dict()
        for name, marks in self._marks().items():
            if PRIVATE in marks:
                kept.pop(name, None)
            elif PLACE in marks and name in kept:
                kept[name] = public_name(kept[name])
        return kept

    def write(self, folder: Path):
        """Writes the record into a folder, whole or not at all."""
        write_json(folder / self.FILE, self.to_dict())

    def without(self, mark: str) -> Self:
        """A copy without the entries that have a mark: `END` or `ADAPTER`."""
        return dataclasses.replace(self, **{name: None for name, marks in self._marks().items() if mark in marks})

    @classmethod
    def _marks(cls) -> dict[str, tuple[str, ...]]:
        hints = typing.get_type_hints(cls, include_extras=True)
        return {f.name: getattr(hints[f.name], "__metadata__", ()) for f in dataclasses.fields(cls)}


def _with_records(value: Any, kind: Any, path: Path) -> Any:
    """A value with the records that its type has inside it."""
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
    """What something was made with, and when."""

    hfgpt: str | None = None
    python: str | None = None
    platform: Annotated[str | None, END] = None
    versions: dict[str, str] | None = None
    finished: Annotated[str | None, END] = None

    def stamp(self) -> Self:
        """Fills in versions, platform and time as they are now; returns the record."""
        self.hfgpt, self.python, self.platform = hfgpt.__version__, platform.python_version(), platform.platform()
        self.versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        self.finished = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return self


@dataclass(kw_only=True)
class TrainingRecord(Record):
    """What a training took, planned and actual side by side: run.json of a first pass, and a part of a run's."""

    FILE: ClassVar[str] = "run.json"

    steps: Annotated[int | None, END] = None
    tokens: Annotated[int | None, END] = None
    resumed_from_step: Annotated[int | None, END] = None
    plan: Annotated[dict[str, Any] | None, END] = None
    actual: Annotated[dict[str, Number | str] | None, END] = None


@dataclass(kw_only=True)
class Samples(Record):
    """Texts that a model wrote, and how they were sampled."""

    texts: Annotated[list[str], REQUIRED]
    seed: int | None = None
    temperature: Number | None = None
    top_k: int | None = None
    max_new_tokens: int | None = None


@dataclass(kw_only=True)
class RunRecord(TrainingRecord, Environment):
    """run.json: what the weights of a run depend on, what their training took, and what the card shows.

    The first entries are known before training, and a resumed run is compared with them; publishing adds the last.
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
    samples: Annotated[Samples | None, END, ADAPTER] = None
    checkpoint: bool | None = None
    measured_again: Annotated[str | None, END] = None
    measured_with: str | None = None


@dataclass(kw_only=True)
class MergeRecord(Environment):
    """merge.json: how much merging an adapter into its base model changed.

    Args:
        adapter, base_model: What was merged into what.
        difference: The largest difference of logits in float32.
        largest_logit: The largest magnitude of the unmerged model's.
        tolerance: Largest difference allowed, as a part of `largest_logit` where that is above 1.
        tokens: How many random tokens were compared.
        weights_sha256: Of the merged model.
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
    """conversion.json: where weights came from, and how far the logits of both models are apart.

    Args:
        source: What was converted.
        format: From or to which layout.
        parameters, source_parameters: Of the result and of the source, tied ones once.
        differences: See `hfgpt.conversion.parity.Difference`.
        greedy_equal: Whether both continue the same text with the same tokens; None for a classifier.
        notes: What was filled, dropped, tied, cut or merged.
        passed: Whether every difference is within its tolerance.
        architecture: Of the result, for its card.
        weights_sha256: Of the result.
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


# Records with the hash of the weights. A model made from a run may keep its run.json, so that is read last.
OF_WEIGHTS = (ConversionRecord, MergeRecord, RunRecord)


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None: there is no file.

    Raises:
        InputError: It is not JSON, or not an object.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"'{path}' cannot be read ({' '.join(str(error).split())[:200]}): {REMEDY}") from error
    if not isinstance(content, dict):
        raise InputError(f"'{path}' is not as hfgpt writes it, it is not a JSON object: {REMEDY}")
    return content


def read_metrics(folder: Path) -> dict[str, Number]:
    """The content of metrics.json; empty where nothing was measured.

    Raises:
        InputError: It cannot be read, or has what is not a number.
    """
    metrics = read_object(folder / METRICS_FILE) or {}
    if wrong := [name for name, value in metrics.items() if not isinstance(value, int | float)]:
        raise InputError(f"'{folder / METRICS_FILE}' is not as hfgpt writes it: {wrong[0]} is not a number; {REMEDY}")
    return metrics


def write_metrics(folder: Path, metrics: dict[str, Number]):
    """Writes metrics.json, whole or not at all."""
    write_json(folder / METRICS_FILE, metrics)


def is_run(folder: Path) -> bool:
    """Whether a run began in a folder."""
    return (folder / RECIPE_FILE).is_file()


def is_finished(folder: Path) -> bool:
    """Whether the run in a folder came to its end: its card is written last."""
    return is_run(folder) and (folder / CARD_FILE).is_file()


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is the resumable state of a run."""
    return (folder / "trainer_state.json").is_file()


def is_hub_id(name: str) -> bool:
    """Whether a model or a source of data is named by its Hub id, and not by a place on this machine."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*|gpt2(-medium|-large|-xl)?", name)) and not Path(name).exists()


def public_name(name: str) -> str:
    """A Hub id or a generated source as it is; of a path on this machine, or a URL, the name of the file alone."""
    if is_hub_id(name) or name.startswith("synthetic:"):
        return name
    return Path(urlsplit(name).path if "://" in name else name).name
