"""Floating-point operations of a model, counted from its configuration.

The common shortcut of six operations a parameter leaves out attention, and transformers' own count leaves out the
embeddings too, one of which is the output head: for GPT-2 small at its full context that is 40 % too little.

Source: Kaplan et al., "Scaling Laws for Neural Language Models" (2020), section 2.1, with the backward pass taken as
twice the forward pass.
"""

from hfgpt.configuration_hfgpt import HfGPTConfig


def count_matrix_parameters(config: HfGPTConfig) -> int:
    """Weights that every token is multiplied by: the projections of all blocks and the head, not the embeddings."""
    attention = 4 * config.hidden_size**2
    mlp = 2 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * (attention + mlp) + config.hidden_size * config.vocab_size


def training_flops_per_token(config: HfGPTConfig, length: int) -> float:
    """Operations to train on one token of a sequence of `length` tokens, forward and backward.

    Two operations (a product and a sum) a weight and token forward, twice that backward; attention scores and mixing
    cost `2 * length * hidden_size` each a layer and token, forward. Causality is not credited: kernels may or may not
    use it, and the field's published figures do not.
    """
    attention = 4 * config.num_hidden_layers * length * config.hidden_size
    return 3 * (2 * count_matrix_parameters(config) + attention)
