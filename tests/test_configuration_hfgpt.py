"""The configuration: what it refuses, the names it accepts, what it writes, and the sizes of the published models.

All checks are exact.
"""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from hfgpt import HfGPTConfig, HfGPTForCausalLM
from hfgpt.configuration_hfgpt import PRESETS

# Every GPT-2 name with our name, and a value of the right type that is not the default.
GPT2_NAMES = {
    "n_embd": ("hidden_size", 48),
    "n_layer": ("num_hidden_layers", 3),
    "n_head": ("num_attention_heads", 6),
    "n_inner": ("intermediate_size", 100),
    "n_positions": ("max_position_embeddings", 16),
    "n_ctx": ("max_position_embeddings", 16),
    "activation_function": ("hidden_act", "relu"),
    "layer_norm_epsilon": ("layer_norm_eps", 1e-6),
}
OTHER_THAN_DEFAULT = {
    "vocab_size": 99,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 100,
    "max_position_embeddings": 16,
    "hidden_act": "relu",
    "layer_norm_eps": 1e-6,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "qkv_bias": False,
    "embd_pdrop": 0.2,
    "resid_pdrop": 0.3,
    "attn_pdrop": 0,
    "use_cache": False,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": 4,
}
BOOK = {"qkv_bias": False, "tie_word_embeddings": False}


# Sizes


# Counted by hand: V C + T C + L (12 C^2 + 13 C) + 2 C for GPT-2's layout; the book's has V C more (the head) and
# 3 C L fewer (the biases).
@pytest.mark.parametrize(
    ("preset", "overrides", "count"),
    [
        ("gpt2", {}, 124_439_808),
        ("gpt2", BOOK, 163_009_536),
        ("gpt2", {"qkv_bias": False}, 124_412_160),
        ("gpt2", {"tie_word_embeddings": False}, 163_037_184),
        ("gpt2-medium", {}, 354_823_168),
        ("gpt2-medium", BOOK, 406_212_608),
        ("gpt2-large", {}, 774_030_080),
        ("gpt2-large", BOOK, 838_220_800),
        ("gpt2-xl", {}, 1_557_611_200),
        ("gpt2-xl", BOOK, 1_637_792_000),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset, overrides, count):
    config = HfGPTConfig.from_preset(preset, **overrides)
    with torch.device("meta"):
        model = HfGPTForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert model.num_parameters() == count


def test_every_preset_is_counted():
    assert list(PRESETS) == ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
    assert HfGPTConfig().to_dict() == HfGPTConfig.from_preset("gpt2").to_dict()


def test_unknown_preset_lists_the_choices():
    with pytest.raises(
        ValueError, match=r"unknown preset 'gpt3'; it must be one of gpt2, gpt2-medium, gpt2-large, gpt2-xl"
    ):
        HfGPTConfig.from_preset("gpt3")


# Invalid values


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", "64"),
        ("hidden_size", 32.0),
        ("hidden_size", True),
        ("num_hidden_layers", None),
        ("num_attention_heads", "4"),
        ("intermediate_size", 1.5),
        ("max_position_embeddings", [32]),
        ("hidden_act", 3),
        ("layer_norm_eps", "1e-5"),
        ("initializer_range", None),
        ("tie_word_embeddings", 1),
        ("qkv_bias", "yes"),
        ("embd_pdrop", "0.1"),
        ("resid_pdrop", None),
        ("attn_pdrop", True),
        ("use_cache", "no"),
        ("eos_token_id", "</s>"),
    ],
)
def test_wrong_type_is_refused_with_its_field(field, value):
    with pytest.raises(StrictDataclassError, match=f"'{field}'"):
        HfGPTConfig(**{field: value})
    config = HfGPTConfig()
    with pytest.raises(StrictDataclassError, match=f"'{field}'"):
        setattr(config, field, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_embd", "48"),
        ("n_layer", 2.0),
        ("n_head", "4"),
        ("n_inner", "100"),
        ("n_positions", None),
        ("n_ctx", "16"),
        ("activation_function", 3),
        ("layer_norm_epsilon", "1e-5"),
    ],
)
def test_wrong_type_under_a_gpt2_name_is_refused_with_its_field(name, value):
    with pytest.raises(StrictDataclassError, match=f"'{GPT2_NAMES[name][0]}'"):
        HfGPTConfig(**{name: value})


SIZES = [
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        *((field, value, rf"\b{field} is {value}") for field in SIZES for value in (0, -8)),
        ("num_attention_heads", 7, r"hidden_size 768 is not a multiple of num_attention_heads 7"),
        ("n_head", 7, r"hidden_size 768 is not a multiple of num_attention_heads 7"),
        ("n_embd", -768, r"\bhidden_size is -768"),
        *(
            (field, value, rf"\b{field} is {value}")
            for field in ("embd_pdrop", "resid_pdrop", "attn_pdrop")
            for value in (-0.1, 1, 1.5, float("nan"))
        ),
        *(
            (field, value, rf"\b{field} is {value}")
            for field in ("layer_norm_eps", "initializer_range")
            for value in (0.0, -1e-5, float("nan"))
        ),
    ],
)
def test_impossible_value_is_refused_with_its_field(field, value, message):
    with pytest.raises(StrictDataclassError, match=message):
        HfGPTConfig(**{field: value})


def test_a_value_that_became_impossible_is_refused_when_saving(tmp_path):
    config = HfGPTConfig()
    config.num_attention_heads = 7
    with pytest.raises(StrictDataclassError, match="num_attention_heads 7"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("misspelt", "nearest"),
    [
        ("hidden_sise", "hidden_size"),
        ("n_embed", "n_embd"),
        ("n_layers", "n_layer"),
        ("n_heads", "n_head"),
        ("num_hidden_layer", "num_hidden_layers"),
        ("max_position_embedding", "max_position_embeddings"),
        ("emb_pdrop", "embd_pdrop"),
        ("qkv_biass", "qkv_bias"),
        ("tie_word_embedding", "tie_word_embeddings"),
        ("layer_norm_epsilom", "layer_norm_epsilon"),
        ("usecache", "use_cache"),
    ],
)
def test_misspelt_keyword_is_refused_with_the_nearest_name(misspelt, nearest):
    with pytest.raises(ValueError, match=f"no '{misspelt}'; did you mean '{nearest}'"):
        HfGPTConfig(**{misspelt: 1})


@pytest.mark.parametrize("pair", [{"n_positions": 64, "n_ctx": 128}, {"hidden_size": 64, "n_embd": 128}])
def test_one_field_under_two_names_with_two_values_is_refused(pair):
    with pytest.raises(ValueError, match="is 64; give only one"):
        HfGPTConfig(**pair)
    same = HfGPTConfig(**dict.fromkeys(pair, 192))
    assert getattr(same, next(iter(pair))) == 192


# Names


@pytest.mark.parametrize("gpt2_name", GPT2_NAMES)
def test_gpt2_names_read_and_write_the_standard_fields(gpt2_name):
    name, value = GPT2_NAMES[gpt2_name]
    sizes = {"hidden_size": 48, "num_attention_heads": 4}  # 48 wide, so that 6 heads divide it
    sizes.pop(name, None)
    config = HfGPTConfig(**sizes, **{gpt2_name: value})
    assert getattr(config, name) == getattr(config, gpt2_name) == value
    config = HfGPTConfig()
    setattr(config, gpt2_name, value)
    assert getattr(config, name) == getattr(config, gpt2_name) == value
    assert gpt2_name not in config.to_dict()


def test_no_gpt2_name_is_missing():
    assert {gpt2_name: name for gpt2_name, (name, _) in GPT2_NAMES.items()} == HfGPTConfig.attribute_map


@pytest.mark.parametrize("width", ["hidden_size", "n_embd"])
def test_mlp_is_four_times_as_wide_unless_given(width):
    assert HfGPTConfig(**{width: 48}).intermediate_size == 192
    assert HfGPTConfig(**{width: 48, "intermediate_size": None}).intermediate_size == 192
    assert HfGPTConfig(**{width: 48, "n_inner": None}).intermediate_size == 192
    assert HfGPTConfig(**{width: 48, "n_inner": 100}).intermediate_size == 100


def test_gpt2s_own_config_json_is_understood(tmp_path):
    """The file of openai-community/gpt2 on the Hub, with sizes changed so that they differ from the defaults."""
    (tmp_path / "config.json").write_text("""{
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-06, "model_type": "gpt2", "n_ctx": 512, "n_embd": 96, "n_head": 6, "n_layer": 3,
        "n_positions": 512, "resid_pdrop": 0.1, "summary_activation": null, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": true, "summary_type": "cls_index", "summary_use_proj": true,
        "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}}, "vocab_size": 50257
    }""")
    config = HfGPTConfig.from_pretrained(tmp_path)
    expected = HfGPTConfig(
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        max_position_embeddings=512,
        hidden_act="gelu_new",
        layer_norm_eps=1e-6,
    )
    for name in OTHER_THAN_DEFAULT:
        assert getattr(config, name) == getattr(expected, name), name
    assert config.to_dict()["model_type"] == "hfgpt"


# Files


def test_every_field_is_kept_when_saving(tmp_path):
    own_fields = [name for name in HfGPTConfig.__annotations__ if not name.startswith("_")]
    assert set(OTHER_THAN_DEFAULT) == set(own_fields)
    config = HfGPTConfig(**OTHER_THAN_DEFAULT)
    for name, value in OTHER_THAN_DEFAULT.items():
        assert value != getattr(HfGPTConfig(), name), f"{name}: the default would prove nothing"
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "hfgpt"
    assert {name: written[name] for name in OTHER_THAN_DEFAULT} == OTHER_THAN_DEFAULT
    loaded = HfGPTConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in OTHER_THAN_DEFAULT} == OTHER_THAN_DEFAULT
    assert HfGPTConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_defaults_are_kept_when_saving(tmp_path):
    HfGPTConfig(n_embd=96).save_pretrained(tmp_path)
    loaded = HfGPTConfig.from_pretrained(tmp_path)
    expected = HfGPTConfig(hidden_size=96).to_dict()
    assert {name: loaded.to_dict()[name] for name in expected if name != "_name_or_path"} == {
        name: value for name, value in expected.items() if name != "_name_or_path"
    }
