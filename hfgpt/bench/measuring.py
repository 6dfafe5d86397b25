"""Paired measurements: the contenders take turns, so that a change in the speed of the machine affects all of them."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from hfgpt.errors import InputError

HFGPT, GPT2, NANOGPT = "hfgpt", "GPT-2", "nanoGPT"
ROUNDS = 5


@dataclass
class Comparison:
    """What each contender reached in the same rounds.

    Args:
        part: What was measured: train, decode, data, load or memory.
        what: The case, such as `step, 4L/4H/128, float32`.
        unit: Unit of the values.
        values: Contender -> one value per round.
        less_is_better: Whether the values are costs, such as seconds.
        limit: What the machine could reach, in `unit`; None: unknown.
    """

    part: str
    what: str
    unit: str
    values: dict[str, list[float]]
    less_is_better: bool = False
    limit: float | None = None

    def median(self, name: str = HFGPT) -> float:
        return statistics.median(self.values[name])

    def spread(self, name: str = HFGPT) -> float:
        """The range of the values, relative to their median."""
        values = self.values[name]
        return (max(values) - min(values)) / self.median(name)

    def ratio(self, name: str) -> float:
        """The median of hfgpt's values relative to another's in the same round."""
        return statistics.median(
            ours / other for ours, other in zip(self.values[HFGPT], self.values[name], strict=True)
        )

    @property
    def used(self) -> float | None:
        """The fraction of the machine's limit that hfgpt reached."""
        return self.median() / self.limit if self.limit else None

    def to_dict(self) -> dict:
        return {
            **vars(self),
            "medians": {name: self.median(name) for name in self.values},
            "ratios": {name: self.ratio(name) for name in self.values if name != HFGPT},
            "used": self.used,
        }


def measure_in_turns(
    contenders: Mapping[str, Callable[[], float]], advance: Callable[[], None], rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Measures each contender once per round, in rotating order.

    Args:
        contenders: Name -> a function that measures once.
        advance: Called after each measurement.
        rounds: Number of rounds.

    Returns:
        Name -> one value per round.
    """
    names, values = list(contenders), {name: [] for name in contenders}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            values[name].append(contenders[name]())
            advance()
    return values


def run_python(code: str, *arguments: str) -> list[float] | float:
    """What a program prints as JSON in its last line, in a process of its own.

    Raises:
        InputError: It failed, probably for lack of memory.
    """
    words = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        fact = (done.stderr.splitlines() or [f"exit status {done.returncode}"])[-1]
        raise InputError(f"a measurement failed ({fact}): it needs up to 8 GB of memory")
    return json.loads(done.stdout.splitlines()[-1])


def repetitions_within(seconds: float, action: Callable[[], None]) -> int:
    """How often an action can be repeated in this time, between 1 and 50, once it has warmed up."""
    action()
    begun = time.perf_counter()
    action()
    return min(max(round(seconds / (time.perf_counter() - begun)), 1), 50)


def synchronize(device: torch.device):
    """Waits for an accelerator."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def _durations(action: Callable[[], None], device: torch.device, seconds: float) -> Iterator[float]:
    end = time.perf_counter() + seconds
    while (begun := time.perf_counter()) < end:
        action()
        synchronize(device)
        yield time.perf_counter() - begun


def measure_matrix_flops(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """The rate of matrix products (2048, 768) x (768, 3072) on this machine, in FLOP/s: that of the fastest."""
    left, right = (
        torch.randn(2048, 768, device=device, dtype=dtype),
        torch.randn(768, 3072, device=device, dtype=dtype),
    )
    return 2 * 2048 * 768 * 3072 / min(_durations(lambda: left @ right, device, seconds))


def measure_bandwidth(device: torch.device, seconds: float = 1.0) -> float:
    """The rate of reading memory on this machine, in bytes per second: that of the fastest of several products.

    A matrix is read once for its product with a vector, as weights are to generate a token.
    """
    matrix, vector = torch.ones(16384, 4096, device=device), torch.ones(4096, device=device)  # 256 MiB
    return matrix.nbytes / min(_durations(lambda: matrix @ vector, device, seconds))
