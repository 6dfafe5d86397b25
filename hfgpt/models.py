"""Saved models: resolves a path or Hub id once, and loads models strictly."""

import functools
import json
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file, logging

from hfgpt.adapters import SEQ_CLS, WEIGHTS_FILE, put_adapter_on, read_adapter
from hfgpt.conversion.checkpoints import check_archive, count_least_parameters, find_weight_files, is_classifier
from hfgpt.data.files import hash_files
from hfgpt.errors import InputError, make_visible
from hfgpt.foreign_code import without_remote_code
from hfgpt.modeling_hfgpt import HfGPTForCausalLM, HfGPTForSequenceClassification
from hfgpt.records import LABELS_FILE, OF_WEIGHTS, RunRecord
from hfgpt.saving import CHECKSUMS_FILE, check_model_path, hash_file, read_checksums
from hfgpt.tokenizer import read_tokenizer

# hfgpt's classes for GPT-2 checkpoints, which the Auto classes would load as transformers' GPT2 classes.
OF_GPT2 = {
    AutoModelForCausalLM: HfGPTForCausalLM,
    AutoModelForSequenceClassification: HfGPTForSequenceClassification,
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
TRAINABLE_TYPES = ("hfgpt", "gpt2")  # loaded as hfgpt models
MOST_LAYERS = 1_000  # the deepest published transformer (DeepNet, arXiv:2203.00555)
# Limits for counts that transformers uses to create lists and modules before it reads the weights.
LIMITS = {"num_hidden_layers": MOST_LAYERS, "n_layer": MOST_LAYERS, "num_labels": 1_000_000}
ChangedWeights = Literal["refuse", "warn"]


def find_model(path: str, revision: str | None = None) -> "SavedModel":
    """Resolves a path or Hub id, without reading the weights.

    Args:
        path: A folder written by `save_pretrained`, or a Hub id.
        revision: Branch, tag or commit on the Hub.

    Raises:
        InputError: There is no model.
    """
    check_model_path(path)
    return SavedModel(path, revision)


def load_model(path: str, revision: str | None = None, auto_class=AutoModelForCausalLM, **options) -> PreTrainedModel:
    """Loads a language model or a classifier; for the arguments see `find_model` and `SavedModel.load`.

    Raises:
        InputError: There is no model, or its type does not match `auto_class`; or as `SavedModel.load`.
    """
    return find_model(path, revision).load(auto_class, **options)


def load_model_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer saved with a model, see `find_model` and `SavedModel.load_tokenizer`."""
    return find_model(path, revision).load_tokenizer()


class SavedModel:
    """A model or an adapter in a folder or on the Hub.

    Properties are read on first use and then cached: create a new object if the folder has changed.

    Args:
        path: A folder or Hub id.
        revision: Branch, tag or commit on the Hub; None: the default branch.
    """

    def __init__(self, path: str, revision: str | None = None):
        self.path, self.revision = path, revision
        self.is_local = Path(path).is_dir()

    @functools.cached_property
    def adapter(self):
        """The configuration of an adapter; None if this is a full model.

        Raises:
            InputError: The adapter's configuration cannot be read.
        """
        check_model_path(self.path)
        if self.is_local:
            found = (Path(self.path) / "adapter_config.json").is_file()
        else:
            found = _is_adapter_on_the_hub(self.path, self.revision or "main")
        return read_adapter(self.path, self.revision) if found else None

    @functools.cached_property
    def base(self) -> "SavedModel | None":
        """The base model of an adapter; None if this is a full model."""
        if self.adapter is None:
            return None
        base = Path(self.adapter.base)
        # The first pass of the same run is inside the adapter's folder, which may have been moved.
        inside = Path(self.path) / base.name
        moved = self.is_local and base.is_absolute() and not base.is_dir() and inside.is_dir()
        return SavedModel(str(inside) if moved else self.adapter.base, self.adapter.revision)

    @functools.cached_property
    def config(self) -> PreTrainedConfig:
        """The configuration of the model, or of the base model of an adapter.

        Raises:
            InputError: The configuration is missing or invalid.
        """
        return self.base.config if self.base else read_config(self.path, self.revision)

    @property
    def is_classifier(self) -> bool:
        """Whether this is a sequence classifier, or an adapter for one."""
        return self.adapter.task == SEQ_CLS if self.adapter else is_classifier(self.config)

    @property
    def auto_class(self):
        """The Auto class for this model."""
        return AutoModelForSequenceClassification if self.is_classifier else AutoModelForCausalLM

    @property
    def labels(self) -> list[str]:
        """Class names of a classifier in the order of their ids."""
        if self.base and not self.base.is_classifier:
            return _adapter_labels(self.path, self.revision)
        return [self.config.id2label[index] for index in range(self.config.num_labels)]

    def load(
        self,
        auto_class: Any = None,
        new_head: list[str] | None = None,
        changed_weights: ChangedWeights = "refuse",
        **options,
    ) -> PreTrainedModel:
        """Loads the model strictly: GPT-2 checkpoints as hfgpt models, adapters with their base model.

        Args:
            auto_class: `AutoModelForCausalLM` or `AutoModelForSequenceClassification`; None: the model's own.
            new_head: Class names for a new classification head, initialized from torch's global generator, on a
                language model.
            changed_weights: What to do if the weights in a folder do not match the hash that was saved with them.
            options: Passed to `from_pretrained`.

        Returns:
            The model in evaluation mode, in float32 unless `dtype` is given.

        Raises:
            InputError: Weights are damaged, not finite, missing or unexpected, or the model's type does not match
                `auto_class`.
        """
        auto_class = auto_class or self.auto_class
        changed = find_changed_weights(self.path)
        if changed and changed_weights == "refuse":
            raise InputError(changed)
        if self.adapter:
            model = self._load_adapted(auto_class, changed_weights=changed_weights, **options)
        else:
            model = self._load_whole(auto_class, new_head, **options)
        if changed:
            print(f"hfgpt: warning: {make_visible(changed)}", file=sys.stderr)
        return model

    def load_with_tokenizer(
        self, auto_class: Any = None, **options
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Loads the model, on the default device, and its tokenizer; for the arguments see `load`.

        Raises:
            InputError: As `load`; or there is no tokenizer, or it does not fit the model.
        """
        tokenizer = self.load_tokenizer()
        model = self.load(auto_class, **options).to(find_device())
        check_vocabulary(model, tokenizer)
        return model, tokenizer

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Loads the tokenizer saved with the model.

        Raises:
            InputError: There is no tokenizer.
        """
        if self.is_local and not any((Path(self.path) / name).is_file() for name in TOKENIZER_FILES):
            raise InputError(f"the folder '{self.path}' has no tokenizer: save the model's tokenizer there")
        with explained("a tokenizer", self.path):
            tokenizer = read_tokenizer(self.path, self.revision)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers' result for a folder without its files
            raise InputError(f"the tokenizer of '{self.path}' has only special tokens: its files are missing")
        return tokenizer

    def check_same_tokens(self, tokenizer: PreTrainedTokenizerBase):
        """Checks that a tokenizer has the same token ids as the one saved with the weights, if there is one.

        Args:
            tokenizer: The tokenizer to use; it may have additional tokens.

        Raises:
            InputError: Names the first token with a different id.
        """
        files = ("tokenizer.json", "vocab.json")
        if self.is_local and not any((Path(self.path) / name).is_file() for name in files):
            return
        ours, theirs = tokenizer.get_vocab(), self.load_tokenizer().get_vocab()
        if differing := [token for token, index in theirs.items() if ours.get(token) != index]:
            token = min(differing, key=theirs.get)
            raise InputError(
                f"the tokenizer does not match that of '{self.path}': the id of {token!r} is "
                f"{ours.get(token, 'unknown')}, not {theirs[token]}; use the model's own tokenizer"
            )

    def hash(self) -> str | None:
        """SHA-256 of the weights (for several files, of the output of `sha256sum`); None if there are none."""
        with explained("a model", self.path):
            files = find_weight_files(self.path, self.revision, self.config)
        return hash_files(files) if files else None

    def _load_whole(self, auto_class: Any, new_head: list[str] | None, **kwargs) -> PreTrainedModel:
        path, revision, config = self.path, self.revision, self.config
        if is_classifier(config) and auto_class is AutoModelForCausalLM:
            raise InputError(f"'{path}' is a classifier, not a language model: use a language model")
        if new_head is not None:
            kwargs |= label_fields(new_head)
        model_class = OF_GPT2[auto_class] if config.model_type == "gpt2" else auto_class
        check_weights_match(path, revision, config)
        kwargs = {"dtype": torch.float32, **kwargs, "revision": revision or "main"}
        if model_class is auto_class:
            kwargs["trust_remote_code"] = False
        with explained("a model", path), quiet_bars(Path(path).is_dir()):
            # Weights with mismatched shapes are ignored here and reported below.
            model, info = model_class.from_pretrained(
                path, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        heads = {"score.weight", "lm_head.weight"} if new_head is not None else set()
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if keys := sorted(set(map(str, info.get(kind) or ())) - heads):
                raise InputError(
                    f"the weights in '{path}' do not match its config.json: {len(keys)} {kind.replace('_', ' ')}, "
                    f"such as {keys[0]}; use both from the same model"
                )
        for name, parameter in model.named_parameters():
            if not parameter.isfinite().all():
                raise InputError(
                    f"the weights in '{path}' contain NaN or infinite values in {name} (the file is damaged, or "
                    "training diverged): use another copy or an earlier checkpoint"
                )
        return model.eval()

    def _load_adapted(self, auto_class: Any, **options) -> PreTrainedModel:
        if self.is_classifier != (auto_class is AutoModelForSequenceClassification):
            kinds = ("classifier", "language model") if self.is_classifier else ("language model", "classifier")
            raise InputError(
                f"'{self.path}' is an adapter for a {kinds[0]}, not for a {kinds[1]}: use one for a {kinds[1]}"
            )
        base = self.base.path
        if not self.base.is_local and (Path(base).is_absolute() or base.startswith(".") or base.count("/") > 1):
            raise InputError(
                f"the base model of the adapter '{self.path}' is not at '{base}': restore it, or fix "
                "base_model_name_or_path in adapter_config.json"
            )
        run = RunRecord.read(Path(self.path))
        trained_on = run and run.base_weights_sha256
        if trained_on and trained_on != self.base.hash():
            raise InputError(
                f"the adapter '{self.path}' was trained on different weights than those now in '{base}': restore "
                "them, or train the adapter again"
            )
        new_head = self.labels if self.is_classifier and not self.base.is_classifier else None
        return put_adapter_on(self.base.load(auto_class, new_head, **options), self.path, self.revision)


def load_classifier(saved: SavedModel, **options) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """A classifier on the default device, its tokenizer, and its class names in the order of their ids.

    Args:
        saved: The model.
        options: See `SavedModel.load`.

    Raises:
        InputError: It is a language model; or as `SavedModel.load_with_tokenizer`.
    """
    if not saved.is_classifier:
        raise InputError(f"'{saved.path}' is a language model, not a classifier: train one with task: classify")
    return *saved.load_with_tokenizer(**options), saved.labels


def find_device() -> torch.device:
    """The device that Trainer uses: the current accelerator, or the CPU."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def read_config(path: str, revision: str | None = None) -> PreTrainedConfig:
    """Reads and validates the configuration of a model.

    Raises:
        InputError: The configuration is missing or invalid.
    """
    check_model_path(path)
    with explained("a configuration", path):
        content, _ = PreTrainedConfig.get_config_dict(path, revision=revision or "main")
        for name in LIMITS.keys() & set(content):
            if isinstance(content[name], int) and content[name] > LIMITS[name]:
                raise InputError(
                    f"the config.json of '{path}' has {name} {content[name]:,}, the limit is {LIMITS[name]:,}: use "
                    "another copy"
                )
        config = AutoConfig.from_pretrained(path, revision=revision or "main", trust_remote_code=False)
    names, labels = config.architectures or [], config.id2label or {}
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise InputError(
            f"the config.json of '{path}' has the architectures {names!r}, not a list of names: use another copy"
        )
    if sorted(labels) != list(range(len(labels))) or not all(isinstance(label, str) for label in labels.values()):
        raise InputError(
            f"the id2label in the config.json of '{path}' does not map ids from 0 without gaps to strings: use "
            "another copy"
        )
    if "/" in str(config._attn_implementation):
        raise InputError(
            f"the config.json of '{path}' refers to code on the Hub, attn_implementation "
            f"'{config._attn_implementation}', which hfgpt never runs: remove that key"
        )
    return config


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    """Checks that the model has embeddings for all ids of a tokenizer.

    Raises:
        InputError: Names both sizes.
    """
    rows = model.get_input_embeddings().num_embeddings
    tokens = max(tokenizer.get_vocab().values(), default=-1) + 1  # ids may have gaps
    if tokens > rows:
        raise InputError(
            f"the tokenizer has {tokens} tokens, but the model has only {rows} embeddings: use the model's tokenizer"
        )


def check_weights_match(path: str, revision: str | None, config: PreTrainedConfig):
    """Checks the weight files before `from_pretrained` builds the model.

    Raises:
        InputError: A weight map refers to files outside its folder, a file is damaged, or the files are too small for
            the model that the configuration describes.
    """
    with explained("a model", path):
        files = find_weight_files(path, revision, config)
        for file in files:
            if file.suffix == ".bin":
                check_archive(file)
    stored = sum(file.stat().st_size for file in files)
    if not files or config.model_type not in TRAINABLE_TYPES:
        return
    # No format uses less than 4 bits per parameter. Small models are built anyway, for more precise errors.
    if (least := count_least_parameters(config)) > max(2 * stored, 2**24):
        raise InputError(
            f"the config.json of '{path}' describes a model of at least {least:,} parameters, but its weights have "
            f"only {stored:,} bytes: use both from the same model"
        )


def label_fields(labels: list[str]) -> dict:
    """The configuration fields for a classifier's labels."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        "problem_type": "single_label_classification",
    }


@functools.cache
def _is_adapter_on_the_hub(path: str, revision: str) -> bool:
    """Cached per process: without a network, each request takes as long as its retries."""
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    with explained("a model", path):
        return cached_file(path, "adapter_config.json", revision=revision, **quiet) is not None


def save_labels(labels: list[str], folder: Path):
    """Saves a classifier's class names with its adapter, whose configuration does not have them.

    Not in a config.json, which would make transformers treat the folder as a full model.
    """
    content = json.dumps({"id2label": dict(enumerate(labels))}, ensure_ascii=False, indent=2)
    (folder / LABELS_FILE).write_text(content + "\n", encoding="utf-8")


def _adapter_labels(path: str, revision: str | None) -> list[str]:
    """The class names of a classifier's adapter, as saved by hfgpt, or LABEL_0, LABEL_1, ..."""
    settings = {"revision": revision or "main", "_raise_exceptions_for_missing_entries": False}
    names = cached_file(path, LABELS_FILE, **settings)
    if names is not None:
        with explained("the labels", path):
            id2label = json.loads(Path(names).read_text(encoding="utf-8"))["id2label"]
            labels = [id2label[str(index)] for index in range(len(id2label))]
            if wrong := [label for label in labels if not isinstance(label, str)]:
                raise InputError(f"a label in '{names}' is {wrong[0]!r}, not a string: restore the original file")
            return labels
    try:
        with safe_open(cached_file(path, WEIGHTS_FILE, revision=revision or "main"), "pt") as file:
            names = list(file.keys())
            rows = [file.get_slice(name).get_shape()[0] for name in names if name.endswith("score.weight")]
    except (OSError, SafetensorError) as error:
        raise InputError(f"the adapter '{path}' cannot be read ({error}): save it again") from error
    if not rows:
        raise InputError(f"the adapter '{path}' has no classification head: save it again")
    return [f"LABEL_{index}" for index in range(rows[0])]


def hash_weights(folder: Path) -> str | None:
    """SHA-256 of the weights of a model or adapter in a folder; None if they are not in a single file."""
    file = _weights_file(folder)
    return hash_file(file) if file else None


def _weights_file(folder: Path) -> Path | None:
    return next((folder / name for name in (WEIGHTS_FILE, "model.safetensors") if (folder / name).is_file()), None)


def find_changed_weights(path: str) -> str | None:
    """Compares the weights in a folder with the hash that was saved with them.

    Returns:
        The problem in one line; None if they match, or there is no hash, or no single file of weights.

    Raises:
        InputError: The record with the hash is damaged.
    """
    folder, weights = Path(path), _weights_file(Path(path))
    if weights is None:
        return None
    recorded = {CHECKSUMS_FILE: read_checksums(folder).get(weights.name)}
    for kind in OF_WEIGHTS:
        if record := kind.read(folder):
            recorded[kind.FILE] = record.weights_sha256
    name, expected = next(((name, value) for name, value in recorded.items() if value), (None, None))
    if expected is None or expected == (actual := hash_file(weights)):
        return None
    return (
        f"the weights in '{path}' have changed since they were saved: {weights.name} has sha256 {actual[:12]}..., but "
        f"{name} has {str(expected)[:12]}...; restore the original file"
    )


@contextmanager
def quiet_bars(quiet: bool = True):
    """Disables transformers' progress bars, which are noise for small local files."""
    quiet = quiet and logging.is_progress_bar_enabled()
    if quiet:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if quiet:
            logging.enable_progress_bar()


@contextmanager
def explained(what: str, path: str):
    """Turns errors of `from_pretrained` into one line."""
    try:
        with without_remote_code(path):
            yield
    except InputError:
        raise
    # For damaged files, json, safetensors and tokenizers raise different errors, even a bare Exception.
    except Exception as error:
        remedy = "save or copy it again" if Path(path).is_dir() else "check the name, the network and the login"
        raise InputError(f"cannot load {what} from '{path}' ({fact_of(error)}): {remedy}") from error


def fact_of(error: Exception) -> str:
    """The message of an error in one line."""
    if isinstance(error, StrictDataclassError):  # only its last line is about the value
        return str(error).splitlines()[-1].strip().removeprefix("ValueError: ").removeprefix("TypeError: ")
    if "weights_only" in str(error):  # torch suggests loading it anyway
        return (
            "its pickle contains code or is damaged and is not loaded; use safetensors files, which cannot have code"
        )
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return textwrap.shorten(str(error), 300, placeholder="...").rstrip(".") or type(error).__name__
