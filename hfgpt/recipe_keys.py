"""The keys of a recipe, and errors for unknown keys, without importing torch.

Importing the dataclasses of the sections takes seconds, mostly for torch, so their fields are read from the source
code. Typos are thus reported immediately.
"""

import ast
import difflib
import functools
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hfgpt.errors import InputError

# Key -> nested keys, or None if it has a value.
Keys = dict[str, dict | None]


def _sections(data: str, training: str, evaluation: str, **more: str) -> dict[str, str]:
    first = {"tokenizer": "tokenizer.TokenizerArguments", "model": "building.ModelArguments", "data": data, **more}
    last = {"adapters": "adapters.AdapterArguments", "training": training, "evaluation": evaluation}
    return {name: f"hfgpt.{place}" for name, place in {**first, **last, "hub": "hub.HubArguments"}.items()}


# The dataclass of each section of each task, in the order of a recipe.
SECTIONS: dict[str, dict[str, str]] = {
    "pretrain": _sections(
        "data.sources.DataArguments", "training.trainer.HfGPTTrainingArguments", "evaluation.EvaluationArguments"
    ),
    "classify": _sections(
        "data.classification.ClassificationDataArguments",
        "training.trainer.FineTuningArguments",
        "evaluation.ClassifierEvaluationArguments",
        pretraining="training.trainer.FirstPassArguments",
    ),
    "instruct": _sections(
        "data.instructions.InstructionDataArguments",
        "training.trainer.FineTuningArguments",
        "evaluation.AnswerEvaluationArguments",
    ),
}
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
    """The keys of all or some sections of a task."""
    return {name: _read_fields(*SECTIONS[task][name].rsplit(".", 1)) for name in sections or SECTIONS[task]}


@functools.cache
def _read_fields(module: str, name: str) -> Keys:
    """The fields of a dataclass and its base classes, from their source code."""
    package, *inner = module.split(".")
    place = Path(importlib.util.find_spec(package).submodule_search_locations[0], *inner)
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    kind = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    if kind is None:  # imported from another module
        imports = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
        origin = next(node for node in imports if name in (alias.name for alias in node.names))
        return _read_fields(f"{module}.{origin.module}" if origin.level else origin.module, name)
    fields: Keys = {}
    for base in kind.bases:
        fields |= _read_fields(module, base.id)
    for node in kind.body:
        if isinstance(node, ast.AnnAssign) and not node.target.id.startswith("_"):
            nested = isinstance(node.annotation, ast.Name) and node.annotation.id.endswith("Arguments")
            fields[node.target.id] = _read_fields(module, node.annotation.id) if nested else None
    return fields


def find_unknown(tree: dict[str, Any], sections: dict[str, Keys | None]) -> Iterator[tuple[str, str]]:
    """Unknown sections and keys, and values where a section is expected, each with an error message."""
    for section, content in tree.items():
        if section not in sections:
            yield str(section), _unknown_section(str(section), sections)
        elif sections[section] is not None:
            yield from _find_unknown_in(section, content, sections[section])


def _find_unknown_in(section: str, content: Any, keys: Keys) -> Iterator[tuple[str, str]]:
    if not isinstance(content, dict):
        yield section, f"'{section}' is a section: indent its keys below it"
        return
    for name, value in content.items():
        key = f"{section}.{name}"
        if name not in keys:
            yield key, _unknown_key(str(name), section, keys)
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
            raise InputError(_unknown_section(path, sections))
        keys = sections[path]
        while names:
            if names[0] not in (keys or {}) or (len(names) > 1 and keys[names[0]] is None):
                raise InputError(_unknown_key(".".join(names), path, keys or {}))
            path = f"{path}.{names[0]}"
            keys = keys[names.pop(0)]
        if keys is not None:
            raise InputError(f"--{path} is a section: set one of its keys, as in --{path}.key value")


def _unknown_section(section: str, sections: dict[str, Any]) -> str:
    return f"there is no section '{section}'{suggest(section, list(sections))}"


def _unknown_key(name: str, section: str, keys: Keys) -> str:
    nickname = NICKNAMES.get(name.lower())
    near = f"; did you mean '{nickname}'?" if nickname in keys else suggest(name, list(keys))
    return f"there is no key '{name}' in section '{section}'{near}"


def suggest(name: str, names: Sequence[str], most: int = 11) -> str:
    """A suggestion to append to an error: the most similar name, or all names if there are few."""
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return (
        f"; did you mean '{found[0]}'?" if found else f" (there are: {', '.join(names)})" if len(names) <= most else ""
    )
