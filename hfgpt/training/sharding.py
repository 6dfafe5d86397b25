"""Fully sharded data parallelism (FSDP2): each process has a part of the weights, gradients and optimizer state.

Accelerate shards the model; Trainer gathers and sums. This file has what they lack: FSDP2 on a CPU, sums of gradients
in float32, and shards on disk that any number of processes can read, as safetensors (accelerate's are pickles).

Source: Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel" (2023).
"""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainingArguments
from transformers.trainer import OPTIMIZER_NAME

from hfgpt.adapters import is_adapted
from hfgpt.errors import InputError

SHARDS_FOLDER = "optimizer"  # in a checkpoint
REST_FILE = "rest.pt"  # in that folder: everything in the state dict that is not sharded


def plan_shards(arguments: TrainingArguments) -> dict[str, Any] | None:
    """The arguments of accelerate's FSDP plugin, checked; None for a run without FSDP, or on one process.

    Args:
        arguments: The recipe's, after its `fsdp_config` was read. `accelerate launch` can also ask for FSDP.

    Raises:
        InputError: A setting would train a different model, or cannot be used on this machine.
    """
    if not arguments.fsdp and not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    if arguments.world_size == 1:
        os.environ.pop("ACCELERATE_USE_FSDP", None)
        return None
    if arguments.device.type == "cpu" and torch.accelerator.is_available():
        raise InputError(
            "training.fsdp on a CPU needs a machine without a GPU: set CUDA_VISIBLE_DEVICES to an empty string"
        )
    options = dict(arguments.fsdp_plugin_args or {})
    # By default, accelerate sums gradients, and returns the loss, with the 8 bits of bfloat16.
    if dtype := torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None:
        options["mixed_precision_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    if arguments.auto_find_batch_size:
        raise InputError("training.auto_find_batch_size cannot be combined with FSDP: remove it, and try batch sizes")
    if int(options.get("fsdp_version") or os.environ.get("FSDP_VERSION", 1)) != 2:
        raise InputError(
            "FSDP1 is not supported: set fsdp_version to 2 in the file of accelerate, or training.fsdp_config.version "
            "to 2"
        )
    if FullyShardedDataParallelPlugin(**options).activation_checkpointing:
        raise InputError(
            "the activation_checkpointing of FSDP draws other dropout in the backward pass: unset it, and set "
            "training.gradient_checkpointing instead"
        )
    return options


def shard_on_cpu(accelerator: Accelerator, options: Mapping[str, Any]):
    """Makes accelerate shard on a CPU, where it would train with DistributedDataParallel without saying so."""
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**options)


def gather_whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor, in every process; any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(whole: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor that every process has, if the other tensor is sharded."""
    if not isinstance(other, DTensor):
        return whole
    return distribute_tensor(whole, other.device_mesh, other.placements, src_data_rank=None)


def gather_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole weights, in the memory of the main process; empty in the others. An adapter's base is left out."""
    gathered = {}
    for parameter in model.parameters():  # tied ones once, so that they are saved once
        if parameter.requires_grad or not is_adapted(model):
            whole = gather_whole(parameter.detach())
            if distributed.get_rank() == 0:
                gathered[parameter] = whole.cpu()
    named = model.named_parameters(remove_duplicate=False)
    return {name: gathered[parameter] for name, parameter in named if parameter in gathered}


def load_shards(tensors: dict[str, torch.Tensor], folder: Path):
    """Reads tensors from the safetensors files of a folder in place, each process only its part."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # on one process, which is intended
        checkpoint.load(tensors, storage_reader=checkpoint.HuggingFaceStorageReader(str(folder)))


def save_optimizer(optimizer: torch.optim.Optimizer, checkpoint_folder: Path):
    """Saves the state dict of an optimizer: each process its shards, and the main process everything else."""
    state_dict, folder = optimizer.state_dict(), checkpoint_folder / SHARDS_FOLDER
    shards = {}
    for index, state in state_dict["state"].items():
        shards |= {f"{index}.{name}": value for name, value in state.items() if isinstance(value, DTensor)}
        state_dict["state"][index] = {name: value for name, value in state.items() if f"{index}.{name}" not in shards}
    checkpoint.save(shards, storage_writer=checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True))
    if distributed.get_rank() == 0:
        torch.save(state_dict, folder / REST_FILE)


def load_optimizer(optimizer: torch.optim.Optimizer, checkpoint_folder: Path):
    """Loads the state dict of a checkpoint, saved by `save_optimizer` or as a whole, on any number of processes."""
    folder = checkpoint_folder / SHARDS_FOLDER
    file = folder / REST_FILE if folder.is_dir() else checkpoint_folder / OPTIMIZER_NAME
    state_dict = torch.load(file, map_location="cpu", weights_only=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if folder.is_dir():
        shards = {}
        saved = checkpoint.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        for name, tensor in saved.items():
            index, _, field = name.partition(".")
            shards[name] = torch.empty_like(parameters[int(index)], dtype=tensor.properties.dtype)
            state_dict["state"][int(index)][field] = shards[name]
        load_shards(shards, folder)
    else:
        for index, state in state_dict["state"].items():
            shape = parameters[index].shape
            of_shape = [name for name, value in state.items() if getattr(value, "shape", None) == shape]
            state |= {name: shard_like(state[name], parameters[index]) for name in of_shape}
    optimizer.load_state_dict(state_dict)
