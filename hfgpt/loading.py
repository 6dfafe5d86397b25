"""Models from a recipe's section `model`, and from folders and Hub ids, or a clear line why not."""

import difflib
import re
import textwrap
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import ACT2FN
from transformers.utils import logging

from hfgpt.configuration_hfgpt import PRESETS, HfGPTConfig
from hfgpt.errors import InputError
from hfgpt.modeling_hfgpt import HfGPTForCausalLM, HfGPTForSequenceClassification

# Our classes for a GPT-2 checkpoint, which the Auto classes would load as transformers' own.
OF_GPT2 = {
    AutoModelForCausalLM: HfGPTForCausalLM,
    AutoModelForSequenceClassification: HfGPTForSequenceClassification,
}


@dataclass
class ModelArguments:
    """The recipe's section `model`: a model to go on from, or the architecture of a new one.

    Args:
        path: A folder or Hub id with weights to go on from; None starts from random weights.
        revision: Branch, tag or commit of the Hub id.
        preset: `gpt2`, `gpt2-medium`, `gpt2-large` or `gpt2-xl`; the fields below change it. None is `gpt2`.
        initialization: `gpt2` (N(0, initializer_range), residual projections scaled) or `torch` (PyTorch's defaults,
            as in the book; a tied head's are the embedding's too).
        attn_implementation: `sdpa`, `eager`, `flex_attention` or `flash_attention_2`; None lets transformers choose.
        vocab_size: None: as many as the tokenizer has tokens.
        pad_vocab_to_multiple_of: Rounds the embedding's rows up for speed (64 on GPUs); rows past the tokenizer's are
            never learned and never generated.

    The other fields are those of `HfGPTConfig`.
    """

    path: str | None = None
    revision: str | None = None
    preset: str | None = None
    initialization: str = "gpt2"
    attn_implementation: str | None = None
    vocab_size: int | None = None
    pad_vocab_to_multiple_of: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    intermediate_size: int | None = None
    max_position_embeddings: int | None = None
    hidden_act: str | None = None
    layer_norm_eps: float | None = None
    initializer_range: float | None = None
    tie_word_embeddings: bool | None = None
    qkv_bias: bool | None = None
    embd_pdrop: float | None = None
    resid_pdrop: float | None = None
    attn_pdrop: float | None = None


_NOT_ARCHITECTURE = {"path", "revision", "preset", "initialization", "pad_vocab_to_multiple_of"}


def build_config(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> HfGPTConfig:
    """The configuration of a new model for a tokenizer.

    Args:
        arguments: What differs from the preset.
        tokenizer: Gives the vocabulary size, where none is set, and the special tokens.

    Raises:
        InputError: The architecture is impossible, the preset unknown, or the vocabulary does not fit the tokenizer.
    """
    if arguments.preset is not None and arguments.preset not in PRESETS:
        raise InputError(f"model.preset is '{arguments.preset}'; choose one of {', '.join(PRESETS)}")
    if arguments.hidden_act not in (None, *ACT2FN):
        near = difflib.get_close_matches(arguments.hidden_act, ACT2FN, n=1, cutoff=0.0)[0]
        raise InputError(f"model.hidden_act is '{arguments.hidden_act}', which transformers lacks: try '{near}'")
    if arguments.pad_vocab_to_multiple_of is not None and arguments.pad_vocab_to_multiple_of < 1:
        raise InputError(f"model.pad_vocab_to_multiple_of is {arguments.pad_vocab_to_multiple_of}; the least is 1")
    given = {
        key: value for key, value in vars(arguments).items() if value is not None and key not in _NOT_ARCHITECTURE
    }
    size = given.setdefault("vocab_size", len(tokenizer))
    if size < len(tokenizer):
        raise InputError(
            f"model.vocab_size is {size}, but the tokenizer has ids up to {len(tokenizer) - 1}: "
            f"set it to {len(tokenizer)}, or leave it out"
        )
    if size > len(tokenizer):
        raise InputError(
            f"model.vocab_size is {size}, but the tokenizer has {len(tokenizer)} tokens and ids beyond mean nothing: "
            "leave it out, or set model.pad_vocab_to_multiple_of to round it up for speed"
        )
    if arguments.pad_vocab_to_multiple_of:
        given["vocab_size"] = -(-size // arguments.pad_vocab_to_multiple_of) * arguments.pad_vocab_to_multiple_of
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        return HfGPTConfig.from_preset(arguments.preset or "gpt2", **{**special, **given})
    except (StrictDataclassError, ValueError) as error:
        raise InputError(f"model: {_fact(error)}") from error


def build_model(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A causal language model to train: new, with weights drawn from torch's global generator, or loaded.

    Args:
        arguments: The recipe's section `model`.
        tokenizer: What the model will be trained with; its ids must fit.

    Raises:
        InputError: As `build_config` and `load_model`; or a loaded model has fewer embeddings than the tokenizer ids.
    """
    if arguments.path is not None:
        fixed = [key for key in vars(arguments) if key not in (*_NOT_ARCHITECTURE, "attn_implementation")]
        if changed := [key for key in fixed if getattr(arguments, key) is not None]:
            raise InputError(f"model.path brings its own architecture: leave out model.{changed[0]}")
        model = load_model(arguments.path, arguments.revision, attn_implementation=arguments.attn_implementation)
        check_vocabulary(model, tokenizer)
        return model
    if arguments.initialization not in ("gpt2", "torch"):
        raise InputError(f"model.initialization is '{arguments.initialization}'; choose 'gpt2' or 'torch'")
    config = build_config(arguments, tokenizer)
    try:
        model = HfGPTForCausalLM._from_config(config)
    except (ValueError, ImportError) as error:
        raise InputError(f"model.attn_implementation is '{arguments.attn_implementation}': {_fact(error)}") from error
    if arguments.initialization == "torch":
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm)):
                module.reset_parameters()
        model.tie_weights()
    if config.vocab_size > len(tokenizer):
        model.generation_config.suppress_tokens = list(range(len(tokenizer), config.vocab_size))
    return model


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    """Refuses a tokenizer whose ids the model has no embeddings for.

    Raises:
        InputError: Names both sizes.
    """
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model embeds only {rows}: use the model's own"
        )


def load_model(path: str, revision: str | None = None, auto_class=AutoModelForCausalLM, **kwargs) -> PreTrainedModel:
    """Loads a model, whole or not at all. A GPT-2 checkpoint becomes a model of ours.

    Args:
        path: A folder that `save_pretrained` wrote, or a Hub id.
        revision: Branch, tag or commit on the Hub.
        auto_class: `AutoModelForCausalLM`, or `AutoModelForSequenceClassification` for a classifier.
        kwargs: Passed on to `from_pretrained`.

    Returns:
        The model in float32, unless `dtype` is given, in evaluation mode.

    Raises:
        InputError: There is no model there, its weights are damaged or not finite, or some are missing or left over.
    """
    config = load_model_config(path, revision)
    if is_classifier(config) and auto_class is AutoModelForCausalLM:
        raise InputError(f"'{path}' is a classifier, not a language model: name one that was trained to continue text")
    model_class = OF_GPT2[auto_class] if config.model_type == "gpt2" else auto_class
    kwargs = {"dtype": torch.float32, **kwargs, "revision": revision or "main"}
    if model_class is auto_class:
        kwargs["trust_remote_code"] = False
    with explained("a model", path), quiet_bars(Path(path).is_dir()):
        # Weights of another shape are left out here, and told below.
        model, info = model_class.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, info.get(kind) or ())):
            raise InputError(
                f"the weights in '{path}' do not fit its config.json: {len(keys)} {kind.replace('_', ' ')}, first "
                f"{keys[0]}; take both from the same model"
            )
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise InputError(f"the weights in '{path}' are damaged: {name} holds NaN or infinity; take another copy")
    return model.eval()


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


def load_model_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer beside a model.

    Raises:
        InputError: There is none.
    """
    check_model_path(path)
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
    if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in files):
        raise InputError(f"the folder '{path}' holds no tokenizer: save the model's own beside it")
    with explained("a tokenizer", path):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision or "main", trust_remote_code=False)
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a folder without its files
        raise InputError(f"the tokenizer of '{path}' has no tokens but special ones: its files are not there")
    return tokenizer


def is_classifier(config: PreTrainedConfig) -> bool:
    """Whether a saved configuration is that of a sequence classifier."""
    return any("SequenceClassification" in name for name in config.architectures or [])


def load_model_config(path: str, revision: str | None = None) -> PreTrainedConfig:
    """Loads the configuration of a model, without its weights.

    Raises:
        InputError: There is none.
    """
    check_model_path(path)
    with explained("a configuration", path):
        return AutoConfig.from_pretrained(path, revision=revision or "main", trust_remote_code=False)


def check_model_path(path: str):
    """Refuses what cannot be a model, before anything asks the Hub for it.

    Raises:
        InputError: A file, a folder without config.json, or a path that does not exist and is no Hub id.
    """
    local = Path(path)
    if local.is_file():
        raise InputError(f"'{path}' is a file; a model is a folder with config.json and weights, or a Hub id")
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise InputError(f"the folder '{path}' holds no config.json, so it is no model: name a finished run")
    elif not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) or ("/" in path and local.parent.is_dir()):
        raise InputError(f"there is no folder '{path}', and it is no Hub id either: check the path")


@contextmanager
def explained(what: str, path: str):
    """Turns what `from_pretrained` raises into one line."""
    try:
        yield
    # Below it json, safetensors and tokenizers meet a damaged file, each with errors of its own, down to the bare one.
    except Exception as error:
        remedy = "save or copy it again" if Path(path).is_dir() else "check the name, the network and the login"
        raise InputError(f"cannot load {what} from '{path}' ({_fact(error)}): {remedy}") from error


def _fact(error: Exception) -> str:
    """What an error says, in one line."""
    if isinstance(error, StrictDataclassError):  # its last line holds the fact, those before name the machinery
        return str(error).splitlines()[-1].strip().removeprefix("ValueError: ").removeprefix("TypeError: ")
    if "weights_only" in str(error):  # torch's advice is to run it all the same
        return "its pickle wants to run code or is damaged, so it is not read; safetensors files cannot hold any"
    if isinstance(error, KeyError):
        return f"there is no {error}"
    return textwrap.shorten(str(error), 300, placeholder="...").rstrip(".") or type(error).__name__
