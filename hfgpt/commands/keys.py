"""`hfgpt keys`: every key of a recipe with its type, default and meaning; does not need torch."""

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from hfgpt.errors import InputError
from hfgpt.output import wrap_text
from hfgpt.recipe_keys import SECTIONS, TASK, Key, Section, read_section, suggest, unknown_key, unknown_section

TRANSFORMERS = (
    "The other keys are unchanged fields of transformers' TrainingArguments "
    "(https://huggingface.co/docs/transformers/main_classes/trainer)"
)


@dataclass
class KeyEntry:
    """A key of a recipe.

    Args:
        key: Dotted name.
        type, default, meaning, library: See `hfgpt.recipe_keys.Key`.
        tasks: Tasks whose recipes have this key in exactly this form.
    """

    key: str
    type: str
    default: Any
    meaning: str
    library: str
    tasks: list[str]


@dataclass
class SectionEntry:
    """A section of a recipe.

    Args:
        section: Its name.
        tasks: Tasks whose recipes have it.
        about: Paragraphs about the section as a whole.
        keys: Its keys, hfgpt's own first.
    """

    section: str
    tasks: list[str]
    about: list[str]
    keys: list[KeyEntry]


def list_keys(name: str | None = None, task: str | None = None) -> list[SectionEntry]:
    """Lists the keys of recipes; a key that differs between tasks is listed once per form.

    Args:
        name: A section, or the dotted name of a key; None: all keys.
        task: `pretrain`, `classify` or `instruct`; None: the keys of all tasks.

    Raises:
        InputError: Unknown task, section or key; the message suggests the closest match.
    """
    if task not in (None, *SECTIONS):
        raise InputError(f"--task is '{task}'{suggest(task, list(SECTIONS))}")
    tasks = [task] if task else list(SECTIONS)
    # Of all tasks, classification has the most sections.
    order = ["task", *SECTIONS[task or "classify"]]
    section, _, inner = (name or "").partition(".")
    if section and section not in order:
        if owner := next((owner for owner in SECTIONS if section in SECTIONS[owner]), None):
            raise InputError(f"recipes of task {task} have no section '{section}': use --task {owner}")
        raise InputError(unknown_section(section, dict.fromkeys(order)))
    entries = [_read_entry(found, tasks) for found in ([section] if section else order)]
    if inner:
        (entry,) = entries
        kept = [key for key in entry.keys if f"{key.key}.".startswith(f"{name}.")]
        if not kept:
            names = {key.key.removeprefix(f"{section}."): None for key in entry.keys}
            raise InputError(unknown_key(inner, section, names))
        entries = [SectionEntry(section, entry.tasks, [], kept)]
    return entries


def render_keys(entries: Sequence[SectionEntry], width: int | None) -> str:
    """The keys as text.

    Args:
        entries: The result of `list_keys`.
        width: Columns to break lines at, with unchanged fields of `TrainingArguments` by name only if there are
            several sections; None: each key is one line, for `grep`.
    """
    blocks = []
    for entry in entries:
        if entry.about:
            title = entry.section + ("" if set(entry.tasks) == set(SECTIONS) else f"  [{', '.join(entry.tasks)}]")
            blocks.append("\n".join([title, *(wrap_text(paragraph, width, 4) for paragraph in entry.about)]))
        own = [key for key in entry.keys if key.library == "hfgpt" or not entry.about]
        blocks += [_render_key(key, entry.tasks, width) for key in own]
        others = entry.keys[len(own) :]
        if others and width is not None and len(entries) > 1:
            names = ", ".join(key.key.removeprefix(f"{entry.section}.") for key in others)
            blocks.append(wrap_text(f"{TRANSFORMERS}; hfgpt keys {entry.section} describes them: {names}", width))
        elif others:
            blocks += [wrap_text(TRANSFORMERS, width), *(_render_key(key, entry.tasks, width) for key in others)]
    return ("\n" if width is None else "\n\n").join(blocks)


def describe_type(annotation: str) -> str:
    """A type in words: `int or null` for `int | None`, `a, b or null` for `Literal['a', 'b'] | None`."""
    words = list(_alternatives(ast.parse(annotation, mode="eval").body))
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _read_entry(section: str, tasks: Sequence[str]) -> SectionEntry:
    about: list[str] = []
    keys: dict[tuple[str, str], KeyEntry] = {}
    having = [task for task in tasks if section in ("task", *SECTIONS[task])]
    for task in having:
        read = TASK if section == "task" else read_section(task, section)
        paragraphs = map(_without_name, getattr(read, "about", []))
        about += [text for text in paragraphs if text and text not in about]
        for name, key in _flatten(section, read):
            entry = keys.setdefault((name, repr(key)), KeyEntry(name, **vars(key), tasks=[]))
            entry.tasks.append(task)
    names = [name for name, _ in keys]
    found = sorted(keys.values(), key=lambda entry: (entry.library != "hfgpt", names.index(entry.key)))
    return SectionEntry(section, having, about, found)


def _without_name(paragraph: str) -> str:
    """A paragraph on a section, below whose name it is shown."""
    text = re.sub(r"^The recipe's section `\w+`[:,.]? ?", "", paragraph)
    return text[:1].upper() + text[1:]


def _flatten(name: str, key: Key | Section) -> Iterator[tuple[str, Key]]:
    if isinstance(key, Key):
        yield name, key
        return
    for inner, content in key.keys.items():
        yield from _flatten(f"{name}.{inner}", content)


def _render_key(entry: KeyEntry, tasks: Sequence[str], width: int | None) -> str:
    head = f"{entry.key}  {describe_type(entry.type)}; default: {_in_yaml(entry.default)}"
    if entry.tasks != tasks:
        head += f"  [{', '.join(entry.tasks)}]"
    meaning = re.sub(r"\bNone\b", "null", entry.meaning)  # as in YAML
    if width is None:
        return f"{head}  {meaning}"
    return f"{wrap_text(head, width, 0, 4)}\n{wrap_text(meaning, width, 4)}"


def _in_yaml(value: Any) -> str:
    """A default as written in a recipe."""
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def _alternatives(node: ast.expr) -> Iterator[str]:
    match node:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            yield from _alternatives(left)
            yield from _alternatives(right)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            for choice in choices.elts if isinstance(choices, ast.Tuple) else [choices]:
                yield _in_yaml(ast.literal_eval(choice))
        case ast.Subscript(value=ast.Name(id="list"), slice=item):
            yield f"list of {ast.unparse(item)}"
        case ast.Subscript(value=ast.Name(id=kind)):
            yield kind
        case _:
            yield ast.unparse(node).replace("None", "null")
