"""What a run says: before it starts, at its end, and in the README.md of its folder."""

import math
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hfgpt.data.report import DataReport
from hfgpt.data.streams import TokenStream
from hfgpt.recipe import Recipe
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
    vocab_size = model.config.vocab_size
    return "\n".join(
        [
            f"model: {estimate.parameters:,} parameters, context {model.config.max_position_embeddings}, "
            f"vocabulary {vocab_size:,}",
            f"device: {describe_device(arguments.device)}; {precision}; attention {model.config._attn_implementation}",
            f"optimizer: {optimizer}; schedule {arguments.lr_scheduler_type.value}",
            f"steps: {estimate.steps:,} of {estimate.tokens_per_step:,} tokens; about {estimate.seconds:,.0f} s at "
            f"{estimate.tokens_per_second:,.0f} tokens/s",
            f"first loss of a model that guesses evenly: ln {vocab_size} = {math.log(vocab_size):.3f}",
        ]
    )


def describe_metrics(metrics: dict[str, Any]) -> str:
    """What was measured on the validation split, in one line."""
    unknown = metrics.get("eval_unknown_tokens")
    measured = f"{unknown:,} of them unknown" if unknown else f"{metrics['eval_bits_per_byte']:.3f} bits a byte"
    return (
        f"loss {metrics['eval_loss']:.4f} nats, perplexity {metrics['eval_perplexity']:.2f} over "
        f"{metrics['eval_tokens']:,} tokens, {measured}"
    )


def render_summary(
    folder: Path, metrics: dict[str, Any], samples: list[str], seconds: float, estimate: Estimate
) -> str:
    """The lines printed at the end of a run."""
    lines = [
        f"validation {describe_metrics(metrics)}; {seconds:.0f} s of training (planned {estimate.seconds:.0f})",
        *(f"sample: {text}" for text in samples),
        f"saved to {folder}; go on with: hfgpt generate {folder} 'your prompt'",
    ]
    return "\n".join(lines)


def render_readme(recipe: Recipe, model: PreTrainedModel, metrics: dict[str, Any], samples: list[str]) -> str:
    """A short README.md for the run folder; every number in it was measured on these weights."""
    quoted = "\n\n".join("> " + text.replace("\n", "\n> ") for text in samples)
    return (
        f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [hfgpt]
---
# {recipe.name}

A GPT of {model.num_parameters():,} parameters, trained by hfgpt with the recipe in `recipe.yaml` on
`{Path(recipe.data.path).name if Path(recipe.data.path).exists() else recipe.data.path}`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
import hfgpt  # or: trust_remote_code=True below

model = AutoModelForCausalLM.from_pretrained("{Path(recipe.training.output_dir).as_posix()}")
tokenizer = AutoTokenizer.from_pretrained("{Path(recipe.training.output_dir).as_posix()}")
```

On the whole validation split: {describe_metrics(metrics)}.

{quoted}
""".rstrip()
        + "\n"
    )
