"""A run: from a recipe to a folder with a model, in seven steps that are the same for every task."""

import contextlib
import datetime
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from torch import distributed
from transformers import PreTrainedModel, TrainerCallback

from hfgpt.durations import Budget
from hfgpt.errors import InputError, Interrupted
from hfgpt.evaluation.spread import all_see, map_over_processes
from hfgpt.hub import HubArguments
from hfgpt.hub.card import write_card
from hfgpt.hub.folder import read_records
from hfgpt.hub.usage import Place
from hfgpt.known_answers import record_answers
from hfgpt.models import find_model, hash_weights
from hfgpt.output import stderr_console
from hfgpt.recipe import Recipe
from hfgpt.records import RECIPE_FILE, write_metrics
from hfgpt.runs.budget import check_budget, fit_to_budget, keep_choice
from hfgpt.runs.first_pass import finish_first_pass, plan_first_pass
from hfgpt.runs.folder import begin_run, check_run_folder, hold_folder
from hfgpt.runs.messages import describe_end, describe_next, describe_start
from hfgpt.runs.record import describe_run
from hfgpt.runs.training import Training, run_training, save_run
from hfgpt.tasks import TASKS
from hfgpt.tasks.task import Data, Measured
from hfgpt.training.callbacks import log_result, plot_loss
from hfgpt.training.checkpoints import list_checkpoints
from hfgpt.training.estimate import explained_memory, plan_run
from hfgpt.training.trackers import check_login
from hfgpt.training.trainer import HfGPTTrainer


def run(
    recipe: Recipe,
    resume: bool = False,
    console: Console | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    budget: Budget | None = None,
) -> dict[str, Any]:
    """Trains the model that a recipe describes and writes a complete run folder.

    Args:
        recipe: See `hfgpt.recipe.load_recipe`.
        resume: Whether to resume from the last checkpoint in `training.output_dir`.
        console: The console to print to; None: stderr.
        callbacks: Trainer callbacks, in addition to those for progress and log.
        budget: Choose the model and its training for this time; None: as in the recipe.

    Returns:
        The content of `metrics.json`; empty in all processes but the main one.

    Raises:
        InputError: There is an error in the recipe, the data or the run folder; or the judge failed at the end, with
            everything else saved.
        Interrupted: Ctrl-C; the message tells how to resume the run.
    """
    is_main = recipe.training.process_index == 0
    console = console or stderr_console(quiet=not is_main)
    if budget:
        check_budget(recipe, budget)
    with hold_folder(Path(recipe.training.output_dir), is_main), explained_disconnection():
        return _run_steps(recipe, resume, console, callbacks, budget)


def _run_steps(recipe: Recipe, resume: bool, console: Console, callbacks: Sequence, budget: Budget | None) -> dict:
    started, arguments, task = time.perf_counter(), recipe.training, TASKS[recipe.task]
    folder, is_main = Path(arguments.output_dir), arguments.process_index == 0

    # 1. The run folder: free, or with the run to resume. Also check what will be needed at the end of the run.
    if budget and resume:
        recipe = keep_choice(recipe, budget)
    checkpoint = check_run_folder(recipe, resume, console)
    task.check(recipe)
    if is_main:  # the only process that reports
        check_login(arguments.report_to)

    # 2. The data: rows, splits, token ids.
    with main_process_first():  # the other processes use its cache
        data = task.load(recipe, folder if resume else None)

    # 3. The model; within a budget, the best one for the time that is left.
    recipe, forecast = fit_to_budget(recipe, data, budget, console) if budget and not resume else (recipe, None)
    model = task.build(recipe, data)

    # 4. The plan, with that of a first pass of language modeling if the recipe has one.
    estimate = plan_run(model, recipe.training, data.row_length, data.train_rows, seconds=0.5)
    first = plan_first_pass(recipe, data, seconds=0.5)
    console.print(describe_start(recipe, data, model, estimate, first, is_new=checkpoint is None), highlight=False)

    # 5. Train: the first pass, and then the run itself, from its weights.
    PartialState().wait_for_everyone()  # all processes have checked the folder
    if is_main:
        begin_run(recipe, data, checkpoint, forecast)
    with explained_memory(recipe.training):
        if recipe.pretraining:
            recipe, data = finish_first_pass(first, recipe, data, console)
            model = task.build(recipe, data)
        trainer = build_trainer(recipe, model, data)
        training = run_training(trainer, estimate, checkpoint, console, callbacks)

    # 6. Save in all processes, then evaluate the saved weights in all that see them.
    save_run(trainer, folder)
    spread = map_over_processes if all_see(folder / RECIPE_FILE) else map
    if spread is map and not is_main:
        return {}
    console.print(f"evaluating the saved weights on the {task.measured_split} split")
    with resumable_evaluation(folder):
        saved = find_model(str(folder)).load().to(arguments.device)
        measured = task.measure(saved, data, recipe, console, spread)
        if not is_main:
            return {}
        samples = task.sample(saved, data, recipe)
        answers = record_answers(saved, data.tokenizer, hash_weights(folder))

    # 7. Write the records; the model card is last and marks the run as finished.
    write_results(recipe, training, data, measured)
    record = describe_run(recipe, training, data, samples, started)
    record.write(folder)
    answers.write(folder)
    metrics = judge(measured, folder)
    write_card(folder, read_records(folder), recipe.hub or HubArguments(), Place.of_folder(folder))
    console.print(describe_end(task, metrics, record, training), highlight=False)
    console.print(describe_next(folder, task), soft_wrap=True)  # not wrapped, so that the command can be copied
    return metrics


def build_trainer(recipe: Recipe, model: PreTrainedModel, data: Data) -> HfGPTTrainer:
    """The trainer of a run, with the arguments of its task."""
    return HfGPTTrainer(
        model=model,
        args=recipe.training,
        train_dataset=data.splits["train"],
        eval_dataset=data.splits["validation"],
        processing_class=data.tokenizer,
        **TASKS[recipe.task].trainer_arguments(recipe, data),
    )


@contextlib.contextmanager
def main_process_first():
    """Runs a block in the main process before the others; they wait as long as it takes, which can be hours."""
    state = PartialState()
    if state.num_processes > 1:
        patient = distributed.new_group(backend="gloo", timeout=datetime.timedelta(days=30))
        if not state.is_main_process:
            distributed.barrier(patient)
    yield
    if state.num_processes > 1 and state.is_main_process:
        distributed.barrier(patient)


@contextlib.contextmanager
def explained_disconnection():
    """Reports in one line that another process of the run has died, instead of the errors of gloo and NCCL."""
    try:
        yield
    except RuntimeError as error:
        # PyTorch raises a plain RuntimeError with gloo's message, and its own classes for NCCL and the rendezvous.
        if not isinstance(error, distributed.DistError) and "gloo/transport" not in str(error):
            raise
        raise InputError(
            "the connection to another process of this run was lost: see the messages of the other processes, and "
            "rerun the command with --resume"
        ) from error


@contextlib.contextmanager
def resumable_evaluation(folder: Path):
    """Turns Ctrl-C during the final evaluation into an `Interrupted` that tells how to finish the run."""
    try:
        yield
    except KeyboardInterrupt:
        resume = ": rerun the command with --resume to finish" if list_checkpoints(folder) else ""
        raise Interrupted(f"stopped during the evaluation; the weights are saved in {folder}{resume}") from None


def write_results(recipe: Recipe, training: Training, data: Data, measured: Measured):
    """Writes the results: metrics.json, the last log entry, plots and answers."""
    folder, state, metrics = Path(recipe.training.output_dir), training.trainer.state, measured.metrics
    write_metrics(folder, metrics)
    if measured.keep:
        measured.keep(folder)
    if TASKS[recipe.task].measured_split == "test":  # in the log, eval_ is the validation split
        metrics = {re.sub("^eval_", "test_", name): value for name, value in metrics.items()}
    log_result(folder, {"step": state.global_step, "epoch": state.epoch, **metrics})
    choices, unit = (len(data.labels), "row") if data.labels else (training.trainer.model.config.vocab_size, "token")
    plot_loss(folder, choices, unit)


def judge(measured: Measured, folder: Path) -> dict[str, Any]:
    """All metrics, with those of the judge if there is one; the judge runs last, since it may fail.

    Raises:
        InputError: The judge failed. The run then has no model card and is not finished: --resume continues here, and
            asks the judge only for missing scores.
    """
    if measured.judge is None:
        return measured.metrics
    try:
        metrics = measured.metrics | measured.judge(folder)
    except InputError as error:
        raise InputError(f"{error}; everything else is saved: rerun the command with --resume") from error
    write_metrics(folder, metrics)
    return metrics
