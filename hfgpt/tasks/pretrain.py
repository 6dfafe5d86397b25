"""Stage 6, pre-training: train a causal language model on text."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerState,
    default_data_collator,
    set_seed,
)

from hfgpt.building import find_base_model
from hfgpt.data.blocks import BlockDataset, MixedBlocks, count_blocks, count_mixture
from hfgpt.data.report import DataReport, counted
from hfgpt.data.sources import DataArguments
from hfgpt.errors import InputError
from hfgpt.evaluation import EvaluationArguments
from hfgpt.evaluation.generation import SamplingArguments, encode_prompt, generate_texts
from hfgpt.evaluation.perplexity import Perplexity, measure_perplexity
from hfgpt.evaluation.spread import Map
from hfgpt.models import SavedModel
from hfgpt.recipe import Recipe
from hfgpt.tasks.preparation import build_recipe_model, context_length, warn_of_small_vocabulary
from hfgpt.tasks.task import ALL_ROWS, NO_TEXTS, Data, Measured
from hfgpt.tasks.text import Tokens, load_all_tokens, load_tokens
from hfgpt.training.arguments import HfGPTTrainingArguments
from hfgpt.training.estimate import Estimate


@dataclass(kw_only=True)
class PretrainingData(Data):
    """Blocks of both splits; validation predicts every token but the first exactly once."""

    splits: dict[str, BlockDataset | MixedBlocks]

    @property
    def row_length(self) -> int:
        return self.splits["train"].block_size

    def count_tokens_seen(self, state: TrainerState, estimate: Estimate) -> int:
        # Trainer sums the FLOPs of the tokens it saw: the last step of an epoch may have fewer than the others.
        return round(state.total_flos / estimate.flops_per_token)


class Pretraining:
    """Trains a causal language model on text; see `hfgpt.tasks.task.Task` for the methods."""

    measured_split = "validation"
    only_for_training: ClassVar[dict[str, str]] = {
        "data.validation_fraction": ALL_ROWS,
        "data.stride": "evaluation uses evaluation.stride",
        **dict.fromkeys(("evaluation.prompts", "evaluation.max_new_tokens"), NO_TEXTS.format("generate")),
        **dict.fromkeys(("evaluation.temperature", "evaluation.top_k"), NO_TEXTS.format("generate")),
    }

    def check(self, recipe: Recipe):
        pass

    def load(
        self, recipe: Recipe, tokenizer_folder: Path | None = None, characters: int | None = None
    ) -> PretrainingData:
        base = find_base_model(recipe.model)
        text = load_tokens(recipe, base, tokenizer_folder, characters)
        tokenizer, report, share = text.tokenizer, text.report, text.share
        warn_of_small_vocabulary(recipe, tokenizer, report)
        block_size = context_length(recipe, base) if recipe.data.block_size is None else recipe.data.block_size
        blocks = {split: build_blocks(text, split, recipe, block_size) for split in text.streams}
        report.warn_if_small("validation", "tokens")
        if share is None:
            share = len(blocks["train"]) / rows_of_steps(recipe.training)
        return PretrainingData(splits=blocks, tokenizer=tokenizer, report=report, base=base, share=share)

    def build(self, recipe: Recipe, data: PretrainingData) -> PreTrainedModel:
        set_seed(recipe.training.seed)
        model = build_recipe_model(recipe, data)
        check_blocks(model, data)
        context = model.config.max_position_embeddings
        sampling_arguments(recipe)
        for prompt in recipe.evaluation.prompts:
            encode_prompt(data.tokenizer, prompt, recipe.evaluation.max_new_tokens, context)
        data.tokenizer.model_max_length = context
        return model

    def trainer_arguments(self, recipe: Recipe, data: PretrainingData) -> dict[str, Any]:
        return {}

    def measure(
        self, model: PreTrainedModel, data: PretrainingData, recipe: Recipe, console: Console, spread: Map = map
    ) -> Measured:
        blocks, batch_size = data.splits["validation"], recipe.training.per_device_eval_batch_size
        return Measured(measure_blocks(model, data.tokenizer, blocks, data.report, batch_size, spread))

    def sample(self, model: PreTrainedModel, data: PretrainingData, recipe: Recipe) -> dict[str, Any]:
        """One continuation of each of the recipe's prompts, and how it was sampled."""
        arguments = sampling_arguments(recipe)
        texts = [generate_texts(model, data.tokenizer, prompt, arguments)[0] for prompt in recipe.evaluation.prompts]
        names = ("seed", "temperature", "top_k", "max_new_tokens")
        return {"texts": texts, **{name: getattr(arguments, name) for name in names}}

    def evaluate(
        self, saved: SavedModel, data: DataArguments, evaluation: EvaluationArguments, console: Console | None = None
    ) -> dict[str, Any]:
        model, tokenizer = saved.load_with_tokenizer(AutoModelForCausalLM)
        stream, report = load_all_tokens(data, tokenizer)
        context = model.config.max_position_embeddings
        block_size = context if data.block_size is None else data.block_size
        if block_size > context:
            raise InputError(f"data.block_size is {block_size}, but the model's context length is {context}: lower it")
        blocks = BlockDataset(
            stream,
            block_size,
            evaluation.stride,
            document_boundaries=data.document_boundaries,
            keep_tail=True,
            name=f"the text of {data.path}",
        )
        count_blocks(blocks, report, "validation")
        return measure_blocks(model, tokenizer, blocks, report, batch_size=8)

    def describe(self, metrics: Mapping[str, Any]) -> str:
        unknown = metrics.get("eval_unknown_tokens")
        measured = f"{unknown:,} of them unknown" if unknown else f"{metrics['eval_bits_per_byte']:.3f} bits per byte"
        return (
            f"validation loss {metrics['eval_loss']:.4f} nats per token, perplexity {metrics['eval_perplexity']:.2f} "
            f"over {counted(metrics['eval_tokens'], 'tokens')}, {measured}"
        )

    def following(self, folder: str) -> str:
        return f"hfgpt generate {folder} 'your prompt'"


def rows_of_steps(arguments: HfGPTTrainingArguments) -> int:
    """Training rows used by `max_steps` steps."""
    return arguments.max_steps * arguments.rows_per_step


def build_blocks(text: Tokens, split: str, recipe: Recipe, block_size: int) -> BlockDataset | MixedBlocks:
    """The blocks of one split, which are counted in the report.

    Raises:
        InputError: The text is shorter than a block.
    """
    is_training = split == "train"
    places = text.sources if len(text.sources) > 1 else [recipe.data.path]
    sources = [
        BlockDataset(
            stream,
            block_size,
            recipe.data.stride if is_training else recipe.evaluation.stride,
            document_boundaries=recipe.data.document_boundaries,
            keep_tail=not is_training,
            name=f"the {split} split of {place}",
        )
        for stream, place in zip(text.streams[split], places, strict=True)
    ]
    if len(sources) == 1:
        count_blocks(sources[0], text.report, split)
        return sources[0]
    blocks = MixedBlocks(sources, places, text.weights if is_training else None)
    count_mixture(blocks, text.report, split)
    return blocks


def check_blocks(model: PreTrainedModel, data: PretrainingData):
    """Checks that the blocks fit the model.

    Raises:
        InputError: A block is longer than the context length, or an id has no embedding.
    """
    context = model.config.max_position_embeddings
    if data.row_length > context:
        raise InputError(
            f"data.block_size is {data.row_length}, but the model's context length is {context}: lower it, or "
            "raise model.max_position_embeddings"
        )
    known = max(data.tokenizer.get_vocab().values())
    if known < model.config.vocab_size:
        return
    largest = max(blocks.largest_id() for blocks in data.splits.values())
    if largest >= model.config.vocab_size:
        raise InputError(
            f"the text has the token id {largest}, but the model's vocab_size is {model.config.vocab_size}: use the "
            "model's own tokenizer"
        )


def measure_blocks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: BlockDataset | MixedBlocks,
    report: DataReport,
    batch_size: int,
    spread: Map = map,
) -> dict[str, Any]:
    """Token-weighted metrics of a model, with their names in `metrics.json`.

    Args:
        model: A causal language model.
        tokenizer: The tokenizer of the blocks.
        blocks: The validation split, with its tail.
        report: Sizes of that split. If it has unknown tokens, they are counted instead of reporting bits per byte,
            since the bytes they stand for were not predicted.
        batch_size: Blocks per batch.
        spread: See `measure_perplexity`.
    """
    loader = DataLoader(blocks, batch_size=batch_size, collate_fn=default_data_collator)
    result: Perplexity = measure_perplexity(model, loader, spread)
    sizes = report.splits["validation"]
    if sizes.unknown_tokens:
        return result.to_dict() | {"eval_unknown_tokens": sizes.unknown_tokens}
    # The first token of each source is not predicted, so its bytes are not counted.
    first = [tokenizer.decode([token], skip_special_tokens=True) for token in blocks.first_tokens()]
    result.bytes = sizes.bytes - sum(len(text.encode()) for text in first)
    return result.to_dict()


def sampling_arguments(recipe: Recipe) -> SamplingArguments:
    """Sampling settings for the recipe's prompts."""
    return SamplingArguments(
        max_new_tokens=recipe.evaluation.max_new_tokens,
        temperature=recipe.evaluation.temperature,
        top_k=recipe.evaluation.top_k,
        seed=recipe.training.seed,
    )
