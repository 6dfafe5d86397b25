"""What several test files share."""

import pytest


@pytest.fixture(scope="session")
def tiny_config():
    """Builds configurations of models that run in a millisecond.

    No dropout, so that results can be compared. Weights ten times GPT-2's: with its 0.02 the attention of so narrow a
    model is all but uniform, and a wrong mask or position would hardly show.
    """

    def build(**overrides):
        from hfgpt import HfGPTConfig

        defaults = {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            "initializer_range": 0.2,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        return HfGPTConfig(**{**defaults, **overrides})

    return build
