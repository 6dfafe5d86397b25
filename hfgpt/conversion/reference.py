"""Reference implementation of the book's model with its own weight names, to compare conversions with.

It computes logits directly from the tensors of a checkpoint and shares no code with the conversion, so that swapped or
transposed weights show up as a difference. GPT-2 and nanoGPT are compared with transformers' GPT-2.

Shapes: B rows, T tokens, C width, H heads, D = C / H, V vocabulary.
"""

from collections.abc import Mapping

import torch
from torch.nn.functional import embedding, layer_norm, linear, scaled_dot_product_attention
from transformers.activations import ACT2FN

from hfgpt.configuration_hfgpt import HfGPTConfig


def book_logits(
    weights: Mapping[str, torch.Tensor],
    config: HfGPTConfig,
    lora_scale: float | None,
    input_ids: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Logits (B, T, V) of the book's model, from its state dict.

    Source: Raschka, *Build a Large Language Model (From Scratch)*, chapters 3 to 5 and appendix E.
    """

    def get(name: str) -> torch.Tensor | None:
        # Cast on demand, to avoid a second copy of all weights.
        return weights[name].to(dtype) if name in weights else None

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
    if get("out_head.weight") is None and get("out_head.linear.weight") is None:  # tied and saved once
        return linear(normed, get("tok_emb.weight"))
    return project("out_head", normed)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Causal attention with H heads; inputs and output are (B, T, C)."""
    heads = [part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in (query, key, value)]  # (B, H, T, D)
    return scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(-2)
