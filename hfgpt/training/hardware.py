"""What this machine computes with: the device, bfloat16 in hardware or not, memory."""

import platform
import re
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from hfgpt.data.report import counted


def has_native_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 matrices in hardware.

    Where it does not, bfloat16 is emulated: right, but up to hundreds of times slower than float32
    (pytorch issue 146508).
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # oneDNN has the kernels; without it (on macOS, say) the instructions alone are of no use.
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        return any(_cpu_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def describe_device(device: torch.device) -> str:
    """The device as people name it, e.g. `NVIDIA A100-SXM4-80GB` or `CPU AMD EPYC, 2 threads`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        name = _cpu_capabilities().get("cpu_name") or platform.processor() or platform.machine()
        return f"CPU {name}, {counted(torch.get_num_threads(), 'threads')}"
    return device.type


def _cpu_capabilities() -> Mapping:
    # torch before 2.12 cannot tell; nothing is then claimed.
    return getattr(torch.cpu, "get_capabilities", dict)()


def process_memory_bytes() -> int:
    """Memory that this process holds: now, or where the system does not tell, the most it ever held."""
    return _process_status("VmRSS") or peak_memory_bytes(torch.device("cpu"))


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held since the last `reset_peak_memory`: by tensors on an accelerator, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on other systems
    # On Linux ru_maxrss can be that of the process which started this one.
    return _process_status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(device: torch.device) -> bool:
    """Lets `peak_memory_bytes` begin anew; False where the system cannot: it stays that of the whole process."""
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
