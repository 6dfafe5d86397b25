"""Callbacks of a run: progress bar, log, loss curves, and a clean stop on Ctrl-C."""

import json
import math
import signal
import threading
from pathlib import Path

import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from torch import distributed
from transformers import TrainerCallback

from hfgpt.errors import STOP_SIGNALS, InputError
from hfgpt.output import drawable
from hfgpt.records import LOG_FILE
from hfgpt.saving import append_text, write_text
from hfgpt.training.divergence import ROLLBACK
from hfgpt.training.speed import describe_speed, describe_time_left

# Name in the log -> label and style of its curve in loss.png.
CURVES = (("loss", "training", "-"), ("eval_loss", "validation", "o-"), ("test_loss", "test", "D"))
WIDE = 140  # columns that the progress bar and all values need on one line


class ProgressCallback(TrainerCallback):
    """A progress bar with loss, speed and remaining time; without a terminal, one line per logging step.

    Args:
        console: The console to print to; stderr, so that stdout stays clean.
    """

    def __init__(self, console: Console):
        self.console = console
        steps, status, left = MofNCompleteColumn(), "{task.fields[status]}", TimeRemainingColumn()
        if console.width >= WIDE:
            columns = ["training", BarColumn(), steps, status, TimeElapsedColumn(), "left", left]
        else:  # the values go on a second line instead of being cut off
            columns = [BarColumn(10), steps, TextColumn(status, table_column=Column()), left]
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.loss = self.eval_loss = self.speed = ""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step, status="")
            self.progress.start()

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            status = _join(self.loss, self.eval_loss, self.speed)
            # With training.max_seconds, max_steps is an estimate that changes.
            self.progress.update(self.task, total=state.max_steps, completed=state.global_step, status=status)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        if not self.console.is_terminal:
            self.loss = self.eval_loss = self.speed = ""  # a line shows only values of its own step
        if "loss" in logs:
            self.loss, self.speed = f"loss {logs['loss']:.3f}", describe_speed(logs)
        if "eval_loss" in logs:
            self.eval_loss = f"validation {logs['eval_loss']:.3f}"
        if ROLLBACK in logs:
            self.console.print(
                f"step {state.global_step}: training diverged; restored the weights and the optimizer state of step "
                f"{logs[ROLLBACK]}",
                highlight=False,
            )
        if not self.console.is_terminal and (self.loss or self.eval_loss):
            step = f"step {state.global_step}/{state.max_steps}"
            line = _join(step, self.loss, self.eval_loss, self.speed, describe_time_left(logs))
            self.console.print(line, highlight=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self):
        """Restores the terminal; also called if training fails."""
        self.progress.stop()


def _join(*parts: str) -> str:
    return "  ".join(filter(None, parts))


class LogCallback(TrainerCallback):
    """Appends all logged values to `training_log.jsonl`, one JSON object per logging step."""

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        # A resumed run repeats the steps since the last checkpoint, and Trainer's last entry.
        log = read_log(args.output_dir)
        kept = [entry for entry in log if entry["step"] <= state.global_step and "total_flos" not in entry]
        _write_log(args.output_dir, kept)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= state.global_step >= state.max_steps  # also if logging_steps does not divide them

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            append_log(args.output_dir, {"step": state.global_step, "epoch": state.epoch, **logs})


class InterruptCallback(TrainerCallback):
    """On the first of `STOP_SIGNALS`, saves a checkpoint and stops; a second signal stops immediately.

    All processes of a run stop after the same step, whichever of them was interrupted. Use as a context manager around
    `Trainer.train` in every process; `interrupted` tells afterwards whether the run was stopped.
    """

    def __init__(self, console: Console):
        self.console = console
        self.signalled = self.interrupted = False
        # A separate group on the CPU, so that the all-reduce does not wait for the accelerator.
        self.group = distributed.new_group(backend="gloo") if PartialState().num_processes > 1 else None
        self.previous = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # only the main thread may set signal handlers
            self.previous = {number: signal.signal(number, self._interrupt) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _interrupt(self, signum, frame):
        if self.signalled:
            raise KeyboardInterrupt
        self.signalled = True
        self.console.print(
            "stopping after this step to save a checkpoint; a second signal stops immediately, without a checkpoint"
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.interrupted = self.signalled
        if self.group is not None:
            anyone = torch.tensor(int(self.signalled))
            distributed.all_reduce(anyone, distributed.ReduceOp.MAX, self.group)
            self.interrupted = bool(anyone)
        if self.interrupted and state.global_step < state.max_steps:
            control.should_log = control.should_save = True
            control.should_training_stop = True
        return control


def append_log(output_dir: str | Path, entry: dict):
    """Appends an entry, which must have a `step`, to a run's `training_log.jsonl`."""
    append_text(Path(output_dir) / LOG_FILE, json.dumps(entry) + "\n")


def log_result(output_dir: str | Path, entry: dict):
    """Adds the final metrics to the log, replacing an entry of the same kind from a process that was killed."""
    others = [old for old in read_log(output_dir) if old["step"] != entry["step"] or old.keys() != entry.keys()]
    _write_log(output_dir, [*others, entry])


def _write_log(output_dir: str | Path, entries: list[dict]):
    write_text(Path(output_dir) / LOG_FILE, "".join(json.dumps(entry) + "\n" for entry in entries))


def read_log(output_dir: str | Path) -> list[dict]:
    """The entries of a run's `training_log.jsonl`, oldest first; empty if the file does not exist.

    Raises:
        InputError: A line is not an entry.
    """
    path = Path(output_dir) / LOG_FILE
    if not path.exists():
        return []
    # A crash while writing leaves an incomplete last line.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if not isinstance(entry["step"], int):
                raise TypeError
            for name, _, _ in CURVES:
                float(entry.get(name, 0))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"'{path}' is damaged in line {number}: restore or delete it") from error
        entries.append(entry)
    return entries


def plot_loss(output_dir: str | Path, choices: int, unit: str = "token"):
    """Plots `loss.png` from a run's log: training, validation and test loss in nats, and the uniform-guess baseline.

    Args:
        output_dir: The run folder.
        choices: Vocabulary size, or number of classes.
        unit: Unit that the loss is averaged over.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    log = read_log(output_dir)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    for key, label, style in CURVES:
        points = [(entry["step"], entry[key]) for entry in log if key in entry]
        if points:
            last = f"{label}: {points[-1][1]:.3f}"
            style = "o-" if len(points) == 1 and style == "-" else style  # a line through one point is invisible
            axes.plot(*zip(*points, strict=True), style, label=last, linewidth=1.2, markersize=4)
    axes.axhline(math.log(choices), color="grey", linestyle=":", label=f"uniform distribution, ln {choices}")
    axes.set(xlabel="optimizer step", ylabel=f"loss (nats per {unit})", title=drawable(Path(output_dir).name, "loss"))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(Path(output_dir) / "loss.png")
    pyplot.close(figure)
