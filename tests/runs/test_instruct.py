"""Instruction-tuning runs: their files, what they learn, how they are judged, and chatting with the model."""

import io
import json
import re
import signal
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfgpt.commands.chat import run_chat
from hfgpt.commands.inspect import inspect_recipe
from hfgpt.commands.merge import merge
from hfgpt.data.instructions import InstructionDataArguments
from hfgpt.errors import InputError, Interrupted
from hfgpt.evaluation import AnswerEvaluationArguments
from hfgpt.evaluation.generation import SamplingArguments
from hfgpt.models import find_model, load_model, load_model_tokenizer
from hfgpt.recipe import load_recipe
from hfgpt.runs.run import run as run_recipe
from hfgpt.saving import hash_file
from hfgpt.serving.conversation import Chat
from hfgpt.tasks import TASKS
from hfgpt.training import estimate
from hfgpt.training.callbacks import ProgressCallback

RECIPE = """
task: instruct
tokenizer: {kind: bpe, vocab_size: 300}
model: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, max_position_embeddings: 96}
data: {path: rows.jsonl}
training:
  per_device_train_batch_size: 8
  max_steps: 60
  learning_rate: 0.01
  logging_steps: 10
  use_cpu: true
  bf16: false
evaluation: {max_new_tokens: 8, prompts: ["Say 1"]}
"""
BASED = (
    "".join(line for line in RECIPE.splitlines(keepends=True) if not line.startswith(("model:", "tokenizer:")))
    + "model: {path: finished}\n"
)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The working directory of the tests in this file, with rows and recipes."""
    folder = tmp_path_factory.mktemp("instruct")
    rows = [{"instruction": f"Say {number}", "input": "", "output": "yes"} for number in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny.yaml").write_text(RECIPE)
    (folder / "based.yaml").write_text(BASED)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        probe = estimate.probe_tokens_per_second
        patch.setattr(estimate, "probe_tokens_per_second", lambda *args, **kwargs: probe(*args[:3], seconds=0.02))
        yield folder


def run(output_dir, *overrides, recipe="tiny", resume=False):
    console = Console(file=io.StringIO(), width=500)
    overrides = [f"--{override}" for override in (f"training.output_dir={output_dir}", *overrides)]
    metrics = run_recipe(load_recipe(f"{recipe}.yaml", overrides), resume, console)
    return metrics, console.file.getvalue()


@pytest.fixture(scope="module")
def finished(here):
    """A finished run. Tests must not change its folder."""
    return run("finished")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_run_learns_to_answer_and_to_stop(here, finished):
    metrics, shown = finished
    folder = here / "finished"
    assert metrics == read(folder / "metrics.json")
    assert metrics["eval_exact_match"] == metrics["eval_normalised_match"] == 1.0
    assert metrics["eval_unfinished_answers"] == 0, "the end of text was learned"
    assert metrics["eval_loss"] < 0.1
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == metrics["eval_answers"] == 6
    assert all(answer["answer"] == answer["reference"] == "yes" for answer in answers)
    assert read(folder / "run.json")["weights_sha256"] == hash_file(folder / "model.safetensors")
    assert "sample: Say 1\nyes" in shown
    for split, count in (("validation", "6 tokens"), ("test", "12 tokens"), ("test", "6 rows")):
        assert f"  warning: the {split} split has only {count}, and metrics on fewer than 1" in shown
    assert "| exact match | 100.00% |" in (folder / "README.md").read_text()


def test_transformers_alone_can_generate_answers(here, finished):
    """With transformers alone: the chat template and the end-of-text token are saved with the model."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained("finished"), AutoTokenizer.from_pretrained("finished")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say 3"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(output[0, prompt["input_ids"].shape[1] :]) == "yes<|endoftext|>"


def test_evaluation_gives_the_metrics_of_the_run(here, finished, tmp_path):
    evaluation = AnswerEvaluationArguments(max_new_tokens=8, answers=str(tmp_path / "a"))
    metrics = TASKS["instruct"].evaluate(
        find_model("finished"), InstructionDataArguments(path="rows.jsonl"), evaluation
    )
    assert (metrics["eval_answers"], metrics["eval_exact_match"]) == (60, 1.0)
    assert len((tmp_path / "a" / "answers.jsonl").read_text().splitlines()) == 60
    evaluation.judge.base_url, evaluation.judge.model, evaluation.answers = "http://127.0.0.1:9/v1", "m", None
    with pytest.raises(InputError, match=r"a judge needs a folder for its judgements: set --evaluation.answers"):
        TASKS["instruct"].evaluate(find_model("finished"), InstructionDataArguments(path="rows.jsonl"), evaluation)


def test_evaluate_reads_every_key_it_accepts(here, finished, read_keys):
    data, evaluation = InstructionDataArguments(path="rows.jsonl", max_rows=5), AnswerEvaluationArguments()
    read = read_keys(partial(TASKS["instruct"].evaluate, find_model("finished")), data=data, evaluation=evaluation)
    of_splits = {"data.name", "data.revision", "data.train_split"}  # only read for Hub data sets and folders
    sections = {"data": data, "evaluation": evaluation}
    keys = {f"{section}.{field.name}" for section, kind in sections.items() for field in fields(kind)}
    assert keys - read - of_splits <= set(TASKS["instruct"].only_for_training.keys())


def test_an_adapter_with_packing(here, finished):
    metrics, _ = run("adapter", "adapters.r=2", "data.packing=true", "training.max_steps=3", recipe="based")
    assert metrics["eval_exact_match"] == 1.0, "it started from the base model"
    assert read(here / "adapter" / "data_report.json")["splits"]["train"]["blocks"] < 30
    assert merge("adapter", here / "merged", console=Console(file=io.StringIO())).difference < 1e-5
    tokenizer = load_model_tokenizer("merged")
    assert tokenizer.chat_template == load_model_tokenizer("finished").chat_template
    ends = load_model("merged").generation_config.eos_token_id  # transformers 5.17 turns it into a list
    assert ends in (tokenizer.eos_token_id, [tokenizer.eos_token_id])


def test_resuming_with_a_base_model_without_a_padding_token(here, finished, tmp_path, monkeypatch):
    load_model("finished").save_pretrained(tmp_path / "base")
    tokenizer = load_model_tokenizer("finished")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "base")
    path = f"model.path={tmp_path / 'base'}"
    run("whole", path, "training.max_steps=6", recipe="based")
    step = ProgressCallback.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 3:
            signal.raise_signal(signal.SIGINT)
        return step(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ProgressCallback, "on_step_end", interrupt)
        with pytest.raises(Interrupted):
            run("parts", path, "training.max_steps=6", recipe="based")
    run("parts", path, "training.max_steps=6", recipe="based", resume=True)
    assert hash_file(here / "parts" / "model.safetensors") == hash_file(here / "whole" / "model.safetensors")


def test_a_4_bit_base_model(here, finished):
    pytest.importorskip("bitsandbytes")
    evaluated = ("training.eval_strategy=steps", "training.eval_steps=1")
    quantized = ("adapters.r=2", "model.load_in_4bit=true", "training.max_steps=3", *evaluated)
    _, shown = run("quantized", *quantized, recipe="based")
    everything = load_model("finished").num_parameters()
    trained = 2 * 2 * (4 * (32 + 32) + 2 * (32 + 128))
    assert f"trainable: {trained:,} of {everything + trained:,} parameters" in shown
    assert (here / "quantized" / "adapter_model.safetensors").is_file()
    load_model("quantized")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [f"evaluation.prompts=['{'long ' * 99}']"],
            "which leaves no room in the context of 96: shorten it",
        ),
        (["training.trainable=head"], "this model has tied embeddings"),
        (["training.last_blocks=1"], "training.last_blocks is set: also set training.trainable to last_blocks"),
        (["data.template=chatml"], "data.template is 'chatml'; it must be one of chat, alpaca, phi3"),
        (
            ["data.max_length=5"],
            r"the train split of rows.jsonl has no usable row .60 rows read; dropped: 51 too long",
        ),
        (["evaluation.judge.base_url=http://127.0.0.1:9/v1", "evaluation.judge.model=m"], "the judge 'm' at http"),
    ],
)
def test_a_refused_recipe_leaves_no_files(here, overrides, message):
    with pytest.raises(InputError, match=message):
        run("refused", *overrides)
    assert not (here / "refused").exists()


def test_a_judge_that_fails_midway_loses_no_answers(here, finished, judge, start_judge):
    arguments = judge.arguments
    overrides = [f"evaluation.judge.base_url={arguments.base_url}", "evaluation.judge.model=referee"]

    def fail_after_three(prompt):
        if len(judge.requests) == 4:
            judge.socket.close()  # no further connections are accepted
        return "60"

    judge.reply = fail_after_three
    with pytest.raises(
        InputError, match=r"3 of 6 answers have been judged in judged/judgements.jsonl; everything else is saved"
    ):
        run("judged", *overrides, "training.max_steps=2")
    weights = hash_file(here / "judged" / "model.safetensors")
    assert "eval_exact_match" in read(Path("judged/metrics.json"))
    other = start_judge()  # it scores 50
    overrides[0] = f"evaluation.judge.base_url={other.arguments.base_url}"
    metrics, _ = run("judged", *overrides, "training.max_steps=2", resume=True)
    assert (metrics["eval_judge_scored"], metrics["eval_judge_failures"]) == (6, 0)
    assert len(other.requests) == 1 + 3, "the connection check, and the missing answers"
    assert hash_file(here / "judged" / "model.safetensors") == weights
    assert "| mean judge score, at the end of the run | 55.0000 |" in (here / "judged" / "README.md").read_text()


# Inspection and chat


def test_inspection_highlights_the_targets(here):
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="standard")
    inspect_recipe(load_recipe("tiny.yaml"), 1, console)
    row = console.file.getvalue().partition("row 0")[2]
    styled = dict.fromkeys(("2", "32", "36"), "")
    for code, text in re.findall(r"\x1b\[([\d;]+)m([^\x1b]*)", row):
        styled[code] = styled.get(code, "") + text
    assert styled["2"].replace("\n", "") == "«### User:Say 0### Assistant:»", "the question is dimmed"
    assert sorted(styled["32"] + styled["36"]) == sorted("yes<|endoftext|>"), (
        "the answer and its end token are targets"
    )
    plain = Console(file=io.StringIO(), width=200)
    inspect_recipe(load_recipe("tiny.yaml"), 1, plain)
    assert "«### User:\nSay 0\n\n### Assistant:\n»yes" in plain.file.getvalue()


@pytest.fixture
def chat(here, finished):
    sampling = SamplingArguments(max_new_tokens=8, greedy=True)
    return Chat(load_model("finished"), load_model_tokenizer("finished"), sampling)


def test_a_chat_answers_and_keeps_the_history(chat):
    assert chat.answer("Say 7") == "yes"
    chat.answer("Say 8")
    with pytest.raises(InputError, match=r"the message contains the special token <.endoftext.>: remove it"):
        chat.answer("Say <|endoftext|> 9")
    assert [message["content"] for message in chat.messages[:3]] == ["Say 7", "yes", "Say 8"]
    chat.reset()
    assert chat.messages == []


def test_a_chat_stays_within_the_context(chat):
    seen = []
    forward = chat.model.forward

    def spy(input_ids, **kwargs):
        seen.append(input_ids.shape[1])
        return forward(input_ids, **kwargs)

    chat.model.forward = spy
    chat.system = "Be kind."
    for number in range(12):
        chat.answer(f"Say {number}")
    assert max(seen) <= 96 - 8
    prompt = chat._fit([*chat.messages, {"role": "user", "content": "x"}])
    text = chat.tokenizer.decode(prompt)
    assert text.startswith("### System:\nBe kind."), "the system message is kept"
    assert "Say 0" not in text, "the oldest turn is dropped first"
    kept = list(chat.messages)
    with pytest.raises(
        InputError,
        match=r"has \d+ tokens with its template, but the context only has room for 88 and an answer of 8",
    ):
        chat.answer("long " * 100)
    assert chat.messages == kept


def test_commands_of_a_chat(here, finished, capsys):
    lines = ["Say 3", "/system Be kind.", "", "/what", "Say 4", "/reset", "Say " + "9" * 200, "/exit", "Say 5"]
    run_chat("finished", SamplingArguments(max_new_tokens=8, greedy=True), lines=iter(lines))
    captured = capsys.readouterr()
    assert captured.out == "yes\nyes\n"
    assert "/reset clears the history" in captured.err
    assert "shorten it, or lower --max-new-tokens" in captured.err.replace(" \n", " ")


def test_the_same_seed_gives_the_same_chat(here, finished):
    def talk(seed):
        sampling = SamplingArguments(max_new_tokens=8, temperature=5.0, seed=seed)
        chat = Chat(load_model("finished"), load_model_tokenizer("finished"), sampling)
        return [chat.answer(text) for text in ("Say 1", "Hello", "Say 2")]

    assert talk(1) == talk(1) != talk(2)


def test_a_model_that_was_not_trained_to_chat(here, finished, tmp_path):
    load_model("finished").save_pretrained(tmp_path)
    tokenizer = load_model_tokenizer("finished")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has no chat template, so the model was not trained to chat"):
        run_chat(str(tmp_path), SamplingArguments(), lines=iter(()))


def test_a_chat_with_a_broken_template_is_refused_before_the_first_message(here, finished, tmp_path):
    load_model("finished").save_pretrained(tmp_path)
    tokenizer = load_model_tokenizer("finished")
    tokenizer.chat_template = "{{ 1 / 0 }}"
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"the tokenizer's chat template fails \(ZeroDivisionError: division by zero\)"
    ):
        run_chat(str(tmp_path), SamplingArguments(), lines=iter(()))
    arguments = InstructionDataArguments(path="rows.jsonl"), AnswerEvaluationArguments()
    with pytest.raises(
        InputError, match=r"the tokenizer's chat template fails \(ZeroDivisionError: division by zero\)"
    ):
        TASKS["instruct"].evaluate(find_model(str(tmp_path)), *arguments)


def test_the_model_sees_the_full_history(chat):
    """Earlier messages reach the model: without them, the logits differ."""
    with torch.no_grad():
        alone = chat.model(torch.tensor([chat._fit([{"role": "user", "content": "Say 1"}])])).logits[0, -1]
        chat.answer("Say 7")
        both = chat.model(torch.tensor([chat._fit([*chat.messages, {"role": "user", "content": "Say 1"}])])).logits[
            0, -1
        ]
    assert (alone - both).abs().max() > 1e-3
