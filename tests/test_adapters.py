"""Adapters: PEFT finds the target modules, trains nothing else, and all ways to load one give the same logits."""

import hashlib
import json
import shutil
import warnings

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from peft.utils import constants
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

import hfgpt
from hfgpt.adapters import AdapterArguments, attach_adapter, merge_adapter, put_adapter_on, trainable_parameters
from hfgpt.errors import InputError
from hfgpt.modeling_hfgpt import HfGPTForCausalLM, HfGPTForSequenceClassification
from hfgpt.models import find_model, load_model, save_labels
from hfgpt.saving import hash_file

IDS = torch.arange(2, 22).view(2, 10)


def logits_of(model):
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


def perturb(model, scale=0.1):
    """Adds random values to the trainable weights, as training would change them."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "modules_to_save" not in name:
                parameter.add_(torch.randn_like(parameter) * scale)
    return model


@pytest.fixture
def base(tiny_config, tmp_path):
    torch.manual_seed(0)
    HfGPTForCausalLM(tiny_config(pad_token_id=1)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base, tmp_path):
    model = perturb(attach_adapter(load_model(str(base)), AdapterArguments(r=4), "CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


# Targets


def test_every_peft_method_finds_its_target_modules(tiny_config):
    names = {name.rpartition(".")[2] for name, _ in HfGPTForCausalLM(tiny_config()).named_modules()}
    tables = {name: table for name, table in vars(constants).items() if name.endswith("_MODULES_MAPPING")}
    assert len(tables) > 30
    for name, table in tables.items():
        assert table["hfgpt"], name
        assert set(table["hfgpt"]) <= names, name


def test_peft_needs_no_target_modules(tiny_config):
    model = get_peft_model(HfGPTForCausalLM(tiny_config()), LoraConfig(task_type="CAUSAL_LM"))
    adapted = {name.partition(".lora_")[0][-6:] for name, p in model.named_parameters() if p.requires_grad}
    assert adapted == {"q_proj", "v_proj"}


def test_rank_16_on_gpt2_small_trains_the_expected_number_of_parameters():
    with torch.device("meta"):
        model = HfGPTForCausalLM(hfgpt.HfGPTConfig.from_preset("gpt2"))
        adapted = attach_adapter(model, AdapterArguments(r=16), "CAUSAL_LM")
    assert trainable_parameters(adapted) == (12 * 221_184, 124_439_808 + 2_654_208)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"target_modules": ["c_attn"]},
            r"\['c_attn'\] cannot be adapted .*: use linear layers, down_proj, k_proj, lm_head",
        ),
        ({"target_modules": "nothing.*"}, "cannot be adapted"),
        ({"r": 0}, "adapters.r is 0; it must be at least 1"),
        ({"lora_dropout": 1.0}, "adapters.lora_dropout is 1.0"),
        ({"bias": "some"}, "adapters.bias is 'some'; it must be none, all or lora_only"),
        ({"init_lora_weights": "pissa"}, "adapters.init_lora_weights is 'pissa'; it must be one of true, gaussian"),
        ({"init_lora_weights": False}, "adapters.init_lora_weights is False"),
    ],
)
def test_what_cannot_be_adapted_is_refused(tiny_config, arguments, message):
    with pytest.raises(InputError, match=message):
        attach_adapter(HfGPTForCausalLM(tiny_config()), AdapterArguments(**arguments), "CAUSAL_LM")


# What an adapter changes

VARIANTS = [
    {},
    {"use_dora": True},
    {"use_rslora": True},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal", "r": 4},
    {"init_lora_weights": "mica"},
    {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 2}},
    {"layers_to_transform": [1]},
    {"bias": "lora_only"},
]


@pytest.mark.parametrize("arguments", VARIANTS, ids=lambda a: "-".join(f"{k}={v}" for k, v in a.items()) or "plain")
def test_a_fresh_adapter_changes_nothing_and_merging_keeps_the_logits(base, tmp_path, arguments):
    """1e-6 and 1e-5: float32 sums in another order."""
    plain = logits_of(load_model(str(base)))
    adapted = attach_adapter(load_model(str(base)), AdapterArguments(**{"r": 4, **arguments}), "CAUSAL_LM")
    # The product of the orthogonal factors is zero except for rounding.
    assert torch.allclose(logits_of(adapted), plain, atol=1e-5 if "orthogonal" in arguments.values() else 1e-6)
    perturb(adapted)
    expected = logits_of(adapted)
    assert (expected - plain).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = load_model(str(tmp_path / "adapter"))
    assert torch.equal(logits_of(loaded), expected)
    assert torch.allclose(logits_of(merge_adapter(loaded, "adapter")), expected, atol=1e-5)


def test_only_the_adapter_is_trained(base):
    model = attach_adapter(load_model(str(base)), AdapterArguments(r=4), "CAUSAL_LM").train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0, weight_decay=0.1)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert len(moved) == 2 * 2 * 6


def test_a_4_bit_base_model_can_be_trained_after_an_evaluation(tiny_config, tmp_path, monkeypatch):
    """The kernel that bitsandbytes uses in eval mode on CPUs with bfloat16 units has no gradient."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(
        "bitsandbytes.nn.modules.has_avx512bf16", lambda: True, raising=False
    )  # version 0.48 has no such kernel
    HfGPTForCausalLM(tiny_config(hidden_size=64, pad_token_id=0)).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = load_model(str(tmp_path), quantization_config=quantization)
    model = perturb(attach_adapter(base, AdapterArguments(r=4), "CAUSAL_LM"))

    def train() -> dict[str, torch.Tensor]:
        model.train().zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    before, logits, after = train(), logits_of(model), train()
    assert len(before) == 24
    assert all(torch.equal(gradient, after[name]) for name, gradient in before.items())
    assert torch.equal(logits, model.train()(IDS, use_cache=False).logits)


# Loading


def test_every_way_to_load_an_adapter_gives_the_same_logits(base, adapter):
    ours = logits_of(load_model(str(adapter)))
    assert torch.equal(logits_of(AutoPeftModelForCausalLM.from_pretrained(adapter)), ours)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(adapter)), ours)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    assert torch.equal(logits_of(loaded), ours)
    assert not torch.equal(logits_of(load_model(str(base))), ours)
    assert find_model(str(adapter)).base.path == str(base)
    assert find_model(str(base)).base is None
    assert not find_model(str(adapter)).is_classifier
    assert find_model(str(adapter)).config.model_type == "hfgpt"


def test_an_adapter_for_another_base_model(base, adapter, tiny_config, tmp_path):
    torch.manual_seed(0)
    HfGPTForCausalLM(tiny_config(hidden_size=64)).save_pretrained(tmp_path / "wide")
    with pytest.raises(
        InputError, match=r"cannot be loaded onto its base model .*use the base model it was trained on"
    ):
        put_adapter_on(load_model(str(tmp_path / "wide")), str(adapter))
    HfGPTForCausalLM(tiny_config(num_hidden_layers=1)).save_pretrained(tmp_path / "short")
    with pytest.raises(InputError, match=r"unexpected weights such as .*layers.1.* .12 in all.; use the base"):
        put_adapter_on(load_model(str(tmp_path / "short")), str(adapter))
    HfGPTForCausalLM(tiny_config(num_hidden_layers=3)).save_pretrained(tmp_path / "long")
    arguments = AdapterArguments(r=4, target_modules=["q_proj"])
    attach_adapter(load_model(str(base)), arguments, "CAUSAL_LM").save_pretrained(tmp_path / "queries")
    with pytest.raises(InputError, match=r"missing weights such as .*layers.2.* .2 in all.; use the base"):
        put_adapter_on(load_model(str(tmp_path / "long")), str(tmp_path / "queries"))


def test_a_base_model_that_was_retrained(base, adapter):
    record = {"base_weights_sha256": hash_file(base / "model.safetensors")}
    (adapter / "run.json").write_text(json.dumps(record))
    load_model(str(adapter))
    perturb(model := load_model(str(base))).save_pretrained(base)
    assert model.training is False
    with pytest.raises(InputError, match=r"was trained on different weights than those now in .*base'"):
        load_model(str(adapter))


def test_the_hash_of_a_base_model_covers_all_its_weights(base, adapter):
    whole = find_model(str(base)).hash()
    assert whole == hash_file(base / "model.safetensors")
    model = load_model(str(base))
    (base / "model.safetensors").unlink()
    assert find_model(str(base)).hash() is None
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    assert find_model(str(base)).hash() == hash_file(base / "pytorch_model.bin")
    model.save_pretrained(base, max_shard_size="20KB")
    shards = sorted(base.glob("model-*.safetensors"))
    assert len(shards) > 1
    lines = "".join(f"{hash_file(shard)}  {shard.name}\n" for shard in shards)
    sharded = find_model(str(base)).hash()
    assert sharded == hashlib.sha256(lines.encode()).hexdigest()
    (adapter / "run.json").write_text(json.dumps({"base_weights_sha256": sharded}))
    load_model(str(adapter))
    perturb(model).save_pretrained(base, max_shard_size="20KB")
    with pytest.raises(InputError, match=r"was trained on different weights than those now in .*base'"):
        load_model(str(adapter))


def test_a_damaged_adapter_and_a_missing_base_model(base, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "cut")
    (tmp_path / "cut" / "adapter_model.safetensors").write_bytes(b"x" * 10)
    with pytest.raises(InputError, match=r"the adapter '.*cut' cannot be loaded onto its base model"):
        load_model(str(tmp_path / "cut"))
    shutil.copytree(adapter, tmp_path / "json")
    (tmp_path / "json" / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match=r"the adapter '.*json' cannot be read"):
        load_model(str(tmp_path / "json"))
    shutil.rmtree(base)
    with pytest.raises(InputError, match=r"the base model of the adapter '.*adapter' is not at '.*base': restore it"):
        load_model(str(adapter))


@pytest.mark.parametrize("name", ["base_model_name_or_path", "revision", "task_type"])
@pytest.mark.parametrize("value", [5, ["a"], {"a": 1}])
def test_an_adapter_config_with_wrong_types_is_refused(adapter, name, value):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(
        InputError, match=r"the adapter '.*adapter' (cannot be read|has \w+ .*, which is not a string)"
    ):
        load_model(str(adapter))


def test_an_adapter_in_a_pickle_is_not_loaded(base, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "old")
    (tmp_path / "old" / "adapter_model.safetensors").unlink()
    torch.save(torch.nn.Linear(2, 2), tmp_path / "old" / "adapter_model.bin")
    with pytest.raises(InputError, match=r"does not appear to have a file named adapter_model.safetensors"):
        load_model(str(tmp_path / "old"))


def test_an_adapter_with_nan_is_refused(base, tmp_path):
    model = attach_adapter(load_model(str(base)), AdapterArguments(r=4), "CAUSAL_LM")
    with torch.no_grad():
        next(parameter for parameter in model.parameters() if parameter.requires_grad).fill_(torch.nan)
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(InputError, match=r"the adapter '.*nan' contains NaN or infinite values in .* or an earlier"):
        load_model(str(tmp_path / "nan"))


def test_an_adapter_that_would_import_a_package_is_refused(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    changes = {"megatron_config": {"a": 1}, "megatron_core": "megatron.planted"}
    (adapter / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(InputError, match="is for Megatron layers: set its megatron_config to null"):
        load_model(str(adapter))


# Heads, tied weights and vocabularies


def test_a_classifier_adapter_includes_its_head_and_labels(base, tmp_path):
    labels = ["ham", "maybe", "spam"]
    classifier = load_model(str(base), auto_class=AutoModelForSequenceClassification, new_head=labels)
    adapted = perturb(attach_adapter(classifier, AdapterArguments(r=4), "SEQ_CLS"))
    head = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad and "score" in name}
    assert len(head) == 1
    with torch.no_grad():
        next(p for n, p in adapted.named_parameters() if "score.modules_to_save" in n).mul_(3)
    expected = logits_of(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    assert find_model(str(tmp_path / "adapter")).is_classifier
    loaded = load_model(str(tmp_path / "adapter"), auto_class=AutoModelForSequenceClassification)
    assert torch.equal(logits_of(loaded), expected)
    assert loaded.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}, "PEFT saves the head without names"
    save_labels(labels, tmp_path / "adapter")
    loaded = load_model(str(tmp_path / "adapter"), auto_class=AutoModelForSequenceClassification)
    assert list(loaded.config.id2label.values()) == labels
    (tmp_path / "adapter" / "labels.json").rename(tmp_path / "labels.json")
    (tmp_path / "adapter" / "labels.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot load the labels from '.*adapter' \(Expecting property name"):
        load_model(str(tmp_path / "adapter"), auto_class=AutoModelForSequenceClassification)
    for content, said in (
        ({"0": ["a"], "1": "b", "2": "c"}, r"a label in '.*labels.json' is \['a'\], not a string"),
        ({"0": "a", "1": "b", "3": "c"}, r"cannot load the labels from '.*adapter' \('2' is missing\)"),
        ("abc", "cannot load the labels from '.*adapter'"),
    ):
        (tmp_path / "adapter" / "labels.json").write_text(json.dumps({"id2label": content}))
        with pytest.raises(InputError, match=said):
            load_model(str(tmp_path / "adapter"), auto_class=AutoModelForSequenceClassification)
    (tmp_path / "labels.json").rename(tmp_path / "adapter" / "labels.json")
    merged = merge_adapter(loaded, "adapter")
    merged.save_pretrained(tmp_path / "merged")
    again = load_model(str(tmp_path / "merged"), auto_class=AutoModelForSequenceClassification)
    assert type(again) is HfGPTForSequenceClassification
    assert torch.allclose(logits_of(again), expected, atol=1e-5)
    assert list(again.config.id2label.values()) == labels
    # As the card shows it to users of PEFT and transformers alone.
    names = dict(enumerate(labels))
    for auto_class in (AutoPeftModelForSequenceClassification, AutoModelForSequenceClassification):
        loaded = auto_class.from_pretrained(tmp_path / "adapter", id2label=names)
        assert torch.equal(logits_of(loaded), expected)
        assert loaded.config.id2label == names
    with pytest.raises(InputError, match="is an adapter for a classifier, not for a language model"):
        load_model(str(tmp_path / "adapter"))


def test_tied_embeddings_stay_tied(base, tmp_path):
    arguments = AdapterArguments(r=4, modules_to_save=["embed_tokens"])
    model = perturb(attach_adapter(load_model(str(base)), arguments, "CAUSAL_LM"))
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_model(str(tmp_path / "adapter"))
    assert torch.allclose(logits_of(loaded), expected, atol=1e-6)
    merged = merge_adapter(loaded, "adapter")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert torch.allclose(logits_of(merged), expected, atol=1e-5)


def test_new_tokens_are_kept(base, tmp_path):
    model = load_model(str(base))
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path / "resized")
    model = load_model(str(tmp_path / "resized"))
    adapted = attach_adapter(model, AdapterArguments(r=4, trainable_token_indices=[66, 67]), "CAUSAL_LM")
    perturb(adapted)
    expected = logits_of(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 70_000
    loaded = load_model(str(tmp_path / "adapter"))
    assert torch.allclose(logits_of(loaded), expected, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.allclose(logits_of(merge_adapter(loaded, "adapter")), expected, atol=1e-5)
