"""Prepares a checkpoint for conversion: the resulting hfgpt model, and a function for the original logits."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from rich.progress import track
from transformers import PreTrainedConfig, PreTrainedModel

from hfgpt.configuration_hfgpt import HfGPTConfig
from hfgpt.conversion import book, gpt2, nanogpt
from hfgpt.conversion.assembly import Parts, build_native_on_meta, build_on_meta, complete_weights, load_whole
from hfgpt.conversion.checkpoints import Checkpoint, is_classifier
from hfgpt.conversion.layouts import WRAPPERS, Layout, strip_wrappers
from hfgpt.conversion.parity import ComputeLogits, compute_with
from hfgpt.conversion.reference import book_logits
from hfgpt.errors import InputError

LAYOUTS = {layout.name: layout for layout in (gpt2.LAYOUT, nanogpt.LAYOUT, book.LAYOUT)}
LARGE = 100_000_000  # parameters; smaller models do not need a progress bar


@dataclass
class ImportArguments:
    """Settings of `hfgpt import` that are missing from the checkpoint, or differ from it.

    Args:
        format: `gpt2`, `nanogpt`, `book`, or `auto` to detect it from the keys.
        num_heads: Number of attention heads, if the file does not have it.
        tokenizer: Tokenizer (see `load_tokenizer`), or nanoGPT's meta.pkl; None: look next to the weights.
        vocab_size: Number of embedding rows to keep; None: those that have a token.
        lora_scale: Factor of the LoRA updates in the book's code.
        hidden_act: Activation, if it is not the format's default.
        revision: Branch, tag or commit on the Hub.
    """

    format: str = "auto"
    num_heads: int | None = None
    tokenizer: str | None = None
    vocab_size: int | None = None
    lora_scale: float | None = None
    hidden_act: str | None = None
    revision: str | None = None

    def __post_init__(self):
        if self.format not in ("auto", *LAYOUTS):
            raise InputError(f"--format is '{self.format}'; it must be one of auto, {', '.join(LAYOUTS)}")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise InputError(f"--vocab-size is {self.vocab_size}; it must be at least 1")
        if self.lora_scale is not None and not math.isfinite(self.lora_scale):
            raise InputError(f"--lora-scale is {self.lora_scale}; it must be finite")


@dataclass
class Source:
    """A checkpoint that is ready for conversion.

    Args:
        format: Layout of its weights.
        config: Configuration of the resulting model; for a GPT-2 in transformers' format, that of the source.
        parameters: Number of parameters of the source, tied ones counted once.
        reference: Computes the logits of the source, with transformers' GPT-2 or the reference implementation.
        load: Returns the resulting model.
        notes: Weights that were filled, dropped, tied, cut or merged.
        recomputed: Whether weights were recomputed, and therefore rounded, instead of only rearranged.
    """

    format: str
    config: PreTrainedConfig
    parameters: int
    reference: ComputeLogits
    load: Callable[[], PreTrainedModel]
    notes: list[str] = field(default_factory=list)
    recomputed: bool = False


def open_weights(
    checkpoint: Checkpoint, arguments: ImportArguments, tokens: int | None, special: dict[str, int | None]
) -> Source:
    """Prepares the conversion of a state dict.

    Args:
        checkpoint: The content of the file.
        arguments: The user's settings.
        tokens: Size of the tokenizer's vocabulary; None if there is no tokenizer.
        special: The tokenizer's `bos_token_id`, `eos_token_id` and `pad_token_id`.

    Raises:
        InputError: The weights are of another kind of model, incomplete, or do not fit the tokenizer.
    """
    weights = strip_wrappers(checkpoint.weights)
    layout = choose_layout(weights, arguments.format)
    merged, adapted = book.merge_lora(weights, arguments.lora_scale) if layout is book.LAYOUT else (weights, 0)
    if arguments.lora_scale is not None and not adapted:
        raise InputError("the checkpoint has no LoRA layers: leave out --lora-scale")
    known_heads = nanogpt.num_heads_of(checkpoint.model_args)
    if known_heads is not None and arguments.num_heads not in (None, known_heads):
        raise InputError(f"--num-heads is {arguments.num_heads}, but the checkpoint has {known_heads}: leave it out")
    dropped = [key for key in merged if not layout.find(key)]
    parts = Parts(
        layout.view(merged),
        layout,
        arguments.num_heads if known_heads is None else known_heads,
        arguments.hidden_act or layout.hidden_act,
        checkpoint.model_args.get("dropout"),
        tokens if arguments.vocab_size is None else arguments.vocab_size,
        arguments.vocab_size is not None or arguments.tokenizer is not None,
        special,
    )
    parameters = sum(tensor.numel() for tensor in parts.weights.values())
    head = parts.weights.get("lm_head.weight")
    if adapted:
        parts.recomputed = True
        parts.notes.append(f"merged: {adapted} LoRA layers, scaled by {arguments.lora_scale:g}")
    if dropped:
        parts.notes.append(f"dropped: {len(dropped)} buffers that are not weights, such as {dropped[0]}")
    parts.notes.append(
        f"assumed, since not in the file: activation {parts.hidden_act} (--hidden-act), LayerNorm epsilon 1e-5"
    )
    config = complete_weights(parts)
    if head is not None and config.tie_word_embeddings and "score.weight" not in parts.weights:
        parameters -= head.numel()

    reference = _reference(layout, weights, config, arguments.lora_scale)
    load = functools.partial(_copy_into_model, config, parts)
    return Source(layout.name, config, parameters, reference, load, parts.notes, parts.recomputed)


def _copy_into_model(config: HfGPTConfig, parts: Parts) -> PreTrainedModel:
    model = build_on_meta(config)
    # The widest dtype in the file; recomputed weights are kept in float32 or wider.
    dtypes = {tensor.dtype for tensor in parts.weights.values()} | ({torch.float32} if parts.recomputed else set())
    dtype = functools.reduce(torch.promote_types, dtypes)
    is_small = model.num_parameters() < LARGE
    tensors = track(parts.weights.items(), "copying weights", disable=is_small, transient=True)
    # Copied one at a time: until here, the tensors are views of the file, some of the same tensor.
    copied = {name: tensor.to(dtype).clone(memory_format=torch.contiguous_format) for name, tensor in tensors}
    return load_whole(model, copied)


def choose_layout(weights: Mapping[str, torch.Tensor], name: str) -> Layout:
    """The layout that the user named, or the one that matches the keys and shapes.

    Raises:
        InputError: The keys do not match it; names some of them.
    """
    without_lora = [key.replace(".linear.", ".") for key in weights if ".lora." not in key]
    # In reverse order, since GPT-2 has all names of nanoGPT; the orientation of the matrices distinguishes them.
    nearest = min(reversed(LAYOUTS.values()), key=lambda layout: len(layout.misfits(without_lora)))
    layout = LAYOUTS.get(name, nearest)
    if name == "auto" and layout is nanogpt.LAYOUT:
        fused = next((tensor for key, tensor in weights.items() if key.endswith("attn.c_attn.weight")), None)
        if fused is not None and fused.ndim == 2 and fused.shape[1] == 3 * fused.shape[0]:
            layout = gpt2.LAYOUT
    layout.check(without_lora if layout is book.LAYOUT else weights)
    return layout


def _reference(
    layout: Layout, weights: Mapping[str, torch.Tensor], config: HfGPTConfig, lora_scale: float | None
) -> ComputeLogits:
    """A function for the checkpoint's logits: (B, T, V) for the tokens that are kept, (B, labels) for a classifier."""
    classifies = is_classifier(config)
    if layout is not book.LAYOUT:
        compute = compute_with(_native_gpt2(layout, weights, config))
    else:

        def compute(input_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            logits = book_logits(weights, config, lora_scale, input_ids, dtype)
            return logits[:, -1] if classifies else logits

    size = config.num_labels if classifies else config.vocab_size
    return lambda input_ids, dtype: compute(input_ids, dtype)[..., :size]


def _native_gpt2(layout: Layout, weights: Mapping[str, torch.Tensor], config: HfGPTConfig) -> PreTrainedModel:
    """transformers' GPT-2 with the unconverted tensors of a GPT-2 or nanoGPT checkpoint."""
    native = build_native_on_meta(config, vocab_size=len(weights["wte.weight"]))
    theirs = {}
    for name, parameter in native.named_parameters():
        tensor = weights.get(WRAPPERS.sub("", name))
        if tensor is None:
            tensor = torch.zeros(parameter.shape)  # a bias that this nanoGPT model does not have
        elif layout is nanogpt.LAYOUT and ".c_" in name and name.endswith("weight"):
            tensor = tensor.T  # plain linear layers
        theirs[name] = tensor
    return load_whole(native, theirs)
