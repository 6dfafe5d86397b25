"""What a run writes down of itself: what the weights depend on, what the training took, what the card shows."""

import time
from pathlib import Path
from typing import Any

from hfgpt.adapters import base_of, count_saved_parameters, is_adapted, read_adapter, trainable_parameters
from hfgpt.hub.card import describe_architecture
from hfgpt.loading import hash_weights
from hfgpt.recipe import Recipe
from hfgpt.runs.folder import describe_base, describe_environment
from hfgpt.runs.training import Training
from hfgpt.saving import read_json
from hfgpt.tasks.task import Data
from hfgpt.training.hardware import describe_device
from hfgpt.training.trainer import HfGPTTrainer


def describe_run(
    recipe: Recipe, training: Training, data: Data, samples: dict[str, Any], started: float
) -> dict[str, Any]:
    """The content of `run.json`: what the training took, all that the weights depend on, what the card shows.

    Args:
        recipe: What was run.
        training: Its training.
        data: What it was trained on.
        samples: `texts` of the trained model, and how they were sampled.
        started: When the run began, by `time.perf_counter`.
    """
    trainer = training.trainer
    tokens = data.count_tokens_seen(trainer.state, training.estimate)
    described = describe_training(training, tokens)
    described["actual"]["total_seconds"] = time.perf_counter() - started
    return {
        **_describe_weights(recipe, trainer, data.labels),
        **read_json(Path(recipe.training.output_dir) / "run.json"),  # what it began with
        "device": describe_device(recipe.training.device),
        "attn_implementation": trainer.model.config._attn_implementation,
        **described,
        "samples": samples,
        **describe_environment(),
        **_describe_first_pass(recipe),
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


def _describe_weights(recipe: Recipe, trainer: HfGPTTrainer, labels: list[str] | None) -> dict[str, Any]:
    """What was trained, on what, and the hashes that bind the measurements to it."""
    folder, model = Path(recipe.training.output_dir), base_of(trainer.model)
    described = {
        "architecture": describe_architecture(model),
        "trained_parameters": trainable_parameters(trainer.model)[0],
        "weights_sha256": hash_weights(folder),
    }
    if labels is not None:
        described["labels"] = {str(index): label for index, label in enumerate(labels)}
    if is_adapted(trainer.model):
        described |= describe_base(read_adapter(str(folder)).base, recipe.model.revision)
        described["saved_parameters"] = count_saved_parameters(str(folder))
    return described


def _describe_first_pass(recipe: Recipe) -> dict[str, Any]:
    """The entry of a run's `run.json` on its first pass; empty where there was none, or no record of it."""
    record = read_json(first_pass_folder(recipe) / "run.json") if recipe.pretraining else {}
    return {"first_pass": record} if record else {}


def first_pass_folder(recipe: Recipe) -> Path:
    """Where the language model of the first pass is: in the run's folder, so that an adapter on it stays whole."""
    return Path(recipe.training.output_dir) / "pretrained"
