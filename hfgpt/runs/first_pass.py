"""The first pass of classification: language modeling on the training texts, in a subfolder of the run."""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from hfgpt.building import DROPOUTS, ModelArguments, build_model, find_base_model
from hfgpt.data.blocks import BlockDataset
from hfgpt.data.streams import TokenStream, tokenize_documents
from hfgpt.errors import InputError
from hfgpt.recipe import Recipe
from hfgpt.runs.record import describe_training, first_pass_folder
from hfgpt.runs.training import run_training, save_run
from hfgpt.saving import CHECKSUMS_FILE, remove_leftovers, write_checksums
from hfgpt.tasks.preparation import context_length
from hfgpt.tasks.task import Data
from hfgpt.training.arguments import HfGPTTrainingArguments
from hfgpt.training.checkpoints import choose_checkpoint, list_checkpoints
from hfgpt.training.estimate import Estimate, describe_steps, describe_time, plan_run
from hfgpt.training.trainer import HfGPTTrainer


@dataclass
class FirstPass:
    """A first pass that is ready to run.

    Args:
        model: The model to train, with weights initialized from the seed.
        arguments: The arguments of its trainer.
        blocks: The texts of the training split as blocks of one token stream.
        estimate: The plan.
    """

    model: PreTrainedModel
    arguments: HfGPTTrainingArguments
    blocks: BlockDataset
    estimate: Estimate

    def describe(self) -> str:
        """Text and cost in one line."""
        return (
            f"first pass (section pretraining): language modeling on {len(self.blocks.stream):,} tokens of training "
            f"text; {describe_steps(self.estimate)}; {describe_time(self.estimate)}"
        )


def prepare_first_pass(recipe: Recipe, data: Data, seconds: float) -> FirstPass:
    """Builds the model and the blocks of a first pass, and plans it with a benchmark of `seconds`.

    Raises:
        InputError: There is too little text for a block, or a block is longer than the context length.
    """
    blocks, model = build_blocks(recipe, data), build_language_model(recipe, data.tokenizer)
    arguments = build_arguments(recipe)
    return FirstPass(model, arguments, blocks, plan_run(model, arguments, blocks.block_size, len(blocks), seconds))


def plan_first_pass(recipe: Recipe, data: Data, seconds: float) -> FirstPass | None:
    """The first pass of a recipe; None if it has none, or if an interrupted run has already finished it."""
    if not recipe.pretraining or (first_pass_folder(recipe) / CHECKSUMS_FILE).is_file():
        return None
    return prepare_first_pass(recipe, data, seconds)


def run_first_pass(first: FirstPass, tokenizer: PreTrainedTokenizerBase, console: Console):
    """Trains a language model on the texts of a classifier.

    Args:
        first: The first pass.
        tokenizer: The run's tokenizer.
        console: Shows progress.

    Raises:
        Interrupted: Ctrl-C; the run can be resumed.
    """
    folder, estimate = Path(first.arguments.output_dir), first.estimate
    trainer = HfGPTTrainer(
        model=first.model, args=first.arguments, train_dataset=first.blocks, processing_class=tokenizer
    )
    training = run_training(trainer, estimate, choose_checkpoint(folder, console), console)
    if trainer.is_world_process_zero():
        remove_leftovers(folder)
        tokens = round(trainer.state.total_flos / estimate.flops_per_token)
        describe_training(training, tokens).write(folder)
    save_run(trainer, folder)
    if trainer.is_world_process_zero():
        write_checksums(folder)
        for checkpoint in list_checkpoints(folder):  # no longer needed
            shutil.rmtree(checkpoint)
    trainer.accelerator.wait_for_everyone()


def finish_first_pass(first: FirstPass | None, recipe: Recipe, data: Data, console: Console) -> tuple[Recipe, Data]:
    """Runs the first pass, unless it is None; returns recipe and data with its model as the base model."""
    if first:
        run_first_pass(first, data.tokenizer, console)
    kept = {name: getattr(recipe.model, name) for name in ("attn_implementation", "load_in_4bit", *DROPOUTS)}
    model = ModelArguments(path=str(first_pass_folder(recipe).resolve()), **kept)
    return dataclasses.replace(recipe, model=model), dataclasses.replace(data, base=find_base_model(model))


def build_language_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model that the first pass trains, with weights initialized from the seed."""
    set_seed(recipe.training.seed)
    dropouts = dict.fromkeys(DROPOUTS, recipe.pretraining.dropout)
    return build_model(dataclasses.replace(recipe.model, **dropouts), tokenizer)


def build_blocks(recipe: Recipe, data: Data) -> BlockDataset:
    """The texts of the training split as blocks of one token stream."""
    context = context_length(recipe, data.base)
    length = recipe.pretraining.block_size or context
    if length > context:
        raise InputError(f"pretraining.block_size is {length}, but the model's context length is {context}: lower it")
    return BlockDataset(join_texts(data.pretraining_texts, data.tokenizer), length, name="the training texts")


def build_arguments(recipe: Recipe) -> HfGPTTrainingArguments:
    """Trainer's arguments for the first pass: its section, with the hardware and optimizer settings of `training`."""
    arguments = recipe.pretraining
    rows, processes = arguments.per_device_train_batch_size, recipe.training.data_processes
    size = -(-rows // recipe.training.batches_per_step)
    if -(-rows // size) < processes:
        raise InputError(
            f"pretraining.per_device_train_batch_size is {rows}, which cannot be divided among {processes} processes: "
            f"set it to a multiple of {processes}"
        )
    return HfGPTTrainingArguments(
        output_dir=str(first_pass_folder(recipe)),
        max_steps=arguments.max_steps,
        per_device_train_batch_size=size,
        global_batch_size=rows,
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
        gradient_checkpointing=recipe.training.gradient_checkpointing or None,  # False also warns since 5.23
        seed=recipe.training.seed,
        use_cpu=recipe.training.use_cpu,
        bf16=recipe.training.bf16,
        fp16=recipe.training.fp16,
        fsdp=recipe.training.fsdp,
        fsdp_config=recipe.training.fsdp_config,
        parallelism_config=recipe.training.parallelism_config,
    )


def join_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> TokenStream:
    """One in-memory stream of all texts, each followed by an end-of-text token if the tokenizer has one."""
    rows = Dataset.from_dict({"text": texts})
    return tokenize_documents(rows, tokenizer, append_eos=tokenizer.eos_token_id is not None)
