"""ONNX exports in transformers.js: the ids and the greedy continuations are those of transformers."""

import io

import pytest
import torch
from engines import TEXTS, encode, known_part, run_node
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfgpt  # noqa: F401  registers the model
from hfgpt.commands.export import ExportArguments, export
from hfgpt.demo_corpus import generate_stories

pytestmark = pytest.mark.engine

CONTINUED = 64


def test_ids_and_greedy_continuations_are_equal(models, tmp_path):
    jobs, expected, prompt = {}, {}, next(generate_stories(1, seed=77))
    for (kind, layout), path in models.items():
        name = f"{kind}-{layout}"
        tokenizer = AutoTokenizer.from_pretrained(path)
        texts = [known_part(tokenizer, text) if kind == "char" else text for text in TEXTS]
        ids = encode(tokenizer, prompt)[:20]
        export(str(path), tmp_path / name, ExportArguments("onnx"), Console(file=io.StringIO()))
        jobs[name] = {"model": str(tmp_path / name), "texts": texts, "prompt": ids, "count": CONTINUED}
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        whole = model.generate(torch.tensor([ids]), max_new_tokens=CONTINUED, do_sample=False, pad_token_id=0)
        expected[name] = ([encode(tokenizer, text) for text in texts], whole[0, len(ids) :].tolist())
    for name, result in zip(jobs, run_node("transformers_js.mjs", list(jobs.values()), tmp_path), strict=True):
        ids, continuation = expected[name]
        assert len(continuation) == CONTINUED
        assert result["continuation"] == continuation, name
        wrong = [row for row in zip(jobs[name]["texts"], result["ids"], ids, strict=True) if row[1] != row[2]]
        assert not wrong, f"{name}: {len(wrong)} differ, such as {wrong[:3]}"
