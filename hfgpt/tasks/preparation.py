"""Steps that all tasks share before training: the tokenizer, the model, adapters and frozen weights."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfgpt.adapters import CAUSAL_LM, SEQ_CLS, attach_adapter
from hfgpt.building import build_model, find_architecture
from hfgpt.configuration_hfgpt import HfGPTConfig
from hfgpt.data.report import DataReport
from hfgpt.errors import InputError
from hfgpt.models import SavedModel
from hfgpt.recipe import Recipe
from hfgpt.tasks.task import Data
from hfgpt.tokenizer import build_tokenizer, load_tokenizer


def find_tokenizer(
    recipe: Recipe, base: SavedModel | None, folder: Path | None, texts: Iterable[str]
) -> PreTrainedTokenizerBase:
    """The tokenizer of a run.

    Args:
        recipe: Its section `tokenizer`.
        base: The base model; None: a new model.
        folder: Folder of a run to resume, whose tokenizer is reused.
        texts: Training texts for a new tokenizer; used if neither a tokenizer nor a base model is given.
    """
    if folder and (folder / "tokenizer.json").is_file():
        return load_tokenizer(str(folder), pad_token=None, add_eos=False)  # as the run saved it
    if base and recipe.tokenizer.path is None:
        return base.load_tokenizer()  # the one it was trained with
    return build_tokenizer(recipe.tokenizer, texts)


def warn_of_small_vocabulary(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, report: DataReport):
    """Adds a warning to the report if the trained tokenizer is smaller than requested."""
    wanted, trained = recipe.tokenizer.vocab_size, recipe.tokenizer.path is None and recipe.model.path is None
    if trained and recipe.tokenizer.kind != "char" and len(tokenizer) < wanted:
        report.warnings.append(
            f"the tokenizer has only {len(tokenizer):,} tokens (tokenizer.vocab_size is {wanted:,}): the training "
            "text is too small for more"
        )


def context_length(recipe: Recipe, base: SavedModel | None) -> int:
    """The context length of the recipe's model, without building it; `base` is the base model."""
    if base:
        return base.config.max_position_embeddings
    return find_architecture(recipe.model).get("max_position_embeddings", HfGPTConfig.max_position_embeddings)


def build_recipe_model(recipe: Recipe, data: Data) -> PreTrainedModel:
    """The model of a recipe, with its adapter attached and weights frozen.

    Args:
        recipe: Its sections `model`, `adapters` and `training`.
        data: Provides tokenizer, labels and base model.

    Raises:
        InputError: See `hfgpt.building.build_model` and `hfgpt.adapters.attach_adapter`; or there is no base model for
            an adapter.
    """
    arguments = recipe.model
    trainable = getattr(recipe.training, "trainable", None) or ("adapters" if recipe.adapters else "all")
    if (trainable == "adapters") != (recipe.adapters is not None):
        raise InputError(
            f"the recipe has a section adapters, but training.trainable is '{trainable}': remove one of them"
            if recipe.adapters
            else "training.trainable is 'adapters', but the recipe has no section adapters: add one, such as r: 16"
        )
    if recipe.adapters is None:
        if arguments.load_in_4bit:
            raise InputError("4-bit weights cannot be trained: add a section adapters, or remove model.load_in_4bit")
        model = build_model(arguments, data.tokenizer, data.labels, data.base)
        if trainable != "all":
            freeze_model(model, (recipe.training.last_blocks or 1) if trainable == "last_blocks" else 0)
        return model
    if arguments.path is None and recipe.pretraining is None:
        raise InputError("an adapter needs a model to adapt: set model.path")
    if arguments.path is not None and Path(arguments.path).is_dir():  # valid in any working directory
        arguments = dataclasses.replace(arguments, path=str(Path(arguments.path).resolve()))
    task_type = CAUSAL_LM if data.labels is None else SEQ_CLS
    model = build_model(arguments, data.tokenizer, data.labels, data.base)
    model = attach_adapter(model, recipe.adapters, task_type, arguments.revision)
    if recipe.training.gradient_checkpointing:
        model.enable_input_require_grads()  # the embeddings are frozen
    return model


def freeze_model(model: PreTrainedModel, last_blocks: int):
    """Freezes all weights but the head and, if `last_blocks` is not 0, the last blocks and the final norm.

    Raises:
        InputError: The model has fewer blocks, or tied embeddings.
    """
    if model.get_output_embeddings() is not None and model.config.tie_word_embeddings:
        raise InputError(
            "this model has tied embeddings (tie_word_embeddings), so its head cannot be trained alone: set "
            "training.trainable to all, or add a section adapters"
        )
    blocks = model.model.layers
    if last_blocks > len(blocks):
        raise InputError(f"training.last_blocks is {last_blocks}, but num_hidden_layers is {len(blocks)}: lower it")
    model.requires_grad_(False)
    head = model.get_output_embeddings() if hasattr(model, "lm_head") else model.score
    for module in (head, *((*blocks[len(blocks) - last_blocks :], model.model.norm) if last_blocks else ())):
        module.requires_grad_(True)
