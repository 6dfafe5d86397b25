"""The configuration of an hfgpt model: GPT-2's architecture with transformers' standard names.

Supports two published layouts: GPT-2's (biases in the query, key and value projections, tied embeddings) and that of
*Build a Large Language Model (From Scratch)* (`qkv_bias=False, tie_word_embeddings=False`).

This file is uploaded to the Hub with the weights, so it imports only transformers and its dependencies.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2, 2019), table 2 for the sizes.
"""

import difflib

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

PRESETS = {
    "gpt2": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "gpt2-medium": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "gpt2-large": {"hidden_size": 1280, "num_hidden_layers": 36, "num_attention_heads": 20},
    "gpt2-xl": {"hidden_size": 1600, "num_hidden_layers": 48, "num_attention_heads": 25},
}

# Options of GPT-2's configuration for which this model supports only one value.
GPT2_OPTIONS = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}

# Written into every saved config.json, so that the Auto classes find the code where hfgpt is not installed.
AUTO_MAP = {
    "AutoConfig": "configuration_hfgpt.HfGPTConfig",
    "AutoModel": "modeling_hfgpt.HfGPTModel",
    "AutoModelForCausalLM": "modeling_hfgpt.HfGPTForCausalLM",
    "AutoModelForSequenceClassification": "modeling_hfgpt.HfGPTForSequenceClassification",
}


@strict
class HfGPTConfig(PreTrainedConfig):
    r"""Architecture of an hfgpt model.

    Args:
        vocab_size: Vocabulary size.
        hidden_size: Size of the hidden states.
        num_hidden_layers: Number of transformer blocks.
        num_attention_heads: Number of attention heads; must divide `hidden_size`.
        intermediate_size: Size of the MLP's hidden layer; `None`: four times `hidden_size`.
        max_position_embeddings: Context length in tokens.
        hidden_act: Activation of the MLP, a name in `transformers.activations.ACT2FN`. It has the tanh GELU twice:
            `gelu_new`, the name in GPT-2 checkpoints, in Python, and `gelu_pytorch_tanh` as a faster kernel.
        layer_norm_eps: Epsilon of the LayerNorms.
        initializer_range: Standard deviation of the initial weights (divided by sqrt(2 * layers) for residual
            projections).
        tie_word_embeddings: Whether input and output embeddings are tied (GPT-2) or separate (the book).
        qkv_bias: Whether the query, key and value projections have biases.
        embd_pdrop: Dropout after the embeddings.
        resid_pdrop: Dropout at the end of each residual branch.
        attn_pdrop: Dropout on the attention weights.

    Raises:
        huggingface_hub.errors.StrictDataclassError: A wrong type or invalid architecture; names the field.
        ValueError: A misspelled field name, a field given by two names, or an unsupported GPT-2 option.

    Example:

    ```python
    >>> HfGPTConfig.from_preset("gpt2-medium", qkv_bias=False).hidden_size
    1024
    ```
    """

    model_type = "hfgpt"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_inner": "intermediate_size",
        "n_positions": "max_position_embeddings",
        "n_ctx": "max_position_embeddings",
        "activation_function": "hidden_act",
        "layer_norm_epsilon": "layer_norm_eps",
    }
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "embed_positions": (["position_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    max_position_embeddings: int = 1024
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    qkv_bias: bool = True
    embd_pdrop: float | int = 0.1
    resid_pdrop: float | int = 0.1
    attn_pdrop: float | int = 0.1
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        # From the config.json of a GPT-2 checkpoint: a different model type, and possibly unsupported options.
        kwargs.pop("model_type", None)
        for name, value in GPT2_OPTIONS.items():
            if (given := kwargs.pop(name, value)) != value:
                raise ValueError(f"{name} is {given}, but this model supports only {value}: load it as a GPT-2 model")
        kwargs = {key: value for key, value in kwargs.items() if not key.startswith("summary_")}
        names = [*type(self).__dataclass_fields__, *self.attribute_map, "num_labels"]
        for key in kwargs.keys() - set(names):
            # Other unknown keys are kept, as in transformers; a misspelled one would silently have no effect.
            if nearest := difflib.get_close_matches(key, names, n=1, cutoff=0.85):
                raise ValueError(f"HfGPTConfig has no '{key}'; did you mean '{nearest[0]}'?")
        # transformers would set GPT-2's names (`n_embd`) without the checks of the field, and the last one would win.
        given = {}
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                value, present = kwargs.pop(alias), given.get(name, getattr(self, name))
                if present != value and (name in given or present != type(self).__dataclass_fields__[name].default):
                    raise ValueError(f"{alias} is {value!r}, but its alias {name} is {present!r}; give only one")
                given[name] = value
                setattr(self, name, value)
        super().__post_init__(**kwargs)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size

    @classmethod
    def get_config_dict(cls, *args, **kwargs) -> tuple[dict, dict]:
        # transformers warns about the configuration of another model type; reading that of GPT-2 is intended here.
        config, kwargs = super().get_config_dict(*args, **kwargs)
        if config.get("model_type") == "gpt2":
            leftovers = ("n_ctx", "_num_labels")  # in old files; transformers ignores them too
            config = {key: value for key, value in config.items() if key not in leftovers}
            config["model_type"] = cls.model_type
        return config, kwargs

    def validate_architecture(self):
        """Checks that the model can be built; called by `@strict` at initialization and before saving."""
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        for name in (*sizes, "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        from transformers.activations import ACT2FN  # here: it imports torch

        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act is '{self.hidden_act}', which is not in transformers.activations.ACT2FN")
        for name in ("embd_pdrop", "resid_pdrop", "attn_pdrop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a dropout probability must be in [0, 1)")
        for name in ("layer_norm_eps", "initializer_range"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "HfGPTConfig":
        """The configuration of a published GPT-2 size.

        Args:
            name: `gpt2` (124M), `gpt2-medium` (355M), `gpt2-large` (774M) or `gpt2-xl` (1558M).
            overrides: Fields that differ from the preset, e.g. `qkv_bias=False, tie_word_embeddings=False` for the
                book's layout.

        Raises:
            ValueError: The preset is unknown.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset '{name}'; it must be one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})


__all__ = ["AUTO_MAP", "PRESETS", "HfGPTConfig"]
