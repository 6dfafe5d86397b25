"""GGUF files in llama.cpp: the ids, the greedy continuations and the probabilities are those of transformers."""

import copy
import io
import math
import random

import pytest
import torch
from engines import TEXTS, encode, known_part, run_node
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfgpt  # noqa: F401  registers the model
from hfgpt.commands.export import ExportArguments, export
from hfgpt.conversion.gguf import FILE_TYPES
from hfgpt.demo_corpus import generate_stories

pytestmark = pytest.mark.engine

CONTINUED = 64


def random_texts(count: int) -> list[str]:
    """Texts of characters from all of Unicode, common and rare, next to spaces, letters and digits."""
    generator = random.Random(0)
    ranges = [(1, 0x7F), (0x80, 0x24F), (0x300, 0x36F), (0x370, 0x1FFF), (0x2000, 0x2BFF), (0x3000, 0xD7FF)]
    ranges += [(0xE000, 0xFFFF), (0x10000, 0x1FFFF), (0x20, 0x20), (0x61, 0x7A), (0x30, 0x39)]
    return [
        "".join(chr(generator.randint(*generator.choice(ranges))) for _ in range(generator.randint(1, 40)))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def measured(models, tmp_path_factory):
    """(name, dtype, job, model, tokenizer, result of llama.cpp) of every exported file."""
    folder, found = tmp_path_factory.mktemp("gguf"), []
    stories = list(generate_stories(6, seed=77))
    for (kind, layout), path in models.items():
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        texts = [*TEXTS, *random_texts(300)] if layout == "tied" else TEXTS
        if kind == "char":  # llama.cpp drops unknown characters
            texts = [known_part(tokenizer, text) for text in texts]
        rows = [encode(tokenizer, story)[: model.config.max_position_embeddings] for story in stories]
        rows = rows[: 1 if kind == "gpt2" else 6]  # sorting a large vocabulary takes most of the time
        for dtype in FILE_TYPES if layout == "tied" else ("f32", "q8_0"):
            out = folder / f"{kind}-{layout}-{dtype}"
            export(str(path), out, ExportArguments("gguf", dtype), Console(file=io.StringIO()))
            job = {"model": str(out / "model.gguf"), "texts": texts, "prompt": rows[0][:20], "count": CONTINUED}
            found.append((out.name, dtype, {**job, "rows": rows, "exact": dtype == "f32"}, model, tokenizer))
    results = run_node("llama.mjs", [job for _, _, job, _, _ in found], folder)
    return [(*row, result) for row, result in zip(found, results, strict=True)]


def test_ids_are_those_of_the_tokenizer(measured):
    wrong = [
        (name, text, ids, encode(tokenizer, text))
        for name, _, job, _, tokenizer, result in measured
        for text, ids in zip(job["texts"], result["ids"], strict=True)
        if ids != encode(tokenizer, text)
    ]
    assert not wrong, f"{len(wrong)} differ, such as {wrong[:3]}"


def test_greedy_continuations_are_equal(measured):
    for name, dtype, job, model, _, result in measured:
        if dtype == "f32":
            prompt = torch.tensor([job["prompt"]])
            whole = model.generate(prompt, max_new_tokens=CONTINUED, do_sample=False, pad_token_id=0)
            assert result["continuation"] == whole[0, prompt.shape[1] :].tolist(), name
            assert len(result["continuation"]) == CONTINUED, name


class TableGELU(torch.nn.Module):
    """llama.cpp's GELU on a CPU: from a table of float16 values, the largest difference from transformers."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        rounded = torch.nn.functional.gelu(values.half().float(), approximate="tanh").half().float()
        return torch.where(values <= -10, 0.0, torch.where(values >= 10, values, rounded))


def log_probabilities(model, tokenizer, row: list[int]) -> torch.Tensor:
    """Those of the next token after each position (T, V), without the ids that have no token."""
    with torch.no_grad():
        logits = model(torch.tensor([row])).logits[0, :, : len(tokenizer)]
    return logits.double().log_softmax(-1)


def test_log_probabilities(measured):
    """f32: of the likeliest token within 1e-3 with llama.cpp's GELU, and 5e-3 without. q8_0: perplexity to 0.5%."""
    for name, dtype, job, model, tokenizer, result in measured:
        tabled = copy.deepcopy(model)
        for layer in tabled.model.layers:
            layer.mlp.act_fn = TableGELU()
        largest, ours, theirs = {"exact": 0.0, "table": 0.0}, [], []
        for row, found in zip(job["rows"], result["rows"], strict=True):
            for kind, network in (("table", tabled), ("exact", model)):
                expected = log_probabilities(network, tokenizer, row)
                top = expected.gather(1, torch.tensor(found["likeliest"])[:, None])[:, 0]
                largest[kind] = max(largest[kind], (top - torch.tensor(found["top"]).double()).abs().max().item())
            ours += expected[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0].tolist()
            theirs += found["next"]
        ratio = math.exp((sum(ours) - sum(theirs)) / len(ours))
        print(f"{name}: largest differences {largest}, perplexity times {ratio:.5f}")
        assert dtype != "f32" or (largest["table"] < 1e-3 and largest["exact"] < 5e-3), name
        assert abs(ratio - 1) < 0.005, name
