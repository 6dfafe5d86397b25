"""`hfgpt bench`: speed and memory compared with transformers' GPT-2 and nanoGPT, on this machine."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils import logging

from hfgpt.bench import PARTS, BenchArguments, decode, train
from hfgpt.bench.data import measure_data
from hfgpt.bench.load import measure_load, measure_memory
from hfgpt.bench.measuring import HFGPT, Comparison, measure_bandwidth, measure_matrix_flops
from hfgpt.bench.models import import_nanogpt
from hfgpt.models import find_device, quiet_bars
from hfgpt.output import stderr_console
from hfgpt.training.hardware import describe_device


@dataclass
class Machine:
    """What the figures were measured on.

    Args:
        device: Its name.
        torch, transformers: Versions.
        matrix_flops: FLOP/s of matrix products, by precision.
        bandwidth: Bytes per second that it reads from memory.
    """

    device: str
    torch: str
    transformers: str
    matrix_flops: dict[str, float]
    bandwidth: float

    to_dict = asdict


@dataclass
class Job:
    """One or more comparisons that are measured together.

    Args:
        name: Shown while it is measured.
        measure: Called with a function to call after each measurement; returns the comparisons.
    """

    name: str
    measure: Callable[[Callable[[], None]], list[Comparison]]


def bench(arguments: BenchArguments, announce: Callable[[Machine], Any], report: Callable[[Comparison], Any]):
    """Measures one part, or all.

    Args:
        arguments: What to measure.
        announce: Called with the machine first.
        report: Called with each comparison as soon as it is there.

    Raises:
        InputError: The checkout of nanoGPT cannot be used.
    """
    if arguments.nanogpt is not None:
        import_nanogpt(arguments.nanogpt)  # before minutes are spent on other measurements
    device, verbosity = find_device(), logging.get_verbosity()
    logging.set_verbosity_error()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = stderr_console()
    try:
        with quiet_bars(), Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("Measuring this machine", total=None)
            flops = {name: measure_matrix_flops(device, getattr(torch, name)) for name in train.precisions(device)}
            bandwidth = measure_bandwidth(device)
            machine = Machine(describe_device(device), torch.__version__, transformers.__version__, flops, bandwidth)
            announce(machine)
            parts = PARTS if arguments.part is None else (arguments.part,)
            jobs = [job for part in parts for job in list_jobs(part, machine, device, arguments.nanogpt)]
            for number, job in enumerate(jobs, 1):
                bar.reset(task, description=f"{number}/{len(jobs)} {job.name}", total=None)
                for comparison in job.measure(lambda: bar.advance(task)):
                    report(comparison)
    finally:
        logging.set_verbosity(verbosity)


def list_jobs(part: str, machine: Machine, device: torch.device, nanogpt: Path | None) -> Iterator[Job]:
    """The jobs of a part."""
    if part == "train":
        for shape in train.choose_shapes(device):
            for precision, flops in machine.matrix_flops.items():
                step = partial(train.measure_step, shape, precision, flops, device, nanogpt)
                yield Job(f"steps of {shape.name}, {precision}", step)
            for case, chosen in train.loop_cases(device).items():
                loop = partial(train.measure_loop, shape, case, chosen, machine.matrix_flops[chosen[HFGPT]])
                yield Job(f"Trainer with {shape.name}, {case}", loop)
    elif part == "decode":
        for shape in decode.SHAPES:
            case = (shape, machine.bandwidth, device, nanogpt)
            yield Job(f"generation by {shape.name}", partial(decode.measure_decoding, *case))
    elif part == "data":
        yield Job("data", measure_data)
    elif part == "load":
        yield Job("loading", measure_load)
    else:
        yield Job("memory of a training step", partial(measure_memory, nanogpt))


def render_machine(machine: Machine) -> str:
    """The machine in one line."""
    rates = ", ".join(f"{flops / 1e9:,.0f} GFLOP/s in {name}" for name, flops in machine.matrix_flops.items())
    return (
        f"{machine.device}; torch {machine.torch}, transformers {machine.transformers}; matrix products {rates}; "
        f"memory read at {machine.bandwidth / 1e9:,.1f} GB/s"
    )


def render_comparison(found: Comparison) -> str:
    """One line: the medians, half the range of the values, and hfgpt's value relative to the others."""
    shown = [f"{HFGPT} {_value(found, HFGPT)} {found.unit}"]
    shown += [f"{name} {_value(found, name)} (x{found.ratio(name):.2f})" for name in found.values if name != HFGPT]
    if found.used:
        shown.append(f"{found.used:.0%} of {'the weights' if found.unit == 'MB' else 'the limit'}")
    return f"{found.what:44} {'; '.join(shown)}"


def _value(found: Comparison, name: str) -> str:
    median = found.median(name)
    digits = 0 if median >= 100 else 2
    spread = f" ±{found.spread(name) / 2:.0%}" if len(found.values[name]) > 1 else ""
    return f"{median:,.{digits}f}{spread}"
