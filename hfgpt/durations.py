"""Durations on the command line, as in `90s` or `1.5h`, and the time budget of a run."""

import re
import time
from collections.abc import Sequence

from hfgpt.errors import InputError

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
LENGTH = {"training.max_steps", "training.num_train_epochs", "training.max_seconds"}


class Budget:
    """The time for a whole command, which begins now; a resumed run has the rest of its training time instead.

    Args:
        seconds: The time.
        overrides: The overrides of the recipe on the command line; their keys, `fixed`, keep these values.

    Raises:
        InputError: An override also determines the length of the run.
    """

    def __init__(self, seconds: float, overrides: Sequence[str] = ()):
        self.seconds, self.ends = seconds, time.monotonic() + seconds
        self.fixed = {override.removeprefix("--").partition("=")[0] for override in overrides}
        if both := sorted(self.fixed & LENGTH):
            raise InputError(f"--budget determines the length of the run, as does --{both[0]}: remove one of them")

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.ends - time.monotonic()


def parse_duration(text: str, option: str) -> float:
    """A duration in seconds.

    Args:
        text: A number and a unit: s, m, h or d.
        option: The option that it is the value of, for the error message.

    Raises:
        InputError: It is not a duration, or it is zero.
    """
    if not re.fullmatch(r"(?=.*[1-9])\d+(\.\d+)?[smhd]", text):
        raise InputError(f"{option} is '{text}'; it must be a positive number and a unit, such as 90s, 5m, 4h or 2d")
    return float(text[:-1]) * UNITS[text[-1]]
