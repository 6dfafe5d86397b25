"""Durations on the command line, and time budgets."""

import pytest

from hfgpt.durations import Budget, parse_duration
from hfgpt.errors import InputError


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("5m", 300), ("1.5h", 5400), ("2d", 172_800)])
def test_durations(text, seconds):
    assert parse_duration(text, "--budget") == seconds


@pytest.mark.parametrize("text", ["5", "0m", "m", "-5m", "5 m", "5min", "1e3s", ""])
def test_invalid_durations_are_refused(text):
    with pytest.raises(InputError, match=f"^--budget is '{text}'; it must be a positive number and a unit"):
        parse_duration(text, "--budget")


def test_an_override_of_the_length_is_refused():
    with pytest.raises(InputError, match=r"--budget determines the length of the run, as does --training.max_steps"):
        Budget(60, ["--training.max_steps=5", "--training.seed", "3"])
