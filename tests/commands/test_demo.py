"""`hfgpt demo`: what it says when it is stopped, and the table at its end."""

import pytest
from rich.table import Table

from hfgpt.commands import demo
from hfgpt.commands.demo import run_demo, stack_cells
from hfgpt.errors import Interrupted


def test_a_demo_that_is_stopped_names_a_command_that_finishes_the_run(tmp_path, monkeypatch):
    def stop(recipe, console):
        raise Interrupted("rerun the command with --resume")

    monkeypatch.setattr(demo, "run", stop)
    folder = tmp_path / "the demo"
    command = f"hfgpt train demo --training.seed 3 --training.output_dir '{folder}' --resume"
    with pytest.raises(Interrupted) as stopped:
        run_demo(folder, {"demo": ["--training.seed", "3"]})
    assert str(stopped.value) == f"the demo was stopped; to finish this run, without the rest: {command}"


def test_on_a_narrow_terminal_each_cell_of_a_row_is_a_line():
    table = Table("stage", "what", "result", "time")
    table.add_row("training", "loss of everything", "1.0", "3 s")
    table.add_row("more", "  baseline", "50%")
    assert stack_cells(table) == "training\n    loss of everything\n    1.0\n    3 s\nmore\n    baseline\n    50%"
