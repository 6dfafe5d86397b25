"""Other people's models, written out over their own names, so that a conversion has something to be compared with.

Each function computes logits from the tensors of a checkpoint as they were read, and shares no table with the
conversion: an exchanged or a transposed weight there is a difference here.

Shapes: B rows, T tokens, C width, H heads, D = C / H, V vocabulary.
"""

from collections.abc import Callable, Mapping

import torch
from torch.nn.functional import embedding, layer_norm, linear, scaled_dot_product_attention
from transformers.activations import ACT2FN

from hfgpt.configuration_hfgpt import HfGPTConfig

Weights = Callable[[str], torch.Tensor | None]  # a tensor by its name in the file; None where there is none


def read_as(weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Weights:
    """The tensors of a checkpoint by name, each converted when it is asked for, so that no second copy is held."""
    return lambda name: weights[name].to(dtype) if name in weights else None


def nanogpt_logits(get: Weights, input_ids: torch.Tensor, config: HfGPTConfig) -> torch.Tensor:
    """Logits (B, T, V) of nanoGPT's model, from the names of its state dict without `transformer.`.

    Source: karpathy/nanoGPT, model.py.
    """
    hidden = get("wte.weight")[input_ids] + get("wpe.weight")[: input_ids.shape[1]]  # (B, T, C)
    width, activation = config.hidden_size, ACT2FN[config.hidden_act]
    for number in range(config.num_hidden_layers):
        block = f"h.{number}."
        normed = layer_norm(hidden, (width,), get(block + "ln_1.weight"), get(block + "ln_1.bias"))
        fused = linear(normed, get(block + "attn.c_attn.weight"), get(block + "attn.c_attn.bias"))  # (B, T, 3C)
        attended = _attend(*fused.split(width, dim=-1), config.num_attention_heads)
        hidden = hidden + linear(attended, get(block + "attn.c_proj.weight"), get(block + "attn.c_proj.bias"))
        normed = layer_norm(hidden, (width,), get(block + "ln_2.weight"), get(block + "ln_2.bias"))
        inner = linear(normed, get(block + "mlp.c_fc.weight"), get(block + "mlp.c_fc.bias"))
        hidden = hidden + linear(activation(inner), get(block + "mlp.c_proj.weight"), get(block + "mlp.c_proj.bias"))
    normed = layer_norm(hidden, (width,), get("ln_f.weight"), get("ln_f.bias"))
    head = get("lm_head.weight")
    return linear(normed, get("wte.weight") if head is None else head)


def book_logits(
    get: Weights, input_ids: torch.Tensor, config: HfGPTConfig, lora_scale: float | None = None
) -> torch.Tensor:
    """Logits (B, T, V) of the book's model, from the names of its state dict.

    Source: Raschka, *Build a Large Language Model (From Scratch)*, chapters 3 to 5 and appendix E.
    """

    def project(name: str, x: torch.Tensor) -> torch.Tensor:
        if get(f"{name}.lora.A") is None:
            return linear(x, get(f"{name}.weight"), get(f"{name}.bias"))
        adapted = x @ get(f"{name}.lora.A") @ get(f"{name}.lora.B")
        return linear(x, get(f"{name}.linear.weight"), get(f"{name}.linear.bias")) + lora_scale * adapted

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        if get(f"{name}.scale") is None:  # the faster variant
            return layer_norm(x, x.shape[-1:], get(f"{name}.weight"), get(f"{name}.bias"))
        centered = x - x.mean(-1, keepdim=True)
        variance = x.var(-1, keepdim=True, unbiased=False)
        return get(f"{name}.scale") * centered / torch.sqrt(variance + 1e-5) + get(f"{name}.shift")

    hidden = embedding(input_ids, get("tok_emb.weight")) + get("pos_emb.weight")[: input_ids.shape[1]]
    for number in range(config.num_hidden_layers):
        block = f"trf_blocks.{number}"
        normed = norm(f"{block}.norm1", hidden)
        if get(f"{block}.att.qkv.weight") is None:
            parts = [project(f"{block}.att.W_{part}", normed) for part in ("query", "key", "value")]
            output = f"{block}.att.out_proj"
        else:
            parts = project(f"{block}.att.qkv", normed).chunk(3, dim=-1)
            output = f"{block}.att.proj"
        hidden = hidden + project(output, _attend(*parts, config.num_attention_heads))
        inner = project(f"{block}.ff.layers.0", norm(f"{block}.norm2", hidden))
        hidden = hidden + project(f"{block}.ff.layers.2", ACT2FN[config.hidden_act](inner))
    normed = norm("final_norm", hidden)
    if get("out_head.weight") is None and get("out_head.linear.weight") is None:  # tied, and saved once
        return linear(normed, get("tok_emb.weight"))
    return project("out_head", normed)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Causal attention over H heads: (B, T, C) each in, (B, T, C) out."""
    heads = [part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in (query, key, value)]  # (B, H, T, D)
    return scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(-2)
