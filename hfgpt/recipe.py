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

from hfgpt.data.files import nearest
from hfgpt.data.sources import DataArguments
from hfgpt.errors import InputError
from hfgpt.evaluation import EvaluationArguments
from hfgpt.loading import ModelArguments
from hfgpt.tokenizer import TokenizerArguments
from hfgpt.training.trainer import HfGPTTrainingArguments

TASKS = ("pretrain",)
SECTIONS = {
    "tokenizer": TokenizerArguments,
    "model": ModelArguments,
    "data": DataArguments,
    "training": HfGPTTrainingArguments,
    "evaluation": EvaluationArguments,
}
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
        values: What the recipe and the overrides say, with our own sections complete: enough to repeat the run.
    """

    name: str
    task: str
    tokenizer: TokenizerArguments
    model: ModelArguments
    data: DataArguments
    training: HfGPTTrainingArguments
    evaluation: EvaluationArguments
    values: dict[str, Any]


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

    for key, fault in _find_faults(tree):
        raise InputError(where(key) + fault)
    parser = _build_parser()
    try:
        values = parser.parse_object(tree)
    except ArgumentError as error:
        key, fact = _explain(error)
        raise InputError(where(key) + fact) from error
    _check_overrides(overrides or [])
    try:
        values = parser.parse_args(overrides, namespace=values) if overrides else values
    except ArgumentError as error:
        raise InputError(_explain(error)[1]) from error
    if values.training.output_dir is None:
        values.training.output_dir = str(Path("runs") / path.stem)
    try:
        sections = {section: kind(**vars(values[section])) for section, kind in SECTIONS.items()}
    except (ValueError, TypeError, KeyError, ImportError) as error:
        key, value, fact = _explain_refusal(error, values.training)
        written = key and tree.get("training", {}).get(key) == value
        raise InputError((where(f"training.{key}") if written else "") + fact) from error
    return Recipe(path.stem, values.task, **sections, values=_resolved_values(values, parser))


def parse_sections(overrides: list[str], sections: list[str]) -> dict[str, Any]:
    """The arguments of some sections from the command line alone, for commands without a recipe.

    Args:
        overrides: `--section.key value` or `--section.key=value`.
        sections: The sections they may name.

    Returns:
        Section name -> its arguments.

    Raises:
        InputError: An unknown key or section, or a wrong type.
    """
    parser = ArgumentParser(exit_on_error=False)
    for section in sections:
        parser.add_class_arguments(SECTIONS[section], section)
    _check_overrides(overrides, tuple(sections))
    try:
        values = parser.parse_args(overrides)
    except ArgumentError as error:
        raise InputError(_explain(error)[1]) from error
    return {section: SECTIONS[section](**vars(values[section])) for section in sections}


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
    raise InputError(f"there is no recipe or .yaml file '{name}'{_nearest(name, recipe_names())}")


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
    lines = {}
    for key, value in node.value:
        inner = value.value if isinstance(value, yaml.MappingNode) else []
        for name, mark in [(key.value, key.start_mark), *((f"{key.value}.{k.value}", k.start_mark) for k, _ in inner)]:
            if name in lines:
                raise InputError(
                    f"{path.name}, line {mark.line + 1}: {name} is already in line {lines[name]}: drop one"
                )
            lines[name] = mark.line + 1
    return tree, lines


@functools.cache
def _build_parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--task", type=typing.Literal[TASKS], default="pretrain")
    for section, kind in SECTIONS.items():
        parser.add_class_arguments(kind, section)
    return parser


def _find_faults(tree: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What jsonargparse does not look at: keys and what is wrong with them."""
    for section, content in tree.items():
        if fault := _unknown_key(str(section)):
            yield str(section), fault
        elif section not in SECTIONS:
            if content is None:
                yield section, f"{section} cannot be empty"
        elif not isinstance(content, dict):
            yield section, f"'{section}' is a section: indent its keys below it"
        else:
            for name, value in content.items():
                key = f"{section}.{name}"
                if fault := _unknown_key(key):
                    yield key, fault
                elif value is None and not _allows_none(SECTIONS[section], name):
                    yield key, f"{key} cannot be empty"


def _check_overrides(overrides: list[str], sections: tuple[str, ...] = ("task", *SECTIONS)):
    for override in overrides:
        if override.startswith("--"):
            key = override[2:].partition("=")[0]
            if fault := _unknown_key(key, sections):
                raise InputError(fault)
            if key in SECTIONS:
                raise InputError(f"--{key} is a section: name one of its keys, as in --{key}.key value")


def _unknown_key(key: str, sections: tuple[str, ...] = ("task", *SECTIONS)) -> str | None:
    section, dot, name = key.partition(".")
    if section not in sections:
        return f"there is no section '{section}'{_nearest(section, sections)}"
    fields = [field.name for field in dataclasses.fields(SECTIONS[section])] if section in SECTIONS else []
    if dot and name not in fields:
        return f"there is no key '{name}' in section '{section}'{_nearest(name, fields)}"
    return None


def _allows_none(kind: type, name: str) -> bool:
    hint = typing.get_type_hints(kind)[name]
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return type(None) in options or Any in options


def _explain(error: ArgumentError) -> tuple[str, str]:
    """The key that jsonargparse complains of, and its complaint in one line."""
    text = str(error)
    if found := re.search(r'Parser key "([^"]+)":\s*(.*)', text, re.DOTALL):
        key, fact = found.groups()
        # The value comes last; what lies between is one line for each type of a union.
        expected = re.findall(r"Expected an? (<class '(\w+)'>|typing\.Literal(\[.*?\]))", fact)
        value = re.search(r"(?:Got value|Given value): (.*)", fact)
        if expected and value:
            names = [TYPES.get(name, name) if name else f"one of {choices[1:-1]}" for _, name, choices in expected]
            wanted = " or ".join(dict.fromkeys(names))
            return key, f"{key} is {value.group(1).strip()!r}; it must be {wanted}"
        return key, f"{key}: {' '.join(fact.split())}"
    return "", f"{' '.join(text.split())}; an override is --section.key value"


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


def _resolved_values(values: Namespace, parser: ArgumentParser) -> dict[str, Any]:
    """Our own sections without their empty keys, and of TrainingArguments' hundred what differs from the defaults."""
    defaults = parser.get_defaults()
    resolved: dict[str, Any] = {"task": values.task}
    for section in SECTIONS:
        keep = vars(values[section])
        if section == "training":
            keep = {key: value for key, value in keep.items() if value != vars(defaults[section])[key]}
        # A null is written where it differs from the default: `pad_token: null` is another tokenizer.
        unset = [key for key, value in keep.items() if value is None and vars(defaults[section])[key] is None]
        resolved[section] = {key: _plain(value) for key, value in keep.items() if key not in unset}
    return resolved


def _plain(value: Any) -> Any:
    if isinstance(value, Namespace):
        return {key: _plain(inner) for key, inner in vars(value).items()}
    return getattr(value, "value", value)  # enumerations of transformers


def _flatten(values: dict[str, Any]) -> dict[str, Any]:
    flat = {}
    for section, content in values.items():
        keys = {f"{section}.{key}": value for key, value in content.items()} if section in SECTIONS else None
        flat |= keys or {section: content}
    return flat


def _nearest(name: str, names: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean '{found[0]}'?" if found else f" (there are: {', '.join(names)})" if len(names) < 12 else ""
