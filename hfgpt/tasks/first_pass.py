"""The first pass of classification: language modelling over the training texts, in a folder of its own."""

import dataclasses
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from transformers import PreTrainedTokenizerBase, set_seed

from hfgpt.building import DROPOUTS, ModelArguments, build_model
from hfgpt.data.blocks import BlockDataset
from hfgpt.data.streams import TokenStream
from hfgpt.recipe import Recipe
from hfgpt.tasks.training_run import context_length, run_training, save_run
from hfgpt.training.estimate import plan_run
from hfgpt.training.trainer import HfGPTTrainer, HfGPTTrainingArguments, find_last_checkpoint

FOLDER = "pretrained"


def run_first_pass(
    recipe: Recipe, texts: list[str], tokenizer: PreTrainedTokenizerBase, console: Console
) -> ModelArguments:
    """Trains a language model on the texts of a classifier, or finds the one that an interrupted run left.

    Args:
        recipe: Its sections `pretraining`, `model` and `training`.
        texts: Those of the training split and of no other.
        tokenizer: The run's.
        console: Where to show progress.

    Returns:
        The section `model` of the run, now with the path of that model.

    Raises:
        InputError: As `hfgpt.building.build_model`; or the texts are too short for a block.
        Interrupted: Ctrl-C; the run can be resumed.
    """
    folder, arguments = Path(recipe.training.output_dir) / FOLDER, recipe.pretraining
    kept = {name: getattr(recipe.model, name) for name in ("attn_implementation", "load_in_4bit", *DROPOUTS)}
    first = ModelArguments(path=str(folder.resolve()), **kept)
    if (folder / "model.safetensors").is_file():
        return first
    blocks = BlockDataset(
        join_texts(texts, tokenizer), arguments.block_size or context_length(recipe), name="the training texts"
    )
    set_seed(recipe.training.seed)
    model = build_model(dataclasses.replace(recipe.model, **dict.fromkeys(DROPOUTS, arguments.dropout)), tokenizer)
    training = build_arguments(recipe, folder)
    estimate = plan_run(model, training, blocks.block_size, len(blocks), seconds=0.5)
    console.print(
        f"first pass: language modelling over {len(texts):,} training texts, {len(blocks.stream):,} tokens; "
        f"{estimate.steps:,} steps of {estimate.tokens_per_step:,} tokens, about {estimate.seconds:,.0f} s",
        highlight=False,
    )
    trainer = HfGPTTrainer(model=model, args=training, train_dataset=blocks, processing_class=tokenizer)
    run_training(trainer, estimate, find_last_checkpoint(folder), time.perf_counter(), console)
    if trainer.is_world_process_zero():
        save_run(trainer, folder)
    trainer.accelerator.wait_for_everyone()
    return first


def build_arguments(recipe: Recipe, folder: Path) -> HfGPTTrainingArguments:
    """Trainer's arguments for the first pass: its own section, on the hardware of the section `training`."""
    arguments = recipe.pretraining
    return HfGPTTrainingArguments(
        output_dir=str(folder),
        max_steps=arguments.max_steps,
        per_device_train_batch_size=arguments.per_device_train_batch_size,
        learning_rate=arguments.learning_rate,
        muon_learning_rate=arguments.muon_learning_rate,
        muon_momentum=arguments.muon_momentum,
        weight_decay=arguments.weight_decay,
        warmup_steps=arguments.warmup_steps,
        lr_scheduler_type="linear",
        max_grad_norm=recipe.training.max_grad_norm,
        logging_steps=recipe.training.logging_steps,
        save_strategy="no",
        seed=recipe.training.seed,
        use_cpu=recipe.training.use_cpu,
        bf16=recipe.training.bf16,
        fp16=recipe.training.fp16,
    )


def join_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> TokenStream:
    """One stream in memory: the tokens of each text, and an end of text after it if the tokenizer has one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [[*row, *end] for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    offsets = np.cumsum([0, *map(len, ids)])
    tokens = np.concatenate([np.array(row, dtype=np.uint32) for row in ids])
    return TokenStream(tokens, offsets, int(tokens.max()))
