"""Hardware of this machine: device name, native bfloat16, peak FLOP/s, memory."""

import ctypes
import os
import platform
import re
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from hfgpt.data.report import counted

# Peak TFLOP/s of dense matrix products in bfloat16, float16, TF32 and float32, the first three on matrix units with
# sums in float32; 0: not supported. The names are PyTorch's, without the vendor; a device that is not listed, such as
# a part of one (MIG) or a laptop's, is unknown. Sources: the vendors' data sheets, halved where they count sparsity;
# for GeForce, NVIDIA's white papers on the architectures GA102, Ada and Blackwell.
PRECISIONS = ("bfloat16", "float16", "tf32", "float32")
PEAK_TFLOPS = {
    ("B200",): (2250, 2250, 1125, 75),
    ("H100 80GB HBM3", "H200"): (989.4, 989.4, 494.7, 66.9),
    ("H100 NVL", "H200 NVL"): (835.5, 835.5, 417.5, 60),
    ("H100 PCIe",): (756, 756, 378, 51),
    ("A100-SXM4-40GB", "A100-SXM4-80GB", "A100-PCIE-40GB", "A100 80GB PCIe"): (312, 312, 156, 19.5),
    ("L40S",): (362, 362, 183, 91.6),
    ("L4",): (121, 121, 60, 30.3),
    ("A10",): (125, 125, 62.5, 31.2),
    ("A10G",): (70, 70, 35, 35),
    ("T4",): (0, 65, 0, 8.1),
    ("V100-SXM2-16GB", "V100-SXM2-32GB"): (0, 125, 0, 15.7),
    ("V100-PCIE-16GB", "V100-PCIE-32GB"): (0, 112, 0, 14),
    ("GeForce RTX 3090",): (71, 71, 35.6, 35.6),
    ("GeForce RTX 4090",): (165.2, 165.2, 82.6, 82.6),
    ("GeForce RTX 5090",): (209.5, 209.5, 104.8, 104.8),
    ("Instinct MI300X", "Instinct MI300X OAM"): (1307.4, 1307.4, 653.7, 163.4),
}
RETURNED_BLOCK = 4 * 2**20  # bytes, see `training_heap`


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


def find_peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of a device in one of `PRECISIONS`; None if it is a CPU, or not in `PEAK_TFLOPS`."""
    if device.type != "cuda":
        return None
    name = re.sub(r"^((NVIDIA|Tesla|AMD) )+", "", torch.cuda.get_device_name(device))
    peaks = next((peaks for names, peaks in PEAK_TFLOPS.items() if name in names), None)
    return peaks[PRECISIONS.index(precision)] * 1e12 or None if peaks else None


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


@contextmanager
def training_heap(device: torch.device, saves_memory: bool = False) -> Iterator[None]:
    """On a CPU with glibc, keeps freed memory in the process for later tensors, until the end, or returns it.

    By default, glibc returns large blocks to the system, which clears every page again when it is next needed: in a
    training step of GPT-2 small in bfloat16, that takes a tenth of the time. Settings in the environment are left as
    they are.

    Args:
        device: Device of the training.
        saves_memory: Return every block of `RETURNED_BLOCK` bytes. Kept memory has gaps, into which other sizes do not
            fit: with activation checkpointing, a third of the peak.
    """
    is_set = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc" or is_set:
        yield
        return
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # parameters of mallopt(3)
    libc = ctypes.CDLL(None)
    if saves_memory:
        libc.mallopt(mmap_threshold, RETURNED_BLOCK)
    else:
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
    try:
        yield
    finally:
        # What glibc adapts its thresholds to once large blocks have been freed; setting any of them ends that.
        libc.mallopt(mmap_max, 65536)
        libc.mallopt(mmap_threshold, 32 * 2**20)
        libc.mallopt(trim_threshold, 64 * 2**20)
        libc.malloc_trim(0)


def _process_status(name: str) -> int:
    """A size in bytes from Linux's /proc/self/status; 0 on other systems."""
    status = Path("/proc/self/status").read_text() if sys.platform == "linux" else ""
    found = re.search(rf"{name}:\s*(\d+) kB", status)
    return 1024 * int(found[1]) if found else 0
