"""The record of a run: what the weights depend on, the cost of training, and what the model card shows."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from hfgpt.adapters import base_of, count_saved_parameters, is_adapted, trainable_parameters
from hfgpt.hub.card import describe_architecture
from hfgpt.models import find_model, hash_weights
from hfgpt.recipe import Recipe
from hfgpt.records import RunRecord, Samples, TrainingRecord
from hfgpt.runs.folder import record_base
from hfgpt.runs.training import Training
from hfgpt.tasks.task import Data
from hfgpt.training.divergence import find_rollbacks
from hfgpt.training.hardware import describe_device


def describe_run(recipe: Recipe, training: Training, data: Data, samples: dict[str, Any], started: float) -> RunRecord:
    """The record of a run: the cost of training, all that the weights depend on, and what the model card shows.

    Args:
        recipe: The recipe of the run.
        training: The finished training.
        data: The run's data.
        samples: `texts` of the trained model, and the sampling settings.
        started: `time.perf_counter` at the start of the run.
    """
    folder, model = Path(recipe.training.output_dir), training.trainer.unwrapped
    network, tokens = base_of(model), data.count_tokens_seen(training.trainer.state, training.estimate)
    record = dataclasses.replace(
        RunRecord.read(folder),  # written before training
        **vars(describe_training(training, tokens)),
        architecture=describe_architecture(network),
        trained_parameters=trainable_parameters(model)[0],
        weights_sha256=hash_weights(folder),
        labels={str(index): label for index, label in enumerate(data.labels)} if data.labels else None,
        device=describe_device(recipe.training.device),
        attn_implementation=network.config._attn_implementation,
        first_pass=TrainingRecord.read(first_pass_folder(recipe)) if recipe.pretraining else None,
        samples=Samples(**samples),
        rollbacks=find_rollbacks(training.trainer.state.log_history) or None,
    )
    record.actual["total_seconds"] = time.perf_counter() - started
    if is_adapted(model):
        record.saved_parameters = count_saved_parameters(str(folder))
        if record.base_model is None:  # the base model is the first pass of this run
            record = record_base(record, find_model(str(folder)).base)
    return record.stamp()


def describe_training(training: Training, tokens: int) -> TrainingRecord:
    """The record of a training: actual and planned cost."""
    steps = training.trainer.state.global_step
    return TrainingRecord(
        steps=steps,
        tokens=tokens,
        resumed_from_step=training.first_step,
        plan=training.estimate.to_dict(),
        actual={
            "training_seconds": training.seconds,
            "tokens_per_second": tokens * (1 - training.first_step / steps) / training.seconds,
            "peak_memory_bytes": training.peak_memory[0],
            "peak_memory_of": training.peak_memory[1],
        },
    )


def first_pass_folder(recipe: Recipe) -> Path:
    """Folder of the first pass's model: inside the run folder, so that an adapter stays with its base model."""
    return Path(recipe.training.output_dir) / "pretrained"
