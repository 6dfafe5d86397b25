"""`export --format onnx`: what the folder contains and computes, and what is refused.

tests/engines runs such folders in transformers.js.
"""

import io
import json
import sys

import onnx
import pytest
from rich.console import Console
from transformers import AutoTokenizer

from hfgpt import HfGPTForCausalLM, HfGPTForSequenceClassification, InputError
from hfgpt.commands.export import ExportArguments, export
from hfgpt.commands.verify import verify
from hfgpt.tokenizer import train_tokenizer


def run(folder, out):
    return export(str(folder), out, ExportArguments("onnx"), Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def exported(tiny_config, tmp_path_factory):
    """A random model with embeddings without a token, its export and the report."""
    folder = tmp_path_factory.mktemp("onnx")
    tokenizer = train_tokenizer(["hello wörld, it's"] * 3, "bpe", vocab_size=300)
    config = tiny_config(vocab_size=len(tokenizer) + 20, pad_token_id=tokenizer.pad_token_id)
    HfGPTForCausalLM(config).save_pretrained(folder / "ours")
    tokenizer.save_pretrained(folder / "ours")
    return tokenizer, folder / "out", run(folder / "ours", folder / "out")


def test_a_folder_has_what_transformers_js_reads(exported):
    tokenizer, out, report = exported
    size = len(tokenizer)
    assert (report.passed, report.greedy_equal) == (True, True)
    assert report.notes == [f"cut: rows {size} to {size + 19} of the token embedding, which have no token"]
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["n_layer"], config["n_head"], config["n_embd"]) == ("gpt2", 2, 4, 32)
    assert config["vocab_size"] == size
    assert AutoTokenizer.from_pretrained(out).encode("hello") == tokenizer.encode("hello")
    graph = onnx.load(out / "onnx/model.onnx").graph
    cache = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    assert {given.name for given in graph.input} == {
        "input_ids",
        "attention_mask",
        *(f"past_key_values.{name}" for name in cache),
    }
    assert {found.name for found in graph.output} == {"logits", *(f"present.{name}" for name in cache)}


def test_it_is_verified_in_onnx_runtime(exported):
    _, out, _ = exported
    assert verify(str(out)).startswith("verified: this is the model measured on ")
    with pytest.raises(InputError, match="an ONNX file is computed in float32: leave out --precision"):
        verify(str(out), precision="bfloat16")
    model = onnx.load(out / "onnx/model.onnx")
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weight.raw_data = bytes(len(weight.raw_data))
    onnx.save(model, out / "onnx/model.onnx")
    with pytest.raises(InputError, match="differs in its weights or positions"):
        verify(str(out))


def test_what_is_refused(tiny_config, tmp_path, monkeypatch):
    HfGPTForSequenceClassification(tiny_config(num_labels=3)).save_pretrained(tmp_path / "classifier")
    with pytest.raises(InputError, match=r"the model is a classifier, and transformers\.js has no GPT-2 classifiers"):
        run(tmp_path / "classifier", tmp_path / "out")
    model = HfGPTForCausalLM(tiny_config())
    model.save_pretrained(tmp_path / "ours")
    size = 4 * model.num_parameters()
    with monkeypatch.context() as patch:
        patch.setattr("hfgpt.conversion.onnx.MOST_BYTES", size)
        with pytest.raises(InputError, match=f"the model has {size:,} bytes in float32, but an ONNX file holds"):
            run(tmp_path / "ours", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"ONNX files need the package onnxruntime: pip install 'hfgpt\[onnx\]'"):
        run(tmp_path / "ours", tmp_path / "out")
    assert not (tmp_path / "out").exists()
