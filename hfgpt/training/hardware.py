"""Hardware of this machine: device name, native bfloat16, memory."""

import platform
import re
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from hfgpt.data.report import counted


def has_native_bf16(device: torch.device) -> bool:
    """Whether `device` has hardware support for bfloat16 matrix products.

    Without it, bfloat16 is emulated: correct, but up to hundreds of times slower than float32 (pytorch issue 146508).
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # The kernels are in oneDNN; without it (on macOS, for example) PyTorch does not use the instructions.
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        return any(_cpu_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def describe_device(device: torch.device) -> str:
    """Human-readable device name, e.g. `NVIDIA A100-SXM4-80GB` or `CPU AMD EPYC, 2 threads`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        name = _cpu_capabilities().get("cpu_name") or platform.processor() or platform.machine()
        return f"CPU {name}, {counted(torch.get_num_threads(), 'threads')}"
    return device.type


def _cpu_capabilities() -> Mapping:
    # Not available before torch 2.12: then empty.
    return getattr(torch.cpu, "get_capabilities", dict)()


def process_memory_bytes() -> int:
    """Resident memory of this process; its peak on systems that do not report the current value."""
    return _process_status("VmRSS") or peak_memory_bytes(torch.device("cpu"))


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory since the last `reset_peak_memory`: of tensors on an accelerator, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on other systems
    # On Linux, ru_maxrss can be inherited from the parent process.
    return _process_status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(device: torch.device) -> bool:
    """Resets `peak_memory_bytes`; returns False if the system does not support that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5)
    except OSError:
        return False
    return True


def _process_status(name: str) -> int:
    """A size in bytes from Linux's /proc/self/status; 0 on other systems."""
    status = Path("/proc/self/status").read_text() if sys.platform == "linux" else ""
    found = re.search(rf"{name}:\s*(\d+) kB", status)
    return 1024 * int(found[1]) if found else 0
