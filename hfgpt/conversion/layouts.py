"""Layouts of third-party checkpoints: a table of names for each one, and the code that applies the tables.

In a table, their module is on the left, hfgpt's on the right, and `*` is the index of the block. Applying a table
creates views of their tensors under hfgpt's names. The same table therefore serves both directions: an import copies
from the views, one tensor at a time, and an export writes to them.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from hfgpt.errors import InputError

# Prefixes of all names: from torch.compile, DistributedDataParallel, and the attribute of the base model.
WRAPPERS = re.compile(r"^((_orig_mod|module|transformer)\.)+")
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Layout:
    """How one family of checkpoints names and stores the weights of a GPT.

    Args:
        name: Value of `--format`.
        modules: Their module -> hfgpt's; several hfgpt modules are concatenated in theirs along the outputs.
        hidden_act: Activation of the MLP, which is not in the files.
        transposed: Whether the matrices of the blocks are stored as (in, out), as in GPT-2, and not as (out, in).
        parameters: Their name of a module's parameter -> hfgpt's.
        ignored: Regular expression for keys that are not weights, such as causal masks.
        may_classify: Whether classifiers replace the output head under the same name.
        may_lack_biases: Whether models may have no biases.
    """

    name: str
    modules: dict[str, tuple[str, ...]]
    hidden_act: str
    transposed: bool = False
    parameters: dict[str, str] = field(default_factory=lambda: {"weight": "weight", "bias": "bias"})
    ignored: str = r"(?!)"
    may_classify: bool = False
    may_lack_biases: bool = False

    def find(self, key: str) -> tuple[str, ...]:
        """The names of the hfgpt weights in the tensor `key`; empty if the layout does not have this key."""
        module, _, parameter = key.rpartition(".")
        number = NUMBER.search(key)
        ours = self.modules.get(NUMBER.sub("*", f"{module}.", count=1)[:-1], ())
        if parameter not in self.parameters:
            return ()
        return tuple(f"{name.replace('*', number[0] if number else '')}.{self.parameters[parameter]}" for name in ours)

    def misfits(self, keys: Iterable[str]) -> list[str]:
        """The keys that are neither weights of this layout nor ignored."""
        return [key for key in keys if not self.find(key) and not re.search(self.ignored, key)]

    def check(self, keys: Iterable[str]):
        """Checks that keys match this layout.

        Raises:
            InputError: Names some keys that do not match.
        """
        keys = list(keys)
        misfits = self.misfits(keys)
        if misfits or not any(self.find(key) for key in keys):
            shown = ", ".join(misfits[:3]) + (", ..." if len(misfits) > 3 else "") or "no weights"
            raise InputError(
                f"these are not the weights of a {self.name} model, the requested or closest format: {len(misfits)} "
                f"of {len(keys)} keys do not match it ({shown}); use another checkpoint"
            )

    def view(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Views of their weights under hfgpt's names and in its orientation, without keys that are not weights.

        Raises:
            InputError: A tensor cannot be split into hfgpt's weights.
        """
        ours = {}
        for key, tensor in weights.items():
            names = self.find(key)
            if self.transposed and NUMBER.search(key) and tensor.ndim == 2:
                tensor = tensor.T
            if names and (tensor.ndim == 0 or tensor.shape[0] % len(names)):
                raise InputError(f"{key} has shape {tuple(tensor.shape)}, which does not match {' and '.join(names)}")
            ours |= zip(names, tensor.chunk(len(names)) if names else (), strict=True)
        return ours


def strip_wrappers(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Removes the prefixes of wrappers from the names of weights.

    Raises:
        InputError: Two names become the same.
    """
    stripped = {WRAPPERS.sub("", key): tensor for key, tensor in weights.items()}
    if len(stripped) < len(weights):
        raise InputError("the file has some weights twice, with and without a wrapper's prefix: save only one model")
    return stripped
