"""lm-evaluation-harness: its numbers are those of the model, for any batch size, and what is cut is said."""

import copy
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfgpt import HfGPTForCausalLM, cli
from hfgpt.commands.evaluate import evaluate_benchmarks, render_benchmarks
from hfgpt.commands.export import ExportArguments, export
from hfgpt.data.sources import DataArguments
from hfgpt.data.templates import TEMPLATES
from hfgpt.demo_corpus import generate_stories
from hfgpt.errors import InputError
from hfgpt.evaluation import BenchmarkArguments, EvaluationArguments
from hfgpt.evaluation.perplexity import row_nll
from hfgpt.models import find_model
from hfgpt.records import read_benchmarks
from hfgpt.tasks import TASKS
from hfgpt.tokenizer import train_tokenizer, wrap_in_end_of_text

pytestmark = pytest.mark.engine

STORIES = list(generate_stories(40, seed=77))
TARGETS = {
    "multiple_choice": {"doc_to_choice": "{{choices}}", "doc_to_target": "gold"},
    "loglikelihood_rolling": {"doc_to_target": "{{text}}"},
    "generate_until": {"doc_to_target": "{{answer}}", "generation_kwargs": {"until": ["."], "max_gen_toks": 30}},
}


@pytest.fixture
def write_task(tmp_path):
    """Writes a task and its rows; returns its YAML file."""

    def write(kind: str, rows: list[dict], *metrics: str, name: str = "own", **settings):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        content = {"output_type": kind, "test_split": "test", "doc_to_text": "{{prompt}}", **common, **TARGETS[kind]}
        content["metric_list"] = [{"metric": metric} for metric in metrics]
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content | settings))
        return str(tmp_path / f"{name}.yaml")

    return write


@pytest.fixture
def folder(story_model, tmp_path):
    return str(shutil.copytree(story_model, tmp_path / "model"))


@pytest.fixture(scope="module")
def loaded(story_model):
    model = AutoModelForCausalLM.from_pretrained(story_model, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(story_model)


def score(model, ids: list[int], count: int) -> float:
    """The log-likelihood of the last `count` ids, with as much context as fits before them."""
    ids = torch.tensor([ids[-(model.config.max_position_embeddings + 1) :]])
    targets = ids[:, 1:].clone()
    targets[:, : targets.shape[1] - count] = -100
    with torch.no_grad():
        return -row_nll(model, {"input_ids": ids[:, :-1], "shift_labels": targets})[0].item()


def evaluate(path, task, **options):
    (result,) = evaluate_benchmarks(path, BenchmarkArguments([task], **options)).values()
    return result


def test_multiple_choice(folder, loaded, write_task, hub):
    model, tokenizer = loaded
    rows, right, right_per_letter = [], 0, 0
    for number, story in enumerate(STORIES):
        words = story.split()
        start = len(words) - 7 - number % 20
        end = start + 3 + number % 4
        choices = [" ".join(words[start:end][::-1]), " ".join(words[start - 2 : end - 2]), " ".join(words[start:end])]
        rows.append({"prompt": " ".join(words[:start]), "choices": choices, "gold": 2})
        scores = []
        for choice in choices:
            ids, prompt = tokenizer.encode(f"{rows[-1]['prompt']} {choice}"), tokenizer.encode(rows[-1]["prompt"])
            assert ids[: len(prompt)] == prompt
            scores.append(score(model, ids, len(ids) - len(prompt)))
        right += max(scores) == scores[2]
        per_letter = [value / len(choice) for value, choice in zip(scores, choices, strict=True)]
        right_per_letter += max(per_letter) == per_letter[2]
    task = write_task("multiple_choice", rows, "acc", "acc_norm")
    results = [evaluate(folder, task, batch_size=size) for size in (1, 8)]
    for result in results:
        assert result.metrics["acc"] == right / len(rows)
        assert result.metrics["acc_norm"] == right_per_letter / len(rows)
        assert 0.2 < result.metrics["acc"] < 1
        assert (result.rows, result.of_rows, result.num_fewshot) == (40, 40, 0)
    context = model.config.max_position_embeddings
    lengths = [len(tokenizer.encode(f"{row['prompt']} {choice}")) for row in rows for choice in row["choices"]]
    assert results[0].truncated == sum(length > context + 1 for length in lengths) > 10
    assert hub.log == [], "no network"


def test_bits_per_byte_are_those_of_hfgpt(folder, loaded, write_task, tmp_path):
    model, tokenizer = loaded
    context = model.config.max_position_embeddings
    ids = tokenizer.encode(" ".join(STORIES))[: 3 * context]
    text = tokenizer.decode(ids)
    assert tokenizer.encode(text) == ids
    (tmp_path / "text.txt").write_text(tokenizer.eos_token + text)
    ours = TASKS["pretrain"].evaluate(
        find_model(folder), DataArguments(path=str(tmp_path / "text.txt")), EvaluationArguments()
    )
    assert ours["eval_tokens"] == len(ids)
    expected = ours["eval_loss"] * len(ids) / math.log(2) / len(text.encode())
    task = write_task("loglikelihood_rolling", [{"prompt": "", "text": text}], "bits_per_byte")
    found = [evaluate(folder, task, batch_size=size).metrics["bits_per_byte"] for size in (1, 8)]
    assert found == pytest.approx([expected, expected], rel=1e-6)


def test_generation(folder, loaded, write_task):
    """Each answer is what the model generates alone; prompts may be empty, or longer than the context."""
    model, tokenizer = loaded
    context, rows = model.config.max_position_embeddings, []
    prompts = ["", *(story[: 40 + 25 * number] for number, story in enumerate(STORIES)), " ".join(STORIES)]
    for prompt in prompts:
        ids = (tokenizer.encode(prompt) or [tokenizer.eos_token_id])[-(context - 30) :]
        start = len(ids)
        while (
            len(ids) < start + 30
            and tokenizer.eos_token_id not in ids[start:]
            and "." not in tokenizer.decode(ids[start:])
        ):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        answer = tokenizer.decode(ids[start:], skip_special_tokens=True).split(".")[0]
        rows.append({"prompt": prompt, "answer": answer})
    task = write_task("generate_until", rows, "exact_match")
    for size in (1, 8):
        result = evaluate(folder, task, batch_size=size)
        assert result.metrics["exact_match"] == 1
        lengths = [len(tokenizer.encode(prompt)) for prompt in prompts]
        assert result.truncated == sum(length + 30 > context for length in lengths) > 1
        assert result.shortened is None


def test_new_tokens_are_limited_to_the_context(folder, write_task):
    """The harness asks for 256 new tokens by default."""
    task = write_task("generate_until", [{"prompt": "Once", "answer": "x"}], "exact_match", generation_kwargs={})
    result = evaluate(folder, task)
    assert (result.shortened, result.truncated) == (1, None)
    assert "1 answer limited to what fits in the context" in render_benchmarks({"own": result})


def test_log_likelihoods(loaded):
    from lm_eval.api.instance import Instance

    from hfgpt.evaluation.harness import FittedLM

    model, tokenizer = loaded
    story, end = STORIES[0], tokenizer.eos_token_id
    long = tokenizer.decode(tokenizer.encode(" ".join(STORIES))[:400])
    pairs = [
        ("", story[:50]),
        (" \n", "Once"),
        ("Once upon", " a"),
        ("Once up", "on a time"),
        (long, " there"),
        ("Once", long),
    ]
    expected = []
    for context, continuation in pairs:
        before, after = tokenizer.encode(context), tokenizer.encode(continuation)
        if not context.strip():
            before, after = [end], tokenizer.encode(context + continuation)
        elif tokenizer.encode(context + continuation)[: len(before)] == before:
            after = tokenizer.encode(context + continuation)[len(before) :]
        ends = [len(after)] if len(after) <= 160 else [*range(80, len(after), 80), len(after)]
        parts = zip([0, *ends], ends, strict=False)
        expected.append(sum(score(model, before + after[:stop], stop - start) for start, stop in parts))
    requests = [Instance("loglikelihood", {}, pair, 0, ("own", 0, 1)) for pair in pairs]
    for size in (1, 4):
        lm = FittedLM(model, tokenizer, size)
        found = lm.loglikelihood(requests, disable_tqdm=True)
        assert [value for value, _ in found] == pytest.approx(expected, rel=1e-5)
        assert lm.truncated["own"] == 2
    wrapped = copy.deepcopy(tokenizer)
    wrap_in_end_of_text(wrapped)  # as if it were a classifier's
    assert FittedLM(model, wrapped, 4).loglikelihood(requests, disable_tqdm=True) == found
    assert found[2][1] is True, "greedy decoding continues 'Once upon' with ' a'"


def test_unknown_characters_are_counted_and_give_no_bits_per_byte(tiny_config, write_task, tmp_path):
    tokenizer = train_tokenizer(["abc abc"], "char")
    model = HfGPTForCausalLM(tiny_config(vocab_size=len(tokenizer), eos_token_id=0))
    model.save_pretrained(tmp_path / "char")
    tokenizer.save_pretrained(tmp_path / "char")
    path = str(tmp_path / "char")
    known = write_task("loglikelihood_rolling", [{"prompt": "", "text": "abc"}], "bits_per_byte", name="known")
    assert evaluate(path, known).metrics.keys() == {"bits_per_byte"}
    rolling = write_task("loglikelihood_rolling", [{"prompt": "", "text": "abcxyz"}], "bits_per_byte", name="rolling")
    result = evaluate(path, rolling)
    assert (result.metrics, result.unknown_tokens) == ({}, 3)
    assert "not measured" in render_benchmarks({"rolling": result})
    choices = write_task(
        "multiple_choice", [{"prompt": "a!", "choices": ["a", "?"], "gold": 0}], "acc", name="choices"
    )
    assert evaluate(path, choices).unknown_tokens == 3
    assert read_benchmarks(tmp_path / "char").keys() == {"known", "rolling", "choices"}
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(path)
    evaluate(path, known)
    assert read_benchmarks(tmp_path / "char").keys() == {"known"}, "the others were measured on other weights"


def test_exports_and_adapters(folder, write_task, tmp_path):
    from peft import LoraConfig, get_peft_model

    from hfgpt.commands.merge import merge

    task = write_task("loglikelihood_rolling", [{"prompt": "", "text": STORIES[0]}], "bits_per_byte")
    expected = evaluate(folder, task).metrics["bits_per_byte"]
    export(folder, tmp_path / "gpt2", ExportArguments("gpt2"))
    assert evaluate(str(tmp_path / "gpt2"), task).metrics["bits_per_byte"] == pytest.approx(expected, rel=1e-6)
    torch.manual_seed(0)
    adapted = get_peft_model(find_model(folder).load(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    find_model(folder).load_tokenizer().save_pretrained(tmp_path / "adapter")
    changed = evaluate(str(tmp_path / "adapter"), task).metrics["bits_per_byte"]
    assert abs(changed - expected) > 0.01
    merge(str(tmp_path / "adapter"), tmp_path / "merged", 1e-4)
    assert evaluate(str(tmp_path / "merged"), task).metrics["bits_per_byte"] == pytest.approx(changed, rel=1e-5)
    assert "| own | bits_per_byte |" in (tmp_path / "merged" / "README.md").read_text()


def test_options(folder, write_task):
    rows = [{"prompt": story[:40], "choices": ["a", "b"], "gold": 0} for story in STORIES]
    task = write_task("multiple_choice", rows, "acc", fewshot_split="test")
    result = evaluate(folder, task, limit=5, num_fewshot=2)
    assert (result.rows, result.of_rows, result.num_fewshot) == (5, 40, 2)
    assert "2 examples per prompt; 5 rows of 40" in render_benchmarks({"own": result})
    with pytest.raises(InputError, match="needs a tokenizer with a chat template"):
        evaluate(folder, task, chat_template=True)


def test_chat_template(folder, loaded, write_task):
    model, tokenizer = loaded
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = next(iter(TEMPLATES.values()))
    tokenizer.save_pretrained(folder)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "A fox"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(chat, return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=30, do_sample=False)[0, ids["input_ids"].shape[1] :]
    row = {"prompt": "A fox", "answer": tokenizer.decode(answer, skip_special_tokens=True).split(".")[0]}
    result = evaluate(folder, write_task("generate_until", [row], "exact_match"), chat_template=True)
    assert (result.metrics["exact_match"], result.chat_template) == (1, True)


def test_the_command_prints_one_json_object(folder, write_task, capsys):
    task = write_task("multiple_choice", [{"prompt": "a", "choices": ["a", "b"], "gold": 0}], "acc")
    cli.app(["evaluate", folder, "--benchmarks", task, "--json"], standalone_mode=False)
    out = capsys.readouterr().out
    found = json.loads(out)["benchmarks"]["own"]
    assert found == json.loads((Path(folder) / "metrics.json").read_text())["benchmarks"]["own"]
    assert out.count("\n") == 1


def test_groups(folder, write_task, tmp_path):
    rows = [{"prompt": story[:40], "choices": ["a", "b"], "gold": number % 2} for number, story in enumerate(STORIES)]
    names = [
        write_task("multiple_choice", rows[part::2], "acc", name=f"part{part}") and f"part{part}" for part in (0, 1)
    ]
    group = {"group": "parts", "task": names, "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "group.yaml").write_text(yaml.safe_dump(group))
    arguments = BenchmarkArguments([str(tmp_path / "group.yaml")])
    found = evaluate_benchmarks(folder, arguments)
    assert found.keys() == {"parts", "part0", "part1"}
    assert found["parts"].metrics["acc"] == (found["part0"].metrics["acc"] + found["part1"].metrics["acc"]) / 2
    assert found["parts"].rows == 40


def test_refusals(folder, write_task, tmp_path):
    row = {"prompt": "a", "choices": ["a", "b"], "gold": 0}

    def refusal(*names: str, **options) -> str:
        with pytest.raises(InputError) as caught:
            evaluate_benchmarks(folder, BenchmarkArguments(names, **options))
        return str(caught.value)

    assert refusal("arc_esy").startswith("no benchmark is named 'arc_esy' (nearest: arc_easy")
    assert "'humaneval' runs code that the model writes" in refusal("humaneval")
    fixed = write_task("multiple_choice", [row], "acc", name="fixed", num_fewshot=0)
    assert "'fixed' is defined without examples" in refusal(fixed, num_fewshot=2)
    assert "'fixed' is named twice" in refusal(fixed, fixed)
    foreign = write_task("multiple_choice", [row], "acc", "bertscore", name="foreign")
    assert "needs the metric 'bertscore', whose code is on the Hub" in refusal(foreign)
    unsafe = write_task("multiple_choice", [row], "acc", name="unsafe", unsafe_code=True)
    assert "'unsafe' runs code that the model writes" in refusal(unsafe)
    wrong = write_task("multiple_choice", [row], "acc", name="wrong", doc_to_text="{{ x.y }}")
    assert re.search(r"wrong\.yaml' cannot be run \(UndefinedError: 'x' is undefined\)", refusal(wrong))
    (tmp_path / "wrong.jsonl").unlink()
    assert "cannot be run (FileNotFoundError: " in refusal(wrong)
    assert "has no benchmark" in refusal(str(tmp_path / "none.yaml"))
    (tmp_path / "list.yaml").write_text("[1, 2]")
    assert "cannot be run (ValueError: Expected YAML dict" in refusal(str(tmp_path / "list.yaml"))
    assert read_benchmarks(tmp_path / "model") == {}
