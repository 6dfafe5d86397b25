"""The recipe's section `training`: transformers' TrainingArguments, with other defaults, checks and more keys."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from hfgpt.data.report import counted
from hfgpt.errors import InputError
from hfgpt.models import find_device
from hfgpt.training.batches import count_rounds
from hfgpt.training.hardware import has_native_bf16
from hfgpt.training.sharding import plan_shards
from hfgpt.training.tensor_parallel import plan_parallelism
from hfgpt.training.trackers import check_installed

# The arguments that affect the result of training. The recipe.yaml of a run contains all of them, so that it keeps its
# meaning if a default changes, here or in transformers.
LEARNED = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size", "auto_find_batch_size"),
    "num_train_epochs",
    *(
        "max_steps",
        "max_seconds",
        "learning_rate",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "warmup_steps",
        "weight_decay",
    ),
    *("decay_all_parameters", "optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2"),
    *("adam_epsilon", "muon_learning_rate", "muon_momentum", "max_grad_norm", "label_smoothing_factor"),
    *("neftune_noise_alpha", "average_tokens_across_devices", "bf16", "fp16", "tf32", "seed", "data_seed"),
    *("dataloader_drop_last", "train_sampling_strategy", "load_best_model_at_end", "trainable", "last_blocks"),
)
# Ranges of numeric arguments: TrainingArguments accepts any value, or its errors do not name the key.
LIMITS = (
    (
        "at least 1",
        lambda value: value >= 1,
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps save_total_limit "
        "global_batch_size block_size max_rollbacks",
    ),
    (
        "above 0",
        lambda value: 0 < value < math.inf,
        "num_train_epochs logging_steps eval_steps save_steps max_seconds",
    ),
    (
        "finite and at least 0",
        lambda value: 0 <= value < math.inf,
        "learning_rate muon_learning_rate weight_decay warmup_steps max_grad_norm adam_epsilon eval_delay "
        "dataloader_num_workers",
    ),
    (
        "at least 0 and below 1",
        lambda value: 0 <= value < 1,
        "adam_beta1 adam_beta2 muon_momentum label_smoothing_factor dropout",
    ),
    (f"at least 0 and below {2**32}", lambda value: 0 <= value < 2**32, "seed data_seed"),
)


def check_numbers(section: str, arguments: Any):
    """Checks that numbers are within `LIMITS`; None is skipped.

    Args:
        section: Name of the recipe section, for error messages.
        arguments: An object with some of the names in `LIMITS`.

    Raises:
        InputError: A number is out of range.
    """
    for limit, holds, names in LIMITS:
        for name in names.split():
            value = getattr(arguments, name, None)
            if value is not None and not holds(value):
                raise InputError(f"{section}.{name} is {value}; it must be {limit}")


# Defaults for training from scratch; TrainingArguments' own are for fine-tuning.
FROM_SCRATCH = {"learning_rate": 1e-3, "num_train_epochs": 10.0, "warmup_steps": 0.05}


@dataclass
class HfGPTTrainingArguments(TrainingArguments):
    """The recipe's section `training`: the fields of `TrainingArguments`, with defaults for small GPTs, and more.

    Three fields have different defaults in a recipe that trains from scratch, without `model.path` and a first pass.

    Args:
        output_dir: Folder of the run; None: `runs/NAME`, with the recipe's name.
        learning_rate: Peak learning rate of AdamW. From scratch: 0.001; use less for wide models (6e-4 is usual for
            GPT-2 small).
        num_train_epochs: Number of epochs, unless `max_steps` is set. From scratch: 10.
        warmup_steps: Number of warmup steps, or, below 1, their fraction of all steps. From scratch: 0.05.
        bf16: bfloat16 mixed precision; None: only if the hardware supports it natively, never if it is emulated.
        global_batch_size: Total batch size (in rows) per optimizer step, across all processes. The rows are divided
            into batches of at most `per_device_train_batch_size`, and these among the processes, so that a run on
            another number of processes takes the same steps. None: `per_device_train_batch_size` x
            `gradient_accumulation_steps` x processes.
        max_seconds: Training time in seconds, instead of `max_steps` or `num_train_epochs`. The learning-rate schedule
            then follows the clock, so the result depends on the speed of the machine. A resumed run has the remaining
            time.
        muon_learning_rate: If set, train the weight matrices of the blocks with Muon at this learning rate, and the
            rest with AdamW at `learning_rate`; both use the same schedule.
        muon_momentum: Momentum of Muon; use less than the usual 0.95 for runs of a few hundred steps.
        decay_all_parameters: Whether to apply weight decay to biases and norms too, as in the book.
        on_divergence: What to do if the loss or the gradient norm is not finite: `stop`, or `rollback` to the weights
            and the optimizer state of the last checkpoint and continue with the next batches, at the same step and
            learning rate. On a CPU it is noticed at the same step, on an accelerator at the next logging step,
            evaluation or checkpoint.
        max_rollbacks: Number of rollbacks after which a run that diverges again stops.
        fsdp: Fully sharded data parallelism (FSDP2): divide weights, gradients and optimizer state among the
            processes; a single process keeps all. `fsdp_config` has its settings.
        disable_tqdm: Whether transformers' own progress bars are off.
        push_to_hub: Not supported: use the section `hub`.
    """

    bf16: bool | None = None
    global_batch_size: int | None = None
    max_seconds: float | None = None
    muon_learning_rate: float | None = None
    muon_momentum: float = 0.95
    decay_all_parameters: bool = False
    on_divergence: Literal["stop", "rollback"] = "stop"
    max_rollbacks: int = 3
    fsdp: bool = False
    logging_steps: float = 10
    # Trainer's default synchronizes with the device at every micro-batch, and hides non-finite losses.
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool = False
    disable_tqdm: bool | None = True
    log_level_replica: str = "passive"  # as in the main process; Trainer's default is more verbose
    save_total_limit: int | None = 2
    dataloader_pin_memory: bool | None = None
    # Every parameter has a gradient at every step, so do not search the graph for unused ones.
    ddp_find_unused_parameters: bool | None = False

    def __post_init__(self):
        if self.max_steps < 1 and self.max_steps != -1:
            raise InputError(
                f"training.max_steps is {self.max_steps}; it must be at least 1, or -1 to train for num_train_epochs"
            )
        check_numbers("training", self)
        if self.max_seconds is not None:
            self._check_time_limit()
        if self.push_to_hub:
            raise InputError(
                "training.push_to_hub would push checkpoints without the model's code and hide errors: set "
                "hub.repo_id instead"
            )
        check_installed(self.report_to)
        device = torch.device("cpu") if self.use_cpu else find_device()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and has_native_bf16(device)
        if self.dataloader_pin_memory is None:
            self.dataloader_pin_memory = device.type == "cuda"
        # TrainingArguments rejects bf16 on a CPU unless use_cpu is set.
        self.use_cpu = device.type == "cpu"
        super().__post_init__()
        _check_precision(self)
        if self.world_size > 1 and not self.average_tokens_across_devices:
            raise InputError(
                "training.average_tokens_across_devices is false, so the loss would depend on how rows are divided "
                "among processes: leave it out"
            )
        self.parallelism_config = plan_parallelism(self)
        self.fsdp_plugin_args = plan_shards(self)
        self.fsdp = self.fsdp and self.is_fully_sharded  # Trainer would refuse it on one process
        if self.global_batch_size is not None:
            self._check_global_batch(self.global_batch_size, self.data_processes)
        if self.on_divergence not in ("stop", "rollback"):
            raise InputError(f"training.on_divergence is '{self.on_divergence}'; it must be stop or rollback")
        if self.on_divergence == "rollback" and (self.save_strategy == SaveStrategy.NO or self.save_only_model):
            raise InputError(
                "training.on_divergence is rollback, which needs checkpoints with the optimizer: unset "
                "training.save_strategy: no and training.save_only_model"
            )
        for name in ("deepspeed", "auto_find_batch_size"):
            if self.on_divergence == "rollback" and getattr(self, name):
                raise InputError(
                    f"training.on_divergence is rollback, which does not support training.{name}: unset it"
                )

    def _check_time_limit(self):
        if self.max_steps > 0:
            raise InputError(
                f"training.max_steps is {self.max_steps}, and cannot be combined with training.max_seconds: remove "
                "one of them, or pass --training.max_steps -1"
            )
        if self.warmup_steps >= 1:
            raise InputError(
                f"training.warmup_steps is {self.warmup_steps:g} steps: with training.max_seconds, it must be a "
                "fraction of the time, such as 0.05"
            )
        counted = {"num_decay_steps", "num_stable_steps", "timescale"} & set(self.lr_scheduler_kwargs or ())
        if counted or self.lr_scheduler_type == "inverse_sqrt":
            raise InputError(
                f"training.lr_scheduler_{'kwargs' if counted else 'type'} has {min(counted, default='inverse_sqrt')}, "
                "which counts steps: with training.max_seconds, use another schedule, such as linear or cosine"
            )
        for name in ("logging_steps", "eval_steps", "save_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(
                    f"training.{name} is {value:g}, a fraction of all steps, whose number is unknown with "
                    "training.max_seconds: set it to at least 1"
                )

    def _check_global_batch(self, rows: int, processes: int):
        if self.gradient_accumulation_steps != 1:
            raise InputError(
                f"training.gradient_accumulation_steps is {self.gradient_accumulation_steps}, and cannot be combined "
                "with training.global_batch_size, which determines it: remove one of them"
            )
        if not self.has_fixed_batches:
            raise InputError(
                "training.global_batch_size cannot be combined with auto_find_batch_size or train_sampling_strategy: "
                "batch_rebalance, whose batches vary in size: remove one of them"
            )
        if self.batches_per_step < processes:
            remedy = f"lower training.per_device_train_batch_size to at most {rows // processes}"
            raise InputError(
                f"training.global_batch_size is {rows}, which is only {counted(self.batches_per_step, 'batches')} of "
                f"{self.per_device_train_batch_size} rows for {processes} processes: "
                + (remedy if rows >= processes else f"raise it to at least {processes}")
            )

    @property
    def has_fixed_batches(self) -> bool:
        """Whether all batches have the same number of rows, except at the end of an epoch."""
        return not self.auto_find_batch_size and self.train_sampling_strategy != "batch_rebalance"

    @property
    def is_sharded(self) -> bool:
        """Whether each process has only a part of the weights, by FSDP or tensor parallelism."""
        return self.is_fully_sharded or self.is_tensor_parallel

    @property
    def is_fully_sharded(self) -> bool:
        """Whether FSDP divides the weights, gradients and optimizer state, each process taking other rows."""
        return self.fsdp_plugin_args is not None

    @property
    def is_tensor_parallel(self) -> bool:
        """Whether all processes take the same rows, each with a part of the matrices."""
        return self.parallelism_config is not None

    @property
    def data_processes(self) -> int:
        """Number of processes with different rows."""
        return 1 if self.is_tensor_parallel else self.world_size

    @property
    def data_index(self) -> int:
        """Index of this process among those with different rows."""
        return 0 if self.is_tensor_parallel else self.process_index

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step, in all processes."""
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.data_processes
        return rows if self.global_batch_size is None else self.global_batch_size

    @property
    def rows_per_process(self) -> int:
        """The most rows of an optimizer step that one process takes."""
        rounds = count_rounds(self, self.rows_per_step)
        return min(rounds * self.per_device_train_batch_size, self.rows_per_step)

    @property
    def batches_per_step(self) -> int:
        """Batches of an optimizer step, in all processes."""
        return -(-self.rows_per_step // self.per_device_train_batch_size)


@dataclass
class FineTuningArguments(HfGPTTrainingArguments):
    """The recipe's section `training` for classification and instructions.

    Args:
        trainable: What to train: `all` weights; `last_blocks` (with the final norm and the head); only the `head`; or
            the `adapters` of that section. None: the adapters if the recipe has any, else all.
        last_blocks: Number of blocks for `last_blocks`; None: one.
        train_sampling_strategy: Order of the training rows: `group_by_length` (the least padding), `random`,
            `sequential` or `batch_rebalance`.
    """

    trainable: Literal["all", "last_blocks", "head", "adapters"] | None = None
    last_blocks: int | None = None
    train_sampling_strategy: str = "group_by_length"

    def __post_init__(self):
        if self.trainable not in (None, "all", "last_blocks", "head", "adapters"):
            raise InputError(
                f"training.trainable is '{self.trainable}'; it must be all, last_blocks, head or adapters"
            )
        if self.last_blocks is not None and self.last_blocks < 1:
            raise InputError(f"training.last_blocks is {self.last_blocks}; it must be at least 1")
        if self.last_blocks is not None and self.trainable != "last_blocks":
            raise InputError("training.last_blocks is set: also set training.trainable to last_blocks, or unset it")
        super().__post_init__()


@dataclass
class FirstPassArguments:
    """The recipe's section `pretraining`: the first pass of a classifier, a language model of the training texts.

    It uses the texts of the training split and those dropped to balance the classes, but never validation or test
    texts (Gururangan et al., "Don't Stop Pretraining", 2020). Other settings are those of the section `training`.

    Args:
        max_steps: Number of optimizer steps.
        per_device_train_batch_size: Blocks per optimizer step, in all processes.
        block_size: Tokens predicted per block; None: the model's context length.
        learning_rate: Learning rate of AdamW.
        muon_learning_rate: Learning rate of Muon for the matrices in the blocks; None: AdamW for all parameters.
        muon_momentum: Momentum of Muon.
        weight_decay: Weight decay of both optimizers.
        warmup_steps: Steps of linear warmup, followed by linear decay.
        dropout: Replaces the three dropouts of the section `model`.
    """

    max_steps: int = 300
    per_device_train_batch_size: int = 16
    block_size: int | None = None
    learning_rate: float = 0.004
    muon_learning_rate: float | None = 0.02
    muon_momentum: float = 0.95
    weight_decay: float = 0.0
    warmup_steps: int = 20
    dropout: float = 0.0

    def __post_init__(self):
        if self.max_steps < 1:
            raise InputError(f"pretraining.max_steps is {self.max_steps}; it must be at least 1")
        check_numbers("pretraining", self)


def _check_precision(arguments: HfGPTTrainingArguments):
    """Checks that the file of `accelerate launch` does not set another precision than the recipe, which is recorded.

    Raises:
        InputError: It does.
    """
    precision = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "no"
    if (launched := getattr(arguments, "mixed_precision", precision)) != precision:
        raise InputError(
            f"mixed_precision is {launched} in the accelerate file, but training.{launched} is false: set "
            f'mixed_precision to "no", and training.{launched} to true if you want it'
        )
