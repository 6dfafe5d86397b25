"""Builds the model to train from a recipe's section `model`: new, or loaded, with a new head or in 4-bit."""

import dataclasses
import difflib
import os
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import ACT2FN

from hfgpt.configuration_hfgpt import PRESETS, HfGPTConfig
from hfgpt.conversion.checkpoints import count_least_parameters
from hfgpt.errors import InputError
from hfgpt.modeling_hfgpt import HfGPTForCausalLM, HfGPTForSequenceClassification
from hfgpt.models import (
    MOST_LAYERS,
    TRAINABLE_TYPES,
    SavedModel,
    check_vocabulary,
    fact_of,
    find_model,
    label_fields,
)

DROPOUTS = ("embd_pdrop", "resid_pdrop", "attn_pdrop")


@dataclass
class ModelArguments:
    """The recipe's section `model`: a base model to load, or the architecture of a new one.

    Without `path` and `preset`, the new model is small enough to learn a small text in minutes on a CPU. With `path`,
    only the dropouts of the architecture may be set, and neither `preset` nor `initialization` nor
    `pad_vocab_to_multiple_of`.

    Args:
        path: Folder or Hub id of a base model; None: train from scratch.
        revision: Branch, tag or commit of the Hub id.
        preset: GPT-2 size: `gpt2`, `gpt2-medium`, `gpt2-large` or `gpt2-xl`; the fields below override it.
        initialization: `gpt2` (N(0, initializer_range), residual projections scaled) or `torch` (PyTorch's defaults,
            as in the book; tied embeddings use those of the head).
        attn_implementation: `sdpa`, `eager`, `flex_attention` or `flash_attention_2`; None lets transformers choose.
        load_in_4bit: Load the weights of `path` in 4-bit (QLoRA's NF4, with bitsandbytes), to train adapters on them.
        vocab_size: Number of token embeddings; None: one per token of the tokenizer.
        pad_vocab_to_multiple_of: Round the number of token embeddings up for speed (64 on GPUs); the extra ids are
            never used and never generated.
        hidden_size: Width of the residual stream; None: 128.
        num_hidden_layers: Number of transformer blocks; None: 4.
        num_attention_heads: Attention heads per block; divides `hidden_size`. None: one for every 64 of `hidden_size`
            (every 32 below 256).
        intermediate_size: Width inside the MLP; None: four times `hidden_size`.
        max_position_embeddings: The context length, in tokens; None: 256.
        hidden_act: Activation of the MLP, a name of `transformers.activations.ACT2FN`; None: `gelu_pytorch_tanh`.
        layer_norm_eps: Epsilon of the LayerNorms; None: 1e-5.
        initializer_range: Standard deviation of the initial weights (residual projections: divided by
            sqrt(2 * layers)); None: 0.02.
        tie_word_embeddings: Whether the output head is the token embedding (GPT-2) or has its own weights (the book);
            None: true.
        qkv_bias: Whether the query, key and value projections have biases; None: true.
        embd_pdrop: Dropout after the embeddings; None: 0.1.
        resid_pdrop: Dropout at the end of each residual branch; None: 0.1.
        attn_pdrop: Dropout on the attention weights; None: 0.1.
    """

    path: str | None = None
    revision: str | None = None
    preset: str | None = None
    initialization: str = "gpt2"
    attn_implementation: str | None = None
    load_in_4bit: bool = False
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

    def __post_init__(self):
        if "/" in (self.attn_implementation or ""):
            raise InputError(
                f"model.attn_implementation is '{self.attn_implementation}', code on the Hub, which hfgpt never runs: "
                "use sdpa, eager, flex_attention or flash_attention_2"
            )
        if self.path is not None:
            usable = {"path", "revision", "attn_implementation", "load_in_4bit", *DROPOUTS}
            defaults = {field.name: field.default for field in dataclasses.fields(self)}
            if given := [key for key in defaults if key not in usable and getattr(self, key) != defaults[key]]:
                names = ", ".join(f"model.{key}" for key in given)
                raise InputError(f"model.path determines the architecture and weights: remove {names}")
        if (self.num_hidden_layers or 0) > MOST_LAYERS:
            raise InputError(f"model.num_hidden_layers is {self.num_hidden_layers:,}; the limit is {MOST_LAYERS:,}")


SMALL = {"hidden_size": 128, "num_hidden_layers": 4, "max_position_embeddings": 256}
_NOT_ARCHITECTURE = {"path", "revision", "preset", "initialization", "load_in_4bit", "pad_vocab_to_multiple_of"}


def find_architecture(arguments: ModelArguments) -> dict[str, Any]:
    """The `HfGPTConfig` fields of a new model: the preset or the small default, with the given values.

    Raises:
        InputError: The preset is unknown.
    """
    if arguments.preset not in (None, *PRESETS):
        raise InputError(f"model.preset is '{arguments.preset}'; it must be one of {', '.join(PRESETS)}")
    given = {
        key: value for key, value in vars(arguments).items() if value is not None and key not in _NOT_ARCHITECTURE
    }
    if given.get("max_position_embeddings", 1) < 1:
        raise InputError(f"model.max_position_embeddings is {given['max_position_embeddings']}; it must be at least 1")
    if arguments.preset is not None:
        return PRESETS[arguments.preset] | given
    fields = SMALL | given
    width = fields["hidden_size"]
    most = max(width // (64 if width >= 256 else 32), 1)
    return {"num_attention_heads": next(heads for heads in range(most, 0, -1) if width % heads == 0)} | fields


def build_config(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> HfGPTConfig:
    """The configuration of a new model.

    Args:
        arguments: The recipe's section `model`.
        tokenizer: Determines the special tokens and, if not set, the vocabulary size.

    Raises:
        InputError: The architecture is invalid, the preset unknown, or the vocabulary does not fit the tokenizer.
    """
    fields = find_architecture(arguments)
    if arguments.hidden_act not in (None, *ACT2FN):
        near = difflib.get_close_matches(arguments.hidden_act, ACT2FN, n=1, cutoff=0.0)[0]
        raise InputError(
            f"model.hidden_act is '{arguments.hidden_act}', which transformers does not have; did you mean '{near}'?"
        )
    if arguments.pad_vocab_to_multiple_of is not None and arguments.pad_vocab_to_multiple_of < 1:
        raise InputError(
            f"model.pad_vocab_to_multiple_of is {arguments.pad_vocab_to_multiple_of}; it must be at least 1"
        )
    size = fields.setdefault("vocab_size", len(tokenizer))
    if size < len(tokenizer):
        raise InputError(
            f"model.vocab_size is {size}, but the tokenizer has ids up to {len(tokenizer) - 1}: "
            f"set it to {len(tokenizer)}, or unset it"
        )
    if size > len(tokenizer):
        raise InputError(
            f"model.vocab_size is {size}, but the tokenizer has only {len(tokenizer)} tokens, so the extra ids would "
            "never be produced: unset it, or set model.pad_vocab_to_multiple_of to round it up for speed"
        )
    if arguments.pad_vocab_to_multiple_of:
        fields["vocab_size"] = -(-size // arguments.pad_vocab_to_multiple_of) * arguments.pad_vocab_to_multiple_of
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        return HfGPTConfig(**special, **fields)
    except (StrictDataclassError, ValueError) as error:
        raise InputError(f"model: {fact_of(error)}") from error


def build_model(
    arguments: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    labels: list[str] | None = None,
    base: SavedModel | None = None,
) -> PreTrainedModel:
    """A model to train: new, with weights initialized from torch's global generator, or loaded.

    Args:
        arguments: The recipe's section `model`.
        tokenizer: The tokenizer to train with; its ids must fit the model.
        labels: Class names in the order of their ids; None: a causal language model. If the base model is a language
            model, the classifier gets a new head; if it is a classifier, its head is kept.
        base: The result of `find_base_model`, if it was called before.

    Raises:
        InputError: As `build_config`, `find_base_model` and `SavedModel.load`; or there is too little memory, or a
            loaded model has a different vocabulary or different classes.
    """
    if arguments.path is not None:
        return _load_to_train(base or find_base_model(arguments), arguments, tokenizer, labels)
    if arguments.load_in_4bit:
        raise InputError("model.load_in_4bit needs a base model: set model.path, or unset model.load_in_4bit")
    if arguments.initialization not in ("gpt2", "torch"):
        raise InputError(f"model.initialization is '{arguments.initialization}'; it must be 'gpt2' or 'torch'")
    config = build_config(arguments, tokenizer)
    _check_memory(config)
    model_class = HfGPTForCausalLM
    if labels is not None:
        model_class = HfGPTForSequenceClassification
        config.update(label_fields(labels))
    try:
        model = model_class._from_config(config)
    except (ValueError, ImportError) as error:
        raise InputError(
            f"model.attn_implementation is '{arguments.attn_implementation}': {fact_of(error)}"
        ) from error
    if arguments.initialization == "torch":
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm)):
                module.reset_parameters()
        model.tie_weights()
    if config.vocab_size > len(tokenizer) and labels is None:
        model.generation_config.suppress_tokens = list(range(len(tokenizer), config.vocab_size))
    return model


def find_base_model(arguments: ModelArguments) -> SavedModel | None:
    """The trainable model at `model.path`; None if it is not set.

    Raises:
        InputError: The model does not exist, is an adapter, or has an unsupported architecture.
    """
    if arguments.path is None:
        return None
    model = find_model(arguments.path, arguments.revision)
    if model.adapter:
        raise InputError(f"model.path '{model.path}' is an adapter: merge it first with hfgpt merge")
    if model.config.model_type not in TRAINABLE_TYPES:
        raise InputError(
            f"model.path '{model.path}' is a model of type {model.config.model_type}; only the types "
            f"{' and '.join(TRAINABLE_TYPES)} can be trained"
        )
    return model


def _check_memory(config: HfGPTConfig):
    """Rejects a model whose weights alone exceed the memory, before allocating them."""
    needed = 4 * count_least_parameters(config)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise InputError(
            f"the model's weights take at least {needed / 1e9:,.0f} GB in float32, but this machine has "
            f"{memory / 1e9:,.0f} GB of memory: lower model.hidden_size, num_hidden_layers or max_position_embeddings"
        )


def _load_to_train(
    base: SavedModel, arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase, labels: list[str] | None
) -> PreTrainedModel:
    # Dropouts are not weights and may differ from those of the earlier training.
    kwargs = {name: getattr(arguments, name) for name in DROPOUTS if getattr(arguments, name) is not None}
    kwargs["attn_implementation"] = arguments.attn_implementation
    if arguments.load_in_4bit:
        compute = torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    if labels is None:
        model = base.load(AutoModelForCausalLM, **kwargs)
    else:
        if base.is_classifier and base.labels != labels:
            raise InputError(
                f"'{base.path}' has the classes {', '.join(base.labels)}, but the data has {', '.join(labels)}: start "
                "from a language model"
            )
        head = None if base.is_classifier else labels
        model = base.load(AutoModelForSequenceClassification, new_head=head, **kwargs)
        model.config.problem_type = "single_label_classification"  # may be unset in other models
    base.check_same_tokens(tokenizer)
    check_vocabulary(model, tokenizer)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model
