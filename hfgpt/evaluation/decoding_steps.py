"""A step of fast generation: the logits after one token, in PyTorch for large models and in NumPy for small ones.

In a small model, calling PyTorch's operations takes longer than the computation. NumPy's take less time to call.

Shapes: C hidden size, H heads, D = C / H, S tokens attended to, V vocabulary size.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from hfgpt.errors import InputError
from hfgpt.modeling_hfgpt import MANY_WEIGHTS, HfGPTBlock, HfGPTForCausalLM, multiply_row

FEW_WEIGHTS = 2**18  # of the largest matrix in a block that is faster in NumPy: a hidden size of 256
PART = 2**13  # weights of one product: OpenBLAS divides larger ones among all threads, which is slower


def has_few_weights(*modules: nn.Module) -> bool:
    """Whether each tensor of these modules has so few weights that NumPy multiplies it faster."""
    return all(weight.numel() <= FEW_WEIGHTS for module in modules for weight in module.parameters())


class Layer(NamedTuple):
    """The weight and the bias of a linear layer."""

    weight: torch.Tensor
    bias: torch.Tensor | None


def read_layer(*layers: nn.Linear) -> Layer:
    """The weights of a layer, or copies of those of several that have the same input, joined."""
    if len(layers) == 1:
        return Layer(layers[0].weight, layers[0].bias)
    biases = [layer.bias for layer in layers]
    return Layer(torch.cat([layer.weight for layer in layers]), None if biases[0] is None else torch.cat(biases))


class Norm(NamedTuple):
    """The arguments of `torch.layer_norm` after the first."""

    shape: tuple[int, ...]
    weight: torch.Tensor
    bias: torch.Tensor
    eps: float


def read_norm(norm: nn.LayerNorm) -> Norm:
    """What a norm computes with."""
    return Norm(norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def halve(layer: Layer) -> Layer:
    """The layer with its weight in float16.

    Raises:
        InputError: A weight is too large for float16.
    """
    if not (weight := layer.weight.half()).isfinite().all():
        raise InputError("a weight is too large for float16: use half=False, or omit --fast")
    return Layer(weight, layer.bias)


def multiply(row: torch.Tensor, layer: Layer) -> torch.Tensor:
    """The product of a row (1, in) and a linear layer."""
    if layer.weight.dtype == torch.float16:
        output = functional.linear(row.half(), layer.weight).float()
        return output if layer.bias is None else output.add_(layer.bias)
    if layer.weight.numel() >= MANY_WEIGHTS:
        return multiply_row(row, *layer)
    return functional.linear(row, *layer)


class LargeStep:
    """A step in PyTorch.

    Args:
        model: Its weights are used.
        half: Whether to copy those of its matrices to float16.

    Raises:
        InputError: A weight is too large for float16.
    """

    def __init__(self, model: HfGPTForCausalLM, half: bool):
        base = model.model
        self.embeddings, self.positions = base.embed_tokens.weight, base.embed_positions.weight
        self.blocks = [LargeBlock(block, half) for block in base.layers]
        self.norm = read_norm(base.norm)
        self.head = LargeHead(model.lm_head, half)

    def __call__(self, token: int, index: int, caches: list[torch.Tensor]) -> torch.Tensor:
        """The logits (1, V) after a token.

        Args:
            token: Its id.
            index: Its position.
            caches: Keys and values (2, H, size, D) of each block, to which those of the token are added.

        Raises:
            InputError: A value is too large for float16.
        """
        with torch.inference_mode():
            hidden = (self.embeddings[token] + self.positions[index]).unsqueeze(0)  # (1, C)
            for block, cache in zip(self.blocks, caches, strict=True):
                hidden = block(hidden, index, cache)
            logits = self.head(torch.layer_norm(hidden, *self.norm))
        return logits.clone()  # outside of inference mode, a tensor like any other


class LargeBlock:
    """A block in PyTorch; for the arguments see `LargeStep`."""

    def __init__(self, block: HfGPTBlock, half: bool):
        attention, mlp = block.self_attn, block.mlp
        self.num_heads, self.scaling = attention.config.num_attention_heads, attention.scaling
        self.input_norm, self.norm = read_norm(block.input_layernorm), read_norm(block.post_attention_layernorm)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        # Only copies are joined.
        layers = [read_layer(*projections)] if half else [read_layer(projection) for projection in projections]
        layers += [read_layer(layer) for layer in (attention.o_proj, mlp.up_proj, mlp.down_proj)]
        *self.projections, self.output, self.up, self.down = [halve(layer) for layer in layers] if half else layers
        self.activation = mlp.act_fn.forward

    def __call__(self, hidden: torch.Tensor, index: int, cache: torch.Tensor) -> torch.Tensor:
        """The hidden state (1, C) after this block."""
        normed = torch.layer_norm(hidden, *self.input_norm)
        projected = torch.cat([multiply(normed, layer) for layer in self.projections], dim=1)
        projected = projected.view(3, self.num_heads, 1, -1)
        cache.narrow(2, index, 1).copy_(projected.narrow(0, 1, 2))
        keys, values = cache.narrow(2, 0, index + 1).split(1)  # (1, H, S, D)
        queries = projected.narrow(0, 0, 1)
        attended = functional.scaled_dot_product_attention(queries, keys, values, scale=self.scaling)
        hidden = hidden + multiply(attended.view(1, -1), self.output)
        normed = torch.layer_norm(hidden, *self.norm)
        return hidden + multiply(self.activation(multiply(normed, self.up)), self.down)


class LargeHead:
    """The head in PyTorch; for the arguments see `LargeStep`."""

    def __init__(self, head: nn.Linear, half: bool):
        self.layer, self.center = read_layer(head), None
        if half:
            # All logits together can be far from zero, where float16 is coarse.
            self.center = head.weight.mean(dim=0)
            self.layer = halve(Layer(head.weight - self.center, None))

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits (1, V) of a hidden state (1, C)."""
        logits = multiply(hidden, self.layer)
        if self.center is not None:
            logits += hidden @ self.center
            if not logits.isfinite().all():
                raise InputError("a value became too large for float16: use half=False, or omit --fast")
        return logits


class SmallStep:
    """A step in NumPy, of a model whose blocks have few weights.

    Args:
        model: A model in float32 on the CPU.
        half: Whether to copy the head's weights to float16, if they are many.

    Raises:
        InputError: A weight of the head is too large for float16.
    """

    def __init__(self, model: HfGPTForCausalLM, half: bool):
        base, head = model.model, model.lm_head
        self.embeddings, self.positions = (
            embedding.weight.detach().numpy() for embedding in (base.embed_tokens, base.embed_positions)
        )
        self.blocks = [SmallBlock(block) for block in base.layers]
        self.norm = SmallNorm(base.norm)
        self.head = SmallLinear(head) if has_few_weights(head) else LargeHead(head, half)

    @np.errstate(all="ignore")  # PyTorch does not warn of overflow and NaN either
    def __call__(self, token: int, index: int, caches: list[torch.Tensor]) -> torch.Tensor:
        """As `LargeStep.__call__`."""
        row = self.embeddings[token] + self.positions[index]  # (C)
        for block, cache in zip(self.blocks, caches, strict=True):
            row = block(row, index, cache.numpy())
        row = self.norm(row)
        if isinstance(self.head, LargeHead):
            return self.head(torch.from_numpy(row).unsqueeze(0))
        return torch.from_numpy(self.head(row)).unsqueeze(0)


class SmallBlock:
    """A block in NumPy."""

    def __init__(self, block: HfGPTBlock):
        attention, mlp = block.self_attn, block.mlp
        self.num_heads, self.scaling = attention.config.num_attention_heads, attention.scaling
        self.input_norm, self.norm = SmallNorm(block.input_layernorm), SmallNorm(block.post_attention_layernorm)
        self.projections = SmallLinear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.output, self.up, self.down = (
            SmallLinear(layer) for layer in (attention.o_proj, mlp.up_proj, mlp.down_proj)
        )
        self.activation = mlp.act_fn.forward

    def __call__(self, row: np.ndarray, index: int, cache: np.ndarray) -> np.ndarray:
        """The hidden state (C) after this block."""
        projected = self.projections(self.input_norm(row)).reshape(3, self.num_heads, -1)
        cache[:, :, index] = projected[1:]
        keys, values = cache[:, :, : index + 1]  # (H, S, D)
        scores = np.matmul(keys, (projected[0] * self.scaling)[:, :, np.newaxis])  # (H, S, 1)
        weights = np.exp(scores - np.maximum.reduce(scores, axis=1, keepdims=True))
        totals = np.add.reduce(weights, axis=1, keepdims=True)  # faster than `sum`, a Python function around it
        attended = np.matmul(weights.transpose(0, 2, 1), values) / totals  # (H, 1, D)
        row = row + self.output(attended.reshape(-1))
        activations = self.activation(torch.from_numpy(self.up(self.norm(row)))).numpy()
        return row + self.down(activations)


class SmallLinear:
    """Linear layers that have the same input, joined, in NumPy."""

    def __init__(self, *layers: nn.Linear):
        weight, self.bias = (None if tensor is None else tensor.detach().numpy() for tensor in read_layer(*layers))
        self.size, inputs = weight.shape
        parts = math.ceil(self.size / max(PART // inputs, 1))
        rows = math.ceil(self.size / parts)
        if padding := parts * rows - self.size:
            weight = np.concatenate([weight, np.zeros((padding, inputs), weight.dtype)])
        self.parts = weight.reshape(parts, rows, inputs)

    def __call__(self, row: np.ndarray) -> np.ndarray:
        """The product (out) of a row (in)."""
        output = np.matmul(self.parts, row).reshape(-1)[: self.size]
        if self.bias is not None:
            output += self.bias
        return output


class SmallNorm:
    """A LayerNorm in NumPy."""

    def __init__(self, norm: nn.LayerNorm):
        self.weight, self.bias, self.eps = norm.weight.detach().numpy(), norm.bias.detach().numpy(), norm.eps
        self.shares = np.full_like(self.weight, 1 / len(self.weight))

    def __call__(self, row: np.ndarray) -> np.ndarray:
        """The normalized row (C)."""
        row = row - row.dot(self.shares)
        row /= math.sqrt(row.dot(row) / len(row) + self.eps)
        row *= self.weight
        row += self.bias
        return row
