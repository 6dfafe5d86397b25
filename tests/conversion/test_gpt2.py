"""GPT-2 checkpoints in any saved form are loaded by `from_pretrained` of our classes and give the same logits.

Tolerance: 1e-5 of logits of about 10. Both models do the same operations in the same order; 0.0 is observed.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from makers import LAYERS, make_gpt2
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, GPT2Model

from hfgpt import HfGPTForCausalLM, HfGPTForSequenceClassification, HfGPTModel
from hfgpt.configuration_hfgpt import PRESETS

TOLERANCE = {"rtol": 0, "atol": 1e-5}


def assert_same(ours, native, ids):
    with torch.no_grad():
        got, expected = (model(input_ids=ids, use_cache=False)[0] for model in (ours.eval(), native.eval()))
    assert expected.abs().max() > 0.5, "the logits are large enough to compare"
    torch.testing.assert_close(got, expected, **TOLERANCE)


@pytest.mark.parametrize("preset", PRESETS)
def test_each_size_gives_gpt2s_logits(preset, tmp_path):
    size = PRESETS[preset]
    sizes = {"n_embd": size["hidden_size"], "n_head": size["num_attention_heads"], "n_layer": 2}
    native = make_gpt2(**sizes, n_positions=16)
    native.save_pretrained(tmp_path)
    ids = torch.randint(3, 90, (2, 16))
    ours = HfGPTForCausalLM.from_pretrained(tmp_path)
    assert_same(ours, native, ids)
    assert ours.num_parameters() == native.num_parameters()
    assert_same(HfGPTModel.from_pretrained(tmp_path), native.transformer, ids)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_the_classifier_gives_gpt2s_logits(padding_side, ids, tmp_path):
    native = make_gpt2("classifier", num_labels=3, id2label={0: "a", 1: "b", 2: "c"})
    native.save_pretrained(tmp_path)
    ours = HfGPTForSequenceClassification.from_pretrained(tmp_path)
    assert ours.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert_same(ours, native, ids)
    padded = ids.clone()
    if padding_side == "right":
        padded[0, 20:] = native.config.pad_token_id
    assert_same(ours, native, padded)


def strip_prefix(folder):
    """As OpenAI's model on the Hub: base model names, with the causal masks of old versions."""
    weights = {name.removeprefix("transformer."): tensor for name, tensor in load_file(folder / FILE).items()}
    for number in range(LAYERS):
        weights[f"h.{number}.attn.bias"] = torch.tril(torch.ones(40, 40, dtype=torch.uint8))[None, None]
        weights[f"h.{number}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, folder / FILE, metadata={"format": "pt"})


FILE = "model.safetensors"


def as_pickle(folder):
    torch.save(load_file(folder / FILE), folder / "pytorch_model.bin")
    (folder / FILE).unlink()


def with_head(folder):
    weights = load_file(folder / FILE)
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    save_file(weights, folder / FILE, metadata={"format": "pt"})


def in_shards(folder):
    GPT2LMHeadModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="50KB")
    (folder / FILE).unlink(missing_ok=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def in_old_shards(folder):
    weights = load_file(folder / FILE)
    files = {name: f"pytorch_model-0000{1 + number % 3}-of-00003.bin" for number, name in enumerate(sorted(weights))}
    for file in set(files.values()):
        torch.save({name: weights[name] for name in weights if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / FILE).unlink()


CHANGES = [strip_prefix, as_pickle, with_head, in_shards, in_old_shards]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("model_class", [HfGPTForCausalLM, HfGPTModel])
def test_every_way_a_checkpoint_is_saved(model_class, change, ids, tmp_path):
    native = make_gpt2()
    native.save_pretrained(tmp_path)
    change(tmp_path)
    ours = model_class.from_pretrained(tmp_path)
    assert_same(ours, native if model_class is HfGPTForCausalLM else native.transformer, ids)


def test_base_model_in_its_own_file(ids, tmp_path):
    native = make_gpt2()
    native.transformer.save_pretrained(tmp_path)
    assert type(GPT2Model.from_pretrained(tmp_path)) is GPT2Model
    assert_same(HfGPTModel.from_pretrained(tmp_path), native.transformer, ids)
    assert_same(HfGPTForCausalLM.from_pretrained(tmp_path), native, ids)


def test_untied_head(ids, tmp_path):
    native = make_gpt2(tie_word_embeddings=False)
    native.save_pretrained(tmp_path)
    ours = HfGPTForCausalLM.from_pretrained(tmp_path)
    assert not torch.equal(ours.lm_head.weight, ours.model.embed_tokens.weight)
    assert_same(ours, native, ids)
    assert_same(HfGPTModel.from_pretrained(tmp_path), native.transformer, ids)


def test_loading_with_the_auto_class(ids, tmp_path):
    native = make_gpt2()
    native.save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is GPT2LMHeadModel
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, model_type="hfgpt")
    assert type(ours) is HfGPTForCausalLM
    assert_same(ours, native, ids)


def test_a_loaded_checkpoint_is_saved_as_an_hfgpt_model(ids, tmp_path):
    """Names, configuration and code: nothing in the folder depends on the GPT-2 mapping."""
    native = make_gpt2()
    native.save_pretrained(tmp_path / "gpt2")
    ours = HfGPTForCausalLM.from_pretrained(tmp_path / "gpt2")
    ours.save_pretrained(tmp_path / "ours")
    names = load_file(tmp_path / "ours" / FILE).keys()
    assert names == HfGPTForCausalLM(ours.config).state_dict().keys() - {"lm_head.weight"}
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("hfgpt", ["HfGPTForCausalLM"])
    assert not [key for key in config if key.startswith(("n_", "summary_", "scale_attn", "reorder", "add_cross"))]
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "ours"), native, ids)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("scale_attn_by_inverse_layer_idx", True),
        ("reorder_and_upcast_attn", True),
        ("add_cross_attention", True),
        ("scale_attn_weights", False),
        ("activation_function", "gelu_of_another_world"),
    ],
)
def test_options_our_model_lacks_are_refused(option, value, tmp_path):
    make_gpt2().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), option: value}))
    with pytest.raises(Exception, match=str(value) if option == "activation_function" else f"{option} is {value}"):
        HfGPTForCausalLM.from_pretrained(tmp_path)


def test_no_weight_is_left_at_random_values(tmp_path):
    make_gpt2().save_pretrained(tmp_path)
    weights = load_file(tmp_path / FILE)
    fewer = {name: tensor for name, tensor in weights.items() if "h.1.mlp.c_fc" not in name}
    save_file(fewer, tmp_path / FILE, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"2 missing weights, such as model\.layers\.1\.mlp\.up_proj\.bias"):
        HfGPTForCausalLM.from_pretrained(tmp_path)
    save_file({**weights, "multiple_choice_head.w": torch.zeros(1)}, tmp_path / FILE, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 unexpected weights, such as .*multiple_choice_head"):
        HfGPTForCausalLM.from_pretrained(tmp_path)


def test_a_new_classifier_on_a_language_model(ids, tmp_path):
    native = make_gpt2()
    native.save_pretrained(tmp_path)
    classifier = HfGPTForSequenceClassification.from_pretrained(tmp_path, num_labels=4)
    assert classifier(ids).logits.shape == (2, 4)
    assert_same(classifier.model, native.transformer, ids)


def test_peft_trains_saves_reloads_and_merges(ids, tmp_path):
    make_gpt2().save_pretrained(tmp_path / "gpt2")
    base = HfGPTForCausalLM.from_pretrained(tmp_path / "gpt2")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, settings)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = model.eval()(ids).logits.detach()
    model.save_pretrained(tmp_path / "adapter")

    fresh = HfGPTForCausalLM.from_pretrained(tmp_path / "gpt2")
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())
    assert (fresh(ids).logits - trained).abs().max() > 1e-2, "training changed the logits"
    reloaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert torch.equal(reloaded(ids).logits, trained)
    merged = reloaded.merge_and_unload(safe_merge=True)
    # The updates are now merged into the matrices, so logits of about 10 are rounded differently.
    torch.testing.assert_close(merged(ids).logits, trained, **TOLERANCE)


@pytest.mark.skipif(
    not {"HFGPT_GPT2", "HFGPT_VERDICT"} <= os.environ.keys(),
    reason="needs GPT-2's weights and the-verdict.txt: set HFGPT_GPT2 to gpt2 or a folder, HFGPT_VERDICT to the text",
)
def test_gpt2s_loss_on_the_books_text_matches_the_book():
    """Chapter 5: 9 batches of 2 x 256 tokens from the first nine tenths, one from the rest; 3.7547 and 3.5596 nats."""
    model = HfGPTForCausalLM.from_pretrained(os.environ["HFGPT_GPT2"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(os.environ["HFGPT_GPT2"])
    text = Path(os.environ["HFGPT_VERDICT"]).read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    losses = []
    for part, blocks in ((text[:cut], 18), (text[cut:], 2)):
        tokens = torch.tensor(tokenizer(part)["input_ids"])
        rows = tokens[: blocks * 256 + 1].unfold(0, 257, 256)
        assert len(rows) == blocks
        with torch.no_grad():
            logits = model(rows[:, :-1]).logits
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item())
    # To the four decimals printed in the book.
    assert losses == pytest.approx([3.7547, 3.5596], abs=1e-4)
