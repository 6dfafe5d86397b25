"""Saved models, resolved once: what lies at a path or Hub id, and how to load it, whole or not at all."""

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

# Our classes for a GPT-2 checkpoint, which the Auto classes would load as transformers' own.
OF_GPT2 = {
    AutoModelForCausalLM: HfGPTForCausalLM,
    AutoModelForSequenceClassification: HfGPTForSequenceClassification,
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
TRAINABLE_TYPES = ("hfgpt", "gpt2")  # what becomes a model of ours
MOST_LAYERS = 1_000  # the deepest transformer published (DeepNet, arXiv:2203.00555)
# What transformers makes lists, tables and modules of before it looks at the weights, and how many at most.
LIMITS = {"num_hidden_layers": MOST_LAYERS, "n_layer": MOST_LAYERS, "num_labels": 1_000_000}
ChangedWeights = Literal["refuse", "warn"]


def find_model(path: str, revision: str | None = None) -> "SavedModel":
    """What lies at a path or Hub id; its weights are not read yet.

    Args:
        path: A folder that `save_pretrained` wrote, or a Hub id.
        revision: Branch, tag or commit on the Hub.

    Raises:
        InputError: There is no model.
    """
    check_model_path(path)
    return SavedModel(path, revision)


def load_model(path: str, revision: str | None = None, auto_class=AutoModelForCausalLM, **options) -> PreTrainedModel:
    """Loads a model of one kind, a language model or a classifier; arguments as of `find_model` and `SavedModel.load`.

    Raises:
        InputError: There is no model there, or one of the other kind; or as `SavedModel.load`.
    """
    return find_model(path, revision).load(auto_class, **options)


def load_model_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer saved with a model; as of `find_model` and `SavedModel.load_tokenizer`."""
    return find_model(path, revision).load_tokenizer()


class SavedModel:
    """A model, or the adapter of one, in a folder or on the Hub.

    Each fact about it is read when it is first asked for, and then kept: a folder that is written to later is to be
    found again.

    Args:
        path: A folder or Hub id.
        revision: Branch, tag or commit on the Hub; None: the newest.
    """

    def __init__(self, path: str, revision: str | None = None):
        self.path, self.revision = path, revision
        self.is_local = Path(path).is_dir()

    @functools.cached_property
    def adapter(self):
        """What an adapter says of itself; None: this is a whole model.

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
        """The base model of an adapter; None: this is a whole model."""
        if self.adapter is None:
            return None
        base = Path(self.adapter.base)
        # A first pass of its own run lies in the adapter's folder, wherever that was moved to.
        inside = Path(self.path) / base.name
        moved = self.is_local and base.is_absolute() and not base.is_dir() and inside.is_dir()
        return SavedModel(str(inside) if moved else self.adapter.base, self.adapter.revision)

    @functools.cached_property
    def config(self) -> PreTrainedConfig:
        """The configuration of the whole model, that of the base for an adapter.

        Raises:
            InputError: There is none, or it cannot be one of a model.
        """
        return self.base.config if self.base else read_config(self.path, self.revision)

    @property
    def is_classifier(self) -> bool:
        """Whether it is a sequence classifier, or the adapter of one."""
        return self.adapter.task == SEQ_CLS if self.adapter else is_classifier(self.config)

    @property
    def auto_class(self):
        """The class that loads it."""
        return AutoModelForSequenceClassification if self.is_classifier else AutoModelForCausalLM

    @property
    def labels(self) -> list[str]:
        """The classes of a classifier in the order of their ids."""
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
        """Loads it, whole or not at all. A GPT-2 checkpoint becomes a model of ours; an adapter is put on its base.

        Args:
            auto_class: `AutoModelForCausalLM` or `AutoModelForSequenceClassification`; None: what it is.
            new_head: Classes of a new head, drawn from torch's global generator, for a language model to classify
                with.
            changed_weights: What to do when the weights in a folder are not those whose hash was saved with them.
            options: Passed on to `from_pretrained`.

        Returns:
            The model in float32, unless `dtype` is given, in evaluation mode.

        Raises:
            InputError: Its weights are damaged or not finite, some are missing or left over, or it is of the other
                kind.
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
        """Loads it onto this machine's device, and its tokenizer; arguments and errors as of `load`.

        Raises:
            InputError: There is no tokenizer, or the model has no embeddings for some of its ids.
        """
        tokenizer = self.load_tokenizer()
        model = self.load(auto_class, **options).to(find_device())
        check_vocabulary(model, tokenizer)
        return model, tokenizer

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Loads the tokenizer saved with it.

        Raises:
            InputError: There is none.
        """
        if self.is_local and not any((Path(self.path) / name).is_file() for name in TOKENIZER_FILES):
            raise InputError(f"the folder '{self.path}' has no tokenizer: save the model's tokenizer there")
        with explained("a tokenizer", self.path):
            tokenizer = read_tokenizer(self.path, self.revision)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a folder without its files
            raise InputError(f"the tokenizer of '{self.path}' has no tokens but special ones: its files are not there")
        return tokenizer

    def check_same_tokens(self, tokenizer: PreTrainedTokenizerBase):
        """Refuses a tokenizer that gives other ids to the tokens of the one saved with the weights.

        Args:
            tokenizer: What the model is to be used with; it may know tokens beyond the model's. Where no tokenizer
                was saved with the weights, nothing is compared.

        Raises:
            InputError: Names the first token that differs.
        """
        files = ("tokenizer.json", "vocab.json")
        if self.is_local and not any((Path(self.path) / name).is_file() for name in files):
            return
        ours, theirs = tokenizer.get_vocab(), self.load_tokenizer().get_vocab()
        if differing := [token for token, index in theirs.items() if ours.get(token) != index]:
            token = min(differing, key=theirs.get)
            raise InputError(
                f"the tokenizer is not that of '{self.path}': {token!r} is {ours.get(token, 'unknown')} in one and "
                f"{theirs[token]} in the other; use the model's own"
            )

    def hash(self) -> str | None:
        """SHA-256 of its weights, of the lines `sha256sum` prints for several files; None: it has none."""
        with explained("a model", self.path):
            files = find_weight_files(self.path, self.revision, self.config)
        return hash_files(files) if files else None

    def _load_whole(self, auto_class: Any, new_head: list[str] | None, **kwargs) -> PreTrainedModel:
        path, revision, config = self.path, self.revision, self.config
        if is_classifier(config) and auto_class is AutoModelForCausalLM:
            raise InputError(
                f"'{path}' is a classifier, not a language model: name one that was trained to continue text"
            )
        if new_head is not None:
            kwargs |= label_fields(new_head)
        model_class = OF_GPT2[auto_class] if config.model_type == "gpt2" else auto_class
        check_weights_match(path, revision, config)
        kwargs = {"dtype": torch.float32, **kwargs, "revision": revision or "main"}
        if model_class is auto_class:
            kwargs["trust_remote_code"] = False
        with explained("a model", path), quiet_bars(Path(path).is_dir()):
            # Weights of another shape are left out here, and told below.
            model, info = model_class.from_pretrained(
                path, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        heads = {"score.weight", "lm_head.weight"} if new_head is not None else set()
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if keys := sorted(set(map(str, info.get(kind) or ())) - heads):
                raise InputError(
                    f"the weights in '{path}' do not fit its config.json: {len(keys)} {kind.replace('_', ' ')}, first "
                    f"{keys[0]}; take both from the same model"
                )
        for name, parameter in model.named_parameters():
            if not parameter.isfinite().all():
                raise InputError(
                    f"the weights in '{path}' are damaged: {name} holds NaN or infinity; take another copy"
                )
        return model.eval()

    def _load_adapted(self, auto_class: Any, **options) -> PreTrainedModel:
        if self.is_classifier != (auto_class is AutoModelForSequenceClassification):
            kinds = ("classifier", "language model") if self.is_classifier else ("language model", "classifier")
            raise InputError(
                f"'{self.path}' is the adapter of a {kinds[0]}, not of a {kinds[1]}: name one of a {kinds[1]}"
            )
        base = self.base.path
        if not self.base.is_local and (Path(base).is_absolute() or base.startswith(".") or base.count("/") > 1):
            raise InputError(
                f"the base model of the adapter '{self.path}' is not at '{base}': put it back, or correct "
                "base_model_name_or_path in adapter_config.json"
            )
        run = RunRecord.read(Path(self.path))
        trained_on = run and run.base_weights_sha256
        if trained_on and trained_on != self.base.hash():
            raise InputError(
                f"the adapter '{self.path}' was trained on other weights than '{base}' now has: put those back, or "
                "train the adapter again"
            )
        new_head = self.labels if self.is_classifier and not self.base.is_classifier else None
        return put_adapter_on(self.base.load(auto_class, new_head, **options), self.path, self.revision)


def load_classifier(saved: SavedModel, **options) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """A classifier on this machine's device, its tokenizer, and its classes in the order of their ids.

    Args:
        saved: Where it lies.
        options: Those of `SavedModel.load`.

    Raises:
        InputError: It is a language model; or as `SavedModel.load_with_tokenizer`.
    """
    if not saved.is_classifier:
        raise InputError(f"'{saved.path}' is a language model, not a classifier: train one with task: classify")
    return *saved.load_with_tokenizer(**options), saved.labels


def find_device() -> torch.device:
    """The device that Trainer will use: the current accelerator, or the CPU."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def read_config(path: str, revision: str | None = None) -> PreTrainedConfig:
    """Reads the configuration of a whole model.

    Raises:
        InputError: There is none, or it cannot be one of a model.
    """
    check_model_path(path)
    with explained("a configuration", path):
        content, _ = PreTrainedConfig.get_config_dict(path, revision=revision or "main")
        for name in LIMITS.keys() & set(content):
            if isinstance(content[name], int) and content[name] > LIMITS[name]:
                raise InputError(
                    f"the config.json of '{path}' has {name} {content[name]:,}, the limit is {LIMITS[name]:,}: take "
                    "another copy"
                )
        config = AutoConfig.from_pretrained(path, revision=revision or "main", trust_remote_code=False)
    names, labels = config.architectures or [], config.id2label or {}
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise InputError(f"the config.json of '{path}' has {names!r} for architectures, not names: take another copy")
    if sorted(labels) != list(range(len(labels))) or not all(isinstance(label, str) for label in labels.values()):
        raise InputError(
            f"the id2label in the config.json of '{path}' does not give a text for each number from 0 on: take "
            "another copy"
        )
    if "/" in str(config._attn_implementation):
        raise InputError(
            f"the config.json of '{path}' names code on the Hub, attn_implementation '{config._attn_implementation}', "
            "which hfgpt never runs: take that key out"
        )
    return config


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    """Refuses a tokenizer whose ids the model has no embeddings for.

    Raises:
        InputError: Names both sizes.
    """
    rows = model.get_input_embeddings().num_embeddings
    tokens = max(tokenizer.get_vocab().values(), default=-1) + 1  # ids may have gaps
    if tokens > rows:
        raise InputError(f"the tokenizer has {tokens} tokens, but the model embeds only {rows}: use the model's own")


def check_weights_match(path: str, revision: str | None, config: PreTrainedConfig):
    """Looks at the files that `from_pretrained` will read the weights from, before it builds a model to put them in.

    Raises:
        InputError: A weight map leads out of the model's folder, a file is damaged, or all of them together are too
            small to hold the model that the configuration describes.
    """
    with explained("a model", path):
        files = find_weight_files(path, revision, config)
        for file in files:
            if file.suffix == ".bin":
                check_archive(file)
    stored = sum(file.stat().st_size for file in files)
    if not files or config.model_type not in TRAINABLE_TYPES:
        return
    # No format takes less than 4 bits for one. A small model is built, as the errors that follow say more.
    if (least := count_least_parameters(config)) > max(2 * stored, 2**24):
        raise InputError(
            f"the config.json of '{path}' describes a model of at least {least:,} parameters, but its weights take "
            f"{stored:,} bytes; take both from the same model"
        )


def label_fields(labels: list[str]) -> dict:
    """The fields of a configuration that name the classes of a classifier."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        "problem_type": "single_label_classification",
    }


@functools.cache
def _is_adapter_on_the_hub(path: str, revision: str) -> bool:
    """Asks the Hub once per process: without a network, each request takes the time of its retries."""
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    with explained("a model", path):
        return cached_file(path, "adapter_config.json", revision=revision, **quiet) is not None


def save_labels(labels: list[str], folder: Path):
    """Saves the names of a classifier's classes with its adapter, whose configuration cannot hold them.

    Not as a config.json: transformers would take the folder for a whole model.
    """
    content = json.dumps({"id2label": dict(enumerate(labels))}, ensure_ascii=False, indent=2)
    (folder / LABELS_FILE).write_text(content + "\n", encoding="utf-8")


def _adapter_labels(path: str, revision: str | None) -> list[str]:
    """The classes of a classifier's adapter: those that hfgpt saved with it, or numbers."""
    settings = {"revision": revision or "main", "_raise_exceptions_for_missing_entries": False}
    names = cached_file(path, LABELS_FILE, **settings)
    if names is not None:
        with explained("the labels", path):
            id2label = json.loads(Path(names).read_text(encoding="utf-8"))["id2label"]
            labels = [id2label[str(index)] for index in range(len(id2label))]
            if wrong := [label for label in labels if not isinstance(label, str)]:
                raise InputError(
                    f"a label in '{names}' is {wrong[0]!r}, not a text: take the file that was saved there"
                )
            return labels
    try:
        with safe_open(cached_file(path, WEIGHTS_FILE, revision=revision or "main"), "pt") as file:
            names = list(file.keys())
            rows = [file.get_slice(name).get_shape()[0] for name in names if name.endswith("score.weight")]
    except (OSError, SafetensorError) as error:
        raise InputError(f"the adapter '{path}' cannot be read ({error}): save it again") from error
    if not rows:
        raise InputError(f"the adapter '{path}' has no head, so its classes are not known: save it again")
    return [f"LABEL_{index}" for index in range(rows[0])]


def hash_weights(folder: Path) -> str | None:
    """SHA-256 of the weights in a folder, a model's or an adapter's; None where they are not in one file."""
    file = _weights_file(folder)
    return hash_file(file) if file else None


def _weights_file(folder: Path) -> Path | None:
    return next((folder / name for name in (WEIGHTS_FILE, "model.safetensors") if (folder / name).is_file()), None)


def find_changed_weights(path: str) -> str | None:
    """Compares the weights in a folder with the hash that was written when they were saved.

    Returns:
        What is wrong, in one line; None if nothing is, or no hash of one file of weights is on record.

    Raises:
        InputError: The record itself is damaged.
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
        f"{name} says {str(expected)[:12]}...; restore the original file"
    )


@contextmanager
def quiet_bars(quiet: bool = True):
    """Switches off transformers' progress bars, which for a local file of some megabytes are noise."""
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
    """Turns what `from_pretrained` raises into one line."""
    try:
        with without_remote_code(path):
            yield
    except InputError:
        raise
    # Below it json, safetensors and tokenizers meet a damaged file, each with errors of its own, down to the bare one.
    except Exception as error:
        remedy = "save or copy it again" if Path(path).is_dir() else "check the name, the network and the login"
        raise InputError(f"cannot load {what} from '{path}' ({fact_of(error)}): {remedy}") from error


def fact_of(error: Exception) -> str:
    """What an error says, in one line."""
    if isinstance(error, StrictDataclassError):  # its last line holds the fact, those before name the machinery
        return str(error).splitlines()[-1].strip().removeprefix("ValueError: ").removeprefix("TypeError: ")
    if "weights_only" in str(error):  # torch's advice is to run it all the same
        return "its pickle wants to run code or is damaged, so it is not read; safetensors files cannot hold any"
    if isinstance(error, KeyError):
        return f"there is no {error}"
    return textwrap.shorten(str(error), 300, placeholder="...").rstrip(".") or type(error).__name__
