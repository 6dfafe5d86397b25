"""The keys of a recipe, and errors for unknown keys, without importing torch.

Importing the dataclasses of the sections takes seconds, mostly for torch, so their fields and docstrings are read from
the source code. Typos are thus reported immediately, and `hfgpt keys` is as fast.
"""

import ast
import difflib
import functools
import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hfgpt.errors import InputError

# Key -> nested keys, or None if it has a value.
Keys = dict[str, dict | None]


@dataclass(frozen=True)
class Key:
    """A key, as the source of its dataclass describes it.

    Args:
        type: The annotation, as in `int | None`.
        default: The default value.
        meaning: Its description, from the docstring or the field's `help`.
        library: `hfgpt`, or `transformers` for an unchanged field of `TrainingArguments`.
    """

    type: str
    default: Any
    meaning: str
    library: str


@dataclass(frozen=True)
class Section:
    """A section, or a key with nested keys.

    Args:
        about: Paragraphs on the section as a whole.
        keys: In the order of the dataclass.
    """

    about: list[str]
    keys: "dict[str, Key | Section]"


def _sections(data: str, training: str, evaluation: str, **more: str) -> dict[str, str]:
    first = {"tokenizer": "tokenizer.TokenizerArguments", "model": "building.ModelArguments", "data": data, **more}
    last = {"adapters": "adapters.AdapterArguments", "training": training, "evaluation": evaluation}
    return {name: f"hfgpt.{place}" for name, place in {**first, **last, "hub": "hub.HubArguments"}.items()}


# The dataclass of each section of each task, in the order of a recipe.
SECTIONS: dict[str, dict[str, str]] = {
    "pretrain": _sections(
        "data.sources.DataArguments", "training.arguments.HfGPTTrainingArguments", "evaluation.EvaluationArguments"
    ),
    "classify": _sections(
        "data.classification.ClassificationDataArguments",
        "training.arguments.FineTuningArguments",
        "evaluation.ClassifierEvaluationArguments",
        pretraining="training.arguments.FirstPassArguments",
    ),
    "instruct": _sections(
        "data.instructions.InstructionDataArguments",
        "training.arguments.FineTuningArguments",
        "evaluation.AnswerEvaluationArguments",
    ),
}
# The one key outside of the sections.
TASK = Key(
    f"Literal{list(SECTIONS)}",
    "pretrain",
    "What to train: `pretrain` (a language model), `classify` (a classifier) or `instruct` (a model that follows "
    "instructions).",
    "hfgpt",
)
# Other common names of keys that are too different for fuzzy matching.
NICKNAMES = {
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "grad_accum": "gradient_accumulation_steps",
    "grad_clip": "max_grad_norm",
    "max_iters": "max_steps",
    "rank": "r",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
    **dict.fromkeys(("block_size", "context", "context_length", "n_ctx", "n_positions"), "max_position_embeddings"),
}


def section_keys(task: str, sections: Sequence[str] | None = None) -> dict[str, Keys]:
    """The keys of the sections of a task, or of some of them."""
    return {name: _names(read_section(task, name)) for name in sections or SECTIONS[task]}


def read_section(task: str, section: str) -> Section:
    """The fields of a section, read from the source code."""
    return _read_class(*SECTIONS[task][section].rsplit(".", 1))


def _names(section: Section) -> Keys:
    return {name: _names(key) if isinstance(key, Section) else None for name, key in section.keys.items()}


@functools.cache
def _read_class(module: str, name: str) -> Section:
    """A dataclass with the fields of its bases; its docstring overrides those of the bases."""
    module, kind = _find_class(module, name)
    library = module.partition(".")[0]
    about, meanings = _read_docstring(kind)
    keys: dict[str, Key | Section] = {}
    for base in kind.bases:
        inherited = _read_class(module, base.id)
        keys |= inherited.keys
        about = about + inherited.about[1:]
    for field in keys.keys() & meanings.keys():
        keys[field] = replace(keys[field], meaning=meanings[field], library=library)
    for node in kind.body:
        if not isinstance(node, ast.AnnAssign) or node.target.id.startswith("_"):
            continue
        field = node.target.id
        if isinstance(node.annotation, ast.Name) and node.annotation.id.endswith("Arguments"):
            keys[field] = _read_class(module, node.annotation.id)
            continue
        default, said = _read_value(node.value, module)
        said = meanings.get(field) or said or getattr(keys.get(field), "meaning", "")
        keys[field] = Key(ast.unparse(node.annotation), default, said, library)
    return Section(about if library == "hfgpt" else [], keys)


@functools.cache
def _parse_module(module: str) -> ast.Module:
    package, *inner = module.split(".")
    place = Path(importlib.util.find_spec(package).submodule_search_locations[0], *inner)
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def _find_class(module: str, name: str) -> tuple[str, ast.ClassDef]:
    """A class and the module that defines it, following imports."""
    tree = _parse_module(module)
    kind = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    if kind is not None:
        return module, kind
    imports = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    origin = next(node for node in imports if name in (alias.name for alias in node.names))
    return _find_class(f"{module}.{origin.module}" if origin.level else origin.module, name)


def _read_docstring(kind: ast.ClassDef) -> tuple[list[str], dict[str, str]]:
    """The paragraphs of a docstring, and the descriptions in its `Args:`."""
    about, meanings = [], {}
    for paragraph in (ast.get_docstring(kind) or "").split("\n\n"):
        heading, *entries = re.split(r"\n {4}(?=\w)", paragraph)
        if heading == "Args:":
            meanings |= dict(" ".join(entry.split()).split(": ", 1) for entry in entries)
        else:
            about.append(" ".join(paragraph.split()))
    return about, meanings


def _read_value(node: ast.expr, module: str) -> tuple[Any, str]:
    """The default of a field, and its `help`."""
    if not isinstance(node, ast.Call):
        return _evaluate(node, module), ""
    options = {option.arg: option.value for option in node.keywords}
    if "default_factory" in options:
        default = {"list": [], "dict": {}}[options["default_factory"].id]
    else:
        default = _evaluate(options["default"], module)
    metadata = options.get("metadata", ast.Dict([], []))
    notes = {key.value: value for key, value in zip(metadata.keys, metadata.values, strict=True)}
    # transformers writes it for argparse, which reads %% as %.
    return default, ast.literal_eval(notes["help"]).replace("%%", "%") if "help" in notes else ""


def _evaluate(node: ast.expr, module: str) -> Any:
    """A literal, or the last value that the module assigns to a name."""
    if isinstance(node, ast.Name):
        assigned = (other for other in ast.walk(_parse_module(module)) if isinstance(other, ast.Assign))
        *_, node = (other.value for other in assigned if ast.unparse(other.targets[0]) == node.id)
    return ast.literal_eval(node)


def find_unknown(tree: dict[str, Any], sections: dict[str, Keys | None]) -> Iterator[tuple[str, str]]:
    """Unknown sections and keys, and values where a section is expected, each with an error message."""
    for section, content in tree.items():
        if section not in sections:
            yield str(section), unknown_section(str(section), sections)
        elif sections[section] is not None:
            yield from _find_unknown_in(section, content, sections[section])


def _find_unknown_in(section: str, content: Any, keys: Keys) -> Iterator[tuple[str, str]]:
    if not isinstance(content, dict):
        yield section, f"'{section}' is a section: indent its keys below it"
        return
    for name, value in content.items():
        key = f"{section}.{name}"
        if name not in keys:
            yield key, unknown_key(str(name), section, keys)
        elif keys[name] is not None:
            yield from _find_unknown_in(key, value, keys[name])


def check_overrides(overrides: Sequence[str], sections: dict[str, Keys | None]):
    """Checks that the sections and keys of `--section.key` overrides exist.

    Raises:
        InputError: Unknown section or key, with a suggestion.
    """
    for override in overrides:
        if not override.startswith("--"):
            continue
        path, *names = override[2:].partition("=")[0].split(".")
        if path not in sections:
            raise InputError(unknown_section(path, sections))
        keys = sections[path]
        while names:
            if names[0] not in (keys or {}) or (len(names) > 1 and keys[names[0]] is None):
                raise InputError(unknown_key(".".join(names), path, keys or {}))
            path = f"{path}.{names[0]}"
            keys = keys[names.pop(0)]
        if keys is not None:
            raise InputError(f"--{path} is a section: set one of its keys, as in --{path}.key value")


def unknown_section(section: str, sections: dict[str, Keys | None]) -> str:
    """The error for an unknown section, with the most similar one, or the section that has a key of this name."""
    owners = [f"{owner}.{section}" for owner, keys in sections.items() if section in (keys or {})]
    near = f"; did you mean the key '{owners[0]}'?" if owners else suggest(section, list(sections))
    return f"there is no section '{section}'{near}"


def unknown_key(name: str, section: str, keys: Keys) -> str:
    """The error for an unknown key, with the most similar one of the section."""
    nickname = NICKNAMES.get(name.lower())
    near = f"; did you mean '{nickname}'?" if nickname in keys else suggest(name, list(keys))
    return f"there is no key '{name}' in section '{section}'{near}"


def suggest(name: str, names: Sequence[str], most: int = 11) -> str:
    """A suggestion to append to an error: the most similar name, or all names if there are few."""
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return (
        f"; did you mean '{found[0]}'?" if found else f" (available: {', '.join(names)})" if len(names) <= most else ""
    )
