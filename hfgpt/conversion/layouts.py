"""Where our weights are in somebody else's checkpoint: a table of names for each layout, and what reads the tables.

In a table, their module is on the left, ours on the right, and `*` is the number of the block. Reading one makes views
of their tensors under our names. So the same table serves both directions: an import copies out of the views, one
tensor at a time, and an export writes into them.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from hfgpt.errors import InputError

# What wrappers put before every name: torch.compile, DistributedDataParallel, and the attribute that holds the body.
WRAPPERS = re.compile(r"^((_orig_mod|module|transformer)\.)+")
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Layout:
    """How one family of checkpoints names and stores the weights of a GPT.

    Args:
        name: What `--format` calls it.
        modules: Their module -> ours; several of ours lie in theirs one after the other, along the outputs.
        hidden_act: The activation of its MLP, which no file of it names.
        transposed: Whether the matrices of the blocks are stored (in, out), as GPT-2's are, and not (out, in).
        parameters: Their name of a module's parameter -> ours.
        ignored: Matches keys that are no weights, such as causal masks.
        may_classify: Whether it puts classifiers in the place of its output head.
        may_lack_biases: Whether it has models without biases.
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
        """The names of our weights that the tensor `key` holds; none if this layout has no such key."""
        module, _, parameter = key.rpartition(".")
        number = NUMBER.search(key)
        ours = self.modules.get(NUMBER.sub("*", f"{module}.", count=1)[:-1], ())
        if parameter not in self.parameters:
            return ()
        return tuple(f"{name.replace('*', number[0] if number else '')}.{self.parameters[parameter]}" for name in ours)

    def misfits(self, keys: Iterable[str]) -> list[str]:
        """The keys that are neither weights of this layout nor known to be none."""
        return [key for key in keys if not self.find(key) and not re.search(self.ignored, key)]

    def check(self, keys: Iterable[str]):
        """Refuses keys that this layout does not have.

        Raises:
            InputError: Names some of them.
        """
        keys = list(keys)
        misfits = self.misfits(keys)
        if misfits or not any(self.find(key) for key in keys):
            shown = ", ".join(misfits[:3]) + (", ..." if len(misfits) > 3 else "") or "there are none"
            raise InputError(
                f"these are not the weights of a {self.name} model, the format that comes nearest or was named: "
                f"{len(misfits)} of {len(keys)} keys do not fit it ({shown}); take another checkpoint"
            )

    def view(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Views of their weights under our names, in our orientation; what is no weight is left out.

        Raises:
            InputError: A tensor cannot be divided among ours.
        """
        ours = {}
        for key, tensor in weights.items():
            names = self.find(key)
            if self.transposed and NUMBER.search(key) and tensor.ndim == 2:
                tensor = tensor.T
            if names and (tensor.ndim == 0 or tensor.shape[0] % len(names)):
                raise InputError(f"{key} has shape {tuple(tensor.shape)}, which does not hold {' and '.join(names)}")
            ours |= zip(names, tensor.chunk(len(names)) if names else (), strict=True)
        return ours


def strip_wrappers(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights without what wrappers put before their names.

    Raises:
        InputError: Two names become one.
    """
    stripped = {WRAPPERS.sub("", key): tensor for key, tensor in weights.items()}
    if len(stripped) < len(weights):
        raise InputError("the file holds some weights twice, with and without a wrapper's prefix: save one model")
    return stripped
