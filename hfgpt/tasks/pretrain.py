"""Stage 6, pre-training: from a recipe to a model that anyone can load, in labelled steps."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, default_data_collator, set_seed

from hfgpt.building import check_base_model
from hfgpt.data.blocks import BlockDataset, count_blocks
from hfgpt.data.report import DataReport
from hfgpt.data.sources import DataArguments, cache_folder, load_all_documents, load_documents
from hfgpt.data.streams import TokenStream, tokenize_documents
from hfgpt.errors import InputError
from hfgpt.evaluation import EvaluationArguments
from hfgpt.evaluation.generation import SamplingArguments, encode_prompt, generate_texts, unknown_token_id
from hfgpt.evaluation.perplexity import Perplexity, measure_perplexity
from hfgpt.loading import check_vocabulary, load_model, load_model_tokenizer
from hfgpt.recipe import Recipe
from hfgpt.saving import quote_path, write_json
from hfgpt.tasks.messages import (
    describe_choices,
    describe_data,
    describe_first_loss,
    describe_metrics,
    render_summary,
)
from hfgpt.tasks.run_folder import begin_run, check_run_folder, holds_run_folder
from hfgpt.tasks.training_run import (
    Training,
    build_recipe_model,
    check_publication,
    context_length,
    describe_run,
    end_run,
    find_tokenizer,
    publish_run,
    run_training,
    save_run,
    warn_of_small_vocabulary,
)
from hfgpt.training.callbacks import log_result, plot_loss, stderr_console
from hfgpt.training.estimate import plan_run
from hfgpt.training.hardware import find_device
from hfgpt.training.trainer import HfGPTTrainer


@dataclass
class PretrainingData:
    """What the model learns from and is measured on.

    Args:
        train: Blocks of the training split.
        validation: Blocks of the validation split, every token but the first predicted once.
        tokenizer: What made them.
        report: What became of the text.
    """

    train: BlockDataset
    validation: BlockDataset
    tokenizer: PreTrainedTokenizerBase
    report: DataReport


@holds_run_folder
def pretrain(recipe: Recipe, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Trains a causal language model from text and leaves a complete run folder.

    Args:
        recipe: See `hfgpt.recipe.load_recipe`.
        resume: Go on from the last checkpoint in `training.output_dir`.
        console: Where to report; None: standard error.

    Returns:
        The content of `metrics.json`.

    Raises:
        InputError: Something in the recipe, the data or the run folder has to be mended first.
        Interrupted: Ctrl-C; the run can be resumed.
    """
    console = console or stderr_console(quiet=recipe.training.process_index > 0)
    started = time.perf_counter()

    # 1. The run folder: free, or that of the run to go on with; and the Hub, if it goes there.
    checkpoint = check_run_folder(recipe, resume, console)
    check_publication(recipe)
    folder = Path(recipe.training.output_dir)

    # 2. Text to tokens to blocks.
    with recipe.training.main_process_first():  # the others then find its tokens in the cache
        data = load_pretraining_data(recipe, folder if resume else None)

    # 3. The model, its weights drawn from the seed.
    model = build_pretraining_model(recipe, data)

    # 4. What it will cost, and what was chosen.
    estimate = plan_run(model, recipe.training, data.train.block_size, len(data.train), seconds=0.5)
    console.print(describe_data(data.report, data.train.stream), highlight=False)
    console.print(describe_choices(model, recipe, estimate), highlight=False)
    if checkpoint is None and recipe.model.path is None:
        console.print(describe_first_loss(model.config.vocab_size), highlight=False)

    # 5. Train.
    PartialState().wait_for_everyone()  # all have seen the folder free
    if recipe.training.process_index == 0:
        begin_run(recipe, data.tokenizer, data.report, checkpoint)
    trainer = HfGPTTrainer(
        model=model,
        args=recipe.training,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=data.tokenizer,
    )
    training = run_training(trainer, estimate, checkpoint, started, console, recipe.hub)
    return finish_run(recipe, training, data, console) if trainer.is_world_process_zero() else {}


def build_pretraining_model(recipe: Recipe, data: PretrainingData) -> PreTrainedModel:
    """The model to train, checked against the blocks and the prompts it will be given.

    Raises:
        InputError: The architecture is impossible, or the data or a prompt does not fit it.
    """
    set_seed(recipe.training.seed)
    model = build_recipe_model(recipe, data.tokenizer)
    check_blocks(model, data)
    context = model.config.max_position_embeddings
    sampling_arguments(recipe)
    for prompt in recipe.evaluation.prompts:
        encode_prompt(data.tokenizer, prompt, recipe.evaluation.max_new_tokens, context)
    data.tokenizer.model_max_length = context
    return model


def finish_run(recipe: Recipe, training: Training, data: PretrainingData, console: Console) -> dict[str, Any]:
    """Saves the trained model, measures it, and writes down what happened; returns the content of `metrics.json`."""
    folder, trainer = Path(recipe.training.output_dir), training.trainer

    # 6. Save, then measure the weights as they were saved.
    save_run(trainer, folder)
    saved = load_model(str(folder)).to(recipe.training.device)
    metrics = measure(saved, data.tokenizer, data.validation, data.report, recipe.training.per_device_eval_batch_size)
    samples = sample(saved, data.tokenizer, recipe)
    write_json(folder / "metrics.json", metrics)
    log_result(folder, {"step": trainer.state.global_step, "epoch": trainer.state.epoch, **metrics})
    plot_loss(folder, saved.config.vocab_size)

    # 7. What happened, for whoever repeats it or asks. Trainer sums the operations of the tokens it saw: the last step
    # of an epoch may have fewer than the others.
    tokens = round(trainer.state.total_flos / training.estimate.flops_per_token)
    write_json(folder / "run.json", describe_run(recipe, training, tokens, samples))
    end_run(recipe)
    measured = f"validation {describe_metrics(metrics)}"
    following = f"hfgpt generate {quote_path(folder)} 'your prompt'"
    console.print(render_summary(folder, measured, samples["texts"], training, following), highlight=False)
    publish_run(recipe, training, console)
    return metrics


def load_pretraining_data(recipe: Recipe, tokenizer_folder: Path | None = None) -> PretrainingData:
    """Reads the text, trains or loads the tokenizer (with a model its own), and cuts both splits into blocks.

    Args:
        recipe: Its sections `data`, `tokenizer` and `model`.
        tokenizer_folder: A run to resume, whose tokenizer is taken rather than trained again.
    """
    if tokenizer_folder is None:
        check_base_model(recipe.model)
    report = DataReport()
    documents = load_documents(recipe.data, recipe.training.seed, report)
    tokenizer = find_tokenizer(recipe, tokenizer_folder, (row["text"] for row in documents["train"]))
    warn_of_small_vocabulary(recipe, tokenizer, report)
    block_size = context_length(recipe) if recipe.data.block_size is None else recipe.data.block_size
    blocks = {}
    for split, texts in documents.items():
        stream: TokenStream = tokenize_documents(
            texts,
            tokenizer,
            cache_dir=cache_folder(recipe.data.cache_dir),
            num_proc=recipe.data.num_proc,
            append_eos=ends_documents(texts),
        )
        blocks[split] = BlockDataset(
            stream,
            block_size,
            recipe.data.stride if split == "train" else recipe.evaluation.stride,
            document_boundaries=recipe.data.document_boundaries,
            keep_tail=split == "validation",
            name=f"the {split} split of {recipe.data.path}",
        )
        count_blocks(blocks[split], unknown_token_id(tokenizer), report, split)
    report.warn_if_small("validation", "tokens")
    return PretrainingData(blocks["train"], blocks["validation"], tokenizer, report)


def ends_documents(texts: Dataset) -> bool:
    """Whether an end-of-text token follows each text: a single one may be a part, cut by position, and not end."""
    return len(texts) > 1


def check_blocks(model: PreTrainedModel, data: PretrainingData):
    """Refuses blocks that the model cannot read.

    Raises:
        InputError: A block is longer than the context, or an id has no embedding.
    """
    context = model.config.max_position_embeddings
    if data.train.block_size > context:
        raise InputError(
            f"data.block_size is {data.train.block_size}, but the context of the model is {context}: lower it, or "
            "raise model.max_position_embeddings"
        )
    largest = max(data.train.stream.max_token_id, data.validation.stream.max_token_id)
    if largest >= model.config.vocab_size:
        raise InputError(f"the text has token id {largest}, but the model embeds only {model.config.vocab_size}")


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: BlockDataset,
    report: DataReport,
    batch_size: int,
) -> dict[str, Any]:
    """Token-weighted metrics of a model, under the names of `metrics.json`.

    Args:
        model: A causal language model.
        tokenizer: What made the blocks.
        blocks: The whole validation split, with its tail.
        report: Holds the sizes of that split. Where it has unknown tokens they are counted, and there are no bits per
            byte, since the bytes they stand for were not predicted.
        batch_size: Blocks at a time.
    """
    loader = DataLoader(blocks, batch_size=batch_size, collate_fn=default_data_collator)
    result: Perplexity = measure_perplexity(model, loader)
    sizes = report.splits["validation"]
    if sizes.unknown_tokens:
        return result.to_dict() | {"eval_unknown_tokens": sizes.unknown_tokens}
    # The first token is context only, so its bytes are not counted.
    first = tokenizer.decode([int(blocks.stream.tokens[0])], skip_special_tokens=True)
    result.bytes = sizes.bytes - len(first.encode())
    return result.to_dict()


def evaluate_model(path: str, data: DataArguments, evaluation: EvaluationArguments) -> dict[str, Any]:
    """Measures a saved language model on all text of a source.

    Args:
        path: A folder or Hub id.
        data: The source; `validation_split`, if named, restricts it.
        evaluation: Its `stride`.

    Returns:
        Metrics under the names of `metrics.json`.

    Raises:
        InputError: No model, no text, or a tokenizer that does not fit the model.
    """
    tokenizer = load_model_tokenizer(path)
    model = load_model(path).to(find_device())
    check_vocabulary(model, tokenizer)
    report = DataReport()
    documents = load_all_documents(data, report)
    stream = tokenize_documents(
        documents,
        tokenizer,
        cache_dir=cache_folder(data.cache_dir),
        num_proc=data.num_proc,
        append_eos=ends_documents(documents),
    )
    context = model.config.max_position_embeddings
    block_size = context if data.block_size is None else data.block_size
    if block_size > context:
        raise InputError(f"data.block_size is {block_size}, but the context of the model is {context}: lower it")
    blocks = BlockDataset(
        stream,
        block_size,
        evaluation.stride,
        document_boundaries=data.document_boundaries,
        keep_tail=True,
        name=f"the text of {data.path}",
    )
    count_blocks(blocks, unknown_token_id(tokenizer), report, "validation")
    return measure(model, tokenizer, blocks, report, batch_size=8)


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> dict[str, Any]:
    """One continuation of each of the recipe's prompts, and how it was sampled."""
    arguments = sampling_arguments(recipe)
    texts = [generate_texts(model, tokenizer, prompt, arguments)[0] for prompt in recipe.evaluation.prompts]
    names = ("seed", "temperature", "top_k", "max_new_tokens")
    return {"texts": texts, **{name: getattr(arguments, name) for name in names}}


def sampling_arguments(recipe: Recipe) -> SamplingArguments:
    """How the recipe's prompts are continued."""
    return SamplingArguments(
        max_new_tokens=recipe.evaluation.max_new_tokens,
        temperature=recipe.evaluation.temperature,
        top_k=recipe.evaluation.top_k,
        seed=recipe.training.seed,
    )
