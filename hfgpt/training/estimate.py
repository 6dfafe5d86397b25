"""Estimated cost of a run: memory is computed, time is measured by a short benchmark on this machine.

Sources: Rajbhandari et al., "ZeRO" (2020), section 3.1, for the bytes of weights, gradients and optimizer state;
Korthikanti et al., "Reducing Activation Recomputation" (2022), section 4, for the activations of a block.
"""

import copy
import math
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.trainer_utils import IntervalStrategy

from hfgpt.configuration_hfgpt import HfGPTConfig
from hfgpt.data.report import counted
from hfgpt.errors import InputError
from hfgpt.training.arguments import HfGPTTrainingArguments
from hfgpt.training.flops import training_flops_per_token
from hfgpt.training.hardware import describe_device, process_memory_bytes, training_heap
from hfgpt.training.optimizers import hidden_matrix_names
from hfgpt.training.tensor_parallel import check_divisible
from hfgpt.training.trainer import HfGPTTrainer


@dataclass
class Estimate:
    """The estimated cost of a run; memory is that of each process.

    Args:
        parameters: Trainable parameters, tied ones counted once.
        weights_bytes, gradients_bytes, optimizer_bytes: Memory for weights, gradients and optimizer state.
        activations_bytes: Memory for the activations of one micro-batch, including logits.
        process_bytes: Other memory of this process when the run was planned: libraries and data. 0 on an accelerator,
            whose memory holds only tensors; its own context is not counted.
        tokens_per_step: Tokens predicted per optimizer step on all devices, averaged over an epoch, whose last step
            may be smaller.
        steps: Optimizer steps; with a time limit, those that the measured speed allows, or 0 if it was not measured.
        flops_per_token: FLOPs per token, forward and backward.
        tokens_per_second: Measured by the benchmark on this machine; None if it was not run, if the whole model, of
            which each process will have a part, does not fit on one device, or with tensor parallelism.
        device: Device of the benchmark.
        gathered_bytes: With FSDP, memory for weights of other processes during a step.
        processes: Number of processes of the run.
        shards: Number of parts of the model, each in another process; 1: each process has the whole model.
        rows_per_process: Rows of an optimizer step in each process.
        share: Fraction of the training text that was tokenized to estimate the number of steps.
        first_pass: Cost of a classifier's first pass, not included in the other fields.
    """

    parameters: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    tokens_per_step: int
    steps: int
    flops_per_token: float
    tokens_per_second: float | None = None
    device: str | None = None
    process_bytes: int = 0
    gathered_bytes: int = 0
    processes: int = 1
    shards: int = 1
    rows_per_process: int = 1
    share: float = 1.0
    first_pass: "Estimate | None" = None

    @property
    def memory_bytes(self) -> int:
        tensors = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.activations_bytes
        return tensors + self.gathered_bytes + self.process_bytes

    @property
    def tokens(self) -> int:
        return self.tokens_per_step * self.steps

    @property
    def flops(self) -> float:
        return self.flops_per_token * self.tokens

    @property
    def seconds(self) -> float | None:
        return self.tokens / self.tokens_per_second if self.tokens_per_second else None

    def to_dict(self) -> dict:
        derived = ("memory_bytes", "tokens", "flops", "seconds")
        first_pass = {"first_pass": self.first_pass.to_dict()} if self.first_pass else {}
        left_out = ("first_pass", *(["share"] if self.share == 1 else []))
        own = {name: value for name, value in asdict(self).items() if name not in left_out}
        return own | {name: getattr(self, name) for name in derived} | first_pass


def estimate_run(model: PreTrainedModel, arguments: HfGPTTrainingArguments, block_size: int, blocks: int) -> Estimate:
    """The computed cost of a run, without a benchmark.

    Args:
        model: The model to train; may be on the meta device.
        arguments: Batch size, gradient accumulation steps, epochs or steps, precision, optimizer.
        block_size: Tokens predicted per row.
        blocks: Rows of the training split.
    """
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    parameters = sum(trainable.values())
    muon = hidden_matrix_names(model) if arguments.muon_learning_rate is not None else set()
    # AdamW keeps two float32 averages per weight, Muon one.
    optimizer_bytes = sum(size * (4 if name in muon else 8) for name, size in trainable.items())
    left_out = blocks % arguments.per_device_train_batch_size if arguments.dataloader_drop_last else 0
    steps_per_epoch = max(-(-(blocks - left_out) // arguments.rows_per_step), 1)
    steps = math.ceil(arguments.num_train_epochs * steps_per_epoch)
    if arguments.max_steps > 0:
        steps = arguments.max_steps
    shards = arguments.world_size if arguments.is_sharded else 1
    return Estimate(
        parameters=parameters,
        weights_bytes=_weights_bytes(model) // shards,
        gradients_bytes=4 * parameters // shards,
        optimizer_bytes=optimizer_bytes // shards,
        activations_bytes=_activations_bytes(model.config, arguments, block_size),
        tokens_per_step=round((blocks - left_out) * block_size / steps_per_epoch),
        steps=steps,
        flops_per_token=training_flops_per_token(model.config, block_size),
        gathered_bytes=_gathered_bytes(model, arguments) if arguments.is_fully_sharded else 0,
        processes=arguments.world_size,
        shards=shards,
        rows_per_process=arguments.rows_per_process,
    )


def _weights_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _gathered_bytes(model: PreTrainedModel, arguments: HfGPTTrainingArguments) -> int:
    """Bytes of the weights that FSDP keeps whole during a step: two blocks, and everything outside of the blocks."""
    width = 2 if arguments.bf16 or arguments.fp16 else 4
    sizes = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        sizes[".layers." in f".{name}"] += width * parameter.numel()
    return sizes[False] + sizes[True] * min(2, model.config.num_hidden_layers) // model.config.num_hidden_layers


def _activations_bytes(config: HfGPTConfig, arguments: HfGPTTrainingArguments, length: int) -> int:
    """Bytes of activations for the backward pass of one micro-batch."""
    # A block keeps about nine tensors of the hidden size (inputs of the norms, projections, attention and residuals)
    # and two of the MLP's; eager attention also keeps two score matrices. The loss keeps the logits twice, in float32.
    width = 2 if arguments.bf16 or arguments.fp16 else 4
    tokens = arguments.per_device_train_batch_size * length
    block = width * (9 * config.hidden_size + 2 * config.intermediate_size)
    if config._attn_implementation == "eager":
        block += 2 * width * config.num_attention_heads * length
    residuals = config.num_hidden_layers * width * config.hidden_size
    layers = 1 if arguments.gradient_checkpointing else config.num_hidden_layers
    return tokens * (layers * block + residuals + 2 * 4 * config.vocab_size)


def probe_tokens_per_second(
    model: PreTrainedModel, arguments: HfGPTTrainingArguments, block_size: int, seconds: float
) -> float:
    """Tokens per second on one device, including optimizer steps at the recipe's gradient accumulation.

    Measured by `probe_seconds`.
    """
    row_seconds, step_seconds = probe_seconds(model, arguments, block_size, seconds)
    rows_per_step = arguments.rows_per_step / arguments.data_processes
    return rows_per_step * block_size / (rows_per_step * row_seconds + step_seconds)


def probe_seconds(
    model: PreTrainedModel, arguments: HfGPTTrainingArguments, block_size: int, seconds: float
) -> tuple[float, float]:
    """Trains a copy of the model on random tokens for `seconds`; changes neither the model nor the random state.

    The batch grows up to the micro-batch size as time allows, so a large model on a slow machine uses fewer rows.

    Returns:
        Seconds per row, forward and backward, and seconds per optimizer step, on one device.
    """
    arguments = copy.copy(arguments)
    arguments.eval_strategy = IntervalStrategy.NO  # Trainer would require an evaluation dataset
    arguments.report_to = []
    arguments.parallelism_config = None  # each process has its own benchmark
    with _unchanged_random_state(), tempfile.TemporaryDirectory() as folder:
        arguments.output_dir = folder  # Trainer creates it
        try:
            trainer = HfGPTTrainer(model=copy.deepcopy(model), args=arguments)
            model = trainer.model.train().to(arguments.device)  # with FSDP, Trainer would move it later
            optimizer = trainer.create_optimizer()
            trainer.create_scheduler(num_training_steps=1)
        # Arguments that Trainer rejects are reported here, before anything is written.
        except (ValueError, TypeError, RuntimeError, ImportError) as error:
            raise InputError(f"training: {' '.join(str(error).split())}") from error
        with training_heap(arguments.device, arguments.gradient_checkpointing):
            row_seconds = _time_row(trainer, model, block_size, seconds)
            for _ in range(2):  # the first step creates the optimizer's state
                began = time.perf_counter()
                optimizer.step()
                _synchronize(model.device)
                step_seconds = time.perf_counter() - began
    return row_seconds, step_seconds


def _time_row(trainer: HfGPTTrainer, model: PreTrainedModel, block_size: int, seconds: float) -> float:
    """Seconds per row, forward and backward, at the largest batch size for which three batches fit in `seconds`."""
    rows, full = 1, trainer.args.per_device_train_batch_size
    loss_only = {"skip_logits": True} if trainer.skips_logits else {}
    start, times = time.perf_counter(), []
    while len(times) < 2 or time.perf_counter() - start < seconds:
        ids = torch.randint(model.config.vocab_size, (rows, block_size), device=model.device)
        labels = torch.zeros_like(ids[:, 0]) if model.config.problem_type else ids
        began = time.perf_counter()
        with trainer.accelerator.autocast():
            loss = model(input_ids=ids, labels=labels, use_cache=False, **loss_only).loss
        loss.backward()
        loss.item()  # waits for an accelerator
        times.append(time.perf_counter() - began)
        # Twice the rows take up to twice the time; for short rows hardly more.
        if len(times) == 2 and rows < full and 2 * 3 * times[1] < seconds:
            rows, times = min(2 * rows, full), []
    return min(times[1:]) / rows  # the first batch of a size is a warm-up


@contextmanager
def _unchanged_random_state():
    """Restores the three random generators that Trainer seeds in its constructor."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


def _synchronize(device: torch.device):
    if device.type != "cpu":
        torch.accelerator.synchronize()


def describe_time(estimate: Estimate) -> str:
    """The time and speed of a run, as in `about 12 s at 1,234 tokens/s`."""
    if estimate.seconds is None:
        return "time unknown, since the benchmark needs the whole model on one device"
    return f"about {estimate.seconds:,.0f} s at {estimate.tokens_per_second:,.0f} tokens/s"


def describe_steps(estimate: Estimate) -> str:
    """The number of steps and their size, as in `500 steps of 2,048 tokens on average`."""
    number = counted(estimate.steps, "steps") if estimate.steps else "an unknown number of steps"
    return f"{number} of {estimate.tokens_per_step:,} tokens on average"


def plan_run(
    model: PreTrainedModel, arguments: HfGPTTrainingArguments, block_size: int, blocks: int, seconds: float = 2.0
) -> Estimate:
    """`estimate_run`, plus the memory of this process and the speed of this machine from a benchmark of `seconds`."""
    if arguments.is_tensor_parallel:
        check_divisible(model, arguments.world_size)
    estimate = estimate_run(model, arguments, block_size, blocks)
    if arguments.device.type == "cpu":
        estimate.process_bytes = max(process_memory_bytes() - _weights_bytes(model), 0)
    estimate.device = describe_device(arguments.device)
    if arguments.max_seconds is not None:
        estimate.steps = 0  # unknown without a benchmark
    with explained_memory(arguments):
        try:
            speed = probe_tokens_per_second(model, arguments, block_size, seconds)
            if not arguments.is_tensor_parallel:
                estimate.tokens_per_second = arguments.world_size * speed
                if arguments.max_seconds is not None:
                    tokens = arguments.max_seconds * estimate.tokens_per_second
                    estimate.steps = max(round(tokens / estimate.tokens_per_step), 1)
        except torch.OutOfMemoryError:
            if not arguments.is_sharded:
                raise
    return estimate


@contextmanager
def explained_memory(arguments: HfGPTTrainingArguments) -> Iterator[None]:
    """Says how to train the same steps with less memory if a device has too little.

    What a process takes at once is never chosen by what fits: each batch has its own dropout, so that a run would
    depend on the machine.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # Without memory, PyTorch raises a subclass of RuntimeError, and on a CPU, a plain one.
        if type(error) is RuntimeError and "can't allocate memory" not in str(error):
            raise
        rows, remedies = arguments.per_device_train_batch_size, []
        if rows > 1:
            unset = ", without gradient_accumulation_steps" if arguments.gradient_accumulation_steps > 1 else ""
            remedies.append(
                f"set training.per_device_train_batch_size to {rows // 2} and training.global_batch_size to "
                f"{arguments.rows_per_step}{unset}, for steps of as many rows"
            )
        if not arguments.gradient_checkpointing:
            remedies.append("set training.gradient_checkpointing to true")
        remedies.append("train a smaller model or shorter rows")
        raise InputError(
            f"{describe_device(arguments.device)} has too little memory for {counted(rows, 'rows')} at once: "
            f"{'; or '.join(remedies)}"
        ) from error
