"""Checkpoints: only complete and undamaged ones are used, and never one newer than the run."""

import io
import itertools
import json
import os
import shutil
import subprocess

import pytest
import torch
from rich.console import Console
from transformers.trainer_utils import rotate_checkpoints

from hfgpt.errors import InputError
from hfgpt.saving import CHECKSUMS_FILE, read_checksums, remove_leftovers, write_checksums
from hfgpt.training.checkpoints import (
    choose_checkpoint,
    find_last_checkpoint,
    list_checkpoints,
    remove_later_checkpoints,
    remove_old_checkpoints,
)

STATE = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
SAVING = {"max_steps": 8, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture
def output_dir(tmp_path):
    """Checkpoints 9 and 10 are complete, 11 is not."""
    for step in (9, 10, 11):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("model.safetensors", *STATE):
            (folder / name).write_text(f"{name} of {step}")
        if step < 11:
            write_checksums(folder)
        else:
            (folder / CHECKSUMS_FILE).touch()  # as while a checkpoint is being saved
    for name in ("checkpoint-best", "other-12"):
        (tmp_path / name).mkdir()
        (tmp_path / name / CHECKSUMS_FILE).touch()
    return tmp_path


def choose(output_dir):
    console = Console(file=io.StringIO(), width=500)
    return choose_checkpoint(output_dir, console), console.file.getvalue()


def test_checksums_match_sha256sum(output_dir):
    folder = output_dir / "checkpoint-9"
    assert set(read_checksums(folder)) == {"model.safetensors", *STATE}
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", CHECKSUMS_FILE], cwd=folder, check=True)


def test_the_newest_complete_checkpoint_is_used(output_dir):
    assert find_last_checkpoint(str(output_dir)) == output_dir / "checkpoint-10"
    assert [path.name for path in list_checkpoints(output_dir)] == ["checkpoint-9", "checkpoint-10", "checkpoint-11"]
    chosen, shown = choose(output_dir)
    assert chosen == output_dir / "checkpoint-10"
    assert shown == f"{output_dir}/checkpoint-11 is incomplete: the run stopped while saving it\n"
    assert find_last_checkpoint(output_dir / "missing") is None
    assert choose(output_dir / "missing") == (None, "")


def test_a_checkpoint_without_checksums_is_neither_used_nor_treated_as_incomplete(output_dir):
    (output_dir / "checkpoint-11" / CHECKSUMS_FILE).unlink()
    with pytest.raises(InputError, match=r"checkpoint-11' has no SHA256SUMS .saved by an earlier version, or copied"):
        choose(output_dir)
    assert (output_dir / "checkpoint-11" / "optimizer.pt").is_file()


@pytest.mark.parametrize("name", ["model.safetensors", *STATE])
@pytest.mark.parametrize("damage", ["missing", "a flipped bit", "truncated"])
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(name, damage, output_dir):
    file = output_dir / "checkpoint-10" / name
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content if damage == "a flipped bit" else content[:3])
    chosen, shown = choose(output_dir)
    assert chosen == output_dir / "checkpoint-9"
    fault = "is missing" if damage == "missing" else "does not match its checksum"
    assert f"{output_dir}/checkpoint-10 is damaged: {name} {fault}; trying the previous one\n" in shown


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(output_dir):
    for step in (9, 10):
        (output_dir / f"checkpoint-{step}" / "optimizer.pt").unlink()
    said = r"checkpoint-10: optimizer.pt is missing; checkpoint-9: optimizer.pt is missing\): restore one, or start"
    with pytest.raises(InputError, match=said):
        choose(output_dir)


@pytest.mark.parametrize("state", STATE)
def test_a_checkpoint_without_training_state_is_not_used(state, output_dir):
    (output_dir / "checkpoint-10" / state).unlink()
    write_checksums(output_dir / "checkpoint-10")
    assert choose(output_dir)[0] == output_dir / "checkpoint-9"


def test_checkpoints_are_kept_by_step_not_by_modification_time(make_model, make_blocks, make_trainer, monkeypatch):
    """After the clock was set back, each new checkpoint looks like the oldest."""
    write, times = torch.save, iter(range(2_000_000_000, 0, -1_000_000))

    def write_earlier(content, path, *args, **kwargs):
        write(content, path, *args, **kwargs)
        moment = next(times)
        os.utime(os.path.dirname(path), (moment, moment))

    trainer = make_trainer(make_model(), make_blocks(200), save_total_limit=2, **SAVING)
    monkeypatch.setattr(torch, "save", write_earlier)
    monkeypatch.setattr("hfgpt.training.trainer.write_checksums", keep_time(write_checksums))
    trainer.train()
    assert [path.name for path in list_checkpoints(trainer.args.output_dir)] == ["checkpoint-6", "checkpoint-8"]
    assert trainer.args.save_total_limit == 2


def test_the_same_checkpoints_are_kept_as_by_trainer(tmp_path):
    steps = (3, 9, 12, 101)
    for number, (limit, best) in enumerate(itertools.product((None, 1, 2, 3, 4, 5), (None, *steps, 6))):
        ours, theirs = tmp_path / f"ours{number}", tmp_path / f"theirs{number}"
        for folder in (ours, theirs):
            for step in steps:
                (folder / f"checkpoint-{step}").mkdir(parents=True)
        remove_old_checkpoints(str(ours), limit, [str(ours / f"checkpoint-{best}")] if best else [])
        rotate_checkpoints(str(theirs), limit, best and str(theirs / f"checkpoint-{best}"))
        assert [path.name for path in list_checkpoints(ours)] == [path.name for path in list_checkpoints(theirs)]
        assert not list(ours.glob(".*"))


def test_a_finished_run_with_a_limit_of_1_keeps_the_best_checkpoint(output_dir):
    remove_old_checkpoints(output_dir, 1, ["elsewhere/checkpoint-9"], keep_newest=False)
    assert [path.name for path in list_checkpoints(output_dir)] == ["checkpoint-9"]


def test_a_killed_removal_leaves_no_damaged_checkpoint(output_dir, monkeypatch):
    write_checksums(output_dir / "checkpoint-11")
    with monkeypatch.context() as patch:
        # Killed after removing the checksums: the rest looks like a checkpoint of an earlier version.
        patch.setattr(shutil, "rmtree", lambda path, **options: (path / CHECKSUMS_FILE).unlink())
        remove_later_checkpoints(output_dir, 10)
        remove_old_checkpoints(output_dir, 1)
    assert choose(output_dir) == (output_dir / "checkpoint-10", "")
    remove_leftovers(output_dir)
    assert {path.name for path in output_dir.iterdir()} == {"checkpoint-10", "checkpoint-best", "other-12"}


def keep_time(write):
    def write_and_restore(folder):
        before = folder.stat().st_mtime
        write(folder)
        os.utime(folder, (before, before))

    return write_and_restore


@pytest.mark.parametrize("name", [*STATE, "model.safetensors"])
def test_a_malicious_checkpoint_is_a_one_line_error(name, make_model, make_blocks, make_trainer, tmp_path):
    """Its checksums are valid: the attacker wrote them, too."""
    trainer = make_trainer(make_model(), make_blocks(200), **SAVING)
    trainer.train()
    folder, planted = list_checkpoints(trainer.args.output_dir)[-2], tmp_path / "planted"
    if name.endswith((".pt", ".pth")):
        torch.save(Hostile(planted), folder / name)
    elif name == "trainer_state.json":
        state = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(state | {"global_step": "6"}))
    else:
        (folder / name).write_bytes(b"\xff" * 100)
    write_checksums(folder)
    again = make_trainer(make_model(), make_blocks(200), **SAVING)
    with pytest.raises(InputError, match=r"cannot resume from the checkpoint '.*checkpoint-6'") as error:
        again.train(resume_from_checkpoint=str(folder))
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)
    assert not planted.exists()


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)
