"""`hfgpt evaluate --benchmarks`, with a stand-in for lm-evaluation-harness, which tests/engines runs."""

import importlib.metadata
import json
import shutil
import sys
import types
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import parse_eval_result_entries

from hfgpt import HfGPTForCausalLM, HfGPTForSequenceClassification
from hfgpt.commands.evaluate import evaluate_benchmarks, record_benchmarks, render_benchmarks
from hfgpt.commands.publish import check_weights
from hfgpt.errors import InputError
from hfgpt.evaluation import BenchmarkArguments
from hfgpt.hub import HubArguments
from hfgpt.hub.card import Card, evaluation_results
from hfgpt.hub.folder import read_records
from hfgpt.hub.staging import stage
from hfgpt.hub.usage import Place
from hfgpt.records import Benchmark, ConversionRecord, read_benchmarks, read_metrics, write_metrics
from hfgpt.tokenizer import train_tokenizer

ARGUMENTS = BenchmarkArguments(["piqa"])


class Model:
    """As much of the harness's class for models as `FittedLM` uses; a token's log-likelihood is minus its id."""

    max_gen_toks = 256

    def __init__(self, model, tokenizer, max_length, prefix_token_id, **options):
        self.tokenizer, self.max_length, self.prefix_token_id = tokenizer, max_length, prefix_token_id
        assert options == {"backend": "causal", "add_bos_token": False, "batch_size": 8}

    def tok_encode(self, text, add_special_tokens=None):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _loglikelihood_tokens(self, requests, **options):
        self.parts = [(before, after) for _, before, after in requests]
        assert all(before and after and len(before + after) <= self.max_length + 1 for before, after in self.parts)
        return [(-float(sum(after)), True) for _, after in self.parts]

    def generate_until(self, requests, **options):
        return [request.arguments for request in requests]


@pytest.fixture
def harness(monkeypatch):
    """The module hfgpt.evaluation.harness, with a stand-in for lm_eval; `harness.results` is what it returns."""
    entries = {
        "piqa": SimpleNamespace(cfg={}, yaml_path=None),
        "humaneval": SimpleNamespace(cfg={"unsafe_code": True}, yaml_path=None),
    }
    task = SimpleNamespace(task_name="piqa", UNSAFE_CODE=False, get_config={"num_fewshot": 0}.get)
    manager = SimpleNamespace(
        task_index=entries, all_tasks=list(entries), load=lambda names: {"tasks": {"piqa": task}, "groups": {}}
    )
    content = {
        "lm_eval.api.group": {"Group": object},
        "lm_eval.api.instance": {"Instance": object},
        "lm_eval.api.task": {"Task": object},
        "lm_eval.evaluator": {
            "simple_evaluate": lambda lm, **options: module.results(lm, **options),
            "add_env_info": None,
            "get_git_commit_hash": None,
        },
        "lm_eval.models.huggingface": {"HFLM": Model},
        "lm_eval.models.utils": {"normalize_gen_kwargs": lambda given, most: {"max_gen_toks": most, **given}},
        "lm_eval.tasks": {"TaskManager": lambda include_path=None, include_defaults=True: manager},
    }
    for name, names in content.items():
        for parent in ("lm_eval", name.rpartition(".")[0], name):
            monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent) or types.ModuleType(parent))
        vars(sys.modules[name]).update(names)
        setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], sys.modules[name])
    monkeypatch.setattr(
        importlib.metadata,
        "version",
        lambda name, version=importlib.metadata.version: "0.4.13" if name == "lm_eval" else version(name),
    )
    monkeypatch.delitem(sys.modules, "hfgpt.evaluation.harness", raising=False)
    from hfgpt.evaluation import harness as module

    yield module
    del sys.modules["hfgpt.evaluation.harness"]
    del sys.modules["hfgpt.evaluation"].harness


def results_of(**metrics):
    return {
        "results": {"piqa": {"alias": "piqa", "sample_len": 3, **metrics}},
        "configs": {"piqa": {"dataset_path": "ybisk/piqa", "dataset_name": "plain", "metadata": {"version": 1.0}}},
        "n-samples": {"piqa": {"effective": 3, "original": 10}},
        "n-shot": {"piqa": 0},
    }


@pytest.fixture
def folder(tiny_config, tmp_path):
    tokenizer = train_tokenizer(["abc def"], "char")
    torch.manual_seed(0)
    model = HfGPTForCausalLM(tiny_config(vocab_size=len(tokenizer)))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_results_are_recorded_in_the_metrics(harness, folder):
    write_metrics(folder, {"eval_loss": 1.5})
    harness.results = lambda lm, **options: results_of(
        **{"acc,none": 0.5, "acc_stderr,none": 0.1, "f1,strict": 1, "f1_stderr,strict": "N/A"}
    )
    shown = render_benchmarks(evaluate_benchmarks(str(folder), ARGUMENTS))
    assert read_metrics(folder) == {"eval_loss": 1.5}
    (found,) = read_benchmarks(folder).values()
    assert found.metrics == {"acc": 0.5, "acc_stderr": 0.1, "f1,strict": 1.0}
    assert found.measured == [("acc", 0.5, 0.1), ("f1,strict", 1.0, None)]
    assert (found.dataset, found.subset, found.version, found.lm_eval) == ("ybisk/piqa", "plain", "1.0", "0.4.13")
    assert [line.split() for line in shown.splitlines()[:2]] == [
        ["piqa", "acc", "0.5000", "+-", "0.1000"],
        ["piqa", "f1,strict", "1.0000"],
    ]
    assert shown.endswith("0 examples per prompt; 3 rows of 10; lm_eval 0.4.13")
    assert not (folder / "README.md").exists()


def test_results_of_other_weights_are_dropped_and_not_published(harness, folder):
    record_benchmarks(folder, {"old": Benchmark(metrics={"acc": 0.1})})
    check_weights(folder, read_records(folder))
    record_benchmarks(folder, {"new": Benchmark(metrics={"acc": 0.2})})
    assert read_benchmarks(folder).keys() == {"old", "new"}
    model = HfGPTForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data += 1
    model.save_pretrained(folder)
    with pytest.raises(InputError, match=r"the benchmark 'old' in metrics\.json was measured on other weights"):
        check_weights(folder, read_records(folder))
    record_benchmarks(folder, {"newer": Benchmark(metrics={"acc": 0.3})})
    assert read_benchmarks(folder).keys() == {"newer"}


def test_the_card_and_the_published_results(folder, tmp_path):
    (folder / "README.md").write_text("an old card")
    conversion = ConversionRecord(source="x", format="nanogpt", differences=[{"absolute": 0.0}], weights_sha256="0")
    conversion.write(folder)
    piqa = Benchmark(
        metrics={"acc": 0.25, "acc_stderr": 0.0625}, dataset="ybisk/piqa", rows=8, of_rows=8, num_fewshot=1
    )
    own = Benchmark(metrics={"bits_per_byte": 1.5}, dataset="/home/me/text.jsonl", truncated=1, lm_eval="0.4.13")
    record_benchmarks(folder, {"piqa": piqa, "own": own})
    card = (folder / "README.md").read_text()
    assert "| piqa | acc | 0.2500 | 0.0625 | 1 example per prompt; 8 rows |" in card
    assert "| own | bits_per_byte | 1.5000 |  | 1 request truncated to the context; lm_eval 0.4.13 |" in card
    records = read_records(folder)
    results = {
        result.dataset_name: result for result in Card(records, HubArguments(), Place("me/x")).metadata.eval_results
    }
    assert (results["piqa"].dataset_type, results["piqa"].metric_type, results["piqa"].metric_value) == (
        "ybisk/piqa",
        "acc",
        0.25,
    )
    assert results["own"].dataset_type == "text.jsonl"
    stage(folder, tmp_path / "staged", ["config.json", "model.safetensors"], records, HubArguments(), Place("me/x"))
    entries = parse_eval_result_entries(yaml.safe_load((tmp_path / "staged/.eval_results/hfgpt.yaml").read_text()))
    found = {(entry.dataset_id, entry.task_id): entry.value for entry in entries}
    assert found == {("ybisk/piqa", "piqa/acc"): 0.25, ("text.jsonl", "own/bits_per_byte"): 1.5}
    assert entries == parse_eval_result_entries(evaluation_results(records))
    assert read_benchmarks(tmp_path / "staged")["own"].dataset == "text.jsonl", "no local path"
    assert "/home/me" not in json.dumps(
        [
            path.read_text()
            for path in (tmp_path / "staged").rglob("*.[mjy]*")
            if path.suffix in (".md", ".json", ".yaml")
        ]
    )


def test_requests_are_fitted_to_the_context(harness, tiny_config):
    tokenizer = train_tokenizer(["abcdefgh"], "char")
    config = tiny_config(vocab_size=len(tokenizer), max_position_embeddings=4)
    lm = harness.FittedLM(SimpleNamespace(config=config), tokenizer, 8)

    def score(context, continuation):
        ((value, greedy),) = lm.loglikelihood(
            [SimpleNamespace(args=(context, continuation), task_name="own", doc_id=7)]
        )
        assert greedy
        return value, lm.parts

    def ids(text):
        return tokenizer.encode(text)

    assert score("ab", "cd") == (-sum(ids("cd")), [(ids("ab"), ids("cd"))])
    assert score("", "cd") == (-sum(ids("cd")), [([0], ids("cd"))])
    assert lm.truncated["own"] == 0
    assert score("abc", "def")[1] == [(ids("bc"), ids("def"))]
    assert lm.truncated["own"] == 1
    assert score("a", "bcdefgh") == (
        -sum(ids("bcdefgh")),
        [(ids("a"), ids("bc")), (ids("abc"), ids("de")), (ids("cde"), ids("fg")), (ids("defg"), ids("h"))],
    )
    assert (lm.truncated["own"], lm.unknown_tokens["own"]) == (2, 0)
    score("xy", "z")
    assert lm.unknown_tokens["own"] == 3
    with pytest.raises(InputError, match=r"benchmark 'own' has an empty answer \(row 7\)"):
        score("ab", "")


@pytest.mark.parametrize(
    ("prompt", "asked", "count", "truncated", "shortened"),
    [
        ("a", 3, 3, 0, 0),
        ("a", 7, 7, 0, 0),
        ("a", 9, 7, 0, 1),
        ("abcdefg", 1, 1, 0, 0),
        ("abcdefg", 2, 2, 1, 0),
        ("abcdefg", 9, 2, 1, 1),
        ("", 9, 7, 0, 1),
    ],
)
def test_new_tokens_are_fitted_to_the_context(
    harness, tiny_config, monkeypatch, prompt, asked, count, truncated, shortened
):
    tokenizer = train_tokenizer(["abcdefgh"], "char")
    config = tiny_config(vocab_size=len(tokenizer), max_position_embeddings=8)
    lm = harness.FittedLM(SimpleNamespace(config=config), tokenizer, 8)
    monkeypatch.setattr(harness, "replace", lambda request, arguments: SimpleNamespace(arguments=arguments))
    request = SimpleNamespace(args=(prompt, {"until": ["\n"], "max_gen_toks": asked}), task_name="own")
    assert lm.generate_until([request]) == [(prompt or "<|endoftext|>", {"until": ["\n"], "max_gen_toks": count})]
    assert (lm.truncated["own"], lm.shortened["own"]) == (truncated, shortened)


def test_refusals(harness, folder, tiny_config, tmp_path):
    def refusal(path=folder, **options):
        with pytest.raises(InputError) as caught:
            evaluate_benchmarks(str(path), BenchmarkArguments(**{"names": ["piqa"], **options}))
        return str(caught.value)

    assert refusal(names=["piqua"]).startswith("no benchmark is named 'piqua' (nearest: piqa)")
    assert "'humaneval' runs code that the model writes" in refusal(names=["humaneval"])
    assert "is defined without examples" in refusal(num_fewshot=2)
    assert "is named twice" in refusal(names=["piqa", "piqa"])
    assert "needs a tokenizer with a chat template" in refusal(chat_template=True)
    assert "--batch-size is 0; it must be at least 1" in refusal(batch_size=0)
    harness.results = lambda lm, **options: {}["rows"]
    assert "the benchmark 'piqa' cannot be run (KeyError: 'rows')" in refusal()

    def load_metric(lm, **options):
        harness.evaluate.load("bertscore")

    harness.results = load_metric
    assert "needs the metric 'bertscore', whose code is on the Hub" in refusal()
    shutil.copytree(folder, tmp_path / "classes")
    HfGPTForSequenceClassification(tiny_config(num_labels=2)).save_pretrained(tmp_path / "classes")
    assert "is a classifier; benchmarks need a language model" in refusal(tmp_path / "classes")


def test_without_the_harness(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"needs the package lm_eval\S*: pip install 'hfgpt\[benchmarks\]'"):
        evaluate_benchmarks(str(folder), ARGUMENTS)


@pytest.mark.parametrize("content", [[1], {"piqa": 1}, {"piqa": {}}, {"piqa": {"metrics": {"acc": "high"}}}])
def test_damaged_results_are_an_error(folder, content):
    (folder / "metrics.json").write_text(json.dumps({"eval_loss": 1.0, "benchmarks": content}))
    with pytest.raises(InputError, match=r"metrics\.json' (has an invalid value|is incomplete)"):
        read_records(folder)
