"""Speed and memory of hfgpt compared with transformers' GPT-2 and nanoGPT, on this machine: `hfgpt bench`."""

from dataclasses import dataclass
from pathlib import Path

from hfgpt.errors import InputError

PARTS = ("train", "decode", "data", "load", "memory")


@dataclass
class BenchArguments:
    """What to measure.

    Args:
        part: One of `PARTS`; None: all.
        nanogpt: The folder of a checkout of nanoGPT, whose model is then measured too.
    """

    part: str | None = None
    nanogpt: Path | None = None

    def __post_init__(self):
        if self.part not in (None, *PARTS):
            raise InputError(f"'{self.part}' is not a part of hfgpt bench: use {', '.join(PARTS[:-1])} or {PARTS[-1]}")
        if self.nanogpt is not None and not (self.nanogpt / "model.py").is_file():
            raise InputError(
                f"--nanogpt '{self.nanogpt}' has no model.py: pass a checkout of github.com/karpathy/nanoGPT"
            )
