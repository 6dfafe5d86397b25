"""Paired measurements, and the contenders of `hfgpt bench`, which compute the same."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from hfgpt.bench import BenchArguments, decode, train
from hfgpt.bench import data as data_module
from hfgpt.bench.load import LOAD, OURS
from hfgpt.bench.measuring import GPT2, HFGPT, NANOGPT, Comparison, measure_in_turns, measure_matrix_flops, run_python
from hfgpt.bench.models import SMALL, Shape, build_models, draw_ids, loss_of
from hfgpt.commands.bench import bench, render_comparison
from hfgpt.errors import InputError
from hfgpt.training import arguments
from hfgpt.training.arguments import HfGPTTrainingArguments

CPU = torch.device("cpu")
TINY = Shape("tiny", 1, 2, 8, 50, 96, length=16, rows=3)


def test_contenders_take_turns_in_another_order_each_round():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) or float(len(calls)) for name in "abc"}
    advanced = []
    values = measure_in_turns(contenders, lambda: advanced.append(1), rounds=3)
    assert "".join(calls) == "abcbcacab"
    assert values == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}
    assert len(advanced) == 9


def test_ratios_are_those_of_the_same_round():
    found = Comparison("train", "step", "tokens/s", {HFGPT: [10.0, 40.0, 15.0], GPT2: [5.0, 40.0, 10.0]}, limit=30.0)
    assert (found.median(), found.median(GPT2), found.ratio(GPT2), found.used) == (15, 10, 1.5, 0.5)
    assert found.spread() == 2
    assert json.loads(json.dumps(found.to_dict()))["ratios"] == {GPT2: 1.5}
    assert render_comparison(found).split(maxsplit=1)[1] == (
        "hfgpt 15.00 ±100% tokens/s; GPT-2 10.00 ±175% (x1.50); 50% of the limit"
    )


def test_the_rate_of_matrix_products_is_plausible():
    assert 1e8 < measure_matrix_flops(CPU, torch.float32, seconds=0.05) < 1e16


@pytest.fixture
def nanogpt(tmp_path):
    """A stand-in for nanoGPT's model.py, with the same interface and names of weights, and no attention."""
    (tmp_path / "model.py").write_text(
        """
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel


class GPTConfig:
    def __init__(self, *fields):
        self.context, self.rows, self.layers, self.heads, self.hidden, self.dropout, self.bias = fields


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        settings = dict(n_positions=config.context, vocab_size=config.rows, n_layer=config.layers, n_head=config.heads)
        self.inner = GPT2LMHeadModel(GPT2Config(n_embd=config.hidden, **settings)).eval()
        print("number of parameters")

    def state_dict(self):
        \"\"\"With matrices as in nn.Linear.\"\"\"
        return {n: w.T if w.ndim == 2 and ".h." in n else w for n, w in self.inner.state_dict().items()}

    def forward(self, ids, targets):
        logits = self.inner(ids).logits
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def generate(self, ids, count, top_k):
        return torch.cat([ids, ids.new_zeros(len(ids), count)], 1)
"""
    )
    return tmp_path


def test_contenders_compute_the_same_loss_and_gradients(nanogpt, capsys):
    models = build_models(TINY, CPU, nanogpt)
    assert list(models) == [HFGPT, GPT2, NANOGPT]
    assert capsys.readouterr().out == ""
    ids = draw_ids(TINY, CPU)
    expected = loss_of(models[HFGPT], ids)
    logits = models[HFGPT](ids[:, :-1]).logits
    torch.testing.assert_close(expected, torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
    expected.backward()
    gradient = models[HFGPT].model.layers[0].mlp.up_proj.weight.grad
    for name in (GPT2, NANOGPT):
        model = models[name]
        loss = loss_of(model, ids)
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
        theirs = getattr(model, "inner", model).transformer.h[0].mlp.c_fc.weight.grad.T
        torch.testing.assert_close(theirs, gradient, rtol=0, atol=1e-5)
    assert list(build_models(TINY, CPU, only=GPT2)) == [GPT2]


def test_a_contender_that_computes_something_else_is_noticed(nanogpt):
    code = (nanogpt / "model.py").read_text()
    (nanogpt / "model.py").write_text(code.replace("return logits, nn", "return logits, 1.1 * nn"))
    with pytest.raises(RuntimeError, match=r"^the loss of nanoGPT is 4\.\d+, that of hfgpt 3\.\d+$"):
        build_models(TINY, CPU, nanogpt)


def test_both_trainers_in_the_precision_of_their_defaults(monkeypatch):
    monkeypatch.setattr(train, "has_native_bf16", lambda device: False)
    assert train.loop_cases(CPU) == {"float32": {HFGPT: "float32", GPT2: "float32"}}
    monkeypatch.setattr(train, "has_native_bf16", lambda device: True)
    assert train.loop_cases(CPU)["defaults"] == {HFGPT: "bfloat16", GPT2: "float32"}
    monkeypatch.setattr(arguments, "has_native_bf16", lambda device: True)
    assert (HfGPTTrainingArguments().bf16, TrainingArguments().bf16) == (True, False)


@pytest.mark.parametrize("name", [HFGPT, GPT2])
def test_compiled_steps_are_those_of_the_model(name, monkeypatch):
    """With a compiler that generates no code; on an accelerator, it is the usual one."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    ids = draw_ids(TINY, CPU)
    steps = [train.BareStep(build_models(TINY, CPU)[name], ids, bf16=False, compiled=flag) for flag in (False, True)]
    for step in steps:
        step.take()
    for expected, found in zip(*(step.model.parameters() for step in steps), strict=True):
        torch.testing.assert_close(found, expected)


def run_loop_here(code: str, argument: str) -> float:
    """In this process, since starting one takes seconds."""
    assert code == train.LOOP
    name, shape, precision = json.loads(argument)
    return train.run_loop(name, Shape(**shape), precision)


def test_all_parts_measure_every_contender(nanogpt, monkeypatch, capsys):
    """With a tiny model; loading and memory, which start processes, are measured by hand."""
    monkeypatch.setattr(train, "choose_shapes", lambda device: [TINY])
    monkeypatch.setattr(train, "SECONDS", 0.01)
    monkeypatch.setattr(train, "run_python", run_loop_here)
    monkeypatch.setattr(decode, "SHAPES", [TINY])
    monkeypatch.setattr(data_module, "STORIES", 30)
    found, machines = [], []
    for part in ("train", "decode", "data"):
        bench(BenchArguments(part, nanogpt), machines.append, found.append)
    assert capsys.readouterr() == ("", "")
    precisions = list(machines[0].matrix_flops)
    assert precisions == train.precisions(CPU)
    contenders = {comparison.what: list(comparison.values) for comparison in found}
    assert contenders == {
        **{f"step, tiny, {precision}": [HFGPT, GPT2] for precision in precisions},
        **{f"step, tiny, exact GELU, {precision}": [HFGPT, NANOGPT] for precision in precisions},
        **{f"Trainer, tiny, {case}": [HFGPT, GPT2] for case in train.loop_cases(CPU)},
        **{f"{case}, tiny, 1 row": [HFGPT, GPT2, NANOGPT] for case in ("greedy", "sampled", "first token")},
        **{f"{case}, tiny, 16 rows": [HFGPT, GPT2] for case in ("greedy", "sampled", "first token")},
        **{
            f"{case}, {loop}, tiny, 1 row": [HFGPT, GPT2]
            for case in ("greedy", "sampled")
            for loop in ("fast loop", "--fast")
        },
        "text to rows, 0 MB, gigatoken": [HFGPT, "map and group_texts", "tokenizer alone"],
    }
    assert all(len(values) == 5 and min(values) > 0 for entry in found for values in entry.values.values())
    assert [entry.limit is not None for entry in found] == [entry.unit == "tokens/s" for entry in found]


def test_loading_is_measured_in_a_process_of_its_own(tmp_path):
    model = build_models(replace(SMALL, hidden=512), CPU, only=HFGPT)[HFGPT]
    model.save_pretrained(tmp_path)
    size = sum(weight.nbytes for weight in model.parameters())
    seconds, memory = run_python(LOAD.format(imported=OURS, folder=str(tmp_path)))
    assert 0 < seconds < 60
    assert size / 2 < memory < 10 * size + 2**26


def test_a_failed_process_is_one_line():
    with pytest.raises(InputError, match=r"^a measurement failed \(MemoryError: too much\): it needs up to 8 GB"):
        run_python("raise MemoryError('too much')")


def test_another_checkout_is_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "model.py").write_text("GPT = 1\n")
    with pytest.raises(InputError, match=r"model\.py does not define GPT and GPTConfig: pass a checkout of nanoGPT$"):
        bench(BenchArguments("train", tmp_path), pytest.fail, pytest.fail)


def test_wrong_arguments():
    with pytest.raises(InputError, match=r"^'speed' is not a part of hfgpt bench: use train, decode, data, load or m"):
        BenchArguments("speed")
    with pytest.raises(InputError, match=r"^--nanogpt '.*' has no model\.py: pass a checkout of github\.com"):
        BenchArguments(nanogpt=Path(sys.prefix))
