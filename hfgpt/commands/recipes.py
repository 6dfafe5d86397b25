"""`hfgpt recipes`: the recipes that ship with the package, as the first lines of each describe it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hfgpt.output import wrap_text
from hfgpt.recipe import recipe_folder, recipe_names


@dataclass
class RecipeSummary:
    """What the comment at the top of a recipe says.

    Args:
        name: As `hfgpt train` takes it.
        purpose: Its first line.
        command: The first command in it.
        file: The recipe itself.
    """

    name: str
    purpose: str
    command: str
    file: Path


def list_recipes() -> list[RecipeSummary]:
    """The recipes of the package by name."""
    return [summarize_recipe(recipe_folder() / f"{name}.yaml") for name in recipe_names()]


def summarize_recipe(file: Path) -> RecipeSummary:
    """Reads the comment at the top of a recipe.

    Args:
        file: Begins with a line that gives the purpose; an indented line of the comment is a command, with remarks
            after two blanks.
    """
    first, *lines = file.read_text(encoding="utf-8").splitlines()
    command = next(found[1] for line in lines if (found := re.match(r"#   (\S+(?: \S+)*)", line)))
    return RecipeSummary(file.stem, first.removeprefix("# "), command, file)


def render_recipes(recipes: Sequence[RecipeSummary], width: int | None) -> str:
    """The recipes for people; a command stays on one line, so that it can be copied.

    Args:
        recipes: At least one.
        width: Columns to break lines at; None: no lines are broken.
    """
    entries = [f"{found.name}\n{wrap_text(found.purpose, width, 4)}\n    {found.command}\n" for found in recipes]
    return "\n".join([*entries, f"The files are in {recipes[0].file.parent}"])
