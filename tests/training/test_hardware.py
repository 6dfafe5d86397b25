"""Memory that is kept while training."""

import json
import os
import platform
import subprocess
import sys

import pytest

# In a process of its own, whose heap has no holes.
SCRIPT = """
import os, resource, torch
from hfgpt.training.hardware import kept_memory

def count():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / (10 * 2**26)

os.environ["MALLOC_ARENA_MAX"] = "1"
with kept_memory(torch.device("cpu")):
    own_settings = count()
del os.environ["MALLOC_ARENA_MAX"]
with kept_memory(torch.device("cpu")):
    print([own_settings, count()])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_is_kept_while_training():
    """The share of a large tensor that the system clears when it is made again."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=plain, capture_output=True, text=True, check=True)
    own_settings, kept = json.loads(done.stdout)
    assert kept < own_settings / 2
