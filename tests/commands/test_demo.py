"""The table at the end of `hfgpt demo`."""

from rich.table import Table

from hfgpt.commands.demo import stack_cells


def test_on_a_narrow_terminal_each_cell_of_a_row_is_a_line():
    table = Table("stage", "what", "result", "time")
    table.add_row("training", "loss of everything", "1.0", "3 s")
    table.add_row("more", "  baseline", "50%")
    assert stack_cells(table) == "training\n    loss of everything\n    1.0\n    3 s\nmore\n    baseline\n    50%"
