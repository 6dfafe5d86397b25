"""What resuming requires: the data, tokenizer, base model and precision of the start, and undamaged checkpoints."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hfgpt.data.report import DataReport
from hfgpt.errors import InputError, Interrupted
from hfgpt.models import find_model
from hfgpt.records import RunRecord
from hfgpt.runs.folder import check_same_sources, describe_sources, keep_steps
from hfgpt.saving import hash_file, write_checksums
from hfgpt.tasks.pretrain import Pretraining
from hfgpt.tasks.task import Data
from hfgpt.training import checkpoints
from hfgpt.training.arguments import HfGPTTrainingArguments
from hfgpt.training.batches import count_rounds
from hfgpt.training.checkpoints import list_checkpoints, step_of
from hfgpt.training.trainer import HfGPTTrainer

TEXT = "The fox saw the hen. The hen saw the fox. Neither said a word about it.\n" * 40


def stop_at(step: int):
    return lambda running: signal.raise_signal(signal.SIGTERM) if running == step else None


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "v.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def uninterrupted(text, train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole") / "run", f"data.path={text}")


@pytest.fixture(scope="module")
def stopped_once(text, train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Interrupted, match="stopped at step 6 of"):
        train(folder, f"data.path={text}", during=stop_at(6))
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-4", "checkpoint-6"]
    return folder


@pytest.fixture
def stopped(stopped_once, text, tmp_path):
    """A run stopped at step 6, with checkpoints at steps 4 and 6."""
    text.write_text(TEXT)
    return Path(shutil.copytree(stopped_once, tmp_path / "run"))


def test_the_step_it_resumes_from_is_shown(stopped, text, uninterrupted, train):
    steps = json.loads((uninterrupted.folder / "run.json").read_text())["steps"]
    run = train(stopped, f"data.path={text}", resume=True)
    size = 16 * 32  # tokens; the last step of an epoch has fewer
    tokens = re.search(rf"resuming from checkpoint-6: step 6 of {steps} \(token (\S+) of (\S+)\)", run.shown).groups()
    done, total = (int(number.replace(",", "")) for number in tokens)
    assert (done * steps, done <= 6 * size) == (total * 6, True)
    assert "; same data order and dropout\n" in run.shown
    assert hash_file(stopped / "model.safetensors") == hash_file(uninterrupted.folder / "model.safetensors")


def test_changed_data_is_refused_and_the_run_left_unchanged(stopped, text, train):
    before = content(stopped)
    text.write_text(TEXT.replace("hen", "cat"))
    said = rf"'{text}' has changed since the run in '{stopped}' started: restore it, or start a new run"
    with pytest.raises(InputError, match=said):
        train(stopped, f"data.path={text}", resume=True)
    assert content(stopped) == before


def test_a_changed_tokenizer_is_refused(stopped, text, train):
    file = stopped / "tokenizer.json"
    tokens = json.loads(file.read_text())
    vocabulary = tokens["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    file.write_text(json.dumps(tokens))
    with pytest.raises(InputError, match=rf"the tokenizer in '{stopped}' has changed since its run started"):
        train(stopped, f"data.path={text}", resume=True)


BEGAN = {
    "data_source": "/d/v.txt",
    "data_sha256": "1",
    "tokenizer_sha256": "2",
    "precision": "float32",
    "processes": 2,
    "base_model": "me/base",
    "base_weights_sha256": "3",
}


@pytest.mark.parametrize(
    ("began", "now", "said"),
    [
        ({}, {"base_weights_sha256": "4"}, "the weights of 'me/base' have changed since the run in 'r' started"),
        (
            {},
            {"precision": "bfloat16, mixed"},
            "started in float32, but would continue in bfloat16, mixed: pass --training.bf16 false",
        ),
        ({"precision": "bfloat16, mixed"}, {"precision": "float32"}, "pass --training.bf16 true"),
        ({"precision": "float16, mixed"}, {"precision": "float32"}, "pass --training.fp16 true"),
    ],
)
def test_the_inputs_a_run_started_with_are_compared(began, now, said):
    before = RunRecord(**BEGAN | began)
    check_same_sources(Path("r"), replace(before, steps=7), before)
    check_same_sources(Path("r"), RunRecord(), before)
    with pytest.raises(InputError, match=said):
        check_same_sources(Path("r"), before, RunRecord(**BEGAN | now))


@pytest.mark.parametrize(("processes", "accumulated"), [(1, 2), (2, 1)])
def test_steps_keep_their_rows_on_another_number_of_processes(processes, accumulated, tmp_path, monkeypatch):
    """Of a run started on one process with accumulation and resumed on two, and then again on either number."""
    RunRecord(processes=2, rows_per_step=16, rows_per_batch=8).write(tmp_path)
    monkeypatch.setattr(HfGPTTrainingArguments, "world_size", processes)
    arguments = HfGPTTrainingArguments(
        str(tmp_path), use_cpu=True, per_device_train_batch_size=8, gradient_accumulation_steps=2
    )
    keep_steps(arguments, tmp_path)
    assert (arguments.rows_per_step, count_rounds(arguments, 16)) == (16, accumulated)
    monkeypatch.setattr(HfGPTTrainingArguments, "world_size", 3)
    with pytest.raises(InputError, match=r"there are 3 processes, but a step .* has only 2 batches of 8 rows"):
        keep_steps(arguments, tmp_path)


def test_the_base_model_is_recorded_when_a_run_starts(uninterrupted, load, tmp_path):
    base = find_model(str(uninterrupted.folder))
    data = Data(splits={}, tokenizer=base.load_tokenizer(), report=DataReport(sha256="1"), base=base)
    sources = describe_sources(load(tmp_path), data)
    assert sources.base_weights_sha256 == hash_file(uninterrupted.folder / "model.safetensors")
    assert sources.to_dict().keys() >= BEGAN.keys()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt"])
def test_a_damaged_checkpoint_costs_only_some_steps(name, stopped, text, uninterrupted, train):
    file = stopped / "checkpoint-6" / name
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    trained = []
    run = train(stopped, f"data.path={text}", resume=True, during=trained.append)
    assert f"checkpoint-6 is damaged: {name} does not match its checksum" in run.shown
    assert trained[0] == 5
    assert hash_file(stopped / "model.safetensors") == hash_file(uninterrupted.folder / "model.safetensors")


def test_leftovers_of_a_killed_process_are_removed_by_resuming(stopped, text, uninterrupted, train):
    shutil.copytree(stopped / "checkpoint-6", stopped / "checkpoint-8")
    (stopped / "checkpoint-8" / "SHA256SUMS").write_text("")  # killed while saving it
    (stopped / ".staging-x1").mkdir()  # killed during the final save
    (stopped / ".staging-x1" / "model.safetensors").write_bytes(b"half")
    (stopped / ".run.json.77.tmp").touch()
    run = train(stopped, f"data.path={text}", resume=True)
    assert f"{stopped}/checkpoint-8 is incomplete: the run stopped while saving it" in run.shown
    assert content(stopped).keys() == content(uninterrupted.folder).keys() - {"loss.png"}
    assert hash_file(stopped / "model.safetensors") == hash_file(uninterrupted.folder / "model.safetensors")


@pytest.mark.parametrize("moved", [1, 2, 3])
def test_a_run_killed_while_starting_starts_over_with_resume(moved, text, train, tmp_path, monkeypatch):
    replace, done = os.replace, []

    def move(source, target):
        if Path(source).parent.name.startswith(".staging-") and Path(target).parent == tmp_path / "run":
            if len(done) == moved:
                raise KeyboardInterrupt
            done.append(Path(target).name)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", move)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", f"data.path={text}", "training.max_steps=1")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(done)
    train(tmp_path / "run", f"data.path={text}", "training.max_steps=1", resume=True)
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "broken", "said"),
    [
        ("recipe.yaml", b"task: [", "recipe.yaml, line 1: "),
        ("recipe.yaml", b"!!python/object/apply:os.system ['touch planted']", "recipe.yaml"),
        ("recipe.yaml", b"training: 5\n", "'training' is a section"),
        ("recipe.yaml", b"\xff\xfe", "recipe.yaml is not valid UTF-8"),
        ("run.json", b'{"task": "pre', "run.json' cannot be read"),
        ("run.json", b"[1]", "run.json' is not a JSON object"),
        ("training_log.jsonl", b"{\n", "training_log.jsonl' is damaged in line 1"),
        ("tokenizer.json", b"{", "tokenizer"),
    ],
)
def test_damaged_files_of_a_run_are_a_one_line_error(name, broken, said, stopped, text, train, monkeypatch):
    monkeypatch.chdir(stopped)
    (stopped / name).write_bytes(broken)
    with pytest.raises(InputError, match=said) as error:
        train(stopped, f"data.path={text}", resume=True)
    assert "\n" not in str(error.value)
    assert not (stopped / "planted").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("best_model_checkpoint", ["x"]),
        ("best_metric", "x"),
        ("log_history", ["x"]),
        ("log_history", [{"loss": 1.0}]),
        ("log_history", [{"step": 1, "loss": None}]),
        ("logging_steps", 0),
        ("save_steps", "x"),
        ("total_flos", None),
        ("stateful_callbacks", ["x"]),
        ("stateful_callbacks", {"x": {}}),
    ],
)
def test_a_trainer_state_with_wrong_types_is_a_one_line_error(name, value, stopped, text, train):
    """As written by a tool that also updates the checksums."""
    checkpoint = stopped / "checkpoint-6"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    (checkpoint / "trainer_state.json").write_text(json.dumps(state | {name: value}))
    write_checksums(checkpoint)
    with pytest.raises(InputError, match=r"checkpoint-6' \(.*\): remove it to resume from the previous") as error:
        train(stopped, f"data.path={text}", resume=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "value"), [("differentiable", True), ("betas", (0.5, 0.5)), ("weight_decay", "x")])
def test_optimizer_settings_that_differ_from_the_recipe_are_refused(name, value, stopped, text, train):
    checkpoint = stopped / "checkpoint-6"
    state = torch.load(checkpoint / "optimizer.pt")
    state["param_groups"][0][name] = value
    torch.save(state, checkpoint / "optimizer.pt")
    write_checksums(checkpoint)
    with pytest.raises(InputError, match=rf"checkpoint-6' \({name} of its optimizer is "):
        train(stopped, f"data.path={text}", resume=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("lr", "base_lrs", "_last_lr") for value in ([], ["x"], [0.5])] + [("lr_lambdas", [5])],
)
def test_scheduled_rates_that_differ_from_the_recipe_are_refused(name, value, stopped, text, train):
    checkpoint = stopped / "checkpoint-6"
    file = checkpoint / ("optimizer.pt" if name == "lr" else "scheduler.pt")
    state = torch.load(file)
    if name == "lr":
        state["param_groups"][0][name] = value[0] if value else None
    else:
        state[name] = value
    torch.save(state, file)
    write_checksums(checkpoint)
    with pytest.raises(InputError, match=r"checkpoint-6' \(.*\): remove it to resume from the previous"):
        train(stopped, f"data.path={text}", resume=True)


def test_a_run_whose_schedule_depends_on_the_metrics_is_resumed(text, train, tmp_path):
    options = ["lr_scheduler_type=reduce_lr_on_plateau", "eval_strategy=steps", "eval_steps=2", "max_steps=6"]
    overrides = [f"data.path={text}", *(f"training.{option}" for option in options)]
    train(tmp_path / "whole", *overrides)
    with pytest.raises(Interrupted):
        train(tmp_path / "run", *overrides, "training.save_steps=2", during=stop_at(4))
    train(tmp_path / "run", *overrides, "training.save_steps=2", resume=True)
    assert hash_file(tmp_path / "run" / "model.safetensors") == hash_file(tmp_path / "whole" / "model.safetensors")


def test_an_unrelated_error_is_not_blamed_on_the_checkpoint(stopped, text, train, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("a bug")

    monkeypatch.setattr(HfGPTTrainer, "training_step", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        train(stopped, f"data.path={text}", resume=True)


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "step"])
@pytest.mark.parametrize("muon", [False, True])
def test_optimizer_moments_of_the_wrong_shape_are_refused_before_use(name, muon, text, train, tmp_path):
    overrides = [f"data.path={text}", *(["training.muon_learning_rate=0.01"] if muon else [])]
    with pytest.raises(Interrupted):
        train(tmp_path / "run", *overrides, during=stop_at(4))
    checkpoint = tmp_path / "run" / "checkpoint-4"
    content = torch.load(checkpoint / "optimizer.pt")
    state = next(state for state in content["state"].values() if name in state)
    state[name] = state[name].reshape(-1)[:1].expand(2)
    torch.save(content, checkpoint / "optimizer.pt")
    write_checksums(checkpoint)
    said = rf"checkpoint-4' \({name} of its optimizer has the shape \(2,\), not \("
    with pytest.raises(InputError, match=said):
        train(tmp_path / "run", *overrides, resume=True)


def test_an_error_after_the_first_step_is_not_blamed_on_the_checkpoint(stopped, text, train):
    def fail(step):
        if step == 8:
            raise RuntimeError("of its own")

    with pytest.raises(RuntimeError, match="of its own"):
        train(stopped, f"data.path={text}", resume=True, during=fail)


def test_a_run_stopped_after_its_last_step_takes_no_further_step(train, tmp_path, monkeypatch):
    """In the middle of an epoch, where transformers' Trainer would take one."""
    from hfgpt.runs import run as module

    def interrupt(*arguments):
        raise KeyboardInterrupt

    uninterrupted = train(tmp_path / "whole", "training.max_steps=5")
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", "training.max_steps=5")
    trained = []
    run = train(tmp_path / "run", "training.max_steps=5", resume=True, during=trained.append)
    assert trained == []
    assert hash_file(run.folder / "model.safetensors") == hash_file(uninterrupted.folder / "model.safetensors")
    assert run.metrics == uninterrupted.metrics
    assert json.loads((run.folder / "run.json").read_text())["resumed_from_step"] == 5


def test_a_run_stopped_during_its_evaluation_says_how_to_finish_it(train, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    uninterrupted = train(tmp_path / "whole", "training.max_steps=5")
    with monkeypatch.context() as patch:
        patch.setattr(Pretraining, "measure", interrupt)
        with pytest.raises(Interrupted) as stopped:
            train(tmp_path / "run", "training.max_steps=5")
    assert str(stopped.value) == (
        f"stopped during the evaluation; the weights are saved in {tmp_path / 'run'}: rerun the command with "
        "--resume to finish"
    )
    run = train(tmp_path / "run", "training.max_steps=5", resume=True)
    assert run.metrics == uninterrupted.metrics


def test_a_run_without_its_record_is_not_resumed(stopped, text, train):
    (stopped / "run.json").unlink()
    with pytest.raises(InputError, match=r"has no run.json, which resuming needs"):
        train(stopped, f"data.path={text}", resume=True)


def test_the_best_model_is_also_saved_by_a_run_stopped_after_its_last_step(train, tmp_path, monkeypatch):
    from hfgpt.runs import run as module

    def interrupt(*arguments):
        raise KeyboardInterrupt

    overrides = ["training.load_best_model_at_end=true", "training.eval_steps=2", "training.save_steps=2"]
    # The first checkpoint is the best.
    overrides += [
        "training.metric_for_best_model=eval_loss",
        "training.greater_is_better=true",
        "training.max_steps=6",
    ]
    uninterrupted = train(tmp_path / "whole", *overrides)
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", *overrides)
    run = train(tmp_path / "run", *overrides, resume=True)
    assert hash_file(run.folder / "model.safetensors") == hash_file(uninterrupted.folder / "model.safetensors")
    assert hash_file(run.folder / "model.safetensors") != hash_file(run.folder / "checkpoint-6" / "model.safetensors")


BEST_IS_FIRST = [
    *("training.load_best_model_at_end=true", "training.metric_for_best_model=eval_loss"),
    *("training.greater_is_better=true", "training.save_total_limit=1", "training.eval_steps=2"),
    *("training.save_steps=2", "training.max_steps=6"),
]


@pytest.mark.parametrize(
    ("overrides", "kept", "left"),
    [(["training.max_steps=12"], [8, 12], [4, 8, 12]), (BEST_IS_FIRST, [2], [2, 4, 6])],
    ids=["the last two", "the best"],
)
def test_old_checkpoints_that_a_killed_run_left_are_removed(overrides, kept, left, train, tmp_path, monkeypatch):
    def interrupt(checkpoint):
        if steps(tmp_path / "run")[-1] == left[-1]:
            raise KeyboardInterrupt
        remove(checkpoint)

    def steps(folder):
        return [step_of(path) for path in list_checkpoints(folder)]

    uninterrupted, remove = train(tmp_path / "whole", *overrides), checkpoints.remove_checkpoint
    assert steps(uninterrupted.folder) == kept
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "remove_checkpoint", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", *overrides)
    assert steps(tmp_path / "run") == left
    run = train(tmp_path / "run", *overrides, resume=True)
    assert content(run.folder).keys() == content(uninterrupted.folder).keys()
    assert hash_file(run.folder / "model.safetensors") == hash_file(uninterrupted.folder / "model.safetensors")


def test_an_interrupted_run_keeps_the_checkpoint_saved_at_the_interrupt(train, tmp_path):
    with pytest.raises(Interrupted, match="stopped at step 5 of 6"):
        train(tmp_path / "run", *BEST_IS_FIRST, during=stop_at(5))
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-5"]


CONSTANT = ("training.lr_scheduler_type=constant", "training.save_steps=3")


def test_a_run_can_be_extended_if_its_learning_rate_does_not_depend_on_its_length(train, tmp_path):
    long, short = tmp_path / "long", tmp_path / "short"
    train(long, *CONSTANT, "training.max_steps=9")
    train(short, *CONSTANT, "training.max_steps=5")
    with pytest.raises(InputError, match=r"finished run: .* pass --resume and a larger --training.max_steps"):
        train(short, *CONSTANT, "training.max_steps=9")
    with pytest.raises(InputError, match=r"is finished: there is nothing to resume; to train it further, pass"):
        train(short, *CONSTANT, "training.max_steps=5", resume=True)
    with pytest.raises(InputError, match=r"training.max_steps is 4, but was 5 when the run in .* started: use the"):
        train(short, *CONSTANT, "training.max_steps=4", resume=True)
    run = train(short, *CONSTANT, "training.max_steps=9", resume=True)
    assert "resuming from checkpoint-5: step 5 of 9" in run.shown
    assert hash_file(short / "model.safetensors") == hash_file(long / "model.safetensors")
    assert json.loads((short / "metrics.json").read_text()) == json.loads((long / "metrics.json").read_text())


def test_otherwise_the_message_explains_how_to_train_longer(stopped, text, uninterrupted, train):
    said = (
        rf"training.max_steps is 90, but was unset when the run in '{stopped}' started, and its learning-rate "
        rf"schedule \(linear\) depends on it; to train it further, start a new run from its weights with --model.path "
        rf"{stopped}/checkpoint-6, another --training.output_dir, and a recipe without model sizes"
    )
    with pytest.raises(InputError, match=said):
        train(stopped, f"data.path={text}", "training.max_steps=90", resume=True)
    said = "nothing to resume; to train it further, start a new run from its weights with --model.path "
    said += str(uninterrupted.folder)
    with pytest.raises(InputError, match=said):
        train(uninterrupted.folder, f"data.path={text}", resume=True)


def test_evaluating_more_often_does_not_change_what_is_learned(uninterrupted, text, train, tmp_path):
    other = train(tmp_path / "run", f"data.path={text}", "training.eval_steps=2")
    assert hash_file(other.folder / "model.safetensors") == hash_file(uninterrupted.folder / "model.safetensors")
