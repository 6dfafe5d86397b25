"""Reads third-party checkpoint files: only tensors and plain values, never code."""

import json
import pickle
import re
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedConfig
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from hfgpt.errors import InputError

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
# Keys of the state dict in a saved dictionary: those of nanoGPT, the book, and other trainers.
WRAPPED_AS = ("model", "model_state_dict", "state_dict")


@dataclass
class Checkpoint:
    """The content of a checkpoint file.

    Args:
        weights: Name -> tensor, memory-mapped if the file format allows it.
        model_args: nanoGPT's model arguments; empty for other formats.
        settings: nanoGPT's training settings; empty for other formats.
    """

    weights: dict[str, torch.Tensor]
    model_args: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a `.pt`, `.pth`, `.bin`, `.ckpt` or `.safetensors` file.

    Raises:
        InputError: The file is damaged, contains code, or is not a state dict of finite, dense tensors.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"'{path}': unsupported file type '{path.suffix}' (supported: {', '.join(SUFFIXES)})")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _load_pickle(path)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"contains code ({wanted[1]})" if wanted else "is not a plain state dict"
        raise InputError(f"'{path}' {what} and is not loaded: save only model.state_dict()") from error
    # A damaged file can raise any exception.
    except Exception as error:
        said = " ".join(str(error).split()).split(". ")[0]
        reason = said if " " in said else type(error).__name__
        if "weights_only" in said:  # for a tar file (before torch 0.4); torch suggests loading it anyway
            reason = "an old format that can contain code"
        raise InputError(f"'{path}' is damaged or not a checkpoint ({reason}): copy or save it again") from error
    if not isinstance(content, dict):
        raise InputError(f"'{path}' contains a {type(content).__name__}, not a state dict: save model.state_dict()")
    wrapped = next((content[name] for name in WRAPPED_AS if isinstance(content.get(name), dict)), content)
    check_weights(path, wrapped)
    plain = {name: content.get(name) for name in ("model_args", "config")}
    model_args, settings = (value if isinstance(value, dict) else {} for value in plain.values())
    return Checkpoint(dict(wrapped), model_args, settings)


def check_archive(path: Path):
    """Checks the content of a file written by `torch.save`, which torch maps into memory without checking.

    Reads the file once, in about a second per gigabyte. The format before torch 1.6 is not an archive and has no
    checksums.

    Raises:
        ValueError: A checksum does not match, the tensors are compressed, or it is a TorchScript program. A damaged
            archive raises errors of zipfile.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise ValueError("it is a TorchScript program")
        tensors = [entry for entry in entries if "/data/" in entry.filename]
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in tensors):
            raise ValueError("its tensors are compressed")  # torch would use the compressed bytes as numbers
        # With torch.serialization.set_crc32_options(False), all checksums are 0.
        if any(entry.CRC for entry in entries) and (damaged := archive.testzip()):
            raise ValueError(f"checksum mismatch in {damaged}")


def _load_pickle(path: Path) -> Any:
    check_archive(path)
    with warnings.catch_warnings():
        # Redundant: anything the unpickler does not support raises an error.
        warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # a file from before torch 1.6


def check_weights(path: Path, weights: dict[Any, Any]):
    """Checks that the weights are a state dict of finite, dense tensors.

    Raises:
        InputError: Names the first invalid entry.
    """
    if not weights:
        raise InputError(f"'{path}' contains no weights: save model.state_dict()")
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            kind = type(tensor).__name__
            raise InputError(
                f"'{path}' is not a state dict: {name!r} is a {kind}, not a tensor; save model.state_dict()"
            )
        dense = tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_meta or tensor.is_complex())
        # A file of a few bytes can declare a tensor of any size whose elements share one number.
        if not dense or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise InputError(f"'{path}': {name} is not a dense tensor of real numbers: save the model in float32")
        if tensor.is_floating_point() and tensor.element_size() < 2:
            raise InputError(f"'{path}': {name} is stored as {tensor.dtype}: save the model in float32")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f"'{path}': {name} has NaN or infinite values: use an earlier checkpoint")


def find_weight_files(path: str, revision: str | None, config: PreTrainedConfig) -> list[Path]:
    """The weight files in `from_pretrained`'s order of preference, downloaded if needed; empty if there are none.

    Raises:
        InputError: A weight map refers to files outside its folder.
    """

    def find(name: str) -> str | None:
        return cached_file(path, name, revision=revision or "main", _raise_exceptions_for_missing_entries=False)

    named = getattr(config, "transformers_weights", None)
    names = [named] if named else [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME]
    first = next(filter(None, map(find, names)), None)
    if first is None or not first.endswith(".index.json"):
        return [Path(first)] if first else []
    shards = sorted(set(json.loads(Path(first).read_text(encoding="utf-8"))["weight_map"].values()))
    # transformers joins each name to the folder unchecked.
    if outside := next((shard for shard in shards if re.search(r"[/\\]|^\.", shard)), None):
        raise InputError(
            f"the weight map of '{path}' refers to a file outside its folder, '{outside}': download the model again"
        )
    return [Path(file) for file in map(find, shards) if file]


def is_classifier(config: PreTrainedConfig) -> bool:
    """Whether a saved configuration is that of a sequence classifier."""
    return any("SequenceClassification" in name for name in config.architectures or [])


def count_least_parameters(config: PreTrainedConfig) -> int:
    """A lower bound of the number of parameters of a GPT-2 or hfgpt model: those of its embeddings and matrices."""
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
    blocks = config.num_hidden_layers * (4 * width * width + 2 * width * inner)
    return width * (config.vocab_size + config.max_position_embeddings) + blocks
