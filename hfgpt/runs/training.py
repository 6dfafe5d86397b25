"""Runs a trainer with progress bar and Ctrl-C handling, and saves the result."""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from transformers import PrinterCallback, TrainerCallback

from hfgpt.errors import Interrupted
from hfgpt.saving import staged_files
from hfgpt.training.callbacks import InterruptCallback, LogCallback, ProgressCallback
from hfgpt.training.checkpoints import step_of
from hfgpt.training.estimate import Estimate
from hfgpt.training.hardware import find_peak_flops, peak_memory_bytes, reset_peak_memory
from hfgpt.training.speed import SpeedMeter
from hfgpt.training.trackers import explained_errors
from hfgpt.training.trainer import HfGPTTrainer


@dataclass
class Training:
    """A finished training.

    Args:
        trainer: With the trained model and its state.
        estimate: The plan.
        first_step: Step of the checkpoint that this process resumed from; 0 in a new run.
        seconds: Training time.
        peak_memory: Bytes, and what they cover: `training`, or the `process` if the peak cannot be reset.
    """

    trainer: HfGPTTrainer
    estimate: Estimate
    first_step: int
    seconds: float
    peak_memory: tuple[int, str]


def run_training(
    trainer: HfGPTTrainer,
    estimate: Estimate,
    checkpoint: Path | None,
    console: Console,
    callbacks: Sequence[TrainerCallback] = (),
) -> Training:
    """Trains to the end.

    Args:
        trainer: A trainer without progress callbacks.
        estimate: The plan.
        checkpoint: Checkpoint to resume from; None: start at step 0.
        console: Shows progress.
        callbacks: Additional Trainer callbacks.

    Raises:
        Interrupted: Ctrl-C; a checkpoint was saved.
        InputError: The loss is not finite, the disk is full, or an experiment tracker failed.
    """
    if checkpoint:
        of_steps = f" of {estimate.steps:,}" if trainer.args.max_seconds is None else ""
        of_tokens = f" of {estimate.tokens:,}" if trainer.args.max_seconds is None else ""
        console.print(
            f"resuming from {checkpoint.name}: step {step_of(checkpoint):,}{of_steps} (token "
            f"{step_of(checkpoint) * estimate.tokens_per_step:,}{of_tokens}); same data order and dropout",
            highlight=False,
        )
    progress = ProgressCallback(console)
    interrupt = InterruptCallback(console)
    trainer.speed = build_meter(trainer, estimate)
    trainer.remove_callback(PrinterCallback)  # prints every logged dictionary
    for callback in (trainer.speed, LogCallback(), progress, interrupt, *callbacks):
        trainer.add_callback(callback)
    peak_of = "training" if reset_peak_memory(trainer.args.device) else "process"  # excludes the benchmark's copy
    begun = time.perf_counter()
    try:
        with interrupt, explained_errors(trainer.args.report_to):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        progress.close()
    if trainer.state.global_step < trainer.state.max_steps and interrupt.interrupted:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; the checkpoint is in "
            f"{trainer.args.output_dir}: rerun the command with --resume"
        )
    seconds, peak_memory = time.perf_counter() - begun, (peak_memory_bytes(trainer.args.device), peak_of)
    first_step = step_of(checkpoint) if checkpoint else 0
    return Training(trainer, estimate, first_step, seconds, peak_memory)


def build_meter(trainer: HfGPTTrainer, estimate: Estimate) -> SpeedMeter:
    """The meter of a training's speed; without MFU if some weights are frozen, which takes fewer FLOPs."""
    arguments, peak = trainer.args, None
    if all(parameter.requires_grad for parameter in trainer.model.parameters()):
        mixed = "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else None
        peak = find_peak_flops(arguments.device, mixed or ("tf32" if arguments.tf32 else "float32"))
    everything = peak * arguments.world_size if peak else None
    return SpeedMeter(estimate.tokens_per_step, estimate.flops_per_token, everything, arguments.device)


def save_run(trainer: HfGPTTrainer, folder: Path):
    """Saves the trained model or adapter, and its tokenizer, atomically.

    All processes take part, since each may hold a shard of the weights; the main process writes.
    """
    main = trainer.is_world_process_zero()
    with staged_files(folder) if main else contextlib.nullcontext(folder) as staging:
        trainer.save_model(str(staging))
        if main:
            (staging / "training_args.bin").unlink()  # a pickle; recipe.yaml has the same content
