"""Start-up, loading and memory, each measured in a process of its own."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from hfgpt.bench.measuring import GPT2, HFGPT, NANOGPT, Comparison, measure_in_turns, run_python
from hfgpt.bench.models import GPT2_SMALL, build_models

OURS, THEIRS = "from hfgpt import HfGPTForCausalLM", "from transformers import GPT2LMHeadModel"
LOAD = """
import json, time, torch
from hfgpt.training.hardware import peak_memory_bytes, process_memory_bytes, reset_peak_memory
{imported} as Model
before, begun = process_memory_bytes(), time.perf_counter()
reset_peak_memory(torch.device("cpu"))
model = Model.from_pretrained({folder!r})
seconds = time.perf_counter() - begun
sum(weight.sum().item() for weight in model.parameters())  # weights are read when they are used
print(json.dumps([seconds, peak_memory_bytes(torch.device("cpu")) - before]))
"""
IMPORT = "import time; begun = time.perf_counter(); {imported}; print(time.perf_counter() - begun)"
TRAIN = """
import json, sys
from contextlib import nullcontext
from pathlib import Path
import torch
from dataclasses import replace
from hfgpt.bench.measuring import HFGPT
from hfgpt.bench.models import GPT2_SMALL, build_models, draw_ids
from hfgpt.bench.train import BareStep
from hfgpt.training.hardware import peak_memory_bytes, process_memory_bytes, reset_peak_memory, training_heap
device, shape = torch.device("cpu"), replace(GPT2_SMALL, rows=4, length=512)
name, checkpointing, nanogpt = json.loads(sys.argv[1])
model = build_models(shape, device, nanogpt and Path(nanogpt), only=name)[name]
if checkpointing:
    model.gradient_checkpointing_enable()
before = process_memory_bytes() - sum(weight.nbytes for weight in model.parameters())
reset_peak_memory(device)
step = BareStep(model, draw_ids(shape, device), bf16=False)
with training_heap(device, checkpointing) if name == HFGPT else nullcontext():  # as in `hfgpt train`
    for _ in range(2):  # in the second, the optimizer has its state
        step.take()
print(peak_memory_bytes(device) - before)
"""


def measure_load(advance: Callable) -> list[Comparison]:
    """Compares importing and loading a model of GPT-2 small's size, also from a checkpoint in GPT-2's layout.

    Args:
        advance: Called after each measurement.
    """
    mapped = "from GPT-2's layout"
    with tempfile.TemporaryDirectory() as folder:
        models = build_models(GPT2_SMALL, torch.device("cpu"))
        size = sum(weight.nbytes for weight in models[HFGPT].parameters())
        for name, model in models.items():
            model.save_pretrained(Path(folder, name))
        loads = {
            HFGPT: LOAD.format(imported=OURS, folder=str(Path(folder, HFGPT))),
            GPT2: LOAD.format(imported=THEIRS, folder=str(Path(folder, GPT2))),
            mapped: LOAD.format(imported=OURS, folder=str(Path(folder, GPT2))),
        }
        both = measure_in_turns({name: partial(run_python, code) for name, code in loads.items()}, advance)
    found = []
    for source in (HFGPT, mapped):
        what = "from_pretrained, 124M" + (f", {source}" if source == mapped else "")
        pair = {HFGPT: both[source], GPT2: both[GPT2]}
        seconds, memory = ({name: [run[i] for run in runs] for name, runs in pair.items()} for i in (0, 1))
        found.append(Comparison("load", what, "s", seconds, less_is_better=True))
        memory = {name: [value / 1e6 for value in values] for name, values in memory.items()}
        found.append(Comparison("load", f"memory of {what}", "MB", memory, less_is_better=True, limit=size / 1e6))
    imports = {HFGPT: IMPORT.format(imported=OURS), GPT2: IMPORT.format(imported=THEIRS)}
    values = measure_in_turns({name: partial(run_python, code) for name, code in imports.items()}, advance)
    found.append(Comparison("load", "import of the model class", "s", values, less_is_better=True))
    values = measure_in_turns({HFGPT: _time_help}, advance)
    found.append(Comparison("load", "hfgpt --help", "s", values, less_is_better=True))
    return found


def _time_help() -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "hfgpt", "--help"], capture_output=True, check=True)
    return time.perf_counter() - begun


def measure_memory(nanogpt: Path | None, advance: Callable) -> list[Comparison]:
    """Compares the peak memory of a step of 4 x 512 tokens at GPT-2 small's size, without the imported libraries.

    Args:
        nanogpt: A checkout of nanoGPT.
        advance: Called after each measurement.
    """
    found = []
    for checkpointing in (False, True):
        # nanoGPT has no activation checkpointing.
        names = [HFGPT, GPT2, *([NANOGPT] if nanogpt and not checkpointing else [])]

        def measure(name: str, checkpointing: bool = checkpointing) -> float:
            return run_python(TRAIN, json.dumps([name, checkpointing, nanogpt and str(nanogpt)])) / 1e6

        # Sizes hardly differ between rounds.
        values = measure_in_turns({name: partial(measure, name) for name in names}, advance, rounds=1)
        what = "step, 124M, 4 x 512" + (", activation checkpointing" if checkpointing else "")
        found.append(Comparison("memory", what, "MB", values, less_is_better=True))
    return found
