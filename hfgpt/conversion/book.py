"""The layout of the book's model: custom LayerNorm, separate query, key and value matrices, untied output head.

Source: Raschka, *Build a Large Language Model (From Scratch)*, chapters 3 to 6 and appendix E.
"""

from collections.abc import Mapping

import torch

from hfgpt.conversion.gpt2 import QKV
from hfgpt.conversion.layouts import Layout
from hfgpt.errors import InputError

LAYOUT = Layout(
    "book",
    {
        "tok_emb": ("model.embed_tokens",),
        "pos_emb": ("model.embed_positions",),
        "trf_blocks.*.norm1": ("model.layers.*.input_layernorm",),
        "trf_blocks.*.att.W_query": ("model.layers.*.self_attn.q_proj",),
        "trf_blocks.*.att.W_key": ("model.layers.*.self_attn.k_proj",),
        "trf_blocks.*.att.W_value": ("model.layers.*.self_attn.v_proj",),
        "trf_blocks.*.att.out_proj": ("model.layers.*.self_attn.o_proj",),
        "trf_blocks.*.att.qkv": QKV,  # this and the next: the faster variant, with PyTorch's LayerNorm
        "trf_blocks.*.att.proj": ("model.layers.*.self_attn.o_proj",),
        "trf_blocks.*.norm2": ("model.layers.*.post_attention_layernorm",),
        "trf_blocks.*.ff.layers.0": ("model.layers.*.mlp.up_proj",),
        "trf_blocks.*.ff.layers.2": ("model.layers.*.mlp.down_proj",),
        "final_norm": ("model.norm",),
        "out_head": ("lm_head",),
    },
    "gelu_pytorch_tanh",
    parameters={"weight": "weight", "bias": "bias", "scale": "weight", "shift": "bias"},
    ignored=r"\.att\.(mask|cache_k|cache_v)$",
    may_classify=True,
)


def merge_lora(weights: Mapping[str, torch.Tensor], scale: float | None) -> tuple[dict[str, torch.Tensor], int]:
    """Merges the LoRA updates of appendix E into their matrices.

    Args:
        weights: A state dict, in which a LoRA layer has `.linear.weight`, `.lora.A` (in, r) and `.lora.B` (r, out).
        scale: Factor of the updates: `alpha` in the printed book's code, `alpha / rank` in later versions.

    Returns:
        The weights of an ordinary model, and the number of merged matrices.

    Raises:
        InputError: There are updates but no scale, or a part of one is missing or has the wrong shape.
    """
    names = sorted({key.rsplit(".lora.", 1)[0] for key in weights if ".lora." in key})
    if not names:
        return dict(weights), 0
    merged = {key.replace(".linear.", "."): tensor for key, tensor in weights.items() if ".lora." not in key}
    for name in names:
        parts = [weights.get(f"{name}.{part}") for part in ("linear.weight", "lora.A", "lora.B")]
        if any(part is None or part.ndim != 2 for part in parts):
            raise InputError(f"the LoRA layer {name} is incomplete: it needs linear.weight, lora.A and lora.B")
        matrix, down, up = parts
        if scale is None:
            raise InputError(
                f"scale of the {len(names)} LoRA layers of rank {len(up)} unknown: pass --lora-scale (alpha in the "
                "printed book's code, alpha / rank in later versions)"
            )
        if (up.shape[1], down.shape[0]) != tuple(matrix.shape) or down.shape[1] != up.shape[0]:
            raise InputError(f"the LoRA layer {name} has inconsistent shapes {[tuple(part.shape) for part in parts]}")
        # In double precision, so that the sum is rounded only once, to float32 or wider.
        total = matrix.double() + scale * (down.double() @ up.double()).T
        merged[f"{name}.weight"] = total.to(torch.promote_types(matrix.dtype, torch.float32))
    return merged, len(names)


def fold_head_bias(norm_bias: torch.Tensor, head: torch.Tensor, head_bias: torch.Tensor) -> torch.Tensor:
    """The final norm's bias with which a head without a bias computes the same logits.

    The classifier of chapter 6 has a bias, those of hfgpt and GPT-2 do not: head @ (norm_bias + d) equals
    head @ norm_bias + head_bias for the smallest such d.

    Args:
        norm_bias: (C).
        head: (labels, C).
        head_bias: (labels).

    Raises:
        InputError: There is no such bias, because the rows of the head are linearly dependent.
    """
    head, head_bias = head.double(), head_bias.double()
    shift = torch.linalg.lstsq(head, head_bias[:, None], driver="gelsd").solution[:, 0]
    if not torch.allclose(head @ shift, head_bias, rtol=0, atol=1e-9 * (1 + head_bias.abs().max().item())):
        raise InputError("the classifier's bias cannot be folded into the final norm: its rows are linearly dependent")
    return (norm_bias.double() + shift).to(torch.promote_types(norm_bias.dtype, torch.float32))
