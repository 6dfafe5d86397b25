"""The messages that a run prints before training and at the end."""

import math
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hfgpt.adapters import trainable_parameters
from hfgpt.data.report import counted
from hfgpt.recipe import Recipe
from hfgpt.records import Forecast, RunRecord
from hfgpt.runs.first_pass import FirstPass
from hfgpt.runs.training import Training
from hfgpt.saving import quote_path
from hfgpt.tasks.task import Data, Task
from hfgpt.training.estimate import Estimate, describe_steps, describe_time
from hfgpt.training.hardware import describe_device


def describe_start(
    recipe: Recipe, data: Data, model: PreTrainedModel, estimate: Estimate, first: FirstPass | None, is_new: bool
) -> str:
    """The lines printed before training: data report, model, device, attention kernel, optimizer, steps.

    Args:
        recipe: The recipe of the run.
        data: Its data.
        model: The model to train.
        estimate: The plan.
        first: The first pass, if there is one to run.
        is_new: Whether the run starts at step 0.
    """
    arguments = recipe.training
    precision = "bfloat16 (mixed)" if arguments.bf16 else "float16 (mixed)" if arguments.fp16 else "float32"
    optimizer = f"{arguments.optim.value}, learning rate {arguments.learning_rate:g}"
    if arguments.muon_learning_rate is not None:
        optimizer = f"Muon {arguments.muon_learning_rate:g} for block matrices, AdamW {arguments.learning_rate:g}"
    way = "FSDP" if arguments.is_fully_sharded else "tensor parallelism"
    sharing = f", each with a part of the model ({way})" if arguments.is_sharded else ""
    trained, everything = trainable_parameters(model)
    kind = f"{len(data.labels)} classes" if data.labels else f"vocabulary {model.config.vocab_size:,}"
    lines = [
        data.summary(),
        f"model: {everything:,} parameters, context length {model.config.max_position_embeddings}, {kind}; "
        f"{counted(model.config.num_hidden_layers, 'layers')}, {counted(model.config.num_attention_heads, 'heads')}, "
        f"hidden size {model.config.hidden_size}",
        f"trainable: {trained:,} of {everything:,} parameters ({trained / everything:.2%})",
        f"device: {describe_device(arguments.device)}; {counted(arguments.world_size, 'processes')}{sharing}; "
        f"{precision}; attention {model.config._attn_implementation}",
        f"optimizer: {optimizer}; schedule {arguments.lr_scheduler_type.value}",
        *([first.describe()] if first else []),
        f"{'second pass' if recipe.pretraining else 'training'}: {describe_steps(estimate)}; "
        f"{describe_time(estimate)}",
    ]
    if is_new and recipe.model.path is None and data.labels is None:  # random weights
        size = model.config.vocab_size
        lines.append(f"expected initial loss (uniform over the vocabulary): ln {size} = {math.log(size):.3f}")
    return "\n".join(lines)


def describe_end(task: Task, metrics: dict[str, Any], record: RunRecord, training: Training) -> str:
    """The lines printed at the end of a run: metrics, actual and planned time, the forecast, sample outputs."""
    planned = training.estimate.seconds
    lines = [
        f"{task.describe(metrics)}; {training.seconds:.0f} s of training"
        f"{'' if planned is None else f' (planned {planned:.0f})'}",
        *([describe_forecast(record.forecast, metrics["eval_loss"])] if record.forecast else []),
        *(f"sample: {text}" for text in record.samples.texts),
    ]
    return "\n".join(lines)


def describe_forecast(forecast: Forecast, loss: float) -> str:
    """Whether a forecast was right, in one line."""
    place = "below" if loss < forecast.low else "above" if loss > forecast.high else "within"
    return f"forecast: {forecast.describe()}; the loss is {place} the interval"


def describe_next(folder: Path, task: Task) -> str:
    """The last line of a run: where it is saved, and the command to try it."""
    return f"saved to {folder}. Next: {task.following(quote_path(folder))}"
