"""The run folder: exactly the expected files, with consistent contents; and which folders are refused."""

import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hfgpt import HfGPTForCausalLM, saving
from hfgpt.data.report import DataReport
from hfgpt.errors import InputError
from hfgpt.runs.folder import begin_run, check_run_folder, hold_folder
from hfgpt.saving import (
    appearing_folder,
    append_text,
    check_free,
    check_writable,
    quote_path,
    remove_leftovers,
    staged_files,
    write_checksums,
    write_json,
    write_text,
)
from hfgpt.tasks import TASKS
from hfgpt.tasks.task import Data
from hfgpt.tokenizer import tokenizer_hash
from hfgpt.training import estimate
from hfgpt.training.hardware import process_memory_bytes

FILES = {
    *(
        "config.json",
        "generation_config.json",
        "known_answers.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ),
    *("configuration_hfgpt.py", "modeling_hfgpt.py", "README.md", "recipe.yaml", "run.json", "metrics.json"),
    *("data_report.json", "training_log.jsonl", "loss.png"),
}


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_files_of_a_run(finished):
    steps = read_json(finished.folder / "run.json")["steps"]
    names = {path.name for path in finished.folder.iterdir()}
    # By default the last two checkpoints are kept.
    assert names == FILES | {f"checkpoint-{steps}", f"checkpoint-{steps // 4 * 4 if steps % 4 else steps - 4}"}
    assert not list(finished.folder.rglob(".*"))
    package = Path(__file__).parents[2] / "hfgpt"
    for name in ("configuration_hfgpt.py", "modeling_hfgpt.py"):
        assert (finished.folder / name).read_text() == (package / name).read_text()
    assert (finished.folder / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_model_loads_like_any_other(finished):
    model = AutoModelForCausalLM.from_pretrained(finished.folder)
    assert type(model) is HfGPTForCausalLM
    assert model.config.use_cache is True
    assert model.num_parameters() == read_json(finished.folder / "run.json")["plan"]["parameters"]
    tokenizer = AutoTokenizer.from_pretrained(finished.folder)
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 32
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(model.config, name) == getattr(tokenizer, name) == getattr(model.generation_config, name)
    assert tokenizer.decode(tokenizer("The village")["input_ids"]) == "The village"


def test_checkpoints_are_models_too(finished):
    checkpoints = sorted(finished.folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert len(checkpoints) == 2
    for folder in checkpoints:
        assert read_json(folder / "config.json")["use_cache"] is True
        assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(os.listdir(folder))
    assert read_json(checkpoints[-1] / "config.json") == read_json(finished.folder / "config.json")
    last = AutoModelForCausalLM.from_pretrained(checkpoints[-1])
    final = AutoModelForCausalLM.from_pretrained(finished.folder).state_dict()
    assert all(torch.equal(tensor, final[name]) for name, tensor in last.state_dict().items())


def test_the_config_refers_to_the_code_saved_with_the_weights(finished):
    auto_map = AutoConfig.from_pretrained(finished.folder).auto_map
    assert auto_map["AutoConfig"] == "configuration_hfgpt.HfGPTConfig"
    assert auto_map["AutoModelForCausalLM"] == "modeling_hfgpt.HfGPTForCausalLM"


def test_run_json_records_the_run(finished):
    run, folder = read_json(finished.folder / "run.json"), finished.folder
    data = TASKS["pretrain"].load(finished.recipe)
    assert run["weights_sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert run["tokenizer_sha256"] == tokenizer_hash(AutoTokenizer.from_pretrained(folder))
    assert run["tokenizer_vocab_size"] == len(data.tokenizer)
    assert run["data_sha256"] == read_json(folder / "data_report.json")["sha256"] == data.report.sha256
    assert (run["task"], run["recipe"], run["seed"]) == ("pretrain", "tiny", finished.recipe.training.seed)
    assert (run["precision"], run["attn_implementation"], run["processes"]) == ("float32", "sdpa", 1)
    assert run["resumed_from_step"] == 0
    assert run["versions"]["torch"] == torch.__version__
    # Planned and measured values.
    plan, actual = run["plan"], run["actual"]
    blocks_per_step = finished.recipe.training.per_device_train_batch_size
    assert run["steps"] == plan["steps"] == 2 * -(-len(data.splits["train"]) // blocks_per_step)
    assert plan["tokens_per_step"] == round(2 * len(data.splits["train"]) * 32 / run["steps"])
    assert 0 < actual["training_seconds"] < actual["total_seconds"]
    assert plan["seconds"] > 0
    # Two epochs; the last step of each has fewer blocks than a full batch.
    assert len(data.splits["train"]) % blocks_per_step
    assert run["tokens"] == 2 * len(data.splits["train"]) * 32
    assert actual["tokens_per_second"] == pytest.approx(run["tokens"] / actual["training_seconds"], rel=1e-9)
    assert 0.5 < plan["memory_bytes"] / actual["peak_memory_bytes"] < 2, "including the libraries"


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux can reset the peak")
def test_the_peak_memory_is_that_of_training(train, tmp_path, monkeypatch):
    probed = []

    def probe(*arguments, **options):
        probed.append(len(b"x" * 2**28))  # held for a moment, like the probe's copy of the model
        return 1000.0

    monkeypatch.setattr(estimate, "probe_tokens_per_second", probe)
    run = train(tmp_path / "run", "training.max_steps=1", "training.eval_strategy=no")
    actual = read_json(run.folder / "run.json")["actual"]
    assert probed == [2**28]
    assert actual["peak_memory_of"] == "training"
    assert actual["peak_memory_bytes"] < process_memory_bytes() + 2**27


def test_reports_are_consistent(finished):
    assert read_json(finished.folder / "metrics.json") == finished.metrics
    assert read_json(finished.folder / "data_report.json") == TASKS["pretrain"].load(finished.recipe).report.to_dict()
    log = [json.loads(line) for line in (finished.folder / "training_log.jsonl").read_text().splitlines()]
    steps = read_json(finished.folder / "run.json")["steps"]
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, steps + 1))
    assert {entry["step"] for entry in log if "eval_loss" in entry} == {*range(8, steps, 8), steps}
    assert {"loss", "grad_norm", "learning_rate", "epoch"} <= log[0].keys()
    assert log[-1] == {"step": steps, "epoch": 2.0, **finished.metrics}


def test_the_readme_contains_the_metrics(finished, monkeypatch, capsys):
    _, front, text = (finished.folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    metrics = finished.metrics
    for words in (
        f"{read_json(finished.folder / 'run.json')['plan']['parameters']:,} parameters",
        f"| predicted tokens | {metrics['eval_tokens']:,} |",
        f"| loss, nats | {metrics['eval_loss']:.4f} |",
        f"| perplexity | {metrics['eval_perplexity']:.4f} |",
        f"| bits per byte | {metrics['eval_bits_per_byte']:.4f} |",
    ):
        assert words in text
    usage, verifying = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    monkeypatch.chdir(finished.folder.parent)  # the card has the folder's name without its parent
    exec(usage, names)
    assert type(names["pipe"].model) is HfGPTForCausalLM
    exec(verifying, names)
    assert "verified: this is the model measured on " in capsys.readouterr().out


def test_an_occupied_folder_is_refused(finished, load, train, tmp_path):
    before = content(finished.folder)
    with pytest.raises(InputError, match=r"already contains a finished run: choose another .* with --model.path '?/"):
        train(finished.folder)
    assert content(finished.folder) == before
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(InputError, match=r"already contains other files \(thesis.txt, ...\)"):
        train(tmp_path)
    with pytest.raises(InputError, match=r"thesis\.txt' is a file: choose another path"):
        train(tmp_path / "thesis.txt")
    assert os.listdir(tmp_path) == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    assert check_run_folder(load(tmp_path / "empty"), resume=False) is None


@pytest.fixture
def stopped(finished, load, tmp_path):
    """An unfinished run; only the files that `check_run_folder` reads."""
    folder = tmp_path / "stopped"
    for step in (4, 8):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
            (folder / f"checkpoint-{step}" / name).write_text(name)
    write_checksums(folder / "checkpoint-4")
    (folder / "checkpoint-8" / "SHA256SUMS").touch()  # incomplete: stopped while saving it
    values = {**finished.recipe.values, "training": {**finished.recipe.values["training"], "output_dir": str(folder)}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder


def test_resume_uses_the_last_complete_checkpoint(stopped, load):
    assert check_run_folder(load(stopped), resume=True) == stopped / "checkpoint-4"
    with pytest.raises(InputError, match="already contains an unfinished run: pass --resume to continue it"):
        check_run_folder(load(stopped), resume=False)


@pytest.mark.parametrize(
    "override",
    ["training.learning_rate=0.5", "training.weight_decay=0.5", "model.qkv_bias=False", "tokenizer.kind=bpe"],
)
def test_resuming_with_another_recipe_names_the_key_and_both_values(override, stopped, load):
    key, _, value = override.partition("=")
    said = rf"{re.escape(key)} is '?{value}'?, but was .* when the run in '.*' started: use the same recipe"
    with pytest.raises(InputError, match=said):
        check_run_folder(load(stopped, override), resume=True)


def test_resuming_may_change_logging_and_evaluation(stopped, load):
    overrides = [
        "evaluation.max_new_tokens=9",
        "training.logging_steps=5",
        "training.save_steps=2",
        "training.eval_steps=3",
        "data.num_proc=2",
        "data.cache_dir=elsewhere",
    ]
    assert check_run_folder(load(stopped, *overrides), resume=True) == stopped / "checkpoint-4"


def test_a_run_that_was_moved_can_be_resumed(stopped, load):
    moved = stopped.rename(stopped.with_name("moved"))
    assert check_run_folder(load(moved), resume=True) == moved / "checkpoint-4"


def test_resuming_without_a_run_is_refused(load, tmp_path):
    for folder in (tmp_path / "missing", tmp_path):
        with pytest.raises(InputError, match=r"there is no run to resume in .*: leave out --resume to start one"):
            check_run_folder(load(folder), resume=True)
    assert os.listdir(tmp_path) == []


def test_resuming_a_finished_run_is_refused(finished, load, train, tmp_path):
    with pytest.raises(InputError, match="is finished: there is nothing to resume"):
        check_run_folder(load(finished.folder), resume=True)
    # Also if its checkpoints were deleted or never saved.
    shutil.copytree(finished.folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*", "recipe.yaml"))
    recipe = load(tmp_path / "run")
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe.values), encoding="utf-8")
    with pytest.raises(InputError, match="is finished: there is nothing to resume"):
        check_run_folder(recipe, resume=True)


HOLDER = """
import fcntl, os, sys, time
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_is_locked_by_one_process_until_it_exits(load, train, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        for resume in (False, True):
            with pytest.raises(InputError, match=rf"another process is training in '{folder}': wait"):
                train(folder, resume=resume)
        assert list(folder.iterdir()) == []
    finally:
        holder.kill()
        holder.communicate()
    with hold_folder(folder):  # a dead process holds no lock
        pass
    with hold_folder(folder), pytest.raises(InputError, match="another process"), hold_folder(folder):
        pass


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    for name in (".staging-x1", "checkpoint-4"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    for name in (".run.json.77.tmp", ".gitignore", "run.json"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", ".gitignore", "run.json"}


def test_files_are_written_atomically(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"é": 1})
    assert path.read_text(encoding="utf-8") == '{\n  "é": 1\n}\n'
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\udc00")
    with pytest.raises(TypeError):
        write_json(path, {"folder": path})

    def fail(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_text(path, "new")
    assert path.read_text(encoding="utf-8") == '{\n  "é": 1\n}\n'
    assert os.listdir(tmp_path) == ["a.json"]


def test_staged_files_appear_together(tmp_path):
    def stage(fail: bool):
        with staged_files(tmp_path) as staging:
            assert staging.parent == tmp_path
            (staging / "one").write_text("new")
            (staging / "two").write_text("new")
            assert content(tmp_path)["one"] == b"old"
            if fail:
                raise RuntimeError

    (tmp_path / "one").write_text("old")
    with pytest.raises(RuntimeError):
        stage(fail=True)
    assert content(tmp_path) == {"one": b"old"}
    stage(fail=False)
    assert content(tmp_path) == {"one": b"new", "two": b"new"}


def test_weights_have_the_permissions_of_other_files(tmp_path):
    def fill(folder: Path):
        save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
        (folder / "config.json").touch()

    (tmp_path / "staged").mkdir()
    with staged_files(tmp_path / "staged") as staging:
        fill(staging)
    with appearing_folder(tmp_path / "appeared") as staging:
        fill(staging)
    (tmp_path / "checkpoint").mkdir()
    fill(tmp_path / "checkpoint")
    write_checksums(tmp_path / "checkpoint")
    for folder in (tmp_path / "staged", tmp_path / "appeared", tmp_path / "checkpoint"):
        modes = {path.name: path.stat().st_mode for path in folder.iterdir()}
        assert len(set(modes.values())) == 1, modes


def test_a_file_in_a_mounted_bucket_is_replaced_instead_of_extended(tmp_path, monkeypatch):
    def refuse_to_extend(path, mode, **options):
        if mode == "a" and (path.exists() or path.parent != tmp_path):
            raise PermissionError(errno.EPERM, "Operation not permitted")
        return open(path, mode, **options)

    monkeypatch.setattr(saving, "open", refuse_to_extend, raising=False)
    for number in (1, 2, 3):
        append_text(tmp_path / "log", f"{number}\n")
    assert (tmp_path / "log").read_text() == "1\n2\n3\n"
    with pytest.raises(PermissionError):
        append_text(tmp_path / "below" / "log", "1\n")
    assert os.listdir(tmp_path) == ["log"]


def test_an_unwritable_folder_is_detected_before_any_work(load, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "below"
    for check in (check_free, lambda folder: hold_folder(folder).__enter__()):
        with pytest.raises(InputError, match=r"cannot create '.*': '.*file' is not a directory; choose another path"):
            check(below)
        faults = {number: os.strerror(number) for number in (errno.EACCES, errno.EROFS, errno.ENOSPC)}
        for number, fault in (faults | {errno.ENOENT: "no files can be created there"}).items():

            def fail(number=number, **kwargs):
                raise OSError(number, os.strerror(number))

            with monkeypatch.context() as patch:
                patch.setattr(tempfile, "NamedTemporaryFile", fail)
                with pytest.raises(InputError, match=f"cannot write to .*new': {fault} .*; choose"):
                    check(tmp_path / "new")
        check(tmp_path / "new" / "run")
    assert os.listdir(tmp_path) == ["file"], "nothing is created"


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_a_folder_without_permission_is_detected(tmp_path):
    (tmp_path / "private").mkdir(mode=0o500)
    with pytest.raises(InputError, match="Permission denied"):
        check_writable(tmp_path / "private" / "run")


def test_a_quoted_path_can_be_pasted_into_a_shell():
    for path in ("runs/a", "a b", "it's", "-x", "$HOME", "故事"):
        assert [Path(word) for word in shlex.split(quote_path(Path(path)))] == [Path(path)]
    assert quote_path("-x") == "./-x", "must not be read as an option"


@pytest.mark.parametrize("existed", [True, False])
def test_a_run_folder_is_created_atomically(existed, finished, load, tmp_path):
    class Full(DataReport):
        def write(self, folder):
            raise OSError("no space left on device")

    tokenizer = AutoTokenizer.from_pretrained(finished.folder)
    recipe = load(tmp_path / "runs" / "new")
    if existed:
        (tmp_path / "runs" / "new").mkdir(parents=True)
    with pytest.raises(OSError, match="no space"), hold_folder(tmp_path / "runs" / "new"):
        begin_run(recipe, Data(splits={}, tokenizer=tokenizer, report=Full()))
    assert (tmp_path / "runs").exists() == existed
    assert content(tmp_path) == {}
    with hold_folder(tmp_path / "runs" / "new"):
        begin_run(recipe, Data(splits={}, tokenizer=tokenizer, report=DataReport(source="here")))
    assert content(tmp_path / "runs" / "new").keys() == {
        "recipe.yaml",
        "run.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "data_report.json",
    }
