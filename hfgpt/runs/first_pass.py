"""The first pass of classification: language modelling over the training texts, in a folder of its own."""

import dataclasses
import shutil

from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from hfgpt.building import DROPOUTS, ModelArguments, build_model, find_base_model
from hfgpt.data.blocks import BlockDataset
from hfgpt.data.report import counted
from hfgpt.data.streams import TokenStream, tokenize_documents
from hfgpt.errors import InputError
from hfgpt.recipe import Recipe
from hfgpt.runs.record import describe_training, first_pass_folder
from hfgpt.runs.training import run_training, save_run
from hfgpt.saving import CHECKSUMS_FILE, remove_leftovers, write_checksums
from hfgpt.tasks.preparation import context_length
from hfgpt.tasks.task import Data
from hfgpt.training.checkpoints import choose_checkpoint, list_checkpoints
from hfgpt.training.estimate import Estimate, plan_run
from hfgpt.training.trainer import HfGPTTrainer, HfGPTTrainingArguments


def run_first_pass(recipe: Recipe, blocks: BlockDataset, tokenizer: PreTrainedTokenizerBase, console: Console):
    """Trains a language model on the texts of a classifier, unless an interrupted run has left a finished one.

    Args:
        recipe: Its sections `pretraining`, `model` and `training`.
        blocks: See `build_blocks`.
        tokenizer: The run's.
        console: Where to show progress.

    Raises:
        Interrupted: Ctrl-C; the run can be resumed.
    """
    folder = first_pass_folder(recipe)
    if (folder / CHECKSUMS_FILE).is_file():
        return
    model, arguments = build_language_model(recipe, tokenizer), build_arguments(recipe)
    estimate = plan_run(model, arguments, blocks.block_size, len(blocks), seconds=0.5)
    console.print(
        f"first pass: language modelling over {len(blocks.stream):,} tokens of training texts; "
        f"{counted(estimate.steps, 'steps')} of {estimate.tokens_per_step:,} tokens each, about "
        f"{estimate.seconds:,.0f} s",
        highlight=False,
    )
    trainer = HfGPTTrainer(model=model, args=arguments, train_dataset=blocks, processing_class=tokenizer)
    training = run_training(trainer, estimate, choose_checkpoint(folder, console), console)
    if trainer.is_world_process_zero():
        remove_leftovers(folder)
        tokens = round(trainer.state.total_flos / estimate.flops_per_token)
        describe_training(training, tokens).write(folder)
    save_run(trainer, folder)
    if trainer.is_world_process_zero():
        write_checksums(folder)
        for checkpoint in list_checkpoints(folder):  # of no use once it is done
            shutil.rmtree(checkpoint)
    trainer.accelerator.wait_for_everyone()


def plan_first_pass(
    recipe: Recipe, blocks: BlockDataset, tokenizer: PreTrainedTokenizerBase, seconds: float
) -> Estimate:
    """What the first pass will cost."""
    model = build_language_model(recipe, tokenizer)
    return plan_run(model, build_arguments(recipe), blocks.block_size, len(blocks), seconds)


def after_first_pass(recipe: Recipe, data: Data) -> tuple[Recipe, Data]:
    """The recipe and the data of the run once its first pass is done: training goes on from its model."""
    kept = {name: getattr(recipe.model, name) for name in ("attn_implementation", "load_in_4bit", *DROPOUTS)}
    model = ModelArguments(path=str(first_pass_folder(recipe).resolve()), **kept)
    return dataclasses.replace(recipe, model=model), dataclasses.replace(data, base=find_base_model(model))


def build_language_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model that the first pass trains, its weights drawn from the seed."""
    set_seed(recipe.training.seed)
    dropouts = dict.fromkeys(DROPOUTS, recipe.pretraining.dropout)
    return build_model(dataclasses.replace(recipe.model, **dropouts), tokenizer)


def build_blocks(recipe: Recipe, data: Data) -> BlockDataset:
    """The texts of the training split as blocks of one stream.

    Args:
        recipe: Its sections `pretraining` and `model`.
        data: The run's.

    Raises:
        InputError: They are too short for a block, or a block is longer than the context.
    """
    context = context_length(recipe, data.base)
    length = recipe.pretraining.block_size or context
    if length > context:
        raise InputError(f"pretraining.block_size is {length}, but the context of the model is {context}: lower it")
    return BlockDataset(join_texts(data.pretraining_texts, data.tokenizer), length, name="the training texts")


def build_arguments(recipe: Recipe) -> HfGPTTrainingArguments:
    """Trainer's arguments for the first pass: its own section, with the hardware and the optimizer of `training`."""
    arguments = recipe.pretraining
    return HfGPTTrainingArguments(
        output_dir=str(first_pass_folder(recipe)),
        max_steps=arguments.max_steps,
        per_device_train_batch_size=arguments.per_device_train_batch_size,
        learning_rate=arguments.learning_rate,
        muon_learning_rate=arguments.muon_learning_rate,
        muon_momentum=arguments.muon_momentum,
        weight_decay=arguments.weight_decay,
        decay_all_parameters=recipe.training.decay_all_parameters,
        optim=recipe.training.optim,
        optim_args=recipe.training.optim_args,
        adam_beta1=recipe.training.adam_beta1,
        adam_beta2=recipe.training.adam_beta2,
        adam_epsilon=recipe.training.adam_epsilon,
        warmup_steps=arguments.warmup_steps,
        lr_scheduler_type="linear",
        max_grad_norm=recipe.training.max_grad_norm,
        logging_steps=recipe.training.logging_steps,
        save_strategy="no",
        gradient_checkpointing=recipe.training.gradient_checkpointing or None,  # False, too, is a warning since 5.23
        seed=recipe.training.seed,
        use_cpu=recipe.training.use_cpu,
        bf16=recipe.training.bf16,
        fp16=recipe.training.fp16,
    )


def join_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> TokenStream:
    """One stream in memory: the tokens of each text, and an end of text after it if the tokenizer has one."""
    rows = Dataset.from_dict({"text": texts})
    return tokenize_documents(rows, tokenizer, append_eos=tokenizer.eos_token_id is not None)
