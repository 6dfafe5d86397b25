"""Tensor parallelism: processes divide each matrix, and compute the same rows together.

PyTorch carries out the model's plan (`tp_plan`). The other weights become replicated DTensors, so that optimizers,
gradient clipping and checkpoints treat all weights as they do with FSDP.

Source: Shoeybi et al., "Megatron-LM" (2019), section 3.
"""

import functools
import os
from contextlib import ExitStack

import torch
from accelerate import Accelerator, ParallelismConfig
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hfgpt.adapters import is_adapted
from hfgpt.errors import InputError

STYLES = {
    "colwise": ColwiseParallel,
    "colwise_gather_output": functools.partial(ColwiseParallel, output_layouts=Replicate()),
    "rowwise": RowwiseParallel,
    "embedding_rowwise": functools.partial(RowwiseParallel, input_layouts=Replicate()),
}
FLAG = "ACCELERATE_USE_PARALLELISM_CONFIG"  # set by `accelerate launch`


def plan_parallelism(arguments: TrainingArguments) -> ParallelismConfig | None:
    """The parallelism of the arguments or of `accelerate launch`, checked; None without any, or on one process.

    Raises:
        InputError: It is not tensor parallelism over all processes, or cannot be combined with another setting.
    """
    config = arguments.parallelism_config
    if config is None and parse_flag_from_env(FLAG):
        config = ParallelismConfig()  # reads the environment
    os.environ.pop(FLAG, None)  # the arguments have it from here on
    if config is None or arguments.world_size == 1:
        return None
    if config.tp_size != arguments.world_size or config.total_size != config.tp_size:
        raise InputError(
            f"parallelism_config has a tp_size of {config.tp_size} in a total size of {config.total_size}, for "
            f"{arguments.world_size} processes: set tp_size to {arguments.world_size} and every other size to 1; for "
            "other ways to divide a model, set training.fsdp"
        )
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise InputError("the accelerate file asks for both FSDP and tensor parallelism: remove one of them")
    for name in ("fsdp", "fp16", "torch_compile", "auto_find_batch_size", "deepspeed"):
        if getattr(arguments, name):
            raise InputError(f"training.{name} cannot be combined with tensor parallelism: unset it")
    if not hasattr(Trainer, "_sync_replicated_trainable_parameters"):
        raise InputError("training with tensor parallelism needs transformers 5.23: upgrade it, or set training.fsdp")
    return config


def check_divisible(model: nn.Module, processes: int):
    """Checks that the model can be divided among a number of processes.

    Raises:
        InputError: It cannot.
    """
    if is_adapted(model):
        raise InputError("adapters cannot be trained with tensor parallelism: use data parallelism or training.fsdp")
    for name in ("num_attention_heads", "intermediate_size"):
        if (size := getattr(model.config, name)) % processes:
            raise InputError(f"model.{name} is {size}, which cannot be divided among {processes} processes")


def enable_parallelism(accelerator: Accelerator, config: ParallelismConfig):
    """Makes accelerate give all processes the same rows of an evaluation, on any device."""
    accelerator.state.parallelism_config = config
    accelerator.state.device_mesh = config.get_device_mesh(accelerator.device.type)


def divide_model(model: PreTrainedModel, mesh: DeviceMesh):
    """Divides the weights of a model among the processes of a mesh, in place; all must have the whole model.

    Raises:
        InputError: As `check_divisible`.
    """
    check_divisible(model, mesh.size())
    # The embedding is divided as the head is, whose weights it may be.
    plan = {f"{'model.' if hasattr(model, 'model') else ''}embed_tokens": "embedding_rowwise", **model.tp_plan}
    parallelize_module(model, mesh, {name: STYLES[style]() for name, style in plan.items()}, src_data_rank=None)
    for module in model.modules():
        if any(not isinstance(weight, DTensor) for weight in module.parameters(recurse=False)):
            distribute_module(module, mesh, input_fn=_replicate_input, output_fn=_to_local)
    model.tie_weights()
    if model.config.attn_pdrop:
        for block in model.base_model.layers:
            dropout = HeadDropout(mesh)
            block.self_attn.register_forward_pre_hook(dropout.begin)
            block.self_attn.o_proj.register_forward_pre_hook(dropout.end)


def _replicate_input(module: nn.Module, inputs: tuple[torch.Tensor, ...], mesh: DeviceMesh) -> tuple[DTensor, ...]:
    return tuple(DTensor.from_local(tensor, mesh, [Replicate()], run_check=False) for tensor in inputs)


def _to_local(module: nn.Module, output: DTensor, mesh: DeviceMesh) -> torch.Tensor:
    return output.to_local()


class HeadDropout:
    """Draws a different dropout of attention weights in each process, since each has other heads.

    All other dropout must be, and is, the same in all processes.
    """

    def __init__(self, mesh: DeviceMesh):
        self.mesh, self.own = mesh, ExitStack()

    def begin(self, module: nn.Module, inputs: tuple):
        """Called before the projections of an attention layer, where the processes have the same random state."""
        seed = int(torch.randint(2**62, ()))
        devices = [] if self.mesh.device_type == "cpu" else [torch.accelerator.current_device_index()]
        self.own.enter_context(torch.random.fork_rng(devices, device_type=self.mesh.device_type))
        torch.manual_seed(seed + self.mesh.get_local_rank())

    def end(self, module: nn.Module, inputs: tuple):
        """Called before the output projection, to return to the common random state."""
        self.own.close()
