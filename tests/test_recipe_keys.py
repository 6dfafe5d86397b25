"""The keys of a recipe as they are read from the source, and what is suggested for those that do not exist."""

import dataclasses
import typing

import pytest

from hfgpt.errors import InputError
from hfgpt.recipe import section_types
from hfgpt.recipe_keys import NICKNAMES, SECTIONS, check_overrides, section_keys


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
def test_the_usual_names_lead_to_ours(key, right):
    keys = section_keys("instruct") | section_keys("classify", ["pretraining"])
    with pytest.raises(InputError, match=f"; did you mean '{right}'\\?$"):
        check_overrides([f"--{key}=1"], keys)


def test_a_nickname_is_no_key_of_ours_where_it_is_suggested():
    for section, keys in section_keys("classify").items():
        for nickname, key in NICKNAMES.items():
            assert not {nickname, key} <= keys.keys(), (section, nickname)
