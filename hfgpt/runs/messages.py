"""What a run says before it starts and at its end."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hfgpt.adapters import trainable_parameters
from hfgpt.data.report import counted
from hfgpt.recipe import Recipe
from hfgpt.runs.training import Training
from hfgpt.saving import quote_path
from hfgpt.tasks.task import Data, Task
from hfgpt.training.estimate import Estimate
from hfgpt.training.hardware import describe_device


def describe_start(recipe: Recipe, data: Data, model: PreTrainedModel, estimate: Estimate, is_new: bool) -> str:
    """The lines printed before training: what became of the data, what the run will do, and with which kernels.

    Args:
        recipe: What is run.
        data: Its data.
        model: To train.
        estimate: What was planned.
        is_new: Whether the run starts at step 0.
    """
    arguments = recipe.training
    precision = "bfloat16 (mixed)" if arguments.bf16 else "float16 (mixed)" if arguments.fp16 else "float32"
    optimizer = f"{arguments.optim.value}, learning rate {arguments.learning_rate:g}"
    if arguments.muon_learning_rate is not None:
        optimizer = f"Muon {arguments.muon_learning_rate:g} in the blocks, AdamW {arguments.learning_rate:g} elsewhere"
    trained, everything = trainable_parameters(model)
    kind = f"{len(data.labels)} classes" if data.labels else f"vocabulary {model.config.vocab_size:,}"
    lines = [
        data.summary(),
        f"model: {everything:,} parameters, context {model.config.max_position_embeddings}, {kind}; "
        f"{counted(model.config.num_hidden_layers, 'layers')}, {counted(model.config.num_attention_heads, 'heads')}, "
        f"hidden size {model.config.hidden_size}",
        f"trained: {trained:,} of {everything:,} parameters ({trained / everything:.2%})",
        f"device: {describe_device(arguments.device)}; {precision}; attention {model.config._attn_implementation}",
        f"optimizer: {optimizer}; schedule {arguments.lr_scheduler_type.value}",
        f"steps: {estimate.steps:,} of {estimate.tokens_per_step:,} tokens each; about {estimate.seconds:,.0f} s at "
        f"{estimate.tokens_per_second:,.0f} tokens/s",
    ]
    if is_new and recipe.model.path is None and data.labels is None:  # what random weights should begin with
        size = model.config.vocab_size
        lines.append(f"expected initial loss (uniform guess): ln {size} = {math.log(size):.3f}")
    return "\n".join(lines)


def describe_end(folder: Path, task: Task, metrics: dict[str, Any], samples: Sequence[str], training: Training) -> str:
    """The lines printed at the end of a run.

    Args:
        folder: Of the run.
        task: Its task.
        metrics: What was measured.
        samples: Of what the model says.
        training: Its time, beside the planned.
    """
    lines = [
        f"{task.describe(metrics)}; {training.seconds:.0f} s of training (planned {training.estimate.seconds:.0f})",
        *(f"sample: {text}" for text in samples),
        f"saved to {folder}. Next: {task.following(quote_path(folder))}",
    ]
    return "\n".join(lines)
