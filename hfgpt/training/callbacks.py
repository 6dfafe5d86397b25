"""What a run shows and leaves while it trains: progress, log, curves, and an end on Ctrl-C that loses nothing."""

import json
import math
import signal
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from hfgpt.evaluation.classification import drawable

LOG_FILE = "training_log.jsonl"


class ProgressCallback(TrainerCallback):
    """A live bar with loss, tokens a second and time left; on a terminal that is none, a line at each logging step.

    Args:
        tokens_per_step: Predicted in one optimizer step, over all devices.
        console: Where to draw; standard error, so that standard output stays clean.
    """

    def __init__(self, tokens_per_step: int, console: Console):
        self.tokens_per_step = tokens_per_step
        self.console = console
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.loss = self.eval_loss = ""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step, status="")
            self.progress.start()
        self.start, self.first_step, self.evaluating = time.perf_counter(), state.global_step, 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.progress.update(self.task, completed=state.global_step, status=self._status(state))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            self.loss = f"loss {logs['loss']:.3f}"
        if "eval_loss" in logs:
            self.eval_loss = f"validation {logs['eval_loss']:.3f}"
            self.evaluating += logs["eval_runtime"]
        if not self.console.is_terminal and ("loss" in logs or "eval_loss" in logs):
            self.console.print(f"step {state.global_step}/{state.max_steps}  {self._status(state)}", highlight=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self):
        """Leaves the terminal in order; called by the task whatever ended the training."""
        self.progress.stop()

    def _status(self, state) -> str:
        seconds = time.perf_counter() - self.start - self.evaluating
        rate = (state.global_step - self.first_step) * self.tokens_per_step / max(seconds, 1e-9)
        return "  ".join(part for part in (self.loss, self.eval_loss, f"{rate:,.0f} tokens/s") if part)


class LogCallback(TrainerCallback):
    """Appends every logged value to `training_log.jsonl`, one JSON object a logging step."""

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / LOG_FILE
        # A run that was stopped between two checkpoints repeats the steps since the first.
        kept = [entry for entry in read_log(args.output_dir) if entry["step"] <= state.global_step]
        path.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            append_log(args.output_dir, {"step": state.global_step, "epoch": state.epoch, **logs})


class InterruptCallback(TrainerCallback):
    """Turns the first Ctrl-C into a checkpoint and an orderly end after the running step; the second ends at once.

    Use as a context manager around `Trainer.train`; `interrupted` says afterwards whether it happened.
    """

    def __init__(self, console: Console):
        self.console = console
        self.interrupted = False

    def __enter__(self):
        self.previous = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *exception):
        signal.signal(signal.SIGINT, self.previous)

    def _interrupt(self, signum, frame):
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        self.console.print("stopping after this step to save a checkpoint; Ctrl-C again stops at once, without one")

    def on_step_end(self, args, state, control, **kwargs):
        if self.interrupted and state.global_step < state.max_steps:
            control.should_log = control.should_save = True
            control.should_training_stop = True
        return control


def append_log(output_dir: str | Path, entry: dict):
    """Adds an entry, with its `step`, to a run's `training_log.jsonl`."""
    with open(Path(output_dir) / LOG_FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def read_log(output_dir: str | Path) -> list[dict]:
    """The entries of a run's `training_log.jsonl`, oldest first; none if there is no such file."""
    path = Path(output_dir) / LOG_FILE
    if not path.exists():
        return []
    # A crash while writing leaves a line without its end.
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def plot_loss(output_dir: str | Path, choices: int, unit: str = "token"):
    """Draws `loss.png` from a run's log: training, validation and test loss in nats, from the uniform guess down.

    Args:
        output_dir: Of the run.
        choices: What the model chooses among: the size of its vocabulary, or the number of classes.
        unit: What the loss is a mean over.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    log = read_log(output_dir)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    curves = (("loss", "training", "-"), ("eval_loss", "validation", "o-"), ("test_loss", "test", "D"))
    for key, label, style in curves:
        points = [(entry["step"], entry[key]) for entry in log if key in entry]
        if points:
            last = f"{label}: {points[-1][1]:.3f}"
            axes.plot(*zip(*points, strict=True), style, label=last, linewidth=1.2, markersize=4)
    axes.axhline(math.log(choices), color="grey", linestyle=":", label=f"uniform guess, ln {choices}")
    axes.set(xlabel="optimizer step", ylabel=f"loss (nats a {unit})", title=drawable(Path(output_dir).name, "loss"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(Path(output_dir) / "loss.png")
    pyplot.close(figure)


def stderr_console(quiet: bool = False) -> Console:
    """The console of progress and notices: standard error, plain where it is not a terminal, and [x] is no markup."""
    return Console(file=sys.stderr, soft_wrap=not sys.stderr.isatty(), quiet=quiet, markup=False)
