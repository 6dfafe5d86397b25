"""The model: its computation, initial weights, tied weights and files.

`CLOSE`: float32 sums in another order change these logits, of about 5 at most, by up to 2e-6; a wrong scale,
activation or transpose changes them by 0.01 or more. Runs of the same operations are compared exactly.
"""

import itertools
import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

import hfgpt.configuration_hfgpt
import hfgpt.modeling_hfgpt
from hfgpt import HfGPTForCausalLM, HfGPTForSequenceClassification, HfGPTModel

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
CLASSES = [HfGPTModel, HfGPTForCausalLM, HfGPTForSequenceClassification]


def make_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 64, shape, generator=torch.Generator().manual_seed(seed))


# Computation


def test_logits_equal_those_of_transformers_gpt2(tiny_config):
    """Same weights; names and transposes are written out here, independently of the conversion code.

    The layer norm epsilon is large, so that a wrong one shows.
    """
    torch.manual_seed(0)
    ours = HfGPTForCausalLM(tiny_config(layer_norm_eps=0.01)).eval()
    for parameter in ours.parameters():  # biases and norms too
        torch.nn.init.normal_(parameter, std=0.2)
    theirs = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, layer_norm_epsilon=0.01)
    ).eval()
    weights = ours.state_dict()
    renamed = {
        "transformer.wte.weight": weights["model.embed_tokens.weight"],
        "transformer.wpe.weight": weights["model.embed_positions.weight"],
        "lm_head.weight": weights["lm_head.weight"],
    }
    for kind in ("weight", "bias"):
        renamed[f"transformer.ln_f.{kind}"] = weights[f"model.norm.{kind}"]
        for layer, (name, own) in itertools.product(
            range(2),
            {
                "ln_1": ["input_layernorm"],
                "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                "attn.c_proj": ["self_attn.o_proj"],
                "ln_2": ["post_attention_layernorm"],
                "mlp.c_fc": ["mlp.up_proj"],
                "mlp.c_proj": ["mlp.down_proj"],
            }.items(),
        ):
            parts = torch.cat([weights[f"model.layers.{layer}.{part}.{kind}"] for part in own])
            renamed[f"transformer.h.{layer}.{name}.{kind}"] = parts.transpose(0, -1)  # vectors are not transposed
    theirs.load_state_dict(renamed)
    ids = make_ids(2, 32)
    assert_close(ours(ids).logits, theirs(ids).logits, **CLOSE)


# Initial weights


def check_is_normal(name: str, values: torch.Tensor, std: float):
    """Within 5 standard errors of N(0, std) in mean, deviation and kurtosis (3: a uniform has 1.8).

    By chance one of these 3 checks fails for one in 600,000 seeds; the seed is fixed.
    """
    values = values.detach().double().flatten()
    errors = 5 / math.sqrt(len(values))
    assert abs(values.mean()) < std * errors, name
    assert abs(values.std() / std - 1) < errors / math.sqrt(2), name
    assert abs((values / std).pow(4).mean() - 3) < errors * math.sqrt(96), name


def check_initial_weights(model):
    config = model.config
    checked = 0
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            check_is_normal(name, parameter, config.initializer_range / math.sqrt(2 * config.num_hidden_layers))
            checked += 1
        else:
            check_is_normal(name, parameter, config.initializer_range)
            checked += 1
    assert checked >= 2 + 6 * config.num_hidden_layers


@pytest.mark.parametrize("model_class", CLASSES)
@pytest.mark.parametrize("way", ["class", "_from_config", "AutoModel", "from_pretrained", "meta"])
def test_every_parameter_is_initialized_correctly(model_class, way, tiny_config):
    # 3 layers and 0.05: not the defaults. 64 wide: 4,096 numbers in a projection, its deviation known to 6 %.
    config = tiny_config(
        hidden_size=64, num_hidden_layers=3, initializer_range=0.05, num_labels=5, tie_word_embeddings=False
    )
    auto_class = dict(
        zip(CLASSES, (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification), strict=True)
    )[model_class]
    torch.manual_seed(1)
    if way == "class":
        model = model_class(config)
    elif way == "_from_config":
        model = model_class._from_config(config)
    elif way == "AutoModel":
        model = auto_class.from_config(config)
    elif way == "from_pretrained":
        model, _ = model_class.from_pretrained(None, config=config, state_dict={}, output_loading_info=True)
    else:
        with torch.device("meta"):
            model = model_class(config)
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
        for module in model.modules():  # as transformers does for weights it could not load
            module._is_hf_initialized = False
        model.init_weights()
    assert type(model) is model_class
    check_initial_weights(model)


def test_loading_initializes_missing_weights_and_changes_no_others(tiny_config, tmp_path):
    torch.manual_seed(2)
    config = tiny_config(hidden_size=64, initializer_range=0.05)
    HfGPTForCausalLM(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    missing = [
        "model.embed_positions.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        # Only the weight of these two is in the file.
        "model.layers.0.self_attn.o_proj.bias",
        "model.layers.0.mlp.up_proj.bias",
    ]
    kept = {name: torch.full_like(weight, 0.3) for name, weight in weights.items() if name not in missing}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"8 missing weights, such as model\.embed_positions\.weight: use another"):
        HfGPTForCausalLM.from_pretrained(tmp_path)
    # With output_loading_info the model is returned all the same.
    model, info = HfGPTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(missing)
    loaded = dict(model.named_parameters())
    assert set(loaded) == set(kept) | set(missing)
    for name in kept:
        assert (loaded[name] == 0.3).all(), name
    check_is_normal(missing[0], loaded[missing[0]], 0.05)
    assert (loaded[missing[1]] == 1).all()
    assert (loaded[missing[2]] == 0).all()
    check_is_normal(missing[3], loaded[missing[3]], 0.05)
    check_is_normal(missing[4], loaded[missing[4]], 0.05 / 2)  # sqrt(2 * 2 layers)
    check_is_normal(missing[5], loaded[missing[5]], 0.05 / 2)
    assert (loaded[missing[6]] == 0).all()
    assert (loaded[missing[7]] == 0).all()


@pytest.mark.parametrize("model_class", [HfGPTForCausalLM, HfGPTForSequenceClassification])
def test_head_on_a_base_model_is_initialized_correctly(model_class, tiny_config, tmp_path):
    torch.manual_seed(3)
    base = HfGPTModel(tiny_config(initializer_range=0.05, tie_word_embeddings=False, num_labels=9))
    base.save_pretrained(tmp_path)
    if model_class is HfGPTForCausalLM:  # nobody wants a language model with a random head
        with pytest.raises(ValueError, match=r"1 missing weights, such as lm_head\.weight"):
            model_class.from_pretrained(tmp_path)
    loaded, _ = model_class.from_pretrained(tmp_path, output_loading_info=True)
    head = loaded.lm_head if model_class is HfGPTForCausalLM else loaded.score
    check_is_normal("head", head.weight, 0.05)
    assert all(map(torch.equal, loaded.model.parameters(), base.parameters()))


@pytest.mark.parametrize("model_class", CLASSES)
def test_there_are_no_buffers(model_class, tiny_config):
    model = model_class(tiny_config())
    assert list(model.buffers()) == []
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("model_class", CLASSES)
def test_a_checkpoint_with_other_weights_is_refused_except_for_heads(model_class, tiny_config, tmp_path):
    HfGPTForCausalLM(tiny_config(tie_word_embeddings=False)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    extra = {**weights, "score.weight": torch.zeros(2, 32)}
    save_file(extra, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert type(model_class.from_pretrained(tmp_path)) is model_class
    extra["model.layers.2.mlp.up_proj.bias"] = torch.zeros(128)
    save_file(extra, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"'{tmp_path}' has 1 unexpected weights, such as .*layers\.2\.mlp\.up_proj\.bias"
    ):
        model_class.from_pretrained(tmp_path)


# Tied weights


@pytest.mark.parametrize("tie", [True, False])
def test_head_is_tied_as_configured_through_files_and_resizing(tie, tiny_config, tmp_path):
    torch.manual_seed(4)
    model = HfGPTForCausalLM(tiny_config(tie_word_embeddings=tie))

    def check(model, rows: int):
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
        assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight) == tie
        assert model.lm_head.weight.shape == model.model.embed_tokens.weight.shape == (rows, 32)
        assert model(make_ids(1, 4)).logits.shape == (1, 4, rows)
        assert model.get_input_embeddings() is model.model.embed_tokens
        assert model.get_output_embeddings() is model.lm_head

    check(model, 64)
    first = [model.model.embed_tokens.weight.detach().clone(), model.lm_head.weight.detach().clone()]
    for rows in (80, 64, 70):
        model.resize_token_embeddings(rows)
        assert model.config.vocab_size == rows
        check(model, rows)
        assert torch.equal(model.model.embed_tokens.weight[:64], first[0])
        assert torch.equal(model.lm_head.weight[:64], first[1])
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in written) == (not tie)
    assert sum(weight.numel() for weight in written.values()) == sum(p.numel() for p in model.parameters())
    loaded = HfGPTForCausalLM.from_pretrained(tmp_path)
    check(loaded, 70)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


# Files

REMOTE = """
import importlib.abc, json, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hfgpt":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

folder, again, *names = sys.argv[1:]
recorded = load_file(f"{folder}/recorded.safetensors")
classes = {
    "causal": AutoModelForCausalLM, "base": AutoModel, "classifier": AutoModelForSequenceClassification
}
for name, auto_class in classes.items():
    assert type(AutoConfig.from_pretrained(f"{folder}/{name}", trust_remote_code=True)).__name__ == "HfGPTConfig"
    model = auto_class.from_pretrained(f"{folder}/{name}", trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        assert torch.equal(model(recorded["ids"])[0], recorded[name]), name
    # Saved from there, it is again a folder that loads without hfgpt.
    model.save_pretrained(f"{again}/{name}")
    model = auto_class.from_pretrained(f"{again}/{name}", trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(model(recorded["ids"])[0], recorded[name]), name
# The files of a language model serve the two other classes as well.
base = AutoModel.from_pretrained(f"{folder}/causal", trust_remote_code=True).eval()
with torch.no_grad():
    assert torch.equal(base(recorded["ids"])[0], recorded["causal_hidden"])
classifier = AutoModelForSequenceClassification.from_pretrained(f"{folder}/causal", trust_remote_code=True)
assert torch.equal(classifier.model.embed_tokens.weight, base.embed_tokens.weight)
assert not any(name.split(".")[0] == "hfgpt" for name in sys.modules)
print("loaded")
"""


def test_saved_models_load_where_hfgpt_is_not_installed(tiny_config, tmp_path):
    """In a process that cannot import hfgpt, with the code saved next to the weights: exactly the same logits."""
    ids = make_ids(2, 12)
    recorded = {"ids": ids}
    for name, model_class in zip(("base", "causal", "classifier"), CLASSES, strict=True):
        torch.manual_seed(5)
        model = model_class(tiny_config(pad_token_id=0)).eval()
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            recorded[name] = model(ids)[0]
            if name == "causal":
                recorded["causal_hidden"] = model.model(ids)[0]
    save_file(recorded, tmp_path / "recorded.safetensors")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = subprocess.run(
        [sys.executable, "-I", "-c", REMOTE, str(tmp_path), str(tmp_path / "again")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "loaded"


@pytest.mark.parametrize("model_class", CLASSES)
def test_saved_folder_contains_the_code_and_refers_to_it(model_class, tiny_config, tmp_path):
    folder = tmp_path / "not" / "there" / "yet"
    model = model_class(tiny_config())
    model.save_pretrained(folder)
    for module in (hfgpt.configuration_hfgpt, hfgpt.modeling_hfgpt):
        assert (folder / Path(module.__file__).name).read_bytes() == Path(module.__file__).read_bytes()
    written = json.loads((folder / "config.json").read_text())
    assert written["architectures"] == [model_class.__name__]
    assert written["auto_map"] == {
        "AutoConfig": "configuration_hfgpt.HfGPTConfig",
        "AutoModel": "modeling_hfgpt.HfGPTModel",
        "AutoModelForCausalLM": "modeling_hfgpt.HfGPTForCausalLM",
        "AutoModelForSequenceClassification": "modeling_hfgpt.HfGPTForSequenceClassification",
    }
    loaded = model_class.from_pretrained(folder)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))


def test_a_read_only_installation_saves_writable_code(tiny_config, tmp_path, monkeypatch):
    for module in (hfgpt.configuration_hfgpt, hfgpt.modeling_hfgpt):
        installed = tmp_path / Path(module.__file__).name
        installed.write_bytes(Path(module.__file__).read_bytes())
        installed.chmod(0o444)
        monkeypatch.setattr(module, "__file__", str(installed))
    HfGPTModel(tiny_config()).save_pretrained(tmp_path / "saved")
    saved = list((tmp_path / "saved").iterdir())
    assert len(saved) == 4
    assert all(path.stat().st_mode & stat.S_IWUSR for path in saved)


def test_weights_loaded_under_other_names_are_saved_under_ours(tiny_config, tmp_path):
    """transformers would write the names it read, which could not be loaded without the same mapping."""
    model = HfGPTForCausalLM(tiny_config())
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    other = {name.replace("model.", "decoder."): weight for name, weight in weights.items()}
    save_file(other, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = HfGPTForCausalLM.from_pretrained(tmp_path, key_mapping={r"^decoder\.": "model."})
    assert all(map(torch.equal, loaded.parameters(), model.parameters()))
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == weights.keys()


def test_only_the_main_process_writes(tiny_config, tmp_path):
    HfGPTModel(tiny_config()).save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.glob("*.py"))
    assert not (tmp_path / "config.json").exists()
