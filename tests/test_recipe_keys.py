"""The keys of a recipe as read from the source, and the suggestions for keys that do not exist."""

import dataclasses
import sys
import typing

import pytest

from hfgpt.errors import InputError
from hfgpt.recipe import section_types
from hfgpt.recipe_keys import NICKNAMES, SECTIONS, Section, check_overrides, read_section, section_keys


def fields_of(kind: type) -> dict:
    hints = typing.get_type_hints(kind)
    return {
        field.name: fields_of(hints[field.name]) if dataclasses.is_dataclass(hints[field.name]) else None
        for field in dataclasses.fields(kind)
        if field.init
    }


@pytest.mark.parametrize("task", SECTIONS)
def test_the_keys_are_the_fields_of_the_dataclasses(task):
    keys = section_keys(task)
    assert len(keys["training"]) > 100
    assert list(keys) == list(section_types(task))
    for section, kind in section_types(task).items():
        assert list(keys[section].items()) == list(fields_of(kind).items()), section


def check_section(section: Section, kind: type):
    """Types and defaults are those of the dataclass, and each key has a description."""
    hints = typing.get_type_hints(kind)
    for field in (field for field in dataclasses.fields(kind) if field.init):
        key = section.keys[field.name]
        if isinstance(key, Section):
            check_section(key, hints[field.name])
            continue
        owner = next(base for base in kind.__mro__ if field.name in vars(base).get("__annotations__", ()))
        assert eval(key.type, vars(sys.modules[owner.__module__])) == hints[field.name], field.name
        made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        assert (key.default, type(key.default)) == (made, type(made)), field.name
        assert key.meaning, field.name
        assert "%%" not in key.meaning


@pytest.mark.parametrize("task", SECTIONS)
def test_types_and_defaults_are_those_of_the_dataclasses(task):
    for section, kind in section_types(task).items():
        check_section(read_section(task, section), kind)


def test_a_description_is_that_of_the_last_class_that_gives_one():
    training, tuning = read_section("pretrain", "training").keys, read_section("classify", "training").keys
    assert training["seed"].library == tuning["seed"].library == "transformers"
    assert training["seed"].meaning == "Random seed that will be set at the beginning of training."
    assert training["push_to_hub"].meaning == "Not supported: use the section `hub`.", "a field of transformers"
    assert training["push_to_hub"].library == "hfgpt"
    assert (training["logging_steps"].default, training["logging_steps"].library) == (10, "hfgpt")
    assert training["logging_steps"].meaning.startswith("Log every X updates steps."), (
        "a different default, the same description"
    )
    assert training["train_sampling_strategy"].library == "transformers"
    assert tuning["train_sampling_strategy"].default == "group_by_length"


def test_the_docstring_of_a_base_class_is_kept_except_its_first_line():
    first, *more = read_section("classify", "training").about
    assert first == "The recipe's section `training` for classification and instructions."
    assert more == read_section("pretrain", "training").about[1:] != []


@pytest.mark.parametrize(
    ("key", "right"),
    [
        ("training.lr", "learning_rate"),
        ("training.batch_size", "per_device_train_batch_size"),
        ("training.epochs", "num_train_epochs"),
        ("training.grad_accum", "gradient_accumulation_steps"),
        ("training.max_iters", "max_steps"),
        ("training.grad_clip", "max_grad_norm"),
        ("model.n_layer", "num_hidden_layers"),
        ("model.n_head", "num_attention_heads"),
        ("model.n_embd", "hidden_size"),
        ("model.block_size", "max_position_embeddings"),
        ("model.context_length", "max_position_embeddings"),
        ("adapters.rank", "r"),
        ("adapters.alpha", "lora_alpha"),
        ("evaluation.batchsize", "batch_size"),
        ("pretraining.LR", "learning_rate"),
    ],
)
def test_common_names_lead_to_ours(key, right):
    keys = section_keys("instruct") | section_keys("classify", ["pretraining"])
    with pytest.raises(InputError, match=f"; did you mean '{right}'\\?$"):
        check_overrides([f"--{key}=1"], keys)


def test_an_alias_is_never_an_existing_key():
    for section, keys in section_keys("classify").items():
        for nickname, key in NICKNAMES.items():
            assert not {nickname, key} <= keys.keys(), (section, nickname)
