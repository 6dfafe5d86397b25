"""Floating-point operations (FLOPs) of a model, computed from its configuration.

The usual approximation of six FLOPs per parameter ignores attention, and transformers' own count also ignores the
embeddings, including the output head: for GPT-2 small at full context that is 40% too low.

Source: Kaplan et al., "Scaling Laws for Neural Language Models" (2020), section 2.1, with a backward pass of twice the
forward pass.
"""

from hfgpt.configuration_hfgpt import HfGPTConfig


def count_matrix_parameters(config: HfGPTConfig) -> int:
    """Parameters in matrix products: the projections of all blocks and the head, but not the embeddings."""
    attention = 4 * config.hidden_size**2
    mlp = 2 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * (attention + mlp) + config.hidden_size * config.vocab_size


def training_flops_per_token(config: HfGPTConfig, length: int) -> float:
    """FLOPs per token of training on sequences of `length` tokens, forward and backward.

    Two FLOPs (multiply and add) per weight and token in the forward pass, twice that in the backward pass; attention
    scores and weighted values take `2 * length * hidden_size` each per layer and token in the forward pass. The causal
    mask is ignored, as in published figures, since not all kernels exploit it.
    """
    attention = 4 * config.num_hidden_layers * length * config.hidden_size
    return 3 * (2 * count_matrix_parameters(config) + attention)
