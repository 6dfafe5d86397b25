"""The run folder: locked by one process, checked for other runs, and filled with everything to reproduce the run."""

import dataclasses
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from hfgpt.data.report import counted
from hfgpt.errors import InputError
from hfgpt.models import SavedModel
from hfgpt.output import stderr_console
from hfgpt.recipe import Recipe, first_difference, load_recipe, render_recipe
from hfgpt.records import CARD_FILE, METRICS_FILE, RECIPE_FILE, Forecast, RunRecord, is_finished, is_run
from hfgpt.saving import (
    check_writable,
    explain_full_disk,
    quote_path,
    remove_leftovers,
    staged_files,
    write_text,
)
from hfgpt.tasks.task import Data
from hfgpt.tokenizer import tokenizer_hash
from hfgpt.training.arguments import HfGPTTrainingArguments
from hfgpt.training.checkpoints import choose_checkpoint, find_last_checkpoint, remove_later_checkpoints, step_of

LENGTH = ("training.max_steps", "training.num_train_epochs")


@contextmanager
def hold_folder(folder: Path, main_process: bool = True) -> Iterator[None]:
    """Creates a folder and locks it until this process ends; removes it afterwards if it is empty.

    Args:
        folder: The run folder.
        main_process: Whether this is the process of the run that writes to it.

    Raises:
        InputError: Another process has locked the folder, or it is not writable.
    """
    if not main_process:
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise InputError(f"training.output_dir '{folder}' is a file: choose another path")
    check_writable(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, folder)
        _HELD.add(descriptor)
        remove_leftovers(folder)
        yield
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()  # only succeeds if empty
        _HELD.discard(descriptor)
        os.close(descriptor)


# Forked processes share the locks, and may outlive this process.
_HELD: set[int] = set()
os.register_at_fork(after_in_child=lambda: [os.close(descriptor) for descriptor in _HELD])


def _lock(descriptor: int, folder: Path):
    """Locks the folder itself, which needs no lock file; the lock ends with the descriptor or the process."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(
            f"another process is training in '{folder}': wait until it ends, or choose another --training.output_dir"
        ) from error
    except OSError:
        pass  # a file system without locks, such as some network file systems


def check_run_folder(recipe: Recipe, resume: bool, console: Console | None = None) -> Path | None:
    """Checks that the run folder is free, or contains the run to resume; writes nothing.

    Args:
        recipe: Its `training.output_dir` is the folder.
        resume: Whether to resume from the last checkpoint there.
        console: Reports damaged checkpoints; None: stderr.

    Returns:
        The checkpoint to resume from, or None to start at step 0.

    Raises:
        InputError: The folder contains another run, or there is nothing to resume.
    """
    folder, console = Path(recipe.training.output_dir), console or stderr_console()
    began, finished = is_run(folder), is_finished(folder)
    if not resume:
        if finished:
            raise InputError(
                f"'{folder}' already contains a finished run: choose another --training.output_dir; "
                f"{_advise_longer(recipe)}"
            )
        if began:
            raise InputError(
                f"'{folder}' already contains an unfinished run: pass --resume to continue it, or choose another "
                "--training.output_dir"
            )
        if folder.is_dir() and (names := sorted(path.name for path in folder.iterdir())):
            raise InputError(
                f"'{folder}' already contains other files ({names[0]}, ...): choose another --training.output_dir"
            )
        return None
    if not began:
        raise InputError(f"there is no run to resume in '{folder}': leave out --resume to start one")
    old = load_recipe(str(folder / RECIPE_FILE))
    longer = _is_longer(old.training, recipe.training)
    if difference := first_difference(old.values, recipe.values, LENGTH if longer else ()):
        key, before, now = difference
        remedy = ": use the same recipe and overrides, or choose another --training.output_dir"
        if key in LENGTH and not _has_constant_rate(recipe.training):
            schedule = recipe.training.lr_scheduler_type.value
            remedy = f", and its learning-rate schedule ({schedule}) depends on it; {_advise_longer(recipe)}"
        now, before = ("unset" if value in (None, -1) else repr(value) for value in (now, before))
        raise InputError(f"{key} is {now}, but was {before} when the run in '{folder}' started{remedy}")
    if finished and not longer:
        raise InputError(f"the run in '{folder}' is finished: there is nothing to resume; {_advise_longer(recipe)}")
    keep_steps(recipe.training, folder)
    checkpoint = choose_checkpoint(folder, console)
    if checkpoint is None:
        if finished:
            raise InputError(f"'{folder}' has no checkpoint to continue from; {_advise_longer(recipe)}")
        console.print(f"'{folder}' has no checkpoint yet: starting at step 0", highlight=False, markup=False)
    return checkpoint


def keep_steps(arguments: HfGPTTrainingArguments, folder: Path):
    """Divides the rows of each step of a resumed run into the same batches, on this number of processes.

    Raises:
        InputError: There are more processes than batches.
    """
    before = RunRecord.read(folder)
    if not before or not before.rows_per_step:
        return
    batches = -(-before.rows_per_step // before.rows_per_batch)
    if arguments.data_processes > batches:
        raise InputError(
            f"there are {arguments.data_processes} processes, but a step of the run in '{folder}' has only "
            f"{counted(batches, 'batches')} of {before.rows_per_batch} rows: use at most {batches}"
        )
    if arguments.rows_per_step != before.rows_per_step:
        arguments.global_batch_size, arguments.gradient_accumulation_steps = before.rows_per_step, 1


def _is_longer(old: HfGPTTrainingArguments, new: HfGPTTrainingArguments) -> bool:
    """Whether a run is only extended, with a learning rate that does not depend on the number of steps."""
    if old.max_seconds is not None or new.max_seconds is not None:
        return False
    if old.max_steps > 0 or new.max_steps > 0:
        return _has_constant_rate(new) and 0 < old.max_steps < new.max_steps
    return _has_constant_rate(new) and old.num_train_epochs < new.num_train_epochs


def _has_constant_rate(arguments: HfGPTTrainingArguments) -> bool:
    """Whether the learning rate does not depend on the number of steps; a warmup may be a fraction of them."""
    schedule, warms_up_by_share = arguments.lr_scheduler_type, 0 < arguments.warmup_steps < 1
    return schedule == "constant" or (schedule == "constant_with_warmup" and not warms_up_by_share)


def _advise_longer(recipe: Recipe) -> str:
    """How to continue training after the run in the recipe's folder."""
    folder = Path(recipe.training.output_dir)
    last = find_last_checkpoint(folder)
    if last and _has_constant_rate(recipe.training) and recipe.training.max_seconds is None:
        return "to train it further, pass --resume and a larger --training.max_steps"
    if recipe.adapters is not None:
        return (
            "to train it further, merge its adapter with hfgpt merge, and start a new run from the result (model.path)"
        )
    weights = folder if is_finished(folder) else last or folder
    others = " and another --training.output_dir"
    if not recipe.model.path:
        others = ", another --training.output_dir, and a recipe without model sizes"
    return f"to train it further, start a new run from its weights with --model.path {quote_path(weights)}{others}"


def begin_run(recipe: Recipe, data: Data, checkpoint: Path | None = None, forecast: Forecast | None = None):
    """Writes everything known before training, all or nothing: the recipe, the tokenizer and the data report.

    Args:
        recipe: The recipe of the run.
        data: Its data; report and tokenizer are written.
        checkpoint: The checkpoint to resume from.
        forecast: The forecast of a new run with a budget; a resumed run keeps its own.

    Raises:
        InputError: Data, tokenizer, base model or precision of a resumed run have changed.
    """
    folder = Path(recipe.training.output_dir)
    sources = describe_sources(recipe, data)
    before = RunRecord.read(folder)
    sources.forecast = before.forecast if before else forecast
    if checkpoint and before is None:
        raise InputError(
            f"'{folder}' has no run.json, which resuming needs to check that nothing changed: restore it, or start a "
            "new run"
        )
    if before:
        check_same_sources(folder, before, sources)
    if checkpoint and before.rows_per_step is None:
        raise InputError(
            f"the run in '{folder}' was started by an earlier version of hfgpt, with another order of rows and other "
            "dropout: finish it with that version, or start a new run"
        )
    remove_later_checkpoints(folder, step_of(checkpoint) if checkpoint else 0)
    for name in (CARD_FILE, METRICS_FILE):  # of a finished run that is extended
        (folder / name).unlink(missing_ok=True)
    with explain_full_disk(folder), staged_files(folder, first=RECIPE_FILE) as staging:
        write_text(staging / RECIPE_FILE, render_recipe(recipe))
        data.tokenizer.save_pretrained(staging)
        data.report.write(staging)
        sources.write(staging)


def check_same_sources(folder: Path, before: RunRecord, now: RunRecord):
    """Checks that nothing a resumed run depends on has changed.

    Args:
        folder: The run folder.
        before: Its run.json.
        now: See `describe_sources`.

    Raises:
        InputError: Names what has changed.
    """
    both = now.to_dict().keys() & before.to_dict().keys()
    changed = {name for name in both if getattr(now, name) != getattr(before, name)}
    anew = "or start a new run in another --training.output_dir"
    if "data_sha256" in changed:
        raise InputError(f"'{now.data_source}' has changed since the run in '{folder}' started: restore it, {anew}")
    if "tokenizer_sha256" in changed:
        raise InputError(f"the tokenizer in '{folder}' has changed since its run started: restore it, {anew}")
    if "base_weights_sha256" in changed:
        raise InputError(
            f"the weights of '{now.base_model}' have changed since the run in '{folder}' started: restore them, {anew}"
        )
    if "precision" in changed:
        flag = {"bfloat16, mixed": "--training.bf16 true", "float16, mixed": "--training.fp16 true"}
        raise InputError(
            f"the run in '{folder}' started in {before.precision}, but would continue in {now.precision}: pass "
            f"{flag.get(before.precision, '--training.bf16 false')}, {anew}"
        )


def describe_sources(recipe: Recipe, data: Data) -> RunRecord:
    """The part of `run.json` that is known before training; for a checkpoint, all that is known."""
    place, arguments = Path(recipe.data.path), recipe.training
    record = RunRecord(
        task=recipe.task,
        recipe=recipe.name,
        seed=arguments.seed,
        data_source=str(place.resolve()) if place.exists() else data.report.source,
        data_sha256=data.report.sha256,
        tokenizer_sha256=tokenizer_hash(data.tokenizer),
        tokenizer_vocab_size=len(data.tokenizer),
        precision="bfloat16, mixed" if arguments.bf16 else "float16, mixed" if arguments.fp16 else "float32",
        processes=arguments.world_size,
        rows_per_step=arguments.rows_per_step,
        rows_per_batch=arguments.per_device_train_batch_size,
    )
    return record_base(record, data.base) if data.base else record


def record_base(record: RunRecord, base: SavedModel) -> RunRecord:
    """Adds the base model of a run and the hash of its weights to the record."""
    place = str(Path(base.path).resolve()) if base.is_local else base.path
    return dataclasses.replace(record, base_model=place, base_weights_sha256=base.hash())
