"""`hfgpt recipes`: the recipes that ship with the package, as described in the comments of the files."""

import shlex
from pathlib import Path

import pytest

from hfgpt.commands.recipes import RecipeSummary, list_recipes, render_recipes, summarize_recipe
from hfgpt.recipe import recipe_folder

FOUND = list_recipes()


def test_every_recipe_is_listed_by_name():
    assert [found.file for found in FOUND] == sorted(recipe_folder().glob("*.yaml"), key=lambda file: file.stem)
    assert len(FOUND) >= 14


@pytest.mark.parametrize("found", FOUND, ids=lambda found: found.name)
def test_a_recipe_starts_with_its_purpose_and_a_command(found):
    assert found.purpose[0].isupper()
    assert found.purpose.endswith(".")
    assert len(found.purpose) <= 100
    assert shlex.split(found.command)[:3] == ["hfgpt", "train", found.name]
    assert "  " not in found.command, "the comment after the command is not part of it"


def test_the_first_command_is_taken_without_its_comment(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("# Do this.\n# And that.\n#\n#   hfgpt train mine --a.b 1     one GPU\n#   hfgpt plan mine\n#\n")
    assert summarize_recipe(file) == RecipeSummary("mine", "Do this.", "hfgpt train mine --a.b 1", file)


@pytest.mark.parametrize("width", [40, 80, 140, None])
def test_lines_fit_the_terminal_but_commands_are_not_wrapped(width):
    shown = render_recipes(FOUND, width)
    lines = shown.splitlines()
    for found in FOUND:
        assert found.name in lines
        assert f"    {found.command}" in lines, "the command can be copied"
        assert found.purpose in " ".join(shown.split())
    others = [line for line in lines if not line.startswith(("    hfgpt ", "The files are in "))]
    assert max(map(len, others)) <= (width or 104)
    folder = Path(FOUND[0].file).parent
    assert lines[-1] == f"The files are in {folder}; those for several GPUs and machines in {folder / 'machines'}"
    assert (folder / "machines").is_dir()
