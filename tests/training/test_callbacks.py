"""Progress, log, curves and Ctrl-C in isolation; `tests/runs` tests them together."""

import io
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from matplotlib import pyplot
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import TrainerControl, TrainerState

from hfgpt.errors import STOP_SIGNALS, InputError
from hfgpt.output import PlainConsole, stderr_console
from hfgpt.training.callbacks import (
    LOG_FILE,
    InterruptCallback,
    LogCallback,
    ProgressCallback,
    log_result,
    plot_loss,
    read_log,
)

PNG = b"\x89PNG\r\n\x1a\n"


def state_at(step: int, max_steps: int = 10, **fields) -> TrainerState:
    state = TrainerState(global_step=step, max_steps=max_steps, epoch=step / 4, **fields)
    state.is_world_process_zero = fields.get("is_world_process_zero", True)
    return state


def text_console(terminal: bool = False, width: int = 200) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width)


def test_log_has_one_object_per_logging_step(tmp_path):
    callback, arguments = LogCallback(), SimpleNamespace(output_dir=str(tmp_path))
    assert read_log(tmp_path) == []
    callback.on_train_begin(arguments, state_at(0), None)
    callback.on_log(arguments, state_at(2), None, logs={"loss": 3.5, "learning_rate": 1e-3})
    callback.on_log(arguments, state_at(4), None, logs={"eval_loss": 3.25})
    callback.on_log(arguments, state_at(6), None, logs={})
    callback.on_log(arguments, state_at(6, is_world_process_zero=False), None, logs={"loss": 9.0})
    expected = [
        {"step": 2, "epoch": 0.5, "loss": 3.5, "learning_rate": 1e-3},
        {"step": 4, "epoch": 1.0, "eval_loss": 3.25},
    ]
    assert [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()] == expected
    assert read_log(str(tmp_path)) == expected


def test_the_last_step_is_always_logged():
    for step in (1, 2, 3):
        control = TrainerControl()
        LogCallback().on_step_end(None, state_at(step, max_steps=3), control)
        assert control.should_log is (step == 3)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        '{"loss": 1}',
        '{"step": 2, "loss": {}}',
        '{"step": 2, "eval_loss": "x"}',
        '{"step": "2"}',
        "\x1b",
        "[" * 9999,
    ],
)
def test_a_damaged_log_names_the_line(line, tmp_path):
    (tmp_path / LOG_FILE).write_text(f'{{"step": 1, "loss": 2.0}}\n{line}\n')
    with pytest.raises(InputError, match=r"training_log.jsonl' is damaged in line 2: restore or delete it"):
        read_log(tmp_path)


def test_log_of_a_resumed_run_drops_repeated_steps(tmp_path):
    arguments = SimpleNamespace(output_dir=str(tmp_path))
    first = LogCallback()
    first.on_train_begin(arguments, state_at(0), None)
    for step in (1, 2, 3, 4):
        first.on_log(arguments, state_at(step), None, logs={"loss": 5.0 - step})
    resumed = LogCallback()
    resumed.on_train_begin(arguments, state_at(2), None)
    assert [entry["step"] for entry in read_log(tmp_path)] == [1, 2]
    resumed.on_log(arguments, state_at(3), None, logs={"loss": 2.0})
    assert [(entry["step"], entry["loss"]) for entry in read_log(tmp_path)] == [(1, 4.0), (2, 3.0), (3, 2.0)]
    # A new run in the folder starts a new log.
    LogCallback().on_train_begin(arguments, state_at(0), None)
    assert (tmp_path / LOG_FILE).read_text() == ""


def test_a_log_truncated_by_a_crash_is_read_up_to_that_point(tmp_path):
    (tmp_path / LOG_FILE).write_text('{"step": 1, "loss": 4.0}\n{"step": 2, "lo')
    assert read_log(tmp_path) == [{"step": 1, "loss": 4.0}]


def test_a_result_measured_again_after_a_crash_is_logged_once(tmp_path):
    evaluated = {"step": 2, "eval_loss": 1.5, "eval_runtime": 0.1}  # during training
    (tmp_path / LOG_FILE).write_text(json.dumps(evaluated) + '\n{"step": 2, "eval_lo')
    for _ in range(2):
        log_result(tmp_path, {"step": 2, "eval_loss": 1.5})
    assert read_log(tmp_path) == [evaluated, {"step": 2, "eval_loss": 1.5}]
    log_result(tmp_path, {"step": 4, "eval_loss": 1.25})  # the same run, extended
    assert [entry["step"] for entry in read_log(tmp_path)] == [2, 2, 4]


SPEED = {"train_tokens_per_second": 10925.4, "train_peak_memory_bytes": 2**30, "train_seconds_left": 62.0}


def test_progress_without_a_terminal_is_a_line_per_logging_step(capsys):
    console = text_console()
    callback = ProgressCallback(console)
    callback.on_train_begin(None, state_at(0), None)
    callback.on_step_end(None, state_at(1), None)
    callback.on_log(None, state_at(2), None, logs={"loss": 3.14159, "learning_rate": 0.1, **SPEED})
    # The loss and the speed of step 2 are not shown again.
    callback.on_log(None, state_at(4), None, logs={"eval_loss": 2.71828, "eval_runtime": 2.0})
    callback.on_log(None, state_at(4), None, logs={"train_runtime": 10.0})
    callback.on_log(None, state_at(6), None, logs={"loss": 3.0})
    callback.on_log(None, state_at(7), None, logs={"rollback_to_step": 4})
    callback.on_log(None, state_at(4, is_world_process_zero=False), None, logs={"loss": 9.0})
    callback.on_train_end(None, state_at(4), None)
    assert console.file.getvalue().splitlines() == [
        "step 2/10  loss 3.142  10,925 tokens/s  MFU n/a  memory 1.00 GiB  0:01:02 left",
        "step 4/10  validation 2.718",
        "step 6/10  loss 3.000",
        "step 7: training diverged; restored the weights and the optimizer state of step 4",
    ]
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_is_a_bar():
    console = text_console(terminal=True)
    callback = ProgressCallback(console)
    callback.on_train_begin(None, state_at(0), None)
    callback.on_log(None, state_at(3), None, logs={"loss": 1.25})
    callback.on_step_end(None, state_at(3), None)
    callback.close()
    assert callback.progress.finished is False
    shown = console.file.getvalue()
    assert "3/10" in shown
    assert "loss 1.250" in shown
    assert "step 3/10" not in shown


@pytest.mark.parametrize("width", [40, 80, 140])
def test_progress_is_complete_on_a_terminal_of_any_width(width):
    console = text_console(terminal=True, width=width)
    callback = ProgressCallback(console)
    callback.on_train_begin(None, state_at(0, max_steps=1000), None)
    callback.on_log(None, state_at(437, max_steps=1000), None, logs={"loss": 1.25, **SPEED, "train_mfu": 0.4567})
    callback.on_log(None, state_at(437, max_steps=1000), None, logs={"eval_loss": 2.5, "eval_runtime": 0.0})
    callback.on_step_end(None, state_at(437, max_steps=1000), None)
    callback.close()
    lines = console.file.getvalue().split("\x1b[2K")[-1]
    assert "…" not in lines
    for part in ("437/1000", "loss 1.250", "validation", "2.500", "10,925", "tokens/s", "45.7%", "1.00", "GiB"):
        assert part in lines


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_interrupt_saves_and_stops_the_second_stops_at_once(number):
    before = signal.getsignal(number)
    console = text_console()
    with InterruptCallback(console) as callback:
        control = callback.on_step_end(None, state_at(3), TrainerControl())
        assert (control.should_save, control.should_training_stop) == (False, False)
        signal.raise_signal(number)
        assert "a second signal stops immediately" in console.file.getvalue()
        control = callback.on_step_end(None, state_at(4), TrainerControl())
        assert (control.should_save, control.should_training_stop) == (True, True)
        # The loss since the last logging step would be lost: Trainer does not save it in checkpoints.
        assert control.should_log
        # After the last step there is nothing to stop.
        control = callback.on_step_end(None, state_at(10), TrainerControl())
        assert (control.should_save, control.should_training_stop) == (False, False)
        assert callback.interrupted
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_outside_the_main_thread_no_handler_is_set():
    failed = []

    def train():
        try:
            with InterruptCallback(text_console()) as callback:
                callback.on_step_end(None, state_at(3), TrainerControl())
        except ValueError as error:
            failed.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert failed == []


TWO_PROCESSES = """
import os, signal, sys
from accelerate import PartialState
from rich.console import Console
from transformers import TrainerControl, TrainerState
from hfgpt.training.callbacks import InterruptCallback

# Two forks share one import of torch.
child = os.fork()
rank = 0 if child else 1
os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
status = 1
try:
    assert PartialState(cpu=True).process_index == rank
    with InterruptCallback(Console(quiet=True)) as callback:
        for step in range(1, 20):
            if step == 5 + 3 * rank:
                signal.raise_signal(signal.SIGTERM)
            control = callback.on_step_end(None, TrainerState(global_step=step, max_steps=100), TrainerControl())
            if control.should_training_stop:
                os.write(1, f"{step} {control.should_save}\\n".encode())
                break
    status = 0
finally:
    if not child:
        os._exit(status)
assert os.waitpid(child, 0)[1] == 0
"""


def test_all_processes_stop_after_the_same_step():
    """The first process is interrupted in step 5, the second would be in step 8."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", TWO_PROCESSES], env=shared, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["5 True", "5 True"]


def test_signal_handlers_are_restored_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError), InterruptCallback(text_console()):
        raise RuntimeError
    assert signal.getsignal(signal.SIGINT) is before


def write_log(folder, *entries: dict):
    (folder / LOG_FILE).write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


def test_curves_show_the_log(tmp_path, monkeypatch):
    write_log(
        tmp_path,
        {"step": 1, "loss": 4.0},
        {"step": 2, "loss": 3.5},
        {"step": 2, "eval_loss": 3.75},
        {"step": 2, "train_loss": 3.75},
    )
    close, drawn = pyplot.close, []
    monkeypatch.setattr(pyplot, "close", lambda figure: (drawn.append(figure), close(figure)))
    plot_loss(tmp_path, choices=61)
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)
    (axes,) = drawn[0].axes
    lines = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
    assert lines["training: 3.500"] == [(1, 4.0), (2, 3.5)]
    assert lines["validation: 3.750"] == [(2, 3.75)]
    assert {height for _, height in lines["uniform distribution, ln 61"]} == {math.log(61)}
    assert "nats" in axes.get_ylabel()
    assert not pyplot.get_fignums()


def test_curves_of_a_log_without_evaluation_show_a_single_loss(tmp_path, monkeypatch):
    write_log(tmp_path, {"step": 1, "loss": 4.0})
    close, drawn = pyplot.close, []
    monkeypatch.setattr(pyplot, "close", lambda figure: (drawn.append(figure), close(figure)))
    plot_loss(str(tmp_path), choices=61)
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)
    assert drawn[0].axes[0].lines[0].get_marker() == "o", "a line of one point would be invisible"


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("run-\u0440\u0443\u0441\u0441\u043a\u0438\u0439", None),
        ("\u6545\u4e8b", "loss"),
        ("run \U0001f680", "loss"),
        ("$\\frac$", r"\$\frac\$"),
    ],
)
def test_curves_of_a_run_with_a_name_in_any_script(name, title, tmp_path, monkeypatch, recwarn):
    (tmp_path / name).mkdir()
    write_log(tmp_path / name, {"step": 1, "loss": 4.0})
    close, drawn = pyplot.close, []
    monkeypatch.setattr(pyplot, "close", lambda figure: (drawn.append(figure), close(figure)))
    plot_loss(tmp_path / name, choices=61)
    assert drawn[0].axes[0].get_title() == (title or name)
    assert [str(warning.message) for warning in recwarn] == []


def test_notices_go_to_standard_error(capsys):
    stderr_console().print("a notice that must not be wrapped [/b] [red] " * 9)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("[/b] [red]") == 9, "no markup: it may be a path or generated text"
    assert err.count("\n") == 1


def test_a_console_prints_foreign_text_literally_and_never_as_commands():
    console = PlainConsole(file=io.StringIO(), width=100, force_terminal=True)
    console.print("label [/x] [bold]:smile: \x1b[2J\x9b2J\u202e", Text("styled", style="green"))
    table = Table("a\x1b[2J", show_header=True, box=None)
    table.add_row("b\x07")
    console.print(table)
    with console.status("[x] \x1b[2J"):
        pass
    shown = console.file.getvalue()
    assert shown.startswith("label [/x] [bold]:smile: \\x1b[2J\\x9b2J\\u202e \x1b[32mstyled\x1b[0m\n")
    for visible in ("a\\x1b[2J", "b\\x07", "[x] \\x1b[2J"):
        assert visible in shown
    assert "\x1b[2J" not in shown
