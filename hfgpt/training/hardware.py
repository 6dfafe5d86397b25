"""What this machine computes with: the device, bfloat16 in hardware or not, memory."""

import platform
import re
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import torch


def find_device() -> torch.device:
    """The device that Trainer will use: the current accelerator, or the CPU."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


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
        return f"CPU {name}, {torch.get_num_threads()} threads"
    return device.type


def _cpu_capabilities() -> Mapping:
    # torch before 2.12 cannot tell; nothing is then claimed.
    return getattr(torch.cpu, "get_capabilities", dict)()


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: by tensors on an accelerator, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # where ru_maxrss can be that of the process which started this one
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on other systems
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
