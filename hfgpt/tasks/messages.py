"""What a run says before it starts and at its end."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hfgpt.adapters import trainable_parameters
from hfgpt.data.report import DataReport
from hfgpt.data.streams import TokenStream
from hfgpt.recipe import Recipe
from hfgpt.tasks.training_run import Training
from hfgpt.training.estimate import Estimate
from hfgpt.training.hardware import describe_device


def describe_data(report: DataReport, stream: TokenStream) -> str:
    """What became of the text, and whether its tokens were there already."""
    reused = f"\n  tokens re-used from {stream.path.parent}" if stream.cached else ""
    return report.summary() + reused


def describe_choices(model: PreTrainedModel, recipe: Recipe, estimate: Estimate) -> str:
    """What this run will do, and with which kernels: the lines printed before it starts."""
    arguments = recipe.training
    precision = "bfloat16 (mixed)" if arguments.bf16 else "float16 (mixed)" if arguments.fp16 else "float32"
    optimizer = f"{arguments.optim.value}, learning rate {arguments.learning_rate:g}"
    if arguments.muon_learning_rate is not None:
        optimizer = f"Muon {arguments.muon_learning_rate:g} in the blocks, AdamW {arguments.learning_rate:g} elsewhere"
    trained, everything = trainable_parameters(model)
    kind = (
        f"{len(model.config.id2label)} classes"
        if recipe.task == "classify"
        else f"vocabulary {model.config.vocab_size:,}"
    )
    return "\n".join(
        (
            f"model: {everything:,} parameters, context {model.config.max_position_embeddings}, {kind}; "
            f"{model.config.num_hidden_layers} layers, {model.config.num_attention_heads} heads, hidden size "
            f"{model.config.hidden_size}",
            f"trained: {trained:,} of {everything:,} parameters ({trained / everything:.2%})",
            f"device: {describe_device(arguments.device)}; {precision}; attention {model.config._attn_implementation}",
            f"optimizer: {optimizer}; schedule {arguments.lr_scheduler_type.value}",
            f"steps: {estimate.steps:,} of {estimate.tokens_per_step:,} tokens; about {estimate.seconds:,.0f} s at "
            f"{estimate.tokens_per_second:,.0f} tokens/s",
        )
    )


def describe_first_loss(vocab_size: int) -> str:
    """The loss that random weights should begin with, for a first look at whether they do."""
    return f"first loss of a model that guesses evenly: ln {vocab_size} = {math.log(vocab_size):.3f}"


def describe_metrics(metrics: dict[str, Any]) -> str:
    """What was measured of a language model on the validation split, in one line."""
    unknown = metrics.get("eval_unknown_tokens")
    measured = f"{unknown:,} of them unknown" if unknown else f"{metrics['eval_bits_per_byte']:.3f} bits a byte"
    return (
        f"loss {metrics['eval_loss']:.4f} nats, perplexity {metrics['eval_perplexity']:.2f} over "
        f"{metrics['eval_tokens']:,} tokens, {measured}"
    )


def describe_classification(metrics: dict[str, Any]) -> str:
    """What was measured of a classifier on the test split, in one line."""
    compared = [f"the largest class {metrics['majority_accuracy']:.2%}"] if "majority_accuracy" in metrics else []
    if "baseline_accuracy" in metrics:
        compared.append(f"logistic regression on character n-grams {metrics['baseline_accuracy']:.2%}")
    return (
        f"accuracy {metrics['eval_accuracy']:.2%} (95 % interval {metrics['eval_accuracy_low']:.2%} to "
        f"{metrics['eval_accuracy_high']:.2%}), macro F1 {metrics['eval_macro_f1']:.4f} over "
        f"{metrics['eval_rows']:,} rows" + (f"; beside it {', '.join(compared)}" if compared else "")
    )


def describe_answers(metrics: dict[str, Any]) -> str:
    """What was measured of a model that follows instructions on the test split, in one line."""
    text = f"loss {metrics['eval_loss']:.4f} nats, perplexity {metrics['eval_perplexity']:.2f} over "
    text += f"{metrics['eval_tokens']:,} tokens of answers"
    if "eval_exact_match" in metrics:
        text += (
            f"; {metrics['eval_exact_match']:.2%} of {metrics['eval_answers']:,} answers exactly right, "
            f"{metrics['eval_normalised_match']:.2%} but for case, punctuation and articles"
        )
    if "eval_judge_score" in metrics:
        text += f"; judged {metrics['eval_judge_score']:.1f} of 100 over {metrics['eval_judge_scored']:,}"
    if metrics.get("eval_judge_failures"):
        text += f" ({metrics['eval_judge_failures']:,} not judged)"
    return text


def render_summary(folder: Path, measured: str, samples: Sequence[str], training: Training, following: str) -> str:
    """The lines printed at the end of a run.

    Args:
        folder: Of the run.
        measured: What was, in one line.
        samples: Of what the model says.
        training: Its time, beside the planned.
        following: The command to go on with.
    """
    lines = [
        f"{measured}; {training.seconds:.0f} s of training (planned {training.estimate.seconds:.0f})",
        *(f"sample: {text}" for text in samples),
        f"saved to {folder}; go on with: {following}",
    ]
    return "\n".join(lines)
