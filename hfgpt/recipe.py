"""Recipes: nested YAML <-> typed arguments, overrides, and errors that name the key and the line.

jsonargparse checks and converts every value by the type of its dataclass field. It does not look at keys of sections
that it does not know, nor at a section that is no mapping, nor at a null where none is allowed, and YAML takes the
last of two equal keys: that is done here.
"""

import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from hfgpt.adapters import AdapterArguments
from hfgpt.building import ModelArguments
from hfgpt.data.classification import ClassificationDataArguments
from hfgpt.data.files import nearest
from hfgpt.data.instructions import InstructionDataArguments
from hfgpt.data.sources import DataArguments
from hfgpt.errors import InputError
from hfgpt.evaluation import AnswerEvaluationArguments, ClassifierEvaluationArguments, EvaluationArguments
from hfgpt.hub import HubArguments
from hfgpt.tokenizer import TokenizerArguments
from hfgpt.training.trainer import FROM_SCRATCH, FineTuningArguments, FirstPassArguments, HfGPTTrainingArguments


def _sections(data: type, training: type, evaluation: type, **more: type) -> dict[str, type]:
    first = {"tokenizer": TokenizerArguments, "model": ModelArguments, "data": data, **more}
    return {**first, "adapters": AdapterArguments, "training": training, "evaluation": evaluation, "hub": HubArguments}


# The sections of each task, in the order of a recipe.
SECTIONS: dict[str, dict[str, type]] = {
    "pretrain": _sections(DataArguments, HfGPTTrainingArguments, EvaluationArguments),
    "classify": _sections(
        ClassificationDataArguments,
        FineTuningArguments,
        ClassifierEvaluationArguments,
        pretraining=FirstPassArguments,
    ),
    "instruct": _sections(InstructionDataArguments, FineTuningArguments, AnswerEvaluationArguments),
}
# What these say is done only where a recipe has them.
OPTIONAL = ("pretraining", "adapters", "hub")
# Types as the author of a recipe calls them.
TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text in quotes",
    "list": "a list like [a, b]",
    "dict": "a mapping like {a: b}",
    "NoneType": "null",
}
# Keys that may differ when a run is resumed: they change what is watched, not what is learned.
RESUMABLE = (
    "evaluation.",
    "hub.",
    "data.num_proc",
    "data.cache_dir",
    "training.output_dir",
    "training.logging_",
    "training.save_",
    "training.eval_",
)


@dataclass
class Recipe:
    """A run: its task and the arguments of every section.

    Args:
        name: The file's name without its suffix.
        task: `pretrain`, `classify` or `instruct`.
        values: What the recipe and the overrides say, with our own sections complete: enough to repeat the run.
        pretraining, adapters, hub: None where the recipe has no such section.
    """

    name: str
    task: str
    tokenizer: TokenizerArguments
    model: ModelArguments
    data: DataArguments | ClassificationDataArguments | InstructionDataArguments
    training: HfGPTTrainingArguments
    evaluation: EvaluationArguments | ClassifierEvaluationArguments | AnswerEvaluationArguments
    values: dict[str, Any]
    pretraining: FirstPassArguments | None = None
    adapters: AdapterArguments | None = None
    hub: HubArguments | None = None


def recipe_folder() -> Path:
    """The recipes of the package: beside the modules in an installed wheel, at the root of a checkout."""
    package = Path(__file__).parent
    return package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def load_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """Reads a recipe and applies overrides.

    Args:
        name: A name from `recipes/`, or the path of a YAML file.
        overrides: `--section.key value` or `--section.key=value`, as on the command line.

    Raises:
        InputError: No such recipe, no YAML, an unknown key (with the nearest right one), or a wrong type.

    Example:

    ```python
    >>> load_recipe("shakespeare-char", ["--training.max_steps", "10"]).training.max_steps
    10
    ```
    """
    path = _find_recipe(name)
    tree, lines = _read_yaml(path)

    def where(key: str) -> str:
        return f"{path.name}, line {lines.get(key) or lines.get(key.partition('.')[0], 1)}: "

    overrides = overrides or []
    task = _find_task(tree, overrides)
    if not isinstance(task, str) or task not in SECTIONS:
        fault = f"task is {task!r}; it must be one of {', '.join(SECTIONS)}" if task else "task cannot be empty"
        raise InputError((where("task") if "task" in tree and tree["task"] == task else "") + fault)
    for key, fault in _find_faults(tree, {"task": str, **SECTIONS[task]}):
        raise InputError(where(key) + fault)
    parser = _build_parser(task)
    try:
        values = parser.parse_object(tree)
    except ArgumentError as error:
        key, fact = _explain(error)
        raise InputError(where(key) + fact) from error
    _check_overrides(overrides, {"task": str, **SECTIONS[task]})
    try:
        values = parser.parse_args(overrides, namespace=values) if overrides else values
    except ArgumentError as error:
        raise InputError(_explain(error)[1]) from error
    values.training.output_dir = values.training.output_dir or str(Path("runs") / path.stem)
    unused = {name for name in OPTIONAL if name not in tree and not any(o.startswith(f"--{name}.") for o in overrides)}
    if values.model.path is None and "pretraining" in unused:
        given = {o.partition("=")[0].removeprefix("--training.") for o in overrides} | set(tree.get("training", {}))
        vars(values.training).update({key: FROM_SCRATCH[key] for key in FROM_SCRATCH.keys() - given})
    try:
        sections = {name: _build(kind, values[name]) for name, kind in SECTIONS[task].items() if name not in unused}
    except (ValueError, TypeError, KeyError, ImportError) as error:
        key, value, fact = _explain_refusal(error, values.training)
        written = key and tree.get("training", {}).get(key) == value
        raise InputError((where(f"training.{key}") if written else "") + fact) from error
    return Recipe(path.stem, task, **sections, values=_resolved_values(values, parser, task, unused))


def parse_sections(overrides: list[str], task: str, sections: list[str]) -> dict[str, Any]:
    """The arguments of some sections from the command line alone, for commands without a recipe.

    Args:
        overrides: `--section.key value` or `--section.key=value`.
        task: Whose sections.
        sections: The sections they may name.

    Returns:
        Section name -> its arguments.

    Raises:
        InputError: An unknown key or section, or a wrong type.
    """
    kinds = {section: SECTIONS[task][section] for section in sections}
    parser = ArgumentParser(exit_on_error=False)
    for section, kind in kinds.items():
        parser.add_class_arguments(kind, section)
    _check_overrides(overrides, kinds)
    try:
        values = parser.parse_args(overrides)
    except ArgumentError as error:
        raise InputError(_explain(error)[1]) from error
    return {section: _build(kind, values[section]) for section, kind in kinds.items()}


def render_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back to the same arguments."""
    return yaml.safe_dump(recipe.values, sort_keys=False, allow_unicode=True)


def first_difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first key, in dotted form, in which two recipes' values differ in what is learned; None if in none."""
    flat_old, flat_new = _flatten(old), _flatten(new)
    for key in sorted(flat_old.keys() | flat_new.keys()):
        if not key.startswith(RESUMABLE) and flat_old.get(key) != flat_new.get(key):
            return key
    return None


def _find_recipe(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    if name in recipe_names():
        return recipe_folder() / f"{name}.yaml"
    if path.is_dir():
        raise InputError(f"recipe '{name}' is a folder: name a .yaml file in it")
    if path.suffix in (".yaml", ".yml"):
        raise InputError(f"there is no recipe file '{name}'{nearest(name)}: check the path")
    raise InputError(f"there is no recipe or .yaml file '{name}'{_nearest(name, recipe_names(), most=99)}")


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The recipe as nested dictionaries, and the line of each dotted key."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InputError(f"{path.name} is not UTF-8: byte 0x{byte:02x} at offset {error.start}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path.name}, line {mark.line + 1}" if mark else path.name
        fact = getattr(error, "problem", None) or " ".join(str(error).split())
        raise InputError(f"{place}: this is no YAML: {fact}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path.name} holds no recipe: it must begin with 'task: pretrain' and sections below it")
    lines: dict[str, int] = {}
    for name, mark in _find_keys(node):
        if name in lines:
            raise InputError(f"{path.name}, line {mark.line + 1}: {name} is already in line {lines[name]}: drop one")
        lines[name] = mark.line + 1
    return tree, lines


def _find_keys(node: yaml.MappingNode, prefix: str = "") -> Iterator[tuple[str, yaml.Mark]]:
    """Every key in dotted form, and where it stands."""
    for key, value in node.value:
        yield f"{prefix}{key.value}", key.start_mark
        if isinstance(value, yaml.MappingNode):
            yield from _find_keys(value, f"{prefix}{key.value}.")


def _find_task(tree: dict[str, Any], overrides: list[str]) -> Any:
    task = tree.get("task", "pretrain")
    for override, following in zip(overrides, [*overrides[1:], ""], strict=False):
        if override == "--task":
            task = following
        elif override.startswith("--task="):
            task = override.partition("=")[2]
    return task


@functools.cache
def _build_parser(task: str) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--task", type=str, default="pretrain")
    for section, kind in SECTIONS[task].items():
        parser.add_class_arguments(kind, section)
    return parser


def _build(kind: type, values: Namespace) -> Any:
    """The dataclass of a section, and those within it, from what the parser made of them."""
    hints = typing.get_type_hints(kind)
    built = {
        name: _build(hints[name], value)
        if isinstance(value, Namespace) and dataclasses.is_dataclass(hints[name])
        else value
        for name, value in vars(values).items()
    }
    return kind(**built)


def _find_faults(tree: dict[str, Any], sections: dict[str, type]) -> Iterator[tuple[str, str]]:
    """What jsonargparse does not look at: keys and what is wrong with them."""
    for section, content in tree.items():
        if section == "task":
            continue
        if section not in sections:
            yield str(section), _unknown_section(str(section), sections)
        else:
            yield from _find_section_faults(section, content, sections[section])


def _find_section_faults(section: str, content: Any, kind: type) -> Iterator[tuple[str, str]]:
    if not isinstance(content, dict):
        yield section, f"'{section}' is a section: indent its keys below it"
        return
    hints = typing.get_type_hints(kind)
    for name, value in content.items():
        key = f"{section}.{name}"
        if name not in hints:
            yield key, _unknown_key(str(name), section, hints)
        elif dataclasses.is_dataclass(hints[name]):
            yield from _find_section_faults(key, value, hints[name])
        elif value is None and not _allows_none(hints[name]):
            yield key, f"{key} cannot be empty"


def _check_overrides(overrides: list[str], sections: dict[str, type]):
    for override in overrides:
        if not override.startswith("--"):
            continue
        section, *names = override[2:].partition("=")[0].split(".")
        if section not in sections:
            raise InputError(_unknown_section(section, sections))
        kind, path = sections[section], section
        while names:
            hints = typing.get_type_hints(kind)
            if names[0] not in hints or (len(names) > 1 and not dataclasses.is_dataclass(hints[names[0]])):
                raise InputError(_unknown_key(".".join(names), path, hints))
            path = f"{path}.{names[0]}"
            kind = hints[names.pop(0)]
        if dataclasses.is_dataclass(kind):
            raise InputError(f"--{path} is a section: name one of its keys, as in --{path}.key value")


def _unknown_section(section: str, sections: dict[str, Any]) -> str:
    return f"there is no section '{section}'{_nearest(section, list(sections))}"


def _unknown_key(name: str, section: str, names: dict[str, Any]) -> str:
    return f"there is no key '{name}' in section '{section}'{_nearest(name, list(names))}"


def _allows_none(hint: Any) -> bool:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return type(None) in options or Any in options


def _explain(error: ArgumentError) -> tuple[str, str]:
    """The key that jsonargparse complains of, and its complaint in one line."""
    if found := re.search(r'Parser key "([^"]+)":\s*(.*)', str(error), re.DOTALL):
        key, fact = found.groups()
        # The value comes last; what lies between is one line for each type of a union.
        expected = re.findall(r"Expected an? (<class '(\w+)'>|typing\.Literal(\[.*?\]))", fact)
        value = re.search(r"(?:Got value|Given value): (.*)", fact)
        if expected and value:
            names = [TYPES.get(name, name) if name else f"one of {choices[1:-1]}" for _, name, choices in expected]
            return key, f"{key} is {value.group(1).strip()!r}; it must be {' or '.join(dict.fromkeys(names))}"
        return key, f"{key}: {' '.join(fact.split())}"
    return "", f"{' '.join(str(error).split())}; an override is --section.key value"


def _explain_refusal(error: Exception, arguments: Namespace) -> tuple[str, Any, str]:
    """The key, the value and one line: transformers names a value that it does not take, but not its key."""
    text = " ".join(str(error).split())
    found = re.match(r"'?(.*?)'? is not a valid \w+, please select one of (.*)", text)
    key = found and next((key for key, value in vars(arguments).items() if value == found[1]), None)
    if not key:
        return "", None, text if isinstance(error, InputError) else f"training: {text}"
    choices = re.findall("'(.*?)'", found[2])
    remedy = _nearest(found[1], choices) or f"; it must be one of {', '.join(choices)}"
    return key, found[1], f"training.{key} is '{found[1]}'{remedy}"


def _resolved_values(values: Namespace, parser: ArgumentParser, task: str, unused: set[str]) -> dict[str, Any]:
    """Our own sections without their empty keys; of TrainingArguments' hundred, those not at their only default."""
    defaults = parser.get_defaults()
    resolved: dict[str, Any] = {"task": task}
    for section in SECTIONS[task]:
        if section in unused:
            continue
        keep = vars(values[section])
        if section == "training":
            kept = [*FROM_SCRATCH, *(key for key, value in keep.items() if value != vars(defaults[section])[key])]
            keep = {key: value for key, value in keep.items() if key in kept}
        # A null is written where it differs from the default: `pad_token: null` is another tokenizer.
        unset = [key for key, value in keep.items() if value is None and vars(defaults[section])[key] is None]
        resolved[section] = {key: _plain(value) for key, value in keep.items() if key not in unset}
    return resolved


def _plain(value: Any) -> Any:
    if isinstance(value, Namespace):
        return {key: _plain(inner) for key, inner in vars(value).items() if inner is not None}
    return getattr(value, "value", value)  # enumerations of transformers


def _flatten(values: dict[str, Any]) -> dict[str, Any]:
    flat = {}
    for section, content in values.items():
        flat |= (
            {f"{section}.{key}": value for key, value in content.items()} if section != "task" else {section: content}
        )
    return flat


def _nearest(name: str, names: Sequence[str], most: int = 11) -> str:
    if found := difflib.get_close_matches(name, names, n=1, cutoff=0.5):
        return f"; did you mean '{found[0]}'?"
    return f" (there are: {', '.join(names)})" if len(names) <= most else ""
