"""Recipes: nested YAML <-> typed arguments, overrides, and errors that name the key and the line.

jsonargparse checks and converts every value by the type of its dataclass field. It does not look at keys of sections
that it does not know, nor at a section that is no mapping, nor at a null where none is allowed: that is done here.
"""

import dataclasses
import difflib
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

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
# Keys that may differ when a run is resumed: they change what is watched, not what is learned.
RESUMABLE = ("evaluation.", "data.num_proc", "data.cache_dir", "training.logging_", "training.save_", "training.eval_")


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
    parser = _build_parser()
    _check_tree(tree, lines, path)
    where = f"{path.name}, line {{}}: "
    try:
        values = parser.parse_object(tree)
    except ArgumentError as error:
        key, fact = _explain(error)
        raise InputError(where.format(lines.get(key, 1)) + fact) from error
    for override in overrides or []:
        if override.startswith("--"):
            _check_key(override[2:].partition("=")[0])
    try:
        values = parser.parse_args(overrides or [], namespace=values)
    except ArgumentError as error:
        raise InputError(_explain(error)[1]) from error
    if values.training.output_dir is None:
        values.training.output_dir = str(Path("runs") / path.stem)
    try:
        sections = {section: kind(**vars(values[section])) for section, kind in SECTIONS.items()}
    except (ValueError, TypeError, KeyError, ImportError) as error:
        raise InputError(f"{path.name}: {str(error).splitlines()[0]}") from error
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
    for override in overrides:
        if override.startswith("--"):
            _check_key(override[2:].partition("=")[0], sections)
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
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise InputError(f"there is no recipe file '{name}'")
        return path
    if name not in recipe_names():
        raise InputError(f"there is no recipe '{name}'{_nearest(name, recipe_names())}; or name a .yaml file")
    return recipe_folder() / f"{name}.yaml"


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
        line = mark.line + 1 if mark else 1
        raise InputError(f"{path.name}, line {line}: this is no YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path.name} holds no recipe: it must begin with 'task: pretrain' and sections below it")
    lines = {}
    for key, value in node.value:
        lines[key.value] = key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            for inner, _ in value.value:
                lines[f"{key.value}.{inner.value}"] = inner.start_mark.line + 1
    return tree, lines


def _build_parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--task", type=typing.Literal[TASKS], default="pretrain")
    for section, kind in SECTIONS.items():
        parser.add_class_arguments(kind, section)
    return parser


def _check_tree(tree: dict[str, Any], lines: dict[str, int], path: Path):
    for section, content in tree.items():
        inner = content if isinstance(content, dict) else {}
        for key in (str(section), *(f"{section}.{name}" for name in inner)):
            try:
                _check_key(key)
            except InputError as error:
                raise InputError(f"{path.name}, line {lines.get(key, 1)}: {error}") from None
        if section in SECTIONS:
            if not isinstance(content, dict):
                raise InputError(
                    f"{path.name}, line {lines[section]}: '{section}' is a section: indent its keys below it"
                )
            for key, value in content.items():
                if value is None and not _allows_none(SECTIONS[section], key):
                    raise InputError(f"{path.name}, line {lines[f'{section}.{key}']}: {section}.{key} cannot be empty")


def _check_key(key: str, sections: tuple[str, ...] = ("task", *SECTIONS)):
    section, _, name = key.partition(".")
    if section not in sections:
        raise InputError(f"there is no section '{section}'{_nearest(section, list(sections))}")
    fields = [field.name for field in dataclasses.fields(SECTIONS[section])] if section in SECTIONS else []
    if name and name.partition(".")[0] not in fields:
        raise InputError(f"there is no key '{name}' in section '{section}'{_nearest(name, fields)}")


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
            wanted = " or ".join(dict.fromkeys(name or f"one of {choices[1:-1]}" for _, name, choices in expected))
            return key, f"{key} is {value.group(1).strip()!r}; it must be {wanted}"
        return key, f"{key}: {' '.join(fact.split())}"
    return "", " ".join(text.split())


def _resolved_values(values: Namespace, parser: ArgumentParser) -> dict[str, Any]:
    """Our own sections without their empty keys, and of TrainingArguments' hundred what differs from the defaults."""
    defaults = parser.get_defaults()
    resolved: dict[str, Any] = {"task": values.task}
    for section in SECTIONS:
        keep = vars(values[section])
        if section == "training":
            keep = {key: value for key, value in keep.items() if value != vars(defaults[section])[key]}
        resolved[section] = {key: _plain(value) for key, value in keep.items() if value is not None}
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


def _nearest(name: str, names: list[str]) -> str:
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean '{found[0]}'?" if found else f" (there are: {', '.join(names)})" if len(names) < 12 else ""
