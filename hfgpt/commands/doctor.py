"""`hfgpt doctor`: versions and hardware of this machine, and the resulting defaults of hfgpt."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from typing import Any

import torch
from huggingface_hub import constants, get_token

import hfgpt
from hfgpt.models import find_device
from hfgpt.output import output_width, render_pairs
from hfgpt.training.hardware import describe_device, has_native_bf16

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "peft", "safetensors", "huggingface_hub")


def examine() -> dict[str, Any]:
    """Collects versions, device, kernels, disk space and login, without using the network.

    Returns:
        Name -> finding, as plain values.
    """
    device = find_device()
    bf16 = has_native_bf16(device)
    flash = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    cache = constants.HF_HOME
    return {
        "hfgpt": hfgpt.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "device": describe_device(device),
        "threads": torch.get_num_threads(),
        "precision": "bfloat16 (mixed)" if bf16 else "float32 (bfloat16 would be emulated)",
        "attention": "sdpa, eager, flex_attention" + (", flash_attention_2" if flash else ""),
        "optimizers": "fused AdamW; Muon in " + ("bfloat16" if bf16 else "float32"),
        "cache": cache,
        "cache_free_gib": round(shutil.disk_usage(_existing(cache)).free / 1024**3, 1),
        "hub": os.environ.get("HF_ENDPOINT", "https://huggingface.co"),
        "hub_offline": bool(constants.HF_HUB_OFFLINE),
        "hub_login": "token found" if get_token() else "no token: run hf auth login",
    }


def render_examination(findings: dict[str, Any]) -> str:
    """The findings as text."""
    return render_pairs(((name, str(value)) for name, value in findings.items()), output_width())


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _existing(path: str) -> str:
    path = os.path.abspath(path)  # the parent of a relative path ends up as "", which never exists
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path
