"""Recipes: nested YAML <-> typed arguments, overrides, and errors that name the key and the line.

jsonargparse checks and converts every value by the type of its dataclass field. It does not check for unknown sections
and keys or sections that are not mappings (`recipe_keys.py` does), nor for null values that are not allowed or
duplicate YAML keys (this file does).
"""

import copy
import dataclasses
import difflib
import functools
import glob
import importlib
import itertools
import pydoc
import re
import tempfile
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from hfgpt.data.files import find_source, is_url, looks_local, nearest
from hfgpt.errors import InputError
from hfgpt.recipe_keys import SECTIONS, check_overrides, find_unknown, section_keys, suggest
from hfgpt.saving import check_model_path, write_text

if TYPE_CHECKING:  # `section_types` imports them, and torch, after the keys have been checked
    from hfgpt.adapters import AdapterArguments
    from hfgpt.building import ModelArguments
    from hfgpt.data.classification import ClassificationDataArguments
    from hfgpt.data.instructions import InstructionDataArguments
    from hfgpt.data.sources import DataArguments
    from hfgpt.evaluation import AnswerEvaluationArguments, ClassifierEvaluationArguments, EvaluationArguments
    from hfgpt.hub import HubArguments
    from hfgpt.tokenizer import TokenizerArguments
    from hfgpt.training.arguments import FirstPassArguments, HfGPTTrainingArguments

# Sections that have an effect only if the recipe contains them.
OPTIONAL = ("pretraining", "adapters", "hub")
MOST_KEYS = 10_000  # per recipe, including list items
# Names of types in error messages.
TYPES = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "text in quotes",
    "list": "a list like [a, b]",
    "dict": "a mapping like {a: b}",
    "NoneType": "null",
}
# Keys that may differ when a run is resumed: they do not affect what is learned (FSDP only changes the order of sums),
# or (the precision) are compared as resolved on the machine.
RESUMABLE = (
    "evaluation.",
    "hub.",
    "data.num_proc",
    "data.cache_dir",
    "training.output_dir",
    "training.bf16",
    "training.fp16",
    "training.fsdp",
    "training.logging_",
    "training.save_",
    "training.eval_",
    "training.per_device_eval_batch_size",
    "training.dataloader_num_workers",
    "training.dataloader_p",  # pin_memory, persistent_workers, prefetch_factor
    "training.report_to",
    "training.run_name",
    "training.on_divergence",
    "training.max_rollbacks",
)


@dataclass
class Recipe:
    """A run: its task and the arguments of every section.

    Args:
        name: File name without the suffix.
        task: `pretrain`, `classify` or `instruct`.
        values: The values of recipe and overrides, and the defaults of hfgpt's sections: enough to repeat the run.
        pretraining, adapters, hub: None if the recipe does not have the section.
    """

    name: str
    task: str
    tokenizer: "TokenizerArguments"
    model: "ModelArguments"
    data: "DataArguments | ClassificationDataArguments | InstructionDataArguments"
    training: "HfGPTTrainingArguments"
    evaluation: "EvaluationArguments | ClassifierEvaluationArguments | AnswerEvaluationArguments"
    values: dict[str, Any]
    pretraining: "FirstPassArguments | None" = None
    adapters: "AdapterArguments | None" = None
    hub: "HubArguments | None" = None


def recipe_folder() -> Path:
    """The folder of the package's recipes: in the package if installed from a wheel, else at the repository root."""
    package = Path(__file__).parent
    return package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes included in the package."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


@functools.cache
def section_types(task: str) -> dict[str, type]:
    """The dataclass of each section of a task."""
    places = {section: place.rpartition(".") for section, place in SECTIONS[task].items()}
    return {section: getattr(importlib.import_module(module), name) for section, (module, _, name) in places.items()}


def load_recipe(name: str, overrides: list[str] | None = None, check_paths: bool = False) -> Recipe:
    """Reads a recipe and applies overrides.

    Args:
        name: Name of a recipe in `recipes/`, or path of a YAML file.
        overrides: `--section.key value` or `--section.key=value`, as on the command line.
        check_paths: Whether to check that `data.path` and `model.path` exist.

    Raises:
        InputError: Unknown recipe, invalid YAML, unknown key (with a suggestion), missing file, or wrong type. All but
            the last are detected before torch is imported.

    Example:

    ```python
    >>> load_recipe("shakespeare-char", ["--training.max_steps", "10"]).training.max_steps
    10
    ```
    """
    path, overrides = find_recipe(name), overrides or []
    tree, lines = _read_yaml(path)

    def where(key: str) -> str:
        return f"{path.name}, line {lines.get(key) or lines.get(key.partition('.')[0], 1)}: "

    def as_given(key: str) -> str:
        return where(key) if key in lines and not _is_overridden(key, overrides) else ""

    task = _as_written("task", tree, overrides, "pretrain")
    if not isinstance(task, str) or task not in SECTIONS:
        fault = f"task is {task!r}; it must be one of {', '.join(SECTIONS)}" if task else "task cannot be empty"
        raise InputError((where("task") if "task" in tree and tree["task"] == task else "") + fault)
    keys = {"task": None, **section_keys(task)}
    for key, fault in find_unknown(tree, keys):
        raise InputError(where(key) + fault)
    check_overrides(overrides, keys)
    if check_paths:
        _check_paths(tree, overrides, path.stem)
    kinds = section_types(task)
    for section, kind in kinds.items():
        for key in _find_empty(section, tree.get(section, {}), kind):
            raise InputError(f"{where(key)}{key} cannot be empty")
    values = _parse(task, tree, overrides, where)
    values.training.output_dir = values.training.output_dir or str(Path("runs") / path.stem)
    unused = {name for name in OPTIONAL if name not in tree and not any(o.startswith(f"--{name}.") for o in overrides)}
    if values.model.path is None and "pretraining" in unused:
        _train_from_scratch(values.training, tree, overrides)
    _leave_out_unused(values, _build_parser(task)[1].tokenizer, overrides, as_given)
    try:
        sections = {name: _build(kind, values[name]) for name, kind in kinds.items() if name not in unused}
    except (ValueError, TypeError, KeyError, ImportError) as error:
        key, fact = _explain_refusal(error, values.training)
        raise InputError(as_given(key) + fact) from error
    return Recipe(path.stem, task, **sections, values=_resolved_values(values, sections))


def _parse(task: str, tree: dict[str, Any], overrides: list[str], where: Callable[[str], str]) -> Namespace:
    """Converts every value to the type of its key; errors in the recipe file itself name the line."""
    parser, defaults = _build_parser(task)
    try:
        values = parser.parse_object(tree, defaults.clone(), defaults=False)
    except ArgumentError as error:
        key, fact = _explain(error)
        raise InputError(where(key) + fact) from error
    try:
        return parser.parse_args(overrides, namespace=values, defaults=False) if overrides else values
    except ArgumentError as error:
        raise InputError(_explain(error)[1]) from error


def _train_from_scratch(training: Namespace, tree: dict[str, Any], overrides: list[str]):
    """Sets the defaults for training from scratch, except for keys set in the recipe or by an override."""
    from hfgpt.training.arguments import FROM_SCRATCH

    given = {*tree.get("training", {}), *(override.partition("=")[0] for override in overrides)}
    for key, value in FROM_SCRATCH.items():
        if not given & {key, f"--training.{key}"}:
            training[key] = value


def _leave_out_unused(values: Namespace, defaults: Namespace, overrides: list[str], as_given: Callable[[str], str]):
    """If a tokenizer is loaded, removes the keys for training one; an error if they were set.

    An override of the tokenizer or model path takes precedence over such keys in the recipe.
    """
    tokenizer = values.tokenizer
    if tokenizer.path is not None:
        source, unused = "tokenizer.path", ("kind", "vocab_size", "max_train_characters")
    elif values.model.path is not None:
        source, unused = "model.path", [key for key in vars(tokenizer) if key != "path"]
    else:
        return
    for name in unused:
        key, value = f"tokenizer.{name}", tokenizer.pop(name)
        gives_way = _is_overridden(source, overrides) and not _is_overridden(key, overrides)
        if value != defaults[name] and not gives_way:
            fault = f"{key} is {value!r}, but the tokenizer is loaded from {source}: remove one of them"
            raise InputError(as_given(key) + fault)


def _is_overridden(key: str, overrides: list[str]) -> bool:
    return any(override.partition("=")[0] == f"--{key}" for override in overrides)


def parse_sections(overrides: list[str], task: str, sections: list[str]) -> dict[str, Any]:
    """The arguments of sections from the command line only, for commands without a recipe.

    Args:
        overrides: `--section.key value` or `--section.key=value`.
        task: Name of the task.
        sections: The allowed sections.

    Returns:
        Section name -> arguments.

    Raises:
        InputError: An unknown key or section, or a wrong type.
    """
    check_overrides(overrides, section_keys(task, sections))
    _check_paths({}, overrides)
    kinds = {section: section_types(task)[section] for section in sections}
    parser = ArgumentParser(exit_on_error=False)
    for section, kind in kinds.items():
        parser.add_class_arguments(kind, section)
    try:
        values = parser.parse_args(overrides)
    except ArgumentError as error:
        raise InputError(_explain(error)[1]) from error
    return {section: _build(kind, values[section]) for section, kind in kinds.items()}


def with_values(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """A recipe with other values, given by their dotted keys, which are checked as in a file.

    Raises:
        InputError: A value is invalid.
    """
    tree = copy.deepcopy(recipe.values)
    for key, value in values.items():
        section, _, name = key.partition(".")
        tree[section][name] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{recipe.name}.yaml"
        write_text(path, yaml.safe_dump(tree))
        return load_recipe(str(path))


def render_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, which `load_recipe` loads with the same arguments."""
    return yaml.safe_dump(recipe.values, sort_keys=False, allow_unicode=True)


def first_difference(
    old: dict[str, Any], new: dict[str, Any], ignoring: Sequence[str] = ()
) -> tuple[str, Any, Any] | None:
    """The first dotted key that affects training and differs between two recipes, with both values; None if equal."""
    flat_old, flat_new = _flatten(old, new["task"]), _flatten(new, new["task"])
    for key in sorted(flat_old.keys() | flat_new.keys()):
        before, now = flat_old.get(key), flat_new.get(key)
        if before != now and key not in ignoring and not key.startswith(RESUMABLE):
            return key, before, now
    return None


def find_recipe(name: str) -> Path:
    """The file of a recipe, from its name or path.

    Raises:
        InputError: There is none.
    """
    path = Path(name)
    if path.is_file():
        return path
    if name in recipe_names():
        return recipe_folder() / f"{name}.yaml"
    if path.is_dir():
        raise InputError(f"recipe '{name}' is a folder: give a .yaml file in it")
    if path.suffix in (".yaml", ".yml"):
        raise InputError(f"the recipe file '{name}' does not exist{nearest(name)}: check the path")
    own = f"{name}.yaml"
    near = [own] if Path(own).is_file() else difflib.get_close_matches(name, recipe_names(), n=1)
    remedy = f"did you mean '{near[0]}'?" if near else "hfgpt recipes lists the recipes"
    raise InputError(f"the recipe '{name}' does not exist; {remedy}")


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The recipe as nested dictionaries, and the line number of each dotted key."""
    try:
        text = path.read_text(encoding="utf-8")
        # Before aliases are expanded: a few lines of them can expand to billions of keys.
        keys = list(itertools.islice(_find_keys(yaml.compose(text, Loader=yaml.SafeLoader)), MOST_KEYS + 1))
        if len(keys) > MOST_KEYS:
            raise yaml.YAMLError(f"more than {MOST_KEYS:,} keys and list items, including those of each alias (*)")
        tree = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InputError(
            f"{path.name} is not valid UTF-8: byte 0x{byte:02x} at offset {error.start}; convert it to UTF-8"
        ) from error
    except RecursionError as error:
        raise InputError(f"{path.name} is nested too deeply, or has an alias (*) inside its own anchor (&)") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an invalid date, or a number of 5,000 digits
        mark = getattr(error, "problem_mark", None)
        place = f"{path.name}, line {mark.line + 1}" if mark else path.name
        fact = getattr(error, "problem", None) or " ".join(str(error).split())
        raise InputError(f"{place}: invalid YAML: {fact}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path.name} is not a recipe: it must be a mapping with a task and sections")
    lines: dict[str, int] = {}
    for name, mark in keys:
        if name in lines:
            raise InputError(
                f"{path.name}, line {mark.line + 1}: {name} is already set in line {lines[name]}: remove one"
            )
        lines[name] = mark.line + 1
    return tree, lines


def _find_keys(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, yaml.Mark]]:
    """Every dotted key, and every list item by its index, with its position in the file."""
    items = node.value if isinstance(node, yaml.CollectionNode) else ()
    for number, item in enumerate(items):
        key, value = item if isinstance(node, yaml.MappingNode) else (None, item)
        name = f"{prefix}{key.value if isinstance(key, yaml.ScalarNode) else number}"
        yield name, (key or value).start_mark
        yield from _find_keys(value, f"{name}.")


def _as_written(key: str, tree: dict[str, Any], overrides: list[str], default: Any = None) -> Any:
    """The raw value of a key, from the last override or else the recipe."""
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.get(section, {})
    value = tree.get(name, default)
    for override, following in zip(overrides, [*overrides[1:], ""], strict=False):
        if override == f"--{key}":
            value = following
        elif override.startswith(f"--{key}="):
            value = override.partition("=")[2]
    return value


def _check_paths(tree: dict[str, Any], overrides: list[str], recipe: str = ""):
    """Checks that local data and models exist; if the path is from the recipe, the error says so."""
    for key, check in (("model.path", check_model_path), ("data.path", find_source)):
        path = _as_written(key, tree, overrides)
        if not isinstance(path, str) or not path:
            continue
        if key == "data.path" and (is_url(path) or Path(path).expanduser().exists()):
            continue
        overridden = _is_overridden(key, overrides)
        is_file = (looks_local(path) or path.startswith("runs/")) and not glob.has_magic(path)
        if is_file and not overridden and not Path(path).expanduser().exists():
            trains = key == "model.path" and Path(path).name in recipe_names()
            remedy = f"train it first (hfgpt train {Path(path).name}), or set" if trains else "set"
            raise InputError(
                f"{key} '{path}' in the recipe {recipe} does not exist{nearest(path)}: {remedy} --{key} to another"
            )
        check(path)


@functools.cache
def _build_parser(task: str) -> tuple[ArgumentParser, Namespace]:
    """The parser for a task's recipes, and its defaults, which must not be modified: computing them takes 35 ms."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--task", type=str, default="pretrain")
    for section, kind in section_types(task).items():
        parser.add_class_arguments(kind, section)
    return parser, parser.get_defaults()


def _build(kind: type, values: Namespace) -> Any:
    """The dataclass of a section, including nested ones, from parsed values."""
    hints = typing.get_type_hints(kind)
    return kind(**{name: _build_value(hints[name], value) for name, value in vars(values).items()})


def _build_value(hint: Any, value: Any) -> Any:
    """A value, with dataclasses instead of namespaces."""
    if isinstance(value, list):
        (items,) = typing.get_args(_without_none(hint)) or (Any,)
        return [_build_value(items, item) for item in value]
    return _build(hint, value) if isinstance(value, Namespace) and dataclasses.is_dataclass(hint) else value


def _find_empty(section: str, content: dict[str, Any], kind: type) -> Iterator[str]:
    """Keys that need a value but have none, which jsonargparse does not check."""
    hints = typing.get_type_hints(kind)
    for name, value in content.items():
        if dataclasses.is_dataclass(hints[name]):
            yield from _find_empty(f"{section}.{name}", value, hints[name])
        elif value is None and not _allows_none(hints[name]):
            yield f"{section}.{name}"


def _without_none(hint: Any) -> Any:
    """`list[str]` of `list[str] | None`."""
    return next((kind for kind in typing.get_args(hint) if typing.get_origin(kind) is list), hint)


def _allows_none(hint: Any) -> bool:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return type(None) in options or Any in options


def _explain(error: ArgumentError) -> tuple[str, str]:
    """The key and a one-line message for a jsonargparse error."""
    if found := re.search(r'Parser key "([^"]+)":\s*(.*)', str(error), re.DOTALL):
        key, fact = found.groups()
        if entry := re.search(r"Problem with given class_path '([\w.]+)':\s*(.*?)(\n    - |$)", fact, re.DOTALL):
            return key, f"{key}: {_explain_entry(*entry.groups()[:2])}"
        # The value comes last, after one line per type of a union.
        expected = re.findall(r"Expected an? (<class '(\w+)'>|typing\.Literal(\[.*?\]))", fact)
        value = re.search(r"(?:Got value|Given value): (.*)", fact)
        if expected and value:
            names = [TYPES.get(name, name) if name else f"one of {choices[1:-1]}" for _, name, choices in expected]
            return key, f"{key} is {value.group(1).strip()!r}; it must be {' or '.join(dict.fromkeys(names))}"
        return key, f"{key}: {' '.join(fact.split())}"
    return "", f"{' '.join(str(error).split())}; overrides must have the form --section.key value"


def _explain_entry(class_path: str, fact: str) -> str:
    """A message for jsonargparse's error about an entry of a list."""
    if unknown := re.match(r"Option '(.*)' is not accepted", fact):
        names = [field.name for field in dataclasses.fields(pydoc.locate(class_path))]
        return f"there is no key '{unknown[1]}' in an entry{suggest(unknown[1], names)}"
    if lacking := re.match(r"the following arguments are required: (.*)", fact):
        return f"an entry does not have {lacking[1]}"
    return _explain(ArgumentError(None, fact))[1]


def _explain_refusal(error: Exception, arguments: Namespace) -> tuple[str, str]:
    """The key and a one-line message: hfgpt's messages start with the key; transformers' contain it, or the value."""
    text = " ".join(str(error).split())
    if isinstance(error, InputError):
        return re.match(r"[\w.]*", text)[0], text
    found = re.match(r"(.*?) is not a valid \w+, please select one of (.*)", text)
    given = (found[1], found[1].strip("'")) if found else ()
    for wrong, (key, value) in itertools.product(given, vars(arguments).items()):
        if value == wrong:
            choices = re.findall("'(.*?)'", found[2])
            remedy = suggest(wrong, choices) or f"; it must be one of {', '.join(choices)}"
            return f"training.{key}", f"training.{key} is {wrong!r}{remedy}"
    key = next((f".{word}" for word in re.findall(r"\w*[_\d]\w*", text) if word in vars(arguments)), "")
    return f"training{key}", f"training{key}: {text}"


def _resolved_values(values: Namespace, sections: dict[str, Any]) -> dict[str, Any]:
    """The values of all sections without empty keys; for `training`, those in `LEARNED` and non-default values."""
    from hfgpt.training.arguments import LEARNED

    resolved: dict[str, Any] = {"task": values.task}
    for section, arguments in sections.items():
        kept, defaults = {}, vars(_build_parser(values.task)[1][section])
        for key, value in vars(values[section]).items():
            if key == "initialization" and values.model.path is not None:
                continue
            learned = section == "training" and key in LEARNED  # as resolved on this machine (bf16)
            # Null is written only if it differs from the default: `pad_token: null` changes the tokenizer.
            if learned or value != defaults[key] or (value is not None and section != "training"):
                kept[key] = _plain(getattr(arguments, key) if learned else value)
        resolved[section] = kept
    return resolved


def _plain(value: Any) -> Any:
    if isinstance(value, Namespace):
        return {key: _plain(inner) for key, inner in vars(value).items() if inner is not None}
    return getattr(value, "value", value)  # transformers' enums


def _flatten(values: dict[str, Any], task: str) -> dict[str, Any]:
    """All dotted keys with their values, or defaults if not set."""
    defaults, flat = vars(_build_parser(task)[1]), {"task": values["task"]}
    for section in values.keys() - {"task"}:
        written = (_plain(defaults[section]) if section in defaults else {}) | values[section]
        flat |= {f"{section}.{key}": value for key, value in written.items()}
    return flat
