"""nanoGPT's layout: GPT-2's names over plain linear layers, in a `ckpt.pt` with the arguments of its model.

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
    "gelu",  # the exact one since June 2023, whatever the weights were started from
    ignored=r"\.attn\.bias$",
    may_lack_biases=True,
)


def num_heads_of(model_args: Mapping[str, Any]) -> int | None:
    """The number of heads that the arguments of nanoGPT's model name, if any."""
    number = model_args.get("n_head")
    return number if isinstance(number, int) else None


def find_meta(checkpoint: Path, settings: Mapping[str, Any]) -> Path | None:
    """The `meta.pkl` of a character-level data set: beside the checkpoint, or where nanoGPT keeps it."""
    dataset = settings.get("dataset")
    places = [checkpoint.parent / "meta.pkl"]
    if isinstance(dataset, str):
        places += [folder / "data" / dataset / "meta.pkl" for folder in checkpoint.resolve().parents[:3]]
    return next((place for place in places if place.is_file()), None)


class _PlainUnpickler(pickle._Unpickler):
    """Reads numbers, strings and containers, and refuses everything that names a class or a function.

    Written in Python: the one in C sets memory aside for whatever index a file names, gigabytes for ten bytes.
    """

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it wants to run {module}.{name}")


def read_meta(path: Path) -> dict[str, int]:
    """The character table of a `meta.pkl`, without running anything in it.

    Returns:
        Character -> id, the ids counting from 0.

    Raises:
        InputError: It is not such a file, holds code, or its two tables do not belong together.
    """
    try:
        with open(path, "rb") as file:
            meta = _PlainUnpickler(file).load()
        table = dict(meta["stoi"])
        characters = sorted(table, key=table.get)
        if dict(meta["itos"]) != dict(enumerate(characters)) or any(len(character) != 1 for character in characters):
            raise ValueError("its stoi and itos are not one table of characters")
    # A damaged pickle raises whatever its bytes happen to spell.
    except Exception as error:
        raise InputError(f"'{path}' is not a nanoGPT character table ({error}): pass another --tokenizer") from error
    return table
