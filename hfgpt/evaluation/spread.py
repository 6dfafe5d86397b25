"""Evaluation by all processes of a run: each batch once, with the results in the order of one process."""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object, send_to_device

# Applies a function to batches: `map`, or with the same results, `map_over_processes`.
Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


def map_over_processes(function: Callable[[Any], Any], batches: Iterable[Any]) -> Iterable[Any]:
    """`map`, but each process takes every n-th batch, and all get all results; tensors on the CPU.

    All processes must call it with the same batches.
    """
    state = PartialState()
    if state.num_processes == 1:
        return map(function, batches)
    own = [function(batch) for batch in itertools.islice(batches, state.process_index, None, state.num_processes)]
    rounds = itertools.zip_longest(*gather_object([send_to_device(own, "cpu")]))
    return [result for results in rounds for result in results if result is not None]  # the last round may be short


def all_see(file: Path) -> bool:
    """Whether all processes see a file, which those of other machines may not."""
    return all(gather_object([file.is_file()]))
