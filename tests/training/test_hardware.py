"""The heap while training: memory that is kept for speed, or returned to the system."""

import json
import os
import platform
import subprocess
import sys

import pytest

glibc_only = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
PLAIN = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}


def run(script: str) -> list[float]:
    """What a script prints as JSON in a process of its own, whose heap has no holes."""
    done = subprocess.run([sys.executable, "-c", script], env=PLAIN, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@glibc_only
def test_freed_memory_is_kept_while_training():
    """The share of a large tensor that the system clears when it is made again."""
    own_settings, returned, kept = run("""
import os, resource, torch
from hfgpt.training.hardware import training_heap

def count():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / (10 * 2**26)

device = torch.device("cpu")
os.environ["MALLOC_ARENA_MAX"] = "1"
with training_heap(device):
    own_settings = count()
del os.environ["MALLOC_ARENA_MAX"]
with training_heap(device, saves_memory=True):
    returned = count()
with training_heap(device):  # last, since it may leave a hole in the heap
    print([own_settings, returned, count()])
""")
    assert kept < own_settings / 2
    assert returned > 2 * kept


@glibc_only
def test_activation_checkpointing_leaves_no_gaps_in_the_heap():
    """The memory, relative to that of the tensors that are left, after freeing every second one of 5 MiB."""
    kept, returned = run("""
import torch
from hfgpt.training.hardware import process_memory_bytes, training_heap

def measure(saves_memory):
    with training_heap(torch.device("cpu"), saves_memory):
        before = process_memory_bytes()
        tensors = [torch.ones(5 * 2**18) for _ in range(40)]
        del tensors[::2]
        return (process_memory_bytes() - before) / sum(tensor.nbytes for tensor in tensors)

torch.ones(5 * 2**18)
print([measure(False), measure(True)])
""")
    assert kept > 1.8
    assert returned < 1.2
