"""Pretraining one model: repeated, interrupted, crashed and resumed runs give bit-identical results."""

import hashlib
import json
import math
import re
import shlex
import signal
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from hfgpt.commands import plan
from hfgpt.commands.merge import merge
from hfgpt.commands.plan import plan_recipe
from hfgpt.data import parts
from hfgpt.data.report import DataReport
from hfgpt.data.sources import DataArguments, load_documents
from hfgpt.errors import InputError, Interrupted
from hfgpt.evaluation import EvaluationArguments
from hfgpt.models import find_model
from hfgpt.recipe import load_recipe, section_types
from hfgpt.runs.run import run
from hfgpt.tasks import TASKS, text
from hfgpt.tasks.preparation import context_length
from hfgpt.tokenizer import tokenizer_hash
from hfgpt.training import estimate
from hfgpt.training.callbacks import read_log
from hfgpt.training.trainer import HfGPTTrainer

# Only read for Hub data sets and folders.
ONLY_OF_SPLITS = {"data.name", "data.revision", "data.train_split"}
MUON = "training.muon_learning_rate=0.02"
TIMED = re.compile("train_|.*_runtime")


def weights_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def learned(folder: Path) -> list[dict]:
    """The log without times: losses and metrics of each step."""
    entries = [entry for entry in read_log(folder) if "loss" in entry or "eval_loss" in entry]
    return [{key: value for key, value in entry.items() if not TIMED.match(key)} for entry in entries]


def press_ctrl_c_at(step: int):
    return lambda running: signal.raise_signal(signal.SIGINT) if running == step else None


def fail_at(step: int):
    def fail(running: int):
        if running == step:
            raise OSError("power failure")

    return fail


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished_muon(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("finished") / "muon", MUON)


def test_the_recipe_of_a_run_gives_the_same_weights(finished, load, train, tmp_path, monkeypatch):
    file = finished.folder / "recipe.yaml"
    assert load(finished.folder, file=file).values == finished.recipe.values
    # Without a probe, which trains a copy of the model and must not affect the run.
    probed = []
    monkeypatch.setattr(estimate, "probe_tokens_per_second", lambda *arguments, **options: probed.append(1) or 1000.0)
    again = train(tmp_path / "again", file=file)
    assert len(probed) == 1
    assert weights_hash(again.folder) == weights_hash(finished.folder)
    assert again.metrics == finished.metrics
    assert learned(again.folder) == learned(finished.folder)
    assert read_json(again.folder / "run.json")["plan"]["tokens_per_second"] == 1000.0


def test_a_different_seed_gives_different_weights(finished, train, tmp_path):
    other = train(tmp_path / "other", "training.seed=7", "training.max_steps=1")
    assert weights_hash(other.folder) != weights_hash(finished.folder)
    assert learned(other.folder)[0]["loss"] != learned(finished.folder)[0]["loss"]


@pytest.mark.parametrize(
    ("step", "muon"),
    [(7, False), ("epoch", False), (15, False), (15, True)],
    ids=["first epoch", "end of an epoch", "second epoch", "second epoch, Muon"],
)
def test_ctrl_c_and_resume_change_nothing(step, muon, finished, finished_muon, train, tmp_path, capfd):
    reference = finished_muon if muon else finished
    overrides = [MUON] if muon else []
    steps = read_json(reference.folder / "run.json")["steps"]
    step = steps // 2 if step == "epoch" else step
    folder, handler = tmp_path / "run", signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as stop:
        train(folder, *overrides, during=press_ctrl_c_at(step))
    assert signal.getsignal(signal.SIGINT) is handler
    message = str(stop.value)
    assert f"step {step} of {steps}" in message
    assert str(folder) in message
    assert "--resume" in message
    assert "\n" not in message
    assert (folder / f"checkpoint-{step}" / "trainer_state.json").is_file()
    assert not (folder / "model.safetensors").exists()
    assert not (folder / "metrics.json").exists()

    trained = []
    resumed = train(folder, *overrides, resume=True, during=trained.append)
    assert trained == list(range(step + 1, steps + 1))
    assert weights_hash(folder) == weights_hash(reference.folder)
    assert resumed.metrics == reference.metrics
    assert learned(folder) == learned(reference.folder)
    assert [entry["step"] for entry in learned(folder) if "loss" in entry] == list(range(1, steps + 1))
    run = read_json(folder / "run.json")
    assert run["resumed_from_step"] == step
    assert run["weights_sha256"] == read_json(reference.folder / "run.json")["weights_sha256"]
    assert capfd.readouterr().out == ""


def test_ctrl_c_in_the_last_step_lets_the_run_finish(finished, train, tmp_path):
    steps = read_json(finished.folder / "run.json")["steps"]
    run = train(tmp_path / "run", during=press_ctrl_c_at(steps))
    assert weights_hash(run.folder) == weights_hash(finished.folder)
    assert run.metrics == finished.metrics


def test_ctrl_c_twice_stops_at_once(finished, train, tmp_path):
    def press_twice(step: int):
        if step == 6:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    folder, handler = tmp_path / "run", signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(folder, during=press_twice)
    assert signal.getsignal(signal.SIGINT) is handler
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]


@pytest.mark.parametrize("step", [3, 6], ids=["before a checkpoint", "after a checkpoint"])
def test_a_crashed_run_is_resumed(step, finished, train, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(OSError, match="power failure"):
        train(folder, during=fail_at(step))
    assert {path.name for path in folder.glob("checkpoint-*")} == ({"checkpoint-4"} if step > 4 else set())
    assert len(read_log(folder)) >= step - 1
    trained = []
    train(folder, resume=True, during=trained.append)
    assert trained[0] == (5 if step > 4 else 1)
    assert weights_hash(folder) == weights_hash(finished.folder)
    # Repeated steps occur only once in the log.
    assert learned(folder) == learned(finished.folder)


def test_a_run_that_failed_after_training_is_resumed(finished, train, tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def fail(*arguments):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("hfgpt.tasks.pretrain.measure_blocks", fail)
        with pytest.raises(OSError, match="no space"):
            train(folder)
    assert not (folder / "metrics.json").exists()
    trained = []
    resumed = train(folder, resume=True, during=trained.append)
    assert trained == []
    assert resumed.metrics == finished.metrics
    assert weights_hash(folder) == weights_hash(finished.folder)


def test_a_run_killed_before_the_last_entry_of_its_log_writes_it(finished, train, tmp_path, monkeypatch):
    folder, log = tmp_path / "run", HfGPTTrainer.log

    def kill(trainer, logs, *arguments):
        if "total_flos" in logs:
            raise KeyboardInterrupt
        log(trainer, logs, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(HfGPTTrainer, "log", kill)
        with pytest.raises(KeyboardInterrupt):
            train(folder)
    assert not [entry for entry in read_log(folder) if "total_flos" in entry]
    with monkeypatch.context() as patch:
        patch.setattr("hfgpt.tasks.pretrain.measure_blocks", kill)
        with pytest.raises(TypeError):
            train(folder, resume=True)
    train(folder, resume=True)
    (last,) = [entry["total_flos"] for entry in read_log(folder) if "total_flos" in entry]
    assert [last] == [entry["total_flos"] for entry in read_log(finished.folder) if "total_flos" in entry]


def test_metrics_match_their_definition(finished):
    """Every token of the validation split except the first is predicted once, in consecutive context-length blocks."""
    model = AutoModelForCausalLM.from_pretrained(finished.folder)
    tokens = torch.from_numpy(TASKS["pretrain"].load(finished.recipe).splits["validation"].stream[:].astype("int64"))
    losses, predicted, size = [], 0, model.config.max_position_embeddings
    while predicted < len(tokens) - 1:
        end = min(predicted + size, len(tokens) - 1)
        with torch.no_grad():
            logits = model(tokens[None, end - size : end]).logits[0].double()
        fresh = logits[size - (end - predicted) :].log_softmax(-1)
        losses.append(-fresh.gather(-1, tokens[predicted + 1 : end + 1, None]).squeeze(-1))
        predicted = end
    losses = torch.cat(losses)
    documents = load_documents(finished.recipe.data, finished.recipe.training.seed, DataReport())["validation"]
    size_in_bytes = len("".join(documents["text"]).encode()) - 1  # the first character is only context
    metrics = finished.metrics
    assert metrics["eval_tokens"] == len(losses) == len(tokens) - 1
    # Float32 logits of a batch and of a single row differ in their last bits.
    assert metrics["eval_loss"] == pytest.approx(losses.mean().item(), rel=1e-6)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(losses.mean().item()), rel=1e-5)
    assert metrics["eval_bytes"] == size_in_bytes
    assert metrics["eval_bits_per_byte"] == pytest.approx(losses.sum().item() / math.log(2) / size_in_bytes, rel=1e-6)


def test_evaluate_gives_the_metrics_of_the_run(finished, tmp_path):
    documents = load_documents(finished.recipe.data, finished.recipe.training.seed, DataReport())["validation"]
    assert len(documents) > 1
    file = tmp_path / "held-out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in documents), encoding="utf-8")
    data = DataArguments(path=str(file), num_proc=1, cache_dir=str(tmp_path))
    evaluate = partial(TASKS["pretrain"].evaluate, find_model(str(finished.folder)))
    # The same weights, tokens and batches of eight: exactly the same numbers.
    assert evaluate(data, EvaluationArguments()) == finished.metrics
    strided = evaluate(data, EvaluationArguments(stride=4))
    assert strided["eval_tokens"] == finished.metrics["eval_tokens"]
    assert strided["eval_loss"] != finished.metrics["eval_loss"]
    data.block_size = 33
    with pytest.raises(InputError, match=r"data\.block_size is 33, but the model's context length is 32"):
        evaluate(data, EvaluationArguments())


def test_evaluate_reads_every_key_it_accepts(finished, read_keys, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("The village is small. " * 9, encoding="utf-8")
    data = DataArguments(path=str(file), num_proc=1, cache_dir=str(tmp_path))
    read = read_keys(
        partial(TASKS["pretrain"].evaluate, find_model(str(finished.folder))),
        data=data,
        evaluation=EvaluationArguments(),
    )
    assert all_keys("pretrain") - read - ONLY_OF_SPLITS <= TASKS["pretrain"].only_for_training.keys()
    assert {"data.path", "data.block_size", "evaluation.stride"} <= read


def test_the_keys_refused_by_evaluate_exist():
    for name, task in TASKS.items():
        assert set(task.only_for_training) < all_keys(name)


def all_keys(task: str) -> set[str]:
    sections = {section: section_types(task)[section] for section in ("data", "evaluation")}
    return {f"{section}.{field.name}" for section, kind in sections.items() for field in fields(kind)}


def test_the_stride_of_the_evaluation_is_used(finished, train, tmp_path):
    run = train(tmp_path / "run", "evaluation.stride=4", "training.max_steps=1", "training.save_strategy=no")
    assert run.metrics["eval_tokens"] == finished.metrics["eval_tokens"]
    blocks = read_json(run.folder / "data_report.json")["splits"]["validation"]["blocks"]
    assert blocks > 7 * read_json(finished.folder / "data_report.json")["splits"]["validation"]["blocks"]


SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path=rows.jsonl", "data.text_column=words"], "words.*text"),
        (["data.path=missing.txt"], "missing.txt"),
        (["data.max_documents=2", "data.block_size=5000", "model.max_position_embeddings=5000"], "data.block_size"),
        (["data.block_size=33"], "data.block_size is 33, but the model's context length is 32"),
        (["model.num_attention_heads=5"], "num_attention_heads 5"),
        (["model.vocab_size=9"], "model.vocab_size is 9"),
        ([*(f"model.{size}=null" for size in SIZES), "model.path=nowhere/at/all"], "nowhere/at/all"),
        (["evaluation.max_new_tokens=40"], "request at most 29 new tokens"),
        (["tokenizer.kind=bpe", "tokenizer.vocab_size=10"], "vocab_size"),
    ],
    ids=str,
)
def test_a_failed_start_leaves_no_files(overrides, message, train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n', encoding="utf-8")
    with pytest.raises(InputError, match=message) as error:
        train(tmp_path / "runs" / "new", *overrides)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def test_a_full_disk_at_the_start_leaves_no_files(train, tmp_path, monkeypatch):
    def fail(self, path):
        raise OSError("no space left on device")

    monkeypatch.setattr(DataReport, "write", fail)
    with pytest.raises(OSError, match="no space"):
        train(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_the_output_of_a_run(finished):
    shown = finished.shown
    parameters = read_json(finished.folder / "run.json")["plan"]["parameters"]
    vocabulary = read_json(finished.folder / "config.json")["vocab_size"]
    assert f"model: {parameters:,} parameters, context length 32, vocabulary {vocabulary}" in shown
    assert f"ln {vocabulary} = {math.log(vocabulary):.3f}" in shown
    assert "float32; attention sdpa" in shown
    assert f"validation loss {finished.metrics['eval_loss']:.4f} nats" in shown
    assert shown.count("sample: ") == 2
    command = shlex.split(shown.rpartition("Next: ")[2])
    assert command == ["hfgpt", "generate", str(finished.folder), "your prompt"], "quoted for the shell"


def test_blocks_are_as_long_as_the_context_of_the_new_model(tmp_path):
    (tmp_path / "r.yaml").write_text("task: pretrain\n")
    for overrides, context in (([], 256), (["--model.preset=gpt2"], 1024), (["--model.max_position_embeddings=8"], 8)):
        assert context_length(load_recipe(str(tmp_path / "r.yaml"), overrides), None) == context
    with pytest.raises(InputError, match=r"model.max_position_embeddings is 0; it must be at least 1"):
        context_length(load_recipe(str(tmp_path / "r.yaml"), ["--model.max_position_embeddings=0"]), None)


def test_a_split_too_small_to_measure_is_reported_at_the_start_and_on_the_card(finished, train, tmp_path):
    run = train(tmp_path / "run", "data.max_documents=3", "training.max_steps=1", "training.eval_strategy=no")
    tokens = run.metrics["eval_tokens"]
    assert tokens < 1000 < finished.metrics["eval_tokens"]
    warning = f"the validation split has only {tokens} tokens, and metrics on fewer than 1,000 are unreliable: "
    warning += "add data, or raise data.validation_fraction if hfgpt makes the split"
    assert f"  warning: {warning}\n" in run.shown
    assert read_json(run.folder / "data_report.json")["warnings"] == [warning]
    said = "these figures are not reliable"
    assert f"With only {tokens} tokens, {said}." in (run.folder / "README.md").read_text(encoding="utf-8")
    assert "warning" not in finished.shown
    assert said not in (finished.folder / "README.md").read_text(encoding="utf-8")


def test_a_vocabulary_smaller_than_requested_is_reported(load, tmp_path):
    def prepare(vocab_size: int):
        kind = ("tokenizer.kind=bpe", f"tokenizer.vocab_size={vocab_size}", "data.max_documents=40")
        return TASKS["pretrain"].load(load(tmp_path, *kind))

    data = prepare(50_000)
    found = len(data.tokenizer)
    assert data.report.warnings == [
        f"the tokenizer has only {found:,} tokens (tokenizer.vocab_size is 50,000): "
        "the training text is too small for more"
    ]
    assert data.report.warnings[0] in data.report.summary()
    assert prepare(300).report.warnings == []
    # No warning for an existing tokenizer.
    data.tokenizer.save_pretrained(tmp_path / "tokenizer")
    recipe = load(tmp_path, f"tokenizer.path={tmp_path / 'tokenizer'}", "data.max_documents=40")
    assert TASKS["pretrain"].load(recipe).report.warnings == []


def test_training_continues_from_a_model_with_its_own_tokenizer(finished, tmp_path):
    """A newly trained tokenizer would change the meaning of every id."""
    path = tmp_path / "more.yaml"
    data = f"{{path: 'synthetic:stories', max_documents: 4, cache_dir: {tmp_path}}}"
    settings = f"model: {{path: {finished.folder}}}\ndata: {data}\n"
    path.write_text(settings + f"training: {{output_dir: {tmp_path / 'run'}, use_cpu: true}}\n")
    recipe = load_recipe(str(path))
    data = TASKS["pretrain"].load(recipe)
    assert tokenizer_hash(data.tokenizer) == tokenizer_hash(AutoTokenizer.from_pretrained(finished.folder))
    model = TASKS["pretrain"].build(recipe, data)
    assert weights_of(model) == weights_of(AutoModelForCausalLM.from_pretrained(finished.folder))


@pytest.mark.parametrize("task", TASKS)
def test_a_base_model_of_another_architecture_is_refused_before_reading_data(task, tmp_path):
    LlamaConfig().save_pretrained(tmp_path / "llama")
    (tmp_path / "r.yaml").write_text(
        f"task: {task}\nmodel: {{path: {tmp_path / 'llama'}}}\ndata: {{path: ./no.txt}}\n"
    )
    recipe = load_recipe(str(tmp_path / "r.yaml"), ["--training.output_dir", str(tmp_path / "run")])
    for start in (run, plan_recipe):
        with pytest.raises(
            InputError, match=r"model.path '.*llama' is a model of type llama; only the types hfgpt and gpt2 can"
        ):
            start(recipe)
    assert not (tmp_path / "run").exists()


def test_an_adapter_on_another_architecture_is_not_merged(tmp_path):
    LlamaConfig().save_pretrained(tmp_path / "llama")
    LoraConfig(base_model_name_or_path=str(tmp_path / "llama")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"adapter' is an adapter for a model of type llama; only those for hfgpt"):
        merge(str(tmp_path / "adapter"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def weights_of(model) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def test_a_plan_reads_no_more_than_it_needs(tmp_path, monkeypatch):
    lines = [json.dumps({"text": f"Story {number} of the hens and the fox."}) for number in range(3000)]
    (tmp_path / "many.jsonl").write_text("\n".join([*lines, "not even JSON"]))
    (tmp_path / "r.yaml").write_text("model: {hidden_size: 16, num_hidden_layers: 1, max_position_embeddings: 32}\n")
    monkeypatch.setattr(text, "DOCUMENTS", 500)
    monkeypatch.setattr(plan, "CHARACTERS", 4000)
    monkeypatch.setattr(plan, "SECONDS", 0.01)
    options = ["--data.path", str(tmp_path / "many.jsonl"), "--data.cache_dir", str(tmp_path / "cache")]

    def make_plan(*more):
        return plan.plan_recipe(load_recipe(str(tmp_path / "r.yaml"), [*options, *more]))

    steps = make_plan("--training.max_steps", "70000", "--training.per_device_train_batch_size", "4")
    assert (steps.steps, steps.tokens_per_step, steps.share) == (70_000, 4 * 32, 1)
    with pytest.raises(InputError, match="is not valid JSON"):  # the length of an epoch depends on all rows
        make_plan("--training.num_train_epochs", "1")
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    epoch = make_plan("--training.num_train_epochs", "1", "--training.per_device_train_batch_size", "1")
    characters = sum(len(json.loads(line)["text"]) for line in lines)
    assert epoch.share == pytest.approx(4000 / (0.9 * characters), rel=0.01)
    monkeypatch.setattr(plan, "CHARACTERS", 10**9)
    exact = make_plan("--training.num_train_epochs", "1", "--training.per_device_train_batch_size", "1")
    assert exact.share == 1
    assert epoch.steps == pytest.approx(exact.steps, rel=0.1)

    # Of a source of several parts, only the first is read.
    monkeypatch.setattr(parts, "PART_BYTES", 20_000)
    (tmp_path / "many.jsonl").write_text("\n".join([*lines, "not even JSON"]))
    sampled = make_plan("--training.num_train_epochs", "1", "--training.per_device_train_batch_size", "1")
    assert sampled.share == pytest.approx(20_000 / (tmp_path / "many.jsonl").stat().st_size, rel=0.01)
    assert sampled.steps == pytest.approx(exact.steps, rel=0.05)
