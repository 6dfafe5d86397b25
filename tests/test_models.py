"""Models from arguments, folders and Hub ids: built as requested, loaded strictly, or refused in one line.

Weights are compared exactly. Only the spread of random weights has a tolerance, which is explained there.
"""

import builtins
import contextlib
import json
import os
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.utils import logging

from hfgpt import HfGPTConfig, HfGPTForCausalLM, models
from hfgpt.building import ModelArguments, build_config, build_model
from hfgpt.errors import InputError
from hfgpt.models import (
    check_model_path,
    check_vocabulary,
    find_changed_weights,
    find_model,
    load_model,
    load_model_tokenizer,
    quiet_bars,
)
from hfgpt.saving import hash_file, write_checksums
from hfgpt.tokenizer import load_tokenizer, train_tokenizer

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
WEIGHTS = "model.safetensors"


def load_model_config(path, revision=None):
    return find_model(path, revision).config


@pytest.fixture(scope="module")
def tokenizer():
    """26 letters and 3 special tokens."""
    tokenizer = train_tokenizer(["abcdefghijklmnopqrstuvwxyz"], kind="char")
    assert len(tokenizer) == 29
    return tokenizer


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory) -> Path:
    """A saved model and its tokenizer. Tests must not change them."""
    folder = tmp_path_factory.mktemp("saved")
    build(tokenizer, seed=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """A copy that a test may damage."""
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def build(tokenizer, seed=0, **arguments):
    torch.manual_seed(seed)
    return build_model(ModelArguments(**{**SMALL, **arguments}), tokenizer)


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(InputError) as error:
        call(*arguments, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


def assert_same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# New models


def test_every_field_reaches_the_configuration(tokenizer):
    values = {
        "vocab_size": 29,
        "hidden_size": 36,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 77,
        "max_position_embeddings": 5,
        "hidden_act": "relu",
        "layer_norm_eps": 1e-3,
        "initializer_range": 0.5,
        "tie_word_embeddings": False,
        "qkv_bias": False,
        "embd_pdrop": 0.25,
        "resid_pdrop": 0.5,
        "attn_pdrop": 0.75,
    }
    elsewhere = {"path", "revision", "preset", "initialization", "attn_implementation", "pad_vocab_to_multiple_of"}
    elsewhere.add("load_in_4bit")
    assert values.keys() | elsewhere == {field.name for field in fields(ModelArguments)}
    config = build_config(ModelArguments(**values), tokenizer)
    assert {name: getattr(config, name) for name in values} == values
    default = build_config(ModelArguments(preset="gpt2"), tokenizer)
    for name in values.keys() - {"vocab_size"}:
        assert getattr(default, name) == getattr(HfGPTConfig(), name) != values[name]


def test_vocabulary_and_special_tokens_are_those_of_the_tokenizer(tokenizer):
    config = build_config(ModelArguments(), tokenizer)
    assert config.vocab_size == 29
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 0, 1)
    unpadded = train_tokenizer(["abc"], kind="char", pad_token=None)
    assert build_config(ModelArguments(), unpadded).pad_token_id is None


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [
        (None, (128, 4, 4)),
        ("gpt2", (768, 12, 12)),
        ("gpt2-medium", (1024, 24, 16)),
        ("gpt2-large", (1280, 36, 20)),
        ("gpt2-xl", (1600, 48, 25)),
    ],
)
def test_presets(preset, sizes, tokenizer):
    config = build_config(ModelArguments(preset=preset, qkv_bias=False), tokenizer)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == sizes
    assert config.intermediate_size == 4 * sizes[0]
    assert not config.qkv_bias


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ({}, (128, 4, 4, 256)),
        ({"hidden_size": 32}, (32, 4, 1, 256)),
        ({"hidden_size": 50}, (50, 4, 1, 256)),
        ({"hidden_size": 100}, (100, 4, 2, 256)),
        ({"hidden_size": 384, "num_hidden_layers": 6}, (384, 6, 6, 256)),
        ({"hidden_size": 768, "num_hidden_layers": 12, "max_position_embeddings": 1024}, (768, 12, 12, 1024)),
        ({"num_attention_heads": 8}, (128, 4, 8, 256)),
        ({"preset": "gpt2"}, (768, 12, 12, 1024)),
        ({"preset": "gpt2", "hidden_size": 384}, (384, 12, 12, 1024)),
    ],
)
def test_a_new_model_is_small_unless_a_size_is_set(given, sizes, tokenizer):
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    config = build_config(ModelArguments(**given), tokenizer)
    assert tuple(getattr(config, name) for name in names) == sizes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "gpt3"}, "model.preset is 'gpt3'; it must be one of gpt2, gpt2-medium, gpt2-large, gpt2-xl"),
        ({"num_attention_heads": 5}, "model: hidden_size 32 is not a multiple of num_attention_heads 5"),
        ({"hidden_size": 0}, "model: hidden_size is 0; it must be at least 1"),
        ({"embd_pdrop": 1.0}, "model: embd_pdrop is 1.0; a dropout probability must be in [0, 1)"),
        ({"hidden_act": "gleu"}, "model.hidden_act is 'gleu', which transformers does not have; did you mean 'gelu'?"),
        ({"initialization": "xavier"}, "model.initialization is 'xavier'; it must be 'gpt2' or 'torch'"),
        ({"pad_vocab_to_multiple_of": 0}, "model.pad_vocab_to_multiple_of is 0; it must be at least 1"),
        (
            {"vocab_size": 28},
            "model.vocab_size is 28, but the tokenizer has ids up to 28: set it to 29, or unset it",
        ),
        (
            {"vocab_size": 30},
            "model.vocab_size is 30, but the tokenizer has only 29 tokens, so the extra ids would never be produced: "
            "unset it, or set model.pad_vocab_to_multiple_of to round it up for speed",
        ),
        (
            {"path": "nowhere", "qkv_bias": True},
            "model.path determines the architecture and weights: remove model.hidden_size, "
            "model.num_hidden_layers, model.num_attention_heads, model.max_position_embeddings, model.qkv_bias",
        ),
    ],
)
def test_impossible_models_are_refused(arguments, message, tokenizer):
    assert refusal(build, tokenizer, **arguments) == message


def test_a_model_too_large_for_any_machine_is_refused_before_it_is_built(tokenizer):
    with pytest.raises(InputError, match=r"model.num_hidden_layers is 1,000,000,000; the limit is 1,000"):
        ModelArguments(num_hidden_layers=10**9)
    message = refusal(build, tokenizer, hidden_size=2**30)
    assert re.fullmatch(
        r"the model's weights take at least [\d,]+ GB in float32, but this machine has [\d,]+ GB of memory: lower "
        r"model.hidden_size, num_hidden_layers or max_position_embeddings",
        message,
    )


@pytest.mark.parametrize(
    ("name", "value"), [("preset", "gpt2"), ("initialization", "torch"), ("pad_vocab_to_multiple_of", 64)]
)
def test_options_for_new_models_are_refused_for_loaded_ones(name, value):
    with pytest.raises(InputError) as error:
        ModelArguments(path="x", embd_pdrop=0.1, **{name: value})
    assert str(error.value) == f"model.path determines the architecture and weights: remove model.{name}"


def test_an_unavailable_attention_implementation_is_refused(tokenizer):
    message = refusal(build, tokenizer, attn_implementation="flash")
    assert message.startswith("model.attn_implementation is 'flash': ")
    assert "sdpa" in message


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_the_requested_attention_implementation_is_used(kind, tokenizer, saved):
    assert build(tokenizer, attn_implementation=kind).config._attn_implementation == kind
    loaded = build_model(ModelArguments(path=str(saved), attn_implementation=kind), tokenizer)
    assert loaded.config._attn_implementation == kind


def test_the_seed_determines_the_weights(tokenizer):
    model = build(tokenizer, seed=3)
    assert_same_weights(model, build(tokenizer, seed=3))
    torch.manual_seed(3)
    assert_same_weights(model, HfGPTForCausalLM(build_config(ModelArguments(**SMALL), tokenizer)))
    assert not torch.equal(model.model.embed_tokens.weight, build(tokenizer, seed=4).model.embed_tokens.weight)


@pytest.mark.parametrize("tied", [True, False])
def test_initialization_of_the_book(tied, tokenizer):
    """PyTorch's defaults: N(0, 1) embeddings; linear layers, including a tied head, uniform below 1 / sqrt(inputs)."""
    model = build(tokenizer, initialization="torch", tie_word_embeddings=tied)
    # The standard deviation of 928 draws has a standard error of 2.3 %; the tolerance is five of them.
    embedding = model.model.embed_tokens.weight
    assert (model.lm_head.weight is embedding) == tied
    if not tied:
        assert embedding.std().item() == pytest.approx(1.0, rel=0.12)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert len(linear) == 2 * 6 + 1
    for name, module in linear.items():
        bound = module.in_features**-0.5
        # The largest of 928 or more uniform draws is below 0.95 of the bound once in 10^20 times.
        assert 0.95 * bound < module.weight.abs().max().item() <= bound, name
    assert torch.equal(model.model.norm.weight, torch.ones(32))
    default = build(tokenizer, tie_word_embeddings=tied)
    assert default.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.12)


@pytest.mark.parametrize(("multiple", "rows"), [(None, 29), (1, 29), (29, 29), (8, 32), (64, 64)])
def test_padded_rows_are_never_generated(multiple, rows, tokenizer, tmp_path):
    model = build(tokenizer, pad_vocab_to_multiple_of=multiple, tie_word_embeddings=False)
    assert model.config.vocab_size == rows == model.get_input_embeddings().num_embeddings
    assert model.generation_config.suppress_tokens == (list(range(29, rows)) or None)
    # Without suppression, a padding row would always win here.
    with torch.no_grad():
        model.lm_head.weight[:29] = 0.0
    model.save_pretrained(tmp_path)
    for loaded in (model, load_model(str(tmp_path))):
        ids = loaded.generate(torch.tensor([[5]]), max_new_tokens=8, do_sample=True, top_k=0, pad_token_id=1)
        assert int(ids.max()) < 29


def test_a_model_to_continue_from(saved, tokenizer):
    model = build_model(ModelArguments(path=str(saved)), tokenizer)
    assert_same_weights(model, build(tokenizer, seed=3))
    larger = train_tokenizer(["abcdefghijklmnopqrstuvwxyzäöü"], kind="char")
    message = "the tokenizer has 32 tokens, but the model has only 29 embeddings: use the model's tokenizer"
    assert refusal(build_model, ModelArguments(path=str(saved)), larger) == message
    assert refusal(check_vocabulary, model, larger) == message
    smaller = train_tokenizer(["abc"], kind="char")
    assert check_vocabulary(model, smaller) is None


# Existing models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_is_loaded_in_float32_for_inference(dtype, tokenizer, tmp_path):
    model = build(tokenizer, seed=5).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert not loaded.training
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert_same_weights(loaded, model.float())
    config, own = load_model_config(str(tmp_path)).to_dict(), loaded.config.to_dict()
    assert config.pop("dtype") in (dtype, str(dtype).removeprefix("torch."))
    del own["dtype"]
    assert config == own


def test_the_tokenizer_saved_with_the_model(saved, tokenizer):
    loaded = load_model_tokenizer(str(saved))
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded("zebra")["input_ids"] == tokenizer("zebra")["input_ids"]


@pytest.mark.parametrize(
    ("auto_class", "load"),
    [(AutoConfig, load_model), (AutoTokenizer, load_model_tokenizer), (AutoConfig, load_model_config)],
)
@pytest.mark.parametrize("revision", [None, "v2"])
def test_a_hub_id_is_requested_once_and_its_code_never_run(auto_class, load, revision, monkeypatch):
    asked = []

    def from_pretrained(path, **options):
        asked.append((path, options["revision"], options["trust_remote_code"]))
        raise OSError("there is no network\nand never was.")

    def cached_file(path, name, revision, **options):
        looked.append((path, name, revision))

    looked = []
    models._is_adapter_on_the_hub.cache_clear()
    monkeypatch.setattr(models, "cached_file", cached_file)
    monkeypatch.setattr(auto_class, "from_pretrained", from_pretrained)
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", lambda path, revision: ({}, {}))
    message = refusal(load, "org/name", revision)
    assert asked == [("org/name", revision or "main", False)]
    expected = [] if load is load_model_tokenizer else [("org/name", "adapter_config.json", revision or "main")]
    assert looked == expected, "checked whether it is an adapter"
    models._is_adapter_on_the_hub.cache_clear()
    assert message.startswith("cannot load a ")
    assert message.endswith(
        " from 'org/name' (there is no network and never was): check the name, the network and the login"
    )


def edit(name, change):
    def damage(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return damage


def edit_config(**changes):
    return edit("config.json", lambda data: json.dumps({**json.loads(data), **changes}).encode())


def edit_weights(change):
    def damage(folder):
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


@pytest.mark.parametrize(
    ("damage", "fact"),
    [
        (edit(WEIGHTS, lambda data: data[: len(data) // 2]), "incomplete metadata, file not fully covered"),
        (edit(WEIGHTS, lambda data: data[:-1]), "incomplete metadata, file not fully covered"),
        (edit(WEIGHTS, lambda data: b""), "header too small"),
        (edit(WEIGHTS, lambda data: b"version https://git-lfs.github.com/spec/v1\n"), "header too large"),
        (edit_config(num_hidden_layers=10**9), "has num_hidden_layers 1,000,000,000, the limit is 1,000"),
        (edit_config(num_labels=10**9), "has num_labels 1,000,000,000, the limit is 1,000,000"),
        (
            edit_config(vocab_size=10**12),
            "describes a model of at least 32,000,000,025,088 parameters, but its weights",
        ),
        (edit_config(hidden_size=10**9, intermediate_size=1), "describes a model of at least 8,000,000,"),
        (edit("config.json", lambda data: b'{"a": ' * 2000 + b"1" + b"}" * 2000), "maximum recursion depth exceeded"),
        (lambda folder: (folder / WEIGHTS).unlink(), "no file named model.safetensors"),
        (edit_weights(lambda weights: weights.pop("model.norm.bias")), "1 missing keys, such as model.norm.bias"),
        (
            edit_weights(lambda weights: weights.update(more=torch.zeros(1))),
            "do not match its config.json: 1 unexpected keys, such as more; use both from the same model",
        ),
        (
            edit_weights(lambda weights: weights["model.norm.bias"].fill_(float("nan"))),
            "contain NaN or infinite values in model.norm.bias (the file is damaged, or training diverged): use",
        ),
        (edit_config(num_hidden_layers=3), "16 missing keys, such as model.layers.2.input_layernorm.bias"),
        (edit_config(num_hidden_layers=1), "16 unexpected keys, such as model.layers.1.input_layernorm.bias"),
        (
            edit_config(max_position_embeddings=8),
            "1 mismatched keys, such as ('model.embed_positions.weight', torch.Size([16, 32]), torch.Size([8, 32]))",
        ),
        (edit_config(num_attention_heads=5), "hidden_size 32 is not a multiple of num_attention_heads 5"),
        (edit_config(num_attention_heads="two"), "'num_attention_heads' expected int, got str"),
        (edit_config(hidden_act="gleu"), "hidden_act is 'gleu'"),
        (edit_config(model_type="no-such-model", auto_map={}), "no-such-model"),
        (edit("config.json", lambda data: data[:20]), "is not a valid JSON file"),
        (edit("config.json", lambda data: b"\xff\xfe"), "is not a valid JSON file"),
        (edit("config.json", lambda data: b"[]"), "Should have a `model_type` key in its config.json"),
    ],
)
def test_a_damaged_model_is_refused(damage, fact, copy):
    damage(copy)
    message = refusal(load_model, str(copy))
    assert f"'{copy}'" in message
    assert fact in message
    assert message.endswith(
        ("save or copy it again", "use both from the same model", "use another copy", "an earlier checkpoint")
    )


@pytest.mark.parametrize(
    "outside", ["../model.safetensors", "/{folder}/model.safetensors", "..", "a/../../b", r"..\\b"]
)
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_a_weight_map_that_points_outside_the_folder_is_refused(index, outside, copy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    (copy / WEIGHTS).rename(folder / WEIGHTS)
    outside = outside.format(folder=folder)
    (copy / index).write_text(json.dumps({"metadata": {}, "weight_map": {"model.norm.bias": outside}}))
    assert refusal(load_model, str(copy)) == (
        f"the weight map of '{copy}' refers to a file outside its folder, '{outside}': download the model again"
    )


def test_a_weight_map_that_points_outside_a_repository_is_refused(copy, hub, tmp_path_factory, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
    (copy / WEIGHTS).unlink()
    weight_map = {"weight_map": {"model.norm.bias": "../../config.json"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, **weight_map}))
    api = HfApi(token="hf_x")
    api.create_repo("me/mapped")
    api.upload_folder(repo_id="me/mapped", folder_path=copy)
    hub.log.clear()
    assert refusal(load_model, "me/mapped").startswith(
        "the weight map of 'me/mapped' refers to a file outside its folder, '../../config"
    )
    assert "GET /me/mapped/resolve/" in "".join(hub.log)
    assert ".." not in "".join(hub.log)


def test_a_weight_map_may_refer_to_links(copy, tmp_path_factory):
    """As in the Hub cache, where every file is a link."""
    blob = tmp_path_factory.mktemp("blobs") / "blob"
    names = list(load_file((copy / WEIGHTS).rename(blob)))
    (copy / "model-00001-of-00001.safetensors").symlink_to(blob)
    weight_map = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert len(load_model(str(copy)).state_dict()) == len(names) + 1, "plus the tied head"


class Hostile:
    """Creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "sharded", "class", "program"])
def test_weights_that_contain_code_are_refused_without_advice_to_run_it(kind, copy):
    weights, name, trap = load_file(copy / WEIGHTS), copy / "pytorch_model.bin", copy / "trap"
    (copy / WEIGHTS).unlink()
    if kind == "sharded":
        name = copy / "part.bin"
        content = {"metadata": {}, "weight_map": dict.fromkeys(weights, name.name)}
        (copy / "pytorch_model.bin.index.json").write_text(json.dumps(content))
    if kind == "program":
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), name)
    else:
        content = nn.Linear(2, 2) if kind == "class" else {**weights, "more": {"nested": [Hostile(trap)]}}
        torch.save(content, name, _use_new_zipfile_serialization=kind != "legacy")
    message = refusal(load_model, str(copy))
    fact = "it is a TorchScript program" if kind == "program" else "its pickle contains code or is damaged"
    assert message.startswith(f"cannot load a model from '{copy}' ({fact}")
    assert "weights_only" not in message
    assert not trap.exists()


def test_a_flipped_bit_in_torch_weights_is_detected_by_their_checksum(copy):
    weights, name = load_file(copy / WEIGHTS), copy / "pytorch_model.bin"
    (copy / WEIGHTS).unlink()
    torch.save(weights, name)
    assert load_model(str(copy)).state_dict().keys() > weights.keys()
    content = bytearray(name.read_bytes())
    place = content.index(weights["model.embed_tokens.weight"].numpy().tobytes())
    content[place] ^= 1
    name.write_bytes(content)
    assert re.search(r"\(checksum mismatch in \S+/data/\d+\): save or copy it", refusal(load_model, str(copy)))


@pytest.mark.parametrize(
    "damage",
    [
        edit("tokenizer.json", lambda data: data[: len(data) // 2]),
        edit("tokenizer.json", lambda data: b"{}"),
        edit("tokenizer.json", lambda data: b'{"version": "1.0", "added_tokens": [], "model": {"type": "X"}}'),
        edit("tokenizer_config.json", lambda data: b"{"),
    ],
)
def test_a_damaged_tokenizer_is_refused(damage, copy):
    damage(copy)
    message = refusal(load_model_tokenizer, str(copy))
    assert message.startswith(f"cannot load a tokenizer from '{copy}' (")
    assert message.endswith("): save or copy it again")


@pytest.mark.parametrize("length", ["x", 1.5, 0, [1]])
def test_a_tokenizer_with_an_invalid_length_is_refused(length, copy):
    edit("tokenizer_config.json", lambda data: json.dumps(json.loads(data) | {"model_max_length": length}).encode())(
        copy
    )
    message = refusal(load_model_tokenizer, str(copy))
    assert message.startswith(f"the tokenizer of '{copy}' has model_max_length {length!r}, which is not a positive")
    assert "has model_max_length" in refusal(load_tokenizer, str(copy))


def test_a_special_token_that_is_not_in_the_vocabulary_is_refused(copy):
    settings = {"eos_token": "", "unk_token": None}
    edit("tokenizer_config.json", lambda data: json.dumps(json.loads(data) | settings).encode())(copy)
    assert "has the special token '', which is not in its vocabulary" in refusal(load_model_tokenizer, str(copy))


def test_a_vocabulary_with_gaps_is_checked_by_its_largest_id(copy):
    def add(data):
        content = json.loads(data)
        content["model"]["vocab"]["~"] = 99
        return json.dumps(content).encode()

    edit("tokenizer.json", add)(copy)
    said = "the tokenizer has 100 tokens, but the model has only 29 embeddings: use the model's tokenizer"
    assert refusal(check_vocabulary, load_model(str(copy)), load_model_tokenizer(str(copy))) == said


@pytest.mark.parametrize("names", [5, "HfGPTForCausalLM", [5], {"a": 1}])
def test_architectures_that_are_not_names_are_refused(names, copy):
    edit_config(architectures=names)(copy)
    message = refusal(load_model_config, str(copy))
    said = f"the config.json of '{copy}' has the architectures {names!r}, not a list of names: use another copy"
    assert message == said or message.startswith("cannot load a configuration from")


@pytest.mark.parametrize("labels", [{"0": ["a"], "1": "b"}, {"0": "a", "2": "b"}, {"0": "a", "1": None}])
def test_labels_that_are_not_strings_or_have_gaps_are_refused(labels, copy):
    edit_config(architectures=["HfGPTForSequenceClassification"], id2label=labels)(copy)
    said = f"the id2label in the config.json of '{copy}' does not map ids from 0 without gaps to strings"
    assert refusal(load_model_config, str(copy)).startswith(said)


def test_a_classifier_is_not_a_language_model(copy):
    edit_config(architectures=["HfGPTForSequenceClassification"])(copy)
    assert "is a classifier, not a language model" in refusal(load_model, str(copy))


def test_a_model_without_a_tokenizer(copy):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    message = refusal(load_model_tokenizer, str(copy))
    assert message == f"the folder '{copy}' has no tokenizer: save the model's tokenizer there"


AUTO_MAP = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoProcessor": "evil.P"}
FOREIGN_TOKENIZER = {"auto_map": {"AutoTokenizer": [None, "evil.T"]}, "tokenizer_class": "T"}


@pytest.mark.parametrize("load", [load_model, load_model_config, load_model_tokenizer, load_tokenizer])
@pytest.mark.parametrize(
    ("files", "refused"),
    [
        ({"config.json": {"model_type": "other", "auto_map": AUTO_MAP}}, (load_model, load_model_config)),
        ({"config.json": {"auto_map": AUTO_MAP}}, ()),
        ({"tokenizer_config.json": FOREIGN_TOKENIZER}, (load_model_tokenizer, load_tokenizer)),
        ({"tokenizer_config.json": {"auto_map": {"AutoTokenizer": [None, "evil.T"]}}}, ()),
        (
            {
                "tokenizer_config.json": {"tokenizer_class": "AutoProcessor"},
                "processor_config.json": {"auto_map": AUTO_MAP},
            },
            (load_model_tokenizer, load_tokenizer),
        ),
        (
            {
                "tokenizer_config.json": {"tokenizer_class": "AutoModelForCausalLM"},
                "config.json": {"model_type": "other", "auto_map": AUTO_MAP},
            },
            (load_model, load_model_config, load_model_tokenizer, load_tokenizer),
        ),
    ],
)
def test_code_in_a_repository_is_not_run_and_causes_no_prompt(load, files, refused, copy, monkeypatch):
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("the user was prompted"))
    (copy / "evil.py").write_text(f"open({str(copy / 'ran')!r}, 'w')\n")
    for name, changes in files.items():
        (copy / name).touch()
        edit(name, lambda data, changes=changes: json.dumps({**json.loads(data or b"{}"), **changes}).encode())(copy)
    if load in refused:
        assert "needs Python code from its repository, which hfgpt never runs" in refusal(load, str(copy))
    else:
        loaded = load(str(copy))
        assert type(loaded).__module__.startswith(("hfgpt.", "transformers."))
        if load in (load_model_tokenizer, load_tokenizer):
            loaded.save_pretrained(copy / "again")
            assert "auto_map" not in json.loads((copy / "again" / "tokenizer_config.json").read_text())
    assert not (copy / "ran").exists()


def test_a_tokenizer_class_that_is_not_a_tokenizer_is_refused(copy):
    edit("tokenizer_config.json", lambda data: b'{"tokenizer_class": "AutoModelForCausalLM"}')(copy)
    for load in (load_model_tokenizer, load_tokenizer):
        assert "is a HfGPTForCausalLM, not a tokenizer: fix its tokenizer_class" in refusal(load, str(copy))


def test_attention_from_the_hub_is_not_loaded(copy):
    edit_config(attn_implementation="me/kernel")(copy)
    assert "refers to code on the Hub, attn_implementation 'me/kernel'" in refusal(load_model, str(copy))


# Paths


def test_paths_that_are_not_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "empty").mkdir(parents=True)
    (tmp_path / "file.txt").write_text("x")
    cases = {
        "file.txt": "'file.txt' is a file; a model is a folder with config.json and weights, or a Hub id",
        "runs/empty": "the folder 'runs/empty' does not have a config.json: give the folder of a saved model or a "
        "finished run",
    }
    for path in ("/no/where", "./none", "../none", "a//b", "a/b/c", "a b", "org/na me"):
        cases[path] = f"the folder '{path}' does not exist, and it is not a Hub id: check the path"
    cases["runs/none"] = (
        "the folder 'runs' does not have 'none': check the path; to load 'runs/none' from the Hub, run this in a "
        "directory without a folder 'runs'"
    )
    for path, message in cases.items():
        for call in (check_model_path, load_model, load_model_tokenizer, load_model_config):
            assert refusal(call, path) == message


@pytest.mark.parametrize("path", ["gpt2", "openai-community/gpt2", "a-b_c/d.e-f_1"])
def test_hub_ids_are_not_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_model_path(path) is None


def test_progress_bars_are_restored():
    assert logging.is_progress_bar_enabled()
    for error in (None, KeyError):
        with contextlib.suppress(KeyError), quiet_bars():
            assert not logging.is_progress_bar_enabled()
            if error:
                raise error
        assert logging.is_progress_bar_enabled()
    with quiet_bars(False):
        assert logging.is_progress_bar_enabled()


MERGE = {"adapter": "a", "base_model": "b", "difference": 0.0, "largest_logit": 1.0, "tokens": 2}
CONVERSION = {"source": "a", "format": "gpt2", "differences": []}


@pytest.mark.parametrize("record", ["run.json", "merge.json", "conversion.json", "SHA256SUMS"])
def test_weights_that_no_longer_match_their_hash(record, saved, tmp_path, capsys):
    folder = shutil.copytree(saved, tmp_path / "model")
    checksum = hash_file(folder / WEIGHTS)
    if record == "SHA256SUMS":
        write_checksums(folder)
    else:
        entries = {"merge.json": MERGE, "conversion.json": CONVERSION}.get(record, {})
        (folder / record).write_text(json.dumps({"weights_sha256": checksum, **entries}))
    assert find_changed_weights(str(folder)) is None
    load_model(str(folder))
    changed = bytearray((folder / WEIGHTS).read_bytes())
    changed[-2] ^= 1  # the lowest bits of a weight: the file still loads
    (folder / WEIGHTS).write_bytes(changed)
    said = f"the weights in '{folder}' have changed since they were saved: {WEIGHTS} has sha256 "
    with pytest.raises(InputError, match=re.escape(said) + rf".* but {record} has {checksum[:12]}"):
        load_model(str(folder))
    load_model(str(folder), changed_weights="warn")
    assert capsys.readouterr().err.startswith(f"hfgpt: warning: {said}")


def test_a_folder_without_a_hash_is_loaded(saved):
    assert find_changed_weights(str(saved)) is None
    assert find_changed_weights("someone/model") is None


def test_a_damaged_record_is_a_one_line_error(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    for content in ('{"weights', "[" * 99999, "3", "\x00"):
        (folder / "run.json").write_text(content)
        with pytest.raises(
            InputError, match=r"run.json' (cannot be read|is incomplete|has an invalid value|is not a JSON object)"
        ) as error:
            load_model(str(folder))
        assert "\n" not in str(error.value)
