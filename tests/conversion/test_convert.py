"""`import` and `export`: every format gives a model with the same outputs, or nothing is written.

Tolerance: 1e-5 of the largest logit in float32, as in the parity report; bit-identical where weights are only copied.
"""

import io
import json
import logging
import pickle

import pytest
import torch
from makers import (
    CONTEXT,
    HEADS,
    LAYERS,
    VOCAB,
    WIDTH,
    add_lora,
    make_book_weights,
    make_gpt2,
    randomize,
    save_nanogpt,
)
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

from hfgpt import HfGPTForCausalLM, HfGPTForSequenceClassification, InputError
from hfgpt.commands.convert import export_model, import_checkpoint
from hfgpt.conversion import book, gpt2, nanogpt, openai
from hfgpt.conversion.assembly import build_native_on_meta
from hfgpt.conversion.sources import ImportArguments
from hfgpt.tokenizer import train_tokenizer

QUIET = Console(file=io.StringIO())
LETTERS = sorted("\n !',.?-abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789äöüß€%&()[]{}<>=+*/#")


def convert(source, out, **arguments):
    return import_checkpoint(str(source), out, ImportArguments(**arguments), QUIET)


def logits_of(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


# GPT-2


@pytest.mark.parametrize("tied", [True, False])
def test_gpt2_import_and_export_is_bit_identical(tied, ids, tmp_path, caplog):
    native = make_gpt2(tie_word_embeddings=tied)
    native.save_pretrained(tmp_path / "gpt2")
    train_tokenizer(["some words to learn"], "char").save_pretrained(tmp_path / "gpt2")
    report = convert(tmp_path / "gpt2", tmp_path / "ours")
    assert [row.absolute for row in report.differences if row.dtype == "float32"] == [0.0, 0.0]
    assert {row.rows for row in report.differences} == {"random", "story"}
    assert (report.greedy_equal, report.passed) == (True, True)
    assert report.to_dict().items() <= json.loads((tmp_path / "ours" / "conversion.json").read_text()).items()
    assert AutoTokenizer.from_pretrained(tmp_path / "ours")("words")["input_ids"]

    assert caplog.records == []
    with caplog.at_level(logging.WARNING):
        exported = export_model(str(tmp_path / "ours"), tmp_path / "again", console=QUIET)
        loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "again")
    assert caplog.records == []
    assert [row.absolute for row in exported.differences if row.dtype == "float32"] == [0.0, 0.0]
    assert torch.equal(logits_of(loaded, ids), logits_of(native, ids))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("gpt2", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    kept = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("gpt2", "again")]
    assert kept[0] | {"n_inner": 4 * WIDTH, "n_ctx": kept[0]["n_positions"]} == kept[1]


def test_importing_and_exporting_a_classifier(ids, tmp_path):
    native = make_gpt2("classifier", num_labels=3)
    native.save_pretrained(tmp_path / "gpt2")
    report = convert(tmp_path / "gpt2", tmp_path / "ours")
    assert report.greedy_equal is None
    ours = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    assert type(ours) is HfGPTForSequenceClassification
    assert torch.equal(logits_of(ours, ids), logits_of(native, ids))
    export_model(str(tmp_path / "ours"), tmp_path / "again", console=QUIET)
    loaded = GPT2ForSequenceClassification.from_pretrained(tmp_path / "again")
    assert all(torch.equal(*pair) for pair in zip(loaded.parameters(), native.parameters(), strict=True))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_export_and_reimport_is_bit_identical(bias, tied, ids, tiny_config, tmp_path):
    model = HfGPTForCausalLM(tiny_config(qkv_bias=bias, tie_word_embeddings=tied, hidden_act="relu"))
    model.save_pretrained(tmp_path / "ours")
    report = export_model(str(tmp_path / "ours"), tmp_path / "gpt2", console=QUIET)
    assert [row.absolute for row in report.differences if row.dtype == "float32"] == [0.0]
    filled = [note for note in report.notes if "filled with zeros: 6 biases" in note]
    assert len(filled) == (not bias)
    convert(tmp_path / "gpt2", tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    ids = ids % 64
    assert torch.equal(logits_of(again, ids[:, :32]), logits_of(model, ids[:, :32]))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    changed = {name for name, value in model.config.to_dict().items() if again.config.to_dict().get(name) != value}
    assert changed <= {"qkv_bias", "auto_map", "architectures", "dtype", "_name_or_path"}
    assert ("qkv_bias" in changed) == (not bias)


# nanoGPT


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt(bias, compiled, ids, tmp_path):
    source = save_nanogpt(tmp_path / "ckpt.pt", bias, compiled=compiled)
    report = convert(tmp_path, tmp_path / "out")
    assert (report.format, report.passed, report.greedy_equal) == ("nanogpt", True, True)
    assert report.source_parameters == sum(parameter.numel() for parameter in source.parameters())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert_close(logits_of(model, ids), source(ids))
    config = model.config
    assert (config.qkv_bias, config.tie_word_embeddings, config.hidden_act) == (bias, True, "gelu")
    assert (config.attn_pdrop, config.eos_token_id, config.max_position_embeddings) == (0.25, None, CONTEXT)
    filled = [note for note in report.notes if note.startswith("filled with zeros")]
    assert len(filled) == (not bias)
    if not bias:
        assert not model.model.layers[0].mlp.up_proj.bias.any()
    export_model(str(tmp_path / "out"), tmp_path / "gpt2", console=QUIET)
    with torch.no_grad():
        assert_close(logits_of(GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2"), ids), source(ids))


def test_nanogpts_characters_become_the_tokenizer(tmp_path):
    letters = LETTERS[:VOCAB]
    save_nanogpt(tmp_path / "ckpt.pt", vocab_size=len(letters))
    (tmp_path / "data" / "letters").mkdir(parents=True)
    tables = {"stoi": {c: i for i, c in enumerate(letters)}, "itos": dict(enumerate(letters))}
    (tmp_path / "data" / "letters" / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(letters), **tables}))
    report = convert(tmp_path / "ckpt.pt", tmp_path / "out")
    assert {row.rows for row in report.differences} == {"random", "story"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "To be, or not?\n"
    assert tokenizer(text)["input_ids"] == [tables["stoi"][letter] for letter in text]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == len(letters)
    with pytest.raises(Exception, match="UNK"):
        tokenizer("☃")


def test_nanogpts_padded_vocabulary_is_truncated_or_kept(tmp_path, ids):
    source = save_nanogpt(tmp_path / "ckpt.pt", vocab_size=VOCAB + 6)
    tokenizer = train_tokenizer(["".join(LETTERS)], "char")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    size = len(tokenizer)
    assert 50 < size < VOCAB + 6
    report = convert(tmp_path, tmp_path / "cut", tokenizer=str(tmp_path / "tokenizer"))
    assert f"cut: rows {size} to {VOCAB + 5} of the token embedding, which have no token" in report.notes
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    ids = ids % size
    with torch.no_grad():
        assert_close(logits_of(model, ids), source(ids)[..., :size])
    assert model.config.eos_token_id == tokenizer.eos_token_id
    convert(tmp_path, tmp_path / "kept", tokenizer=str(tmp_path / "tokenizer"), vocab_size=VOCAB + 6)
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "kept")
    assert kept.config.vocab_size == VOCAB + 6
    assert kept.generation_config.suppress_tokens == list(range(size, VOCAB + 6))


def test_gpt2s_vocabulary_is_recognized_without_a_tokenizer(tmp_path):
    weights = {
        name: torch.nn.functional.pad(tensor, (0, 0, 0, 50304 - VOCAB)) if name.endswith("lm_head.weight") else tensor
        for name, tensor in save_nanogpt(tmp_path / "ckpt.pt").state_dict().items()
    }
    weights["transformer.wte.weight"] = weights["lm_head.weight"]
    torch.save(weights, tmp_path / "big.pt")
    convert(tmp_path / "big.pt", tmp_path / "out", num_heads=HEADS)
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert (config.vocab_size, config.eos_token_id, config.tie_word_embeddings) == (50257, 50256, True)


# The book


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_the_books_model(qkv_bias, tied, masks, ids, tmp_path):
    chapter = pytest.importorskip("llms_from_scratch.ch04", reason="pip install --no-deps llms-from-scratch")
    sizes = {"vocab_size": VOCAB, "context_length": CONTEXT, "emb_dim": WIDTH, "n_heads": HEADS, "n_layers": LAYERS}
    source = chapter.GPTModel({**sizes, "drop_rate": 0.1, "qkv_bias": qkv_bias}).eval()
    weights = make_book_weights(qkv_bias, tied)
    source.load_state_dict(weights)
    saved = source.state_dict()
    if not masks:
        saved = {name: tensor for name, tensor in saved.items() if not name.endswith("mask")}
    saved = {f"_orig_mod.{name}": tensor for name, tensor in saved.items()} if tied else saved
    wrapped = {"model_state_dict": saved, "optimizer_state_dict": {}} if masks else saved
    torch.save(wrapped, tmp_path / "model.pth")
    report = convert(tmp_path / "model.pth", tmp_path / "out", num_heads=HEADS)
    assert (report.format, report.passed, report.greedy_equal) == ("book", True, True)
    parameters = sum(parameter.numel() for parameter in source.parameters()) - tied * VOCAB * WIDTH
    assert report.source_parameters == report.parameters == parameters
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.qkv_bias, model.config.tie_word_embeddings) == (qkv_bias, tied)
    with torch.no_grad():
        assert_close(logits_of(model, ids), source(ids))


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_the_books_faster_variant(qkv_bias, ids, tmp_path):
    chapter = pytest.importorskip("llms_from_scratch.ch04", reason="pip install --no-deps llms-from-scratch")
    sizes = {"vocab_size": VOCAB, "context_length": CONTEXT, "emb_dim": WIDTH, "n_heads": HEADS, "n_layers": LAYERS}
    source = randomize(chapter.GPTModelFast({**sizes, "drop_rate": 0.1, "qkv_bias": qkv_bias}))
    torch.save(source.state_dict(), tmp_path / "model.pth")
    assert convert(tmp_path / "model.pth", tmp_path / "out", num_heads=HEADS).format == "book"
    with torch.no_grad():
        assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), ids), source(ids))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_books_classifier(suffix, ids, tmp_path):
    weights = make_book_weights(True, classes=2)
    path = tmp_path / f"review_classifier{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    report = convert(path, tmp_path / "out", num_heads=HEADS)
    assert report.greedy_equal is None
    assert any(note.startswith("folded: the classifier's bias") for note in report.notes)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    head = weights["out_head.weight"].T
    base = convert_body(weights, tmp_path)
    assert_close(logits_of(model, ids), base(ids)[:, -1] @ head + weights["out_head.bias"])


def convert_body(weights, tmp_path):
    """The hidden states of the same model with a different head."""
    body = {name: tensor for name, tensor in weights.items() if "out_head" not in name}
    torch.save({**make_book_weights(True), **body}, tmp_path / "lm.pth")
    convert(tmp_path / "lm.pth", tmp_path / "lm", num_heads=HEADS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "lm").eval()
    return lambda ids: model.model(ids, use_cache=False).last_hidden_state.detach()


def test_the_books_lora_is_merged(ids, tmp_path):
    weights = add_lora(make_book_weights())
    torch.save(weights, tmp_path / "lora.pth")
    with pytest.raises(InputError, match="scale of the 13 LoRA layers of rank 3 unknown: pass --lora-scale"):
        convert(tmp_path / "lora.pth", tmp_path / "out", num_heads=HEADS)
    report = convert(tmp_path / "lora.pth", tmp_path / "out", num_heads=HEADS, lora_scale=0.5)
    assert "merged: 13 LoRA layers, scaled by 0.5" in report.notes
    up_proj = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers[1].mlp.up_proj.weight
    name = "trf_blocks.1.ff.layers.0"
    update = 0.5 * (weights[f"{name}.lora.A"] @ weights[f"{name}.lora.B"]).T
    # The sum is rounded once in the book's code and twice here.
    torch.testing.assert_close(up_proj, weights[f"{name}.linear.weight"] + update, rtol=0, atol=1e-6)


# OpenAI


def test_openais_tensorflow_names(tmp_path):
    tensorflow = pytest.importorskip("tensorflow", reason="pip install 'hfgpt[tf]'")
    native = make_gpt2()
    native.save_pretrained(tmp_path / "gpt2")
    variables = []
    for name, tensor in load_file(tmp_path / "gpt2" / "model.safetensors").items():
        *scope, module, parameter = name.removeprefix("transformer.").removeprefix("h.").split(".")
        scope = [f"h{scope[0]}", *scope[1:]] if scope else []
        short = "" if module in ("wte", "wpe") else "/b" if parameter == "bias" else "/g" if "ln" in module else "/w"
        value = tensor.numpy()[None] if short == "/w" else tensor.numpy()
        variables.append(("/".join(["model", *scope, module]) + short, value))
    with tensorflow.Graph().as_default(), tensorflow.compat.v1.Session() as session:
        for name, value in variables:
            tensorflow.compat.v1.get_variable(name, initializer=value)
        session.run(tensorflow.compat.v1.global_variables_initializer())
        tensorflow.compat.v1.train.Saver().save(session, str(tmp_path / "tf" / "model.ckpt"))
    (tmp_path / "tf" / "hparams.json").write_text(json.dumps({"n_head": HEADS, "n_layer": LAYERS}))
    assert openai.is_tensorflow_folder(tmp_path / "tf")
    assert convert(tmp_path / "tf", tmp_path / "out").passed
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    convert(tmp_path / "gpt2", tmp_path / "same")
    same = AutoModelForCausalLM.from_pretrained(tmp_path / "same")
    assert all(torch.equal(*pair) for pair in zip(ours.parameters(), same.parameters(), strict=True))


# The parity report can fail


@pytest.mark.parametrize("layout", [nanogpt.LAYOUT, book.LAYOUT, gpt2.LAYOUT], ids=lambda layout: layout.name)
@pytest.mark.parametrize("pair", [("input_layernorm", "post_attention_layernorm"), ("q_proj", "k_proj")])
def test_swapped_weights_are_detected_and_nothing_is_written(layout, pair, tmp_path, monkeypatch):
    """The reference shares no name table with the conversion, so a wrong table cannot confirm itself."""
    if layout is gpt2.LAYOUT:
        torch.save(make_gpt2().transformer.state_dict(), tmp_path / "model.pt")
    elif layout is nanogpt.LAYOUT:
        save_nanogpt(tmp_path / "model.pt")
    else:
        torch.save(make_book_weights(), tmp_path / "model.pt")

    def exchange(name):
        return name.replace(pair[0], "?").replace(pair[1], pair[0]).replace("?", pair[1])

    wrong = {module: tuple(map(exchange, names)) for module, names in layout.modules.items()}
    assert any(wrong[module] != names for module, names in layout.modules.items())
    for module, names in wrong.items():
        monkeypatch.setitem(layout.modules, module, names)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match="does not match its source, so nothing was written"):
        convert(tmp_path / "model.pt", tmp_path / "out", num_heads=HEADS)
    assert sorted(tmp_path.iterdir()) == before


# Export


def test_the_configuration_has_the_keys_llama_cpp_reads(tiny_config, tmp_path):
    """The keys that conversion/gpt2.py of llama.cpp reads without a default."""
    HfGPTForCausalLM(tiny_config()).save_pretrained(tmp_path / "ours")
    export_model(str(tmp_path / "ours"), tmp_path / "gpt2", console=QUIET)
    config = json.loads((tmp_path / "gpt2" / "config.json").read_text())
    read = ("architectures", "n_layer", "n_ctx", "n_embd", "n_head", "layer_norm_epsilon", "vocab_size")
    assert [config[key] for key in read] == [["GPT2LMHeadModel"], 2, 32, 32, 4, 1e-5, 64]


def test_an_adapter_is_merged_on_request(tiny_config, ids, tmp_path):
    HfGPTForCausalLM(tiny_config()).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    settings = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, settings)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match="is an adapter: pass --merge-adapter"):
        export_model(str(tmp_path / "adapter"), tmp_path / "out", console=QUIET)
    with pytest.raises(InputError, match="is not an adapter: leave out --merge-adapter"):
        export_model(str(tmp_path / "base"), tmp_path / "out", merge_adapter=True, console=QUIET)
    export_model(str(tmp_path / "adapter"), tmp_path / "out", merge_adapter=True, console=QUIET)
    ids = ids[:, :32] % 64
    expected = logits_of(model, ids)
    assert (logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), ids) - expected).abs().max() > 0.1
    assert_close(logits_of(GPT2LMHeadModel.from_pretrained(tmp_path / "out"), ids), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}), "is quantized"),
        (lambda weights: weights.update({"model.extra.weight": torch.ones(1)}), "no weight like model.extra.weight"),
    ],
)
def test_what_gpt2_cannot_represent_is_refused(change, message, tiny_config):
    model = HfGPTForCausalLM(tiny_config())
    weights = dict(model.state_dict())
    change(weights)
    with pytest.raises(InputError, match=message):
        gpt2.gpt2_weights(weights, build_native_on_meta(model.config))


def test_byte_level_tokenizers_are_saved_for_older_tools_too(tiny_config, tmp_path):
    tokenizer = train_tokenizer(["hello world, hello words"], "bpe", vocab_size=260)
    config = tiny_config(vocab_size=len(tokenizer))
    HfGPTForCausalLM(config).save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    export_model(str(tmp_path / "ours"), tmp_path / "out", console=QUIET)
    assert {"vocab.json", "merges.txt", "tokenizer.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    vocabulary = json.loads((tmp_path / "out" / "vocab.json").read_text())
    assert vocabulary == {token: number for token, number in tokenizer.get_vocab().items() if token in vocabulary}
