"""What the runs of all tasks have in common: the model, training under a bar that Ctrl-C ends in order, the record."""

import dataclasses
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from hfgpt.adapters import (
    CAUSAL_LM,
    SEQ_CLS,
    attach_adapter,
    base_of,
    count_saved_parameters,
    is_adapted,
    read_adapter,
    trainable_parameters,
)
from hfgpt.building import build_model, find_architecture
from hfgpt.configuration_hfgpt import HfGPTConfig
from hfgpt.data.collators import PaddingCollator
from hfgpt.data.report import DataReport
from hfgpt.errors import InputError, Interrupted
from hfgpt.hub import HubArguments
from hfgpt.hub.background import CheckpointPushes
from hfgpt.hub.card import describe_architecture, write_card
from hfgpt.hub.records import read_records
from hfgpt.hub.upload import check_login
from hfgpt.hub.usage import Place
from hfgpt.loading import hash_weights, load_model_config, load_model_tokenizer
from hfgpt.recipe import Recipe
from hfgpt.saving import quote_path, read_json, staged_files
from hfgpt.tasks.publish import PublishArguments, check_base, publish
from hfgpt.tasks.run_folder import describe_base, describe_environment
from hfgpt.tokenizer import build_tokenizer, load_tokenizer
from hfgpt.training.callbacks import InterruptCallback, LogCallback, ProgressCallback, append_log
from hfgpt.training.checkpoints import step_of
from hfgpt.training.estimate import Estimate, plan_run
from hfgpt.training.hardware import describe_device, peak_memory_bytes, reset_peak_memory
from hfgpt.training.trainer import HfGPTTrainer


@dataclass
class Training:
    """A training that came to its end.

    Args:
        trainer: With the trained model and its state.
        estimate: What was planned.
        first_step: Steps done before this process went on from a checkpoint; 0 in a new run.
        seconds: Of training.
        started: When the run began, by `time.perf_counter`.
        peak_memory: In bytes, and what it is of: `training`, or `process` where no peak can be measured anew.
        pushes: Of its checkpoints to the Hub, maybe still on their way; None: there are none.
    """

    trainer: HfGPTTrainer
    estimate: Estimate
    first_step: int
    seconds: float
    started: float
    peak_memory: tuple[int, str]
    pushes: CheckpointPushes | None = None


def check_publication(recipe: Recipe):
    """Refuses a run that is to be published and could not be, before hours of training rather than after.

    Raises:
        InputError: Nobody is logged in, or its adapter would be of use on this machine alone.
    """
    if recipe.hub is None or recipe.hub.repo_id is None:
        return
    if recipe.adapters is not None:
        # Without a path, its base is the first pass of this very run.
        check_base(recipe.model.path or str(Path(recipe.training.output_dir).resolve()), recipe.hub)
    check_login(recipe.hub.repo_id)


def find_tokenizer(recipe: Recipe, folder: Path | None, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a run.

    Args:
        recipe: Its sections `tokenizer` and `model`.
        folder: A run to resume, whose tokenizer is taken rather than trained again.
        texts: To train one on, if none is named and there is no model to go on from.
    """
    if folder and (folder / "tokenizer.json").is_file():
        return load_tokenizer(str(folder), pad_token=None, add_eos=False)  # as the run saved it
    if recipe.model.path and recipe.tokenizer.path is None:
        return load_model_tokenizer(recipe.model.path, recipe.model.revision)  # the one its weights know
    return build_tokenizer(recipe.tokenizer, texts)


def warn_of_small_vocabulary(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, report: DataReport):
    """Adds to the warnings of a run's report that its text gave its tokenizer fewer tokens than were asked for."""
    wanted, trained = recipe.tokenizer.vocab_size, recipe.tokenizer.path is None and recipe.model.path is None
    if trained and recipe.tokenizer.kind != "char" and len(tokenizer) < wanted:
        report.warnings.append(
            f"the tokenizer has {len(tokenizer):,} tokens, not the {wanted:,} of tokenizer.vocab_size: the training "
            "text gives no more"
        )


def context_length(recipe: Recipe) -> int:
    """The context of the recipe's model, in tokens, without building it."""
    if recipe.model.path is not None:
        return load_model_config(recipe.model.path, recipe.model.revision).max_position_embeddings
    return find_architecture(recipe.model).get("max_position_embeddings", HfGPTConfig.max_position_embeddings)


def padding_collator(tokenizer: PreTrainedTokenizerBase) -> PaddingCollator:
    """Pads with the tokenizer's padding token, or any other where it has none: the mask tells padding apart."""
    token = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return PaddingCollator(token or 0)


def sorted_by_length(rows: Dataset) -> Dataset:
    """The rows in order of their `length`, so that a batch of neighbours has little padding."""
    lengths = rows["length"]
    return rows.select(sorted(range(len(rows)), key=lambda index: lengths[index]))


def build_recipe_model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, labels: list[str] | None = None
) -> PreTrainedModel:
    """The model of a recipe, with its adapter and what is not trained frozen.

    Args:
        recipe: Its sections `model`, `adapters` and `training`.
        tokenizer: What the model will be trained with.
        labels: Of a classifier; None: a language model.

    Raises:
        InputError: See `hfgpt.building.build_model` and `hfgpt.adapters.attach_adapter`; or an adapter on weights that
            nobody else has.
    """
    arguments = recipe.model
    trainable = getattr(recipe.training, "trainable", None) or ("adapters" if recipe.adapters else "all")
    if (trainable == "adapters") != (recipe.adapters is not None):
        raise InputError(
            f"there is a section adapters, but training.trainable is '{trainable}': leave one of them out"
            if recipe.adapters
            else "training.trainable is 'adapters', but there is no section adapters: add it, with r for instance"
        )
    if recipe.adapters is None:
        if arguments.load_in_4bit:
            raise InputError(
                "4-bit weights cannot be trained: add a section adapters, or leave out model.load_in_4bit"
            )
        model = build_model(arguments, tokenizer, labels)
        if trainable != "all":
            freeze_model(model, (recipe.training.last_blocks or 1) if trainable == "last_blocks" else 0)
        return model
    if arguments.path is None and recipe.pretraining is None:
        raise InputError("an adapter needs a model to adapt: set model.path")
    if arguments.path is not None and Path(arguments.path).is_dir():  # found from wherever the adapter is loaded
        arguments = dataclasses.replace(arguments, path=str(Path(arguments.path).resolve()))
    task_type = CAUSAL_LM if labels is None else SEQ_CLS
    model = attach_adapter(build_model(arguments, tokenizer, labels), recipe.adapters, task_type, arguments.revision)
    if recipe.training.gradient_checkpointing:
        model.enable_input_require_grads()  # the frozen embeddings give none
    return model


def plan_rows(model: PreTrainedModel, recipe: Recipe, rows: Dataset, seconds: float) -> Estimate:
    """What a training on rows of different `length` will cost, at their mean length; a first pass is planned apart."""
    lengths = rows["length"]
    return plan_run(model, recipe.training, max(sum(lengths) // len(lengths), 1), len(lengths), seconds)


def freeze_model(model: PreTrainedModel, last_blocks: int):
    """Leaves the head to be trained, and with some last blocks these and the final norm; the rest is frozen.

    Raises:
        InputError: The model has fewer blocks, or its head is its embedding.
    """
    if model.get_output_embeddings() is not None and model.config.tie_word_embeddings:
        raise InputError(
            "the head of this model is its embedding (tie_word_embeddings), which cannot be trained without it: use "
            "training.trainable all, or a section adapters"
        )
    blocks = model.model.layers
    if last_blocks > len(blocks):
        raise InputError(f"training.last_blocks is {last_blocks}, but num_hidden_layers is {len(blocks)}: lower it")
    model.requires_grad_(False)
    head = model.get_output_embeddings() if hasattr(model, "lm_head") else model.score
    for module in (head, *((*blocks[len(blocks) - last_blocks :], model.model.norm) if last_blocks else ())):
        module.requires_grad_(True)


def run_training(
    trainer: HfGPTTrainer,
    estimate: Estimate,
    checkpoint: Path | None,
    started: float,
    console: Console,
    hub: HubArguments | None = None,
) -> Training:
    """Trains to the end.

    Args:
        trainer: Built, with nothing to show progress yet.
        estimate: What was planned.
        checkpoint: Where to go on from; None: from the start.
        started: When the run began, by `time.perf_counter`.
        console: Where to show progress.
        hub: Where the run is published, its checkpoints perhaps in the background; None: nowhere.

    Raises:
        Interrupted: Ctrl-C; a checkpoint was saved.
        InputError: The loss is not finite, or the disk full.
    """
    if checkpoint:
        console.print(
            f"resuming from {checkpoint.name}: step {step_of(checkpoint):,} of {estimate.steps:,}, with the same data "
            "order and random state",
            highlight=False,
        )
    progress = ProgressCallback(estimate.tokens_per_step, console)
    interrupt = InterruptCallback(console)
    trainer.remove_callback(PrinterCallback)  # prints every logged dictionary
    for callback in (LogCallback(), progress, interrupt):
        trainer.add_callback(callback)
    pushes = None
    if hub and hub.repo_id and hub.strategy == "checkpoints" and trainer.is_world_process_zero():
        pushes = CheckpointPushes(hub, console)
        trainer.add_callback(pushes)
    peak_of = "training" if reset_peak_memory(trainer.args.device) else "process"  # without the probe's copy
    begun = time.perf_counter()
    try:
        with interrupt:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        progress.close()
        if pushes:
            pushes.stop()
    if trainer.state.global_step < trainer.state.max_steps and interrupt.interrupted:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; the checkpoint is in "
            f"{trainer.args.output_dir}: go on with the same command and --resume"
        )
    seconds, peak_memory = time.perf_counter() - begun, (peak_memory_bytes(trainer.args.device), peak_of)
    first_step = step_of(checkpoint) if checkpoint else 0
    return Training(trainer, estimate, first_step, seconds, started, peak_memory, pushes)


def save_run(trainer: HfGPTTrainer, folder: Path):
    """Saves the trained model or adapter, and its tokenizer, all files at once."""
    with staged_files(folder) as staging:
        trainer.save_model(str(staging))
        (staging / "training_args.bin").unlink()  # a pickle; recipe.yaml says the same


def describe_run(recipe: Recipe, training: Training, tokens: int, samples: dict[str, Any]) -> dict[str, Any]:
    """The content of `run.json`: what the training took, all that the weights depend on, what the card shows.

    Args:
        recipe: What was run.
        training: Its training.
        tokens: Seen in training.
        samples: `texts` of the trained model, and how they were sampled.
    """
    trainer, described = training.trainer, describe_training(training, tokens)
    described["actual"]["total_seconds"] = time.perf_counter() - training.started
    return {
        **_describe_weights(recipe, trainer),
        **read_json(Path(recipe.training.output_dir) / "run.json"),  # what it began with
        "device": describe_device(recipe.training.device),
        "attn_implementation": trainer.model.config._attn_implementation,
        **described,
        "samples": samples,
        **describe_environment(),
    }


def describe_training(training: Training, tokens: int) -> dict[str, Any]:
    """What a training took, for `run.json`: plan and actual side by side."""
    steps = training.trainer.state.global_step
    return {
        "steps": steps,
        "tokens": tokens,
        "resumed_from_step": training.first_step,
        "plan": training.estimate.to_dict(),
        "actual": {
            "training_seconds": training.seconds,
            "tokens_per_second": tokens * (1 - training.first_step / steps) / training.seconds,
            "peak_memory_bytes": training.peak_memory[0],
            "peak_memory_of": training.peak_memory[1],
        },
    }


def _describe_weights(recipe: Recipe, trainer: HfGPTTrainer) -> dict[str, Any]:
    """What was trained, on what, and the hashes that bind the measurements to it."""
    folder, model = Path(recipe.training.output_dir), base_of(trainer.model)
    described = {
        "architecture": describe_architecture(model),
        "trained_parameters": trainable_parameters(trainer.model)[0],
        "weights_sha256": hash_weights(folder),
    }
    if recipe.task == "classify":
        described["labels"] = {str(index): label for index, label in model.config.id2label.items()}
    if is_adapted(trainer.model):
        described |= describe_base(read_adapter(str(folder)).base, recipe.model.revision)
        described["saved_parameters"] = count_saved_parameters(str(folder))
    return described


def end_run(recipe: Recipe):
    """Writes the model card; with it the run is finished."""
    folder = Path(recipe.training.output_dir)
    write_card(folder, read_records(folder), recipe.hub or HubArguments(), Place(folder.as_posix()))


def publish_run(recipe: Recipe, training: Training, console: Console):
    """Publishes a finished run, if its recipe says so, once the pushes of its checkpoints have come to their end.

    Raises:
        InputError: Something did not arrive; the run itself is finished.
    """
    hub, folder = recipe.hub, Path(recipe.training.output_dir)
    if hub is None or hub.repo_id is None:
        return
    failed = []
    for step, reason in (training.pushes.finish() if training.pushes else {}).items():
        append_log(folder, {"step": step, "hub_error": reason})
        failed.append(f"checkpoint {step}: {reason}")
    try:
        # What was measured a moment ago need not be measured again.
        code = publish(str(folder), hub.repo_id, PublishArguments(private=hub.private, measure=False), (), console)
        console.print(code, highlight=False, markup=False)
    except InputError as error:
        append_log(folder, {"step": training.trainer.state.global_step, "hub_error": str(error)})
        failed.append(f"the finished model: {error}")
    if failed:
        raise InputError(
            f"the run in {folder} is finished, but not all of it was published: {'; '.join(failed)}; publish it with: "
            f"hfgpt publish {quote_path(folder)} {hub.repo_id}"
        )
