"""nanoGPT's layout: GPT-2's names with plain linear layers, in a `ckpt.pt` with the model arguments.

Source: karpathy/nanoGPT, model.py and train.py.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfgpt.conversion.gpt2 import MODULES
from hfgpt.conversion.layouts import Layout
from hfgpt.errors import InputError

LAYOUT = Layout(
    "nanogpt",
    {name: ours for name, ours in MODULES.items() if name != "score"},
    "gelu",  # exact GELU since June 2023, even if training started from GPT-2's weights
    ignored=r"\.attn\.bias$",
    may_lack_biases=True,
)


def num_heads_of(model_args: Mapping[str, Any]) -> int | None:
    """The number of heads in nanoGPT's model arguments; None if they do not have it."""
    number = model_args.get("n_head")
    return number if isinstance(number, int) else None


def find_meta(checkpoint: Path, settings: Mapping[str, Any]) -> Path | None:
    """The `meta.pkl` of a character-level dataset: next to the checkpoint, or in nanoGPT's data folder."""
    dataset = settings.get("dataset")
    places = [checkpoint.parent / "meta.pkl"]
    if isinstance(dataset, str):
        places += [folder / "data" / dataset / "meta.pkl" for folder in checkpoint.resolve().parents[:3]]
    return next((place for place in places if place.is_file()), None)


class _PlainUnpickler(pickle._Unpickler):
    """Reads numbers, strings and containers, and rejects references to classes and functions.

    Based on pickle's Python implementation: the C one allocates memory for any index in a file, gigabytes for ten
    bytes.
    """

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it contains code: {module}.{name}")


def read_meta(path: Path) -> dict[str, int]:
    """Reads the character table of a `meta.pkl`, without running any code in it.

    Returns:
        Character -> id, from 0 without gaps.

    Raises:
        InputError: It is not such a file, contains code, or its two tables are inconsistent.
    """
    try:
        with open(path, "rb") as file:
            meta = _PlainUnpickler(file).load()
        table = dict(meta["stoi"])
        characters = sorted(table, key=table.get)
        if dict(meta["itos"]) != dict(enumerate(characters)) or any(len(character) != 1 for character in characters):
            raise ValueError("its stoi and itos are inconsistent")
    # A damaged pickle can raise any exception.
    except Exception as error:
        raise InputError(f"'{path}' is not a nanoGPT character table ({error}): pass another --tokenizer") from error
    return table
