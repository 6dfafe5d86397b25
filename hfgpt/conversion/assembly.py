"""Assembles a model from weights under hfgpt's names: infers the architecture, fills or trims weights if needed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedConfig, PreTrainedModel

from hfgpt.configuration_hfgpt import PRESETS, HfGPTConfig
from hfgpt.conversion.book import fold_head_bias
from hfgpt.conversion.checkpoints import is_classifier
from hfgpt.conversion.gpt2 import gpt2_config
from hfgpt.conversion.layouts import Layout
from hfgpt.errors import InputError
from hfgpt.modeling_hfgpt import HfGPTForCausalLM, HfGPTForSequenceClassification

# GPT-2's vocabulary size, whose last token is the end-of-text token, and the size to which nanoGPT pads it.
GPT2_TOKENS, PADDED_GPT2_TOKENS = 50257, 50304
# Vocabularies are padded to a multiple of this at most.
MOST_PADDING = 128


@dataclass
class Parts:
    """The parts from which a model is assembled.

    Args:
        weights: hfgpt's names -> tensors, which may be views of a file.
        layout: Layout of the source.
        num_heads: Number of attention heads; None: unknown.
        hidden_act: Activation of the source's MLP.
        dropout: Dropout of the source; None: the default.
        tokens: Vocabulary size; further rows of the embedding are cut. None: keep all.
        tokens_named: Whether the user chose it; otherwise, only padding may be cut.
        special: `bos_token_id`, `eos_token_id`, `pad_token_id`.
        notes: Lines for the report.
        recomputed: Whether weights were recomputed, and therefore rounded, instead of only rearranged.
    """

    weights: dict[str, torch.Tensor]
    layout: Layout
    num_heads: int | None
    hidden_act: str
    dropout: float | None = None
    tokens: int | None = None
    tokens_named: bool = True
    special: dict[str, int | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    recomputed: bool = False


def complete_weights(parts: Parts) -> HfGPTConfig:
    """Infers the architecture, and makes the weights exactly those of the model.

    Args:
        parts: `weights` and `notes` are changed in place.

    Raises:
        InputError: A weight is missing, or shapes are inconsistent; names them.
    """
    weights = parts.weights
    for name in ("model.embed_tokens.weight", "model.embed_positions.weight", "model.layers.0.mlp.up_proj.weight"):
        if name not in weights or weights[name].ndim != 2:
            raise InputError(f"the checkpoint has no matrix for {name}: save all weights of the model")
    labels = _take_classifier(parts)
    _cut_vocabulary(parts)
    embedding, head = weights["model.embed_tokens.weight"], weights.get("lm_head.weight")
    tied = labels is not None or head is None or (head.shape == embedding.shape and torch.equal(head, embedding))
    if tied and weights.pop("lm_head.weight", None) is not None:
        parts.notes.append("tied: the output head equals the token embedding")
    numbers = {int(match[1]) for name in weights if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    if numbers != set(range(len(numbers))):
        raise InputError(f"the blocks of the checkpoint are not numbered from 0 without gaps: {sorted(numbers)[:9]}")
    arguments = {
        "vocab_size": embedding.shape[0],
        "hidden_size": embedding.shape[1],
        "num_hidden_layers": len(numbers),
        "num_attention_heads": _check_heads(parts.num_heads, embedding.shape[1]),
        "intermediate_size": weights["model.layers.0.mlp.up_proj.weight"].shape[0],
        "max_position_embeddings": weights["model.embed_positions.weight"].shape[0],
        "hidden_act": parts.hidden_act,
        "tie_word_embeddings": tied,
        "qkv_bias": "model.layers.0.self_attn.q_proj.bias" in weights,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        **parts.special,
    }
    if parts.dropout is not None:
        arguments |= dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), parts.dropout)
    if labels is not None:
        arguments["num_labels"] = labels
    try:
        config = HfGPTConfig(**arguments)
    except (StrictDataclassError, ValueError) as error:
        raise InputError(f"the checkpoint's architecture is invalid: {str(error).splitlines()[-1].strip()}") from error
    config.architectures = ["HfGPTForCausalLM" if labels is None else "HfGPTForSequenceClassification"]
    _fit(parts, build_on_meta(config))
    return config


def build_on_meta(config: HfGPTConfig) -> PreTrainedModel:
    """Builds the model for a configuration on the meta device."""
    with torch.device("meta"):
        return (HfGPTForSequenceClassification if is_classifier(config) else HfGPTForCausalLM)(config)


def build_native_on_meta(config: HfGPTConfig, **changes) -> PreTrainedModel:
    """Builds the equivalent GPT-2 of transformers on the meta device.

    Args:
        config: Configuration of the hfgpt model.
        changes: Changes to the GPT-2 configuration.
    """
    native_config = gpt2_config(config)
    native_config.update(changes)
    with torch.device("meta"):
        return native_class(config)(native_config)


def native_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    return GPT2ForSequenceClassification if is_classifier(config) else GPT2LMHeadModel


def load_whole(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """Loads weights strictly into a model on the meta device; only a tied head may be missing.

    The tensors are not copied.
    """
    tied = model._tied_weights_keys if model.config.tie_word_embeddings else None
    weights = {**weights, **{name: weights[source] for name, source in (tied or {}).items()}}
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    return model.eval()


def _check_heads(num_heads: int | None, width: int) -> int:
    known = next((size["num_attention_heads"] for size in PRESETS.values() if size["hidden_size"] == width), None)
    hint = f" (GPT-2 uses {known} at this width)" if known else ""
    if num_heads is None:
        raise InputError(f"cannot infer the number of attention heads (hidden size {width}): pass --num-heads{hint}")
    if num_heads < 1 or width % num_heads:
        raise InputError(
            f"hidden size {width} is not divisible by {num_heads} attention heads: pass another --num-heads{hint}"
        )
    return num_heads


def _take_classifier(parts: Parts) -> int | None:
    """Turns an output head of another size than the vocabulary into a classifier; returns the number of labels."""
    weights = parts.weights
    bias = weights.pop("lm_head.bias", None)
    head = weights.get("lm_head.weight")
    rows, width = weights["model.embed_tokens.weight"].shape
    # A language model's head has one row per token; the book's classifiers replace it under the same name.
    if parts.layout.may_classify and head is not None and head.shape[:1] != (rows,):
        weights["score.weight"] = weights.pop("lm_head.weight")
    score = weights.get("score.weight")
    if bias is not None and score is None:
        raise InputError("the language model head has a bias, which hfgpt models do not support")
    if score is None:
        return None
    weights.pop("lm_head.weight", None)
    norm_bias = weights.get("model.norm.bias", torch.empty(0))
    shapes = [tuple(tensor.shape) for tensor in (score, *([] if bias is None else [bias, norm_bias]))]
    if shapes not in ([(len(score), width)], [(len(score), width), (len(score),), (width,)]):
        raise InputError(f"inconsistent shapes of the classifier, its bias and the final norm: {shapes}")
    if bias is not None:
        weights["model.norm.bias"] = fold_head_bias(weights["model.norm.bias"], score, bias)
        parts.recomputed = True
        parts.notes.append("folded: the classifier's bias into the bias of the final norm (same logits)")
    return score.shape[0]


def _cut_vocabulary(parts: Parts):
    rows = len(parts.weights["model.embed_tokens.weight"])
    if parts.tokens is None and rows == PADDED_GPT2_TOKENS:
        parts.tokens = GPT2_TOKENS
    if (parts.tokens or rows) == GPT2_TOKENS and not parts.special:
        parts.special = {"bos_token_id": GPT2_TOKENS - 1, "eos_token_id": GPT2_TOKENS - 1}
    if parts.tokens in (None, rows):
        return
    if parts.tokens > rows:
        raise InputError(
            f"the vocabulary has {parts.tokens} tokens, but the checkpoint has only {rows} embeddings: use its own "
            "tokenizer"
        )
    if not parts.tokens_named and rows - parts.tokens >= MOST_PADDING:
        raise InputError(
            f"the tokenizer next to the weights has {parts.tokens} tokens, but the checkpoint has {rows} embeddings: "
            "pass the right --tokenizer, or the number of embeddings to keep with --vocab-size"
        )
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in parts.weights:
            parts.weights[name] = parts.weights[name][: parts.tokens]
    parts.notes.append(f"cut: rows {parts.tokens} to {rows - 1} of the token embedding, which have no token")


def _fit(parts: Parts, model: PreTrainedModel):
    """Fills missing biases with zeros; rejects other missing, unexpected and mismatched weights."""
    weights, wanted = parts.weights, dict(model.named_parameters())
    dtype = weights["model.embed_tokens.weight"].dtype
    # A model without biases lacks them in every block; if only one block lacks a bias, the checkpoint is damaged.
    kinds = {re.sub(r"\d+", "*", name) for name in weights}
    norms_have = "model.layers.*.input_layernorm.bias" in kinds
    filled = [
        name
        for name in (wanted if parts.layout.may_lack_biases else ())
        if name not in weights and name.endswith(".bias") and re.sub(r"\d+", "*", name) not in kinds
        if not (norms_have and name == "model.norm.bias")
    ]
    for name in filled:
        weights[name] = torch.zeros(wanted[name].shape, dtype=dtype)
    if filled:
        parts.notes.append(
            f"filled with zeros: {len(filled)} biases that are not in the checkpoint, such as {filled[0]}"
        )
    for kind, names in (
        ("lacks the weight", wanted.keys() - weights.keys()),
        ("has the unexpected weight", weights.keys() - wanted.keys()),
    ):
        if names:
            raise InputError(f"the checkpoint {kind} {sorted(names)[0]} ({len(names)} in all): save the whole model")
    for name, parameter in wanted.items():
        if weights[name].shape != parameter.shape:
            shapes = f"{tuple(weights[name].shape)}, but the other weights need {tuple(parameter.shape)}"
            raise InputError(f"inconsistent shapes in the checkpoint: {name} has {shapes}")
        if not weights[name].is_floating_point():
            raise InputError(f"{name} is stored as {weights[name].dtype}: save the model in float32")
