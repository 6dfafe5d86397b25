"""`hfgpt keys`: which keys are listed for which task, and how they are shown."""

import pytest

from hfgpt.commands.keys import describe_type, list_keys, render_keys
from hfgpt.errors import InputError
from hfgpt.recipe_keys import SECTIONS, section_keys


def dotted(keys: dict, prefix: str) -> list[str]:
    return [
        name
        for key, inner in keys.items()
        for name in (dotted(inner, f"{prefix}{key}.") if inner else [f"{prefix}{key}"])
    ]


@pytest.mark.parametrize("task", SECTIONS)
def test_each_key_of_a_task_is_listed_once(task):
    found = list_keys(task=task)
    assert [entry.section for entry in found] == ["task", *SECTIONS[task]]
    for entry in found[1:]:
        listed = [key.key for key in entry.keys]
        assert sorted(listed) == sorted(dotted(section_keys(task)[entry.section], f"{entry.section}."))
        assert all(key.tasks == [task] for key in entry.keys)
        libraries = [key.library for key in entry.keys]
        assert libraries == sorted(libraries), "the keys of hfgpt come first"


def test_without_a_task_each_variant_of_a_key_is_listed_once():
    found = {entry.section: entry for entry in list_keys()}
    assert list(found) == ["task", *SECTIONS["classify"]]
    assert found["pretraining"].tasks == ["classify"]
    fractions = [key for key in found["data"].keys if key.key == "data.validation_fraction"]
    assert [(key.default, key.tasks) for key in fractions] == [
        (0.1, ["pretrain"]),
        (0.1, ["classify"]),
        (0.05, ["instruct"]),
    ]
    (path,) = [key for key in found["data"].keys if key.key == "data.path"]
    assert path.tasks == list(SECTIONS)


def test_one_key_and_its_nested_keys():
    ((entry,),) = [found.keys for found in list_keys("training.max_steps")]
    assert (entry.key, entry.type, entry.default, entry.library) == ("training.max_steps", "int", -1, "transformers")
    (judge,) = list_keys("evaluation.judge")
    assert [key.key.rpartition(".")[0] for key in judge.keys] == ["evaluation.judge"] * 4
    (first,) = list_keys("adapters.r")
    assert [key.key for key in first.keys] == ["adapters.r"], "adapters.rank_pattern is not included"


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("modle", None, "there is no section 'modle'; did you mean 'model'?"),
        ("xyz", None, "there is no section 'xyz' (available: task, tokenizer, model, data, pretraining, adapters, "),
        ("data.pth", None, "there is no key 'pth' in section 'data'; did you mean 'path'?"),
        ("training.lr", "classify", "there is no key 'lr' in section 'training'; did you mean 'learning_rate'?"),
        ("evaluation.judge.modle", None, "no key 'judge.modle' in section 'evaluation'; did you mean 'judge.model'?"),
        ("data.stride", "classify", "there is no key 'stride' in section 'data'"),
        ("pretraining", "instruct", "recipes of task instruct have no section 'pretraining': use --task classify"),
        ("data", "clasify", "--task is 'clasify'; did you mean 'classify'?"),
        (None, "x", "--task is 'x' (available: pretrain, classify, instruct)"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(name, task, message):
    with pytest.raises(InputError) as error:
        list_keys(name, task)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        ("int", "int"),
        ("str | None", "str or null"),
        ("None | str | list[str]", "null, str or list of str"),
        ("Literal['a', 'no'] | None", "a, 'no' or null"),
        ("str | None | Literal[False]", "str, null or false"),
        ("dict[str, int]", "dict"),
    ],
)
def test_types_are_described_as_their_values_are_written_in_recipes(annotation, words):
    assert describe_type(annotation) == words


@pytest.mark.parametrize("width", [40, 80, 140])
def test_lines_fit_the_terminal(width):
    shown = render_keys(list_keys(), width)
    for line in shown.splitlines():
        assert len(line) <= width or " " not in line.strip(), "only a single longer word may exceed the width"
    assert "data.validation_fraction float; default: 0.05 [instruct]" in " ".join(shown.split())
    assert "\n    Branch, tag or commit of" in shown


def test_each_key_is_one_line_when_piped():
    lines = render_keys(list_keys(), None).splitlines()
    assert (
        "training.last_blocks  int or null; default: null  [classify, instruct]  "
        "Number of blocks for `last_blocks`; null: one."
    ) in lines
    assert "training.eval_strategy  IntervalStrategy or str; default: 'no'  " in "\n".join(lines)
    assert "training.adam_epsilon  float; default: 1.0e-08  " in "\n".join(lines), "YAML must read it as a number, too"
    assert sum(line.startswith("training.seed  ") for line in lines) == 1
    alone = render_keys(list_keys("pretraining.max_steps"), None)
    assert alone == "pretraining.max_steps  int; default: 300  Number of optimizer steps."
