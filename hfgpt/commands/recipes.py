"""`hfgpt recipes`: lists the recipes of the package with their purpose and command."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hfgpt.output import wrap_text
from hfgpt.recipe import recipe_folder, recipe_names


@dataclass
class RecipeSummary:
    """A summary of a recipe, from the comment at its top.

    Args:
        name: Name of the recipe, for `hfgpt train`.
        purpose: First line of the comment.
        command: First command in the comment.
        file: Path of the recipe.
    """

    name: str
    purpose: str
    command: str
    file: Path


def list_recipes() -> list[RecipeSummary]:
    """The recipes of the package, sorted by name."""
    return [summarize_recipe(recipe_folder() / f"{name}.yaml") for name in recipe_names()]


def summarize_recipe(file: Path) -> RecipeSummary:
    """Reads the comment at the top of a recipe.

    Args:
        file: A recipe. Its first line is the purpose; an indented line of the comment is a command, with an optional
            explanation after two spaces.
    """
    first, *lines = file.read_text(encoding="utf-8").splitlines()
    command = next(found[1] for line in lines if (found := re.match(r"#   (\S+(?: \S+)*)", line)))
    return RecipeSummary(file.stem, first.removeprefix("# "), command, file)


def render_recipes(recipes: Sequence[RecipeSummary], width: int | None) -> str:
    """The recipes as text for the terminal; commands are not wrapped, so that they can be copied.

    Args:
        recipes: At least one.
        width: Columns to wrap lines at; None: lines are not wrapped.
    """
    entries = [f"{found.name}\n{wrap_text(found.purpose, width, 4)}\n    {found.command}\n" for found in recipes]
    folder = recipes[0].file.parent
    return "\n".join(
        [*entries, f"The files are in {folder}; those for several GPUs and machines in {folder / 'machines'}"]
    )
