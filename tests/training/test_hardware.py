"""Memory that is kept while training."""

import platform
import resource

import pytest
import torch

from hfgpt.training.hardware import kept_memory

SIZE, ROUNDS = 2**26, 10  # bytes


def count_cleared_pages() -> int:
    """Pages that the system cleared while a large tensor was made, freed and made again."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(ROUNDS):
        torch.ones(SIZE // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_is_kept_while_training(monkeypatch):
    for name in ("GLIBC_TUNABLES", "MALLOC_ARENA_MAX"):
        monkeypatch.delenv(name, raising=False)
    pages = SIZE // resource.getpagesize()
    with kept_memory(torch.device("cpu")):
        # Aligned memory fits into what was freed only after a few rounds.
        assert count_cleared_pages() < ROUNDS / 2 * pages
    assert count_cleared_pages() > 0.95 * ROUNDS * pages, "returned to the system again"
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    with kept_memory(torch.device("cpu")):
        assert count_cleared_pages() > 0.95 * ROUNDS * pages, "the user's own settings"
