"""Watching a run: speed in its log, and an experiment tracker, which gets the same values."""

import signal
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
from transformers.integrations import integration_utils

from hfgpt.errors import Interrupted
from hfgpt.hub.contents import sort_contents
from hfgpt.records import RunRecord
from hfgpt.saving import hash_file
from hfgpt.training import trackers
from hfgpt.training.callbacks import read_log

SCALARS: list[tuple[str, float, int]] = []


class SummaryWriter:
    """In place of TensorBoard's: one file per process, and the scalars in `SCALARS`."""

    def __init__(self, log_dir: str):
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        (Path(log_dir) / f"events.out.tfevents.{len(SCALARS)}").write_bytes(b"\0")

    def add_text(self, *arguments):
        pass

    def add_scalar(self, name: str, value: float, step: int):
        SCALARS.append((name, value, step))

    def flush(self):
        pass

    close = flush


@pytest.fixture
def tensorboard(monkeypatch):
    module = ModuleType("torch.utils.tensorboard")
    module.__spec__, module.SummaryWriter = ModuleSpec(module.__name__, None), SummaryWriter
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setattr(trackers, "find_spec", lambda name: module.__spec__)
    SCALARS.clear()


def test_a_tracked_run_is_resumed_and_published_like_any_other(finished, train, tensorboard, tmp_path):
    def interrupt(step: int):
        if step == 7:
            signal.raise_signal(signal.SIGINT)

    folder, report = tmp_path / "run", "training.report_to=tensorboard"
    with pytest.raises(Interrupted):
        train(folder, report, during=interrupt)
    first = list(SCALARS)
    train(folder, report, resume=True)
    assert hash_file(folder / "model.safetensors") == hash_file(finished.folder / "model.safetensors")
    steps = RunRecord.read(folder).steps
    assert [step for name, _, step in first if name == "train/loss"] == list(range(1, 8))
    assert [step for name, _, step in SCALARS if name == "train/loss"] == list(range(1, steps + 1))
    logged = {entry["step"]: entry for entry in read_log(folder) if "loss" in entry}
    for name in ("loss", "train_tokens_per_second", "train_peak_memory_bytes", "train_seconds_left"):
        values = {step: value for tag, value, step in SCALARS if tag == f"train/{name}"}
        assert values == {step: entry[name] for step, entry in logged.items()}
    assert len(list((folder / "runs").rglob("events.*"))) == 2
    contents = sort_contents(folder)
    assert contents.staying["runs"] == "TensorBoard logs"
    assert {*contents.going, "loss.png"} == set(sort_contents(finished.folder).going)


def test_speed_and_memory_are_logged_and_shown(finished):
    entries = [entry for entry in read_log(finished.folder) if "loss" in entry]
    for entry in entries:
        assert entry["train_tokens_per_second"] > 0
        assert entry["train_peak_memory_bytes"] > 2**20
        assert "train_mfu" not in entry, "the peak of a CPU is unknown"
    assert entries[0]["train_seconds_left"] > entries[-1]["train_seconds_left"] == 0
    line = next(line for line in finished.shown.splitlines() if line.startswith("step 1/"))
    assert " tokens/s  MFU n/a  memory " in line
    assert line.endswith(" left")
