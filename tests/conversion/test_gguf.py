"""`export --format gguf` and `ollama`: what the files contain, and what is refused.

tests/engines runs such files in llama.cpp.
"""

import io
import json
import sys

import gguf
import jinja2
import numpy
import pytest
import torch
from gguf import GGUFReader
from rich.console import Console
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hfgpt import HfGPTForCausalLM, HfGPTForSequenceClassification, InputError
from hfgpt.commands.export import ExportArguments, export
from hfgpt.commands.verify import verify
from hfgpt.conversion.gguf import convert_tokenizer, read_gguf, strip_generation
from hfgpt.conversion.ollama import render_template
from hfgpt.data.templates import TEMPLATES
from hfgpt.tokenizer import build_char_tokenizer, train_tokenizer, wrap_in_end_of_text

TEXTS = ["hello wörld, it's", "  two spaces\n\nand 你好 — ü😀!", "say 'hello' to 3 wörlds 😀"]


def make_tokenizer(kind: str, **settings):
    return train_tokenizer(TEXTS * 3, kind, vocab_size=300, **settings)


def save_model(folder, config, tokenizer, **changes):
    """A random model for a tokenizer."""
    size = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    model = HfGPTForCausalLM(config(**{**size, **changes}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


def run(folder, out, dtype=None, kind="gguf"):
    return export(str(folder), out, ExportArguments(kind, dtype), Console(file=io.StringIO()))


def read_metadata(path) -> dict:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


@pytest.mark.parametrize("kind", ["bpe", "char"])
@pytest.mark.parametrize(("tied", "bias"), [(True, True), (False, True), (False, False)])
def test_a_file_has_the_model_and_its_tokenizer(kind, tied, bias, tiny_config, tmp_path):
    tokenizer = make_tokenizer(kind)
    tokenizer.chat_template = TEMPLATES["chat"]
    model = save_model(tmp_path / "ours", tiny_config, tokenizer, tie_word_embeddings=tied, qkv_bias=bias)
    report = run(tmp_path / "ours", tmp_path / "out")
    assert {row.absolute for row in report.differences} == {0.0}
    assert (report.passed, report.greedy_equal) == (True, True)
    files = ["conversion.json", "known_answers.json", "model.gguf"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    assert verify(str(tmp_path / "out")).startswith("verified: this is the model measured on ")
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["format"] == "to gguf, f32"

    metadata = read_metadata(tmp_path / "out" / "model.gguf")
    architecture = {
        "general.architecture": "gpt2",
        "gpt2.context_length": 32,
        "gpt2.embedding_length": 32,
        "gpt2.block_count": 2,
        "gpt2.feed_forward_length": 128,
        "gpt2.attention.head_count": 4,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": strip_generation(TEMPLATES["chat"]),
    }
    assert {name: metadata[name] for name in architecture} == architecture
    assert metadata["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    added = 2 if kind == "bpe" else 3
    assert metadata["tokenizer.ggml.token_type"] == [3] * added + [1] * (len(tokenizer) - added)
    _, rebuilt = read_gguf(tmp_path / "out" / "model.gguf")
    for text in [*TEXTS, " hello<|endoftext|>  \n<|pad|>"]:
        assert rebuilt.encode(text) == tokenizer.encode(text)

    tensors = {found.name: found for found in GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert ("output.weight" in tensors) == (not tied)
    block = model.model.layers[1].self_attn
    qkv = torch.cat([block.q_proj.weight, block.k_proj.weight, block.v_proj.weight])
    numpy.testing.assert_array_equal(tensors["blk.1.attn_qkv.weight"].data, qkv.detach().numpy())
    assert tensors["blk.1.attn_qkv.bias"].data.shape == (96,)
    assert any("filled with zeros" in note for note in report.notes) == (not bias)


# q8_0 rounds to 127 steps, whose size is stored in float16.
@pytest.mark.parametrize(("dtype", "rounding"), [("f16", 2**-11), ("q8_0", 1 / 254 + 2**-11)])
def test_rounded_matrices(dtype, rounding, tiny_config, tmp_path):
    """Everything but matrices stays in float32."""
    tokenizer = make_tokenizer("bpe")
    model = save_model(tmp_path / "ours", tiny_config, tokenizer)
    report = run(tmp_path / "ours", tmp_path / "out", dtype)
    assert report.passed
    assert report.greedy_equal is None
    assert all(row.absolute > 0 for row in report.differences)
    tensors = {found.name: found for found in GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    kinds = {name: found.tensor_type.name.lower() for name, found in tensors.items()}
    matrices = {"token_embd.weight"} | {name for name in kinds if name.endswith("weight") and "norm" not in name}
    matrices -= {"position_embd.weight"}
    assert kinds == {name: dtype if name in matrices else "f32" for name in kinds}
    weight = model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    stored = tensors["blk.0.ffn_up.weight"]
    assert abs(gguf.dequantize(stored.data, stored.tensor_type) - weight).max() <= rounding * abs(weight).max()


def test_embeddings_without_a_token_are_dropped(tiny_config, tmp_path):
    tokenizer = make_tokenizer("bpe")
    save_model(tmp_path / "ours", tiny_config, tokenizer, vocab_size=len(tokenizer) + 20)
    report = run(tmp_path / "ours", tmp_path / "out")
    size = len(tokenizer)
    assert report.notes == [f"cut: rows {size} to {size + 19} of the token embedding, which have no token"]
    reader = GGUFReader(tmp_path / "out" / "model.gguf")
    assert next(found.shape for found in reader.tensors if found.name == "token_embd.weight").tolist() == [32, size]


def test_characters_are_joined_from_their_bytes():
    vocabulary = convert_tokenizer(train_tokenizer(["a é€\n"], "char"))
    assert vocabulary.tokens[3:] == ["Ċ", "Ġ", "a", "Ã©", "âĤ¬"]
    assert vocabulary.merges == ["Ã ©", "â Ĥ", "âĤ ¬"]


def test_a_vocabulary_of_ascii_has_a_merge(tiny_config, tmp_path):
    """llama.cpp does not load a file without merges."""
    save_model(tmp_path / "ours", tiny_config, train_tokenizer(["abc"], "char"))
    run(tmp_path / "ours", tmp_path / "out")
    assert read_metadata(tmp_path / "out" / "model.gguf")["tokenizer.ggml.merges"] == ["ÿ ÿ"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_without_generation_render_the_same_text(name):
    messages = [{"role": role, "content": role.upper()} for role in ("system", "user", "assistant", "user")]
    plain = jinja2.Template(strip_generation(TEMPLATES[name]))
    text = plain.render(messages=messages, eos_token="</s>", add_generation_prompt=True)
    tokenizer = build_char_tokenizer({"a": 0})
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    tokenizer.chat_template = TEMPLATES[name]
    assert text == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "generation %}" not in strip_generation("{%- generation -%} a {% endgeneration %}")


def make_word_level():
    tokenizer = build_char_tokenizer({"a": 0, "b": 1})
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    return tokenizer


def change_backend(change):
    tokenizer = make_tokenizer("bpe")
    change(tokenizer)
    return tokenizer


def add_spaced_token(tokenizer):
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken("<|tool|>", lstrip=True)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_tokenizer("wordpiece"), "the tokenizer is a WordPiece, which llama.cpp encodes differently"),
        (lambda: make_tokenizer("unigram"), "the tokenizer is a Unigram"),
        (
            lambda: PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer(models.WordLevel({"ab": 0, "[UNK]": 1}, unk_token="[UNK]"))
            ),
            "the tokenizer is a WordLevel",
        ),
        (
            lambda: change_backend(
                lambda made: setattr(
                    made.backend_tokenizer, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)
                )
            ),
            "does not split text into words like GPT-2's",
        ),
        (
            lambda: change_backend(lambda made: setattr(made.backend_tokenizer, "normalizer", normalizers.NFC())),
            "the tokenizer normalizes text",
        ),
        (lambda: change_backend(wrap_in_end_of_text), "the tokenizer adds special tokens to every text"),
        (lambda: change_backend(add_spaced_token), "the added token '<|tool|>' includes the spaces around it"),
    ],
)
def test_tokenizers_that_llama_cpp_lacks_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        convert_tokenizer(make())


def test_a_word_level_character_vocabulary(tiny_config, tmp_path):
    """That of nanoGPT's datasets, with an end-of-text token."""
    save_model(tmp_path / "ours", tiny_config, make_word_level(), bos_token_id=2, eos_token_id=2)
    run(tmp_path / "ours", tmp_path / "out")
    metadata = read_metadata(tmp_path / "out" / "model.gguf")
    assert metadata["tokenizer.ggml.tokens"] == ["a", "b", "<|endoftext|>"]
    assert metadata["tokenizer.ggml.eos_token_id"] == metadata["tokenizer.ggml.bos_token_id"] == 2


@pytest.mark.parametrize(
    ("changes", "dtype", "message"),
    [
        ({"hidden_act": "gelu"}, None, "hidden_act is 'gelu', but llama.cpp's GPT-2 has only gelu_pytorch_tanh and"),
        ({"hidden_size": 48}, "q8_0", "hidden_size is 48, but q8_0 needs a multiple of 32: use --dtype f16"),
        ({"intermediate_size": 72}, "q8_0", "intermediate_size is 72, but q8_0 needs a multiple of 32"),
        (
            {"eos_token_id": None, "bos_token_id": None},
            None,
            "the model has 0 end-of-text tokens, but llama.cpp needs",
        ),
        ({"eos_token_id": [0, 1]}, None, "the model has 2 end-of-text tokens"),
        ({}, "int4", "--dtype is 'int4'; it must be one of f32, f16, q8_0"),
    ],
)
def test_models_that_llama_cpp_lacks_are_refused(changes, dtype, message, tiny_config, tmp_path):
    save_model(tmp_path / "ours", tiny_config, make_tokenizer("bpe"), **changes)
    with pytest.raises(InputError, match=message):
        run(tmp_path / "ours", tmp_path / "out", dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_more_refusals(tiny_config, tmp_path, monkeypatch):
    HfGPTForSequenceClassification(tiny_config(num_labels=3)).save_pretrained(tmp_path / "classifier")
    with pytest.raises(InputError, match=r"the model is a classifier, and llama\.cpp has no GPT-2 classifiers"):
        run(tmp_path / "classifier", tmp_path / "out")
    HfGPTForCausalLM(tiny_config()).save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match="has no tokenizer, which a GGUF file contains"):
        run(tmp_path / "bare", tmp_path / "out")
    with pytest.raises(InputError, match="--dtype is for gguf and ollama, not for gpt2: leave it out"):
        run(tmp_path / "bare", tmp_path / "out", "f16", "gpt2")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"GGUF files need the package gguf: pip install 'hfgpt\[gguf\]'"):
        run(tmp_path / "bare", tmp_path / "out")


# Ollama


def test_ollama_gets_a_modelfile(tiny_config, tmp_path):
    save_model(tmp_path / "ours", tiny_config, make_tokenizer("bpe"))
    assert run(tmp_path / "ours", tmp_path / "out", "q8_0", "ollama").passed
    assert (tmp_path / "out" / "Modelfile").read_text() == (
        'FROM ./model.gguf\nTEMPLATE """{{ .Prompt }}"""\nPARAMETER num_ctx 32\nPARAMETER repeat_penalty 1\n'
        'PARAMETER stop "<|endoftext|>"\n'
    )
    assert (tmp_path / "out" / "model.gguf").is_file()


def test_another_chat_template_is_refused(tiny_config, tmp_path):
    tokenizer = make_tokenizer("bpe")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    save_model(tmp_path / "ours", tiny_config, tokenizer)
    with pytest.raises(InputError, match="the chat template is not one of chat, alpaca, phi3, the ones that can be"):
        run(tmp_path / "ours", tmp_path / "out", None, "ollama")
    assert not (tmp_path / "out").exists()


def test_a_template_for_ollama():
    """tests/engines renders all of them with Go."""
    tokenizer = make_tokenizer("bpe")
    tokenizer.chat_template = TEMPLATES["phi3"]
    assert render_template(tokenizer) == (
        "{{ range $index, $message := .Messages }}"
        r'{{ if eq .Role "system" }}{{ "<|system|>\n" }}{{ .Content }}{{ "\n\n" }}'
        r'{{ else if eq .Role "user" }}{{ "<|user|>\n" }}{{ .Content }}{{ "\n" }}'
        r'{{ else if eq .Role "assistant" }}{{ "<|assistant|>\n" }}{{ .Content }}{{ "<|endoftext|>" }}'
        r'{{ end }}{{ end }}{{ "<|assistant|>\n" }}'
    )
