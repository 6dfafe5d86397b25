"""transformers' Trainer and TrainingArguments, changed only where they are wrong for causal language models.

Each override documents what Trainer 5.23 does instead. Everything else, such as gradient accumulation and distributed
training, is Trainer's.
"""

import copy
import functools
import itertools
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from accelerate.utils import gather_object, parse_flag_from_env
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerState, TrainingArguments, default_data_collator
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import SaveStrategy, TrainOutput, has_length

from hfgpt.adapters import is_adapted, saved_tensors
from hfgpt.configuration_hfgpt import HfGPTConfig
from hfgpt.data.report import counted
from hfgpt.errors import STOP_SIGNALS, InputError
from hfgpt.evaluation.perplexity import measure_perplexity
from hfgpt.models import fact_of, find_device, quiet_bars, save_labels
from hfgpt.saving import CHECKSUMS_FILE, explain_full_disk, quote_path, read_checksums, write_checksums
from hfgpt.training.batches import (
    EpochCallback,
    RowOrder,
    StepBatches,
    StepLoader,
    count_rounds,
    draw_seed,
    ignore_labels,
)
from hfgpt.training.checkpoints import (
    find_damage,
    find_last_checkpoint,
    list_checkpoints,
    remove_old_checkpoints,
    step_of,
)
from hfgpt.training.divergence import ROLLBACK, find_rollbacks
from hfgpt.training.flops import training_flops_per_token
from hfgpt.training.gradients import PairwiseSums
from hfgpt.training.hardware import has_native_bf16
from hfgpt.training.optimizers import MuonFactory, MuonWithAdamW
from hfgpt.training.sharding import (
    gather_weights,
    gather_whole,
    load_optimizer,
    load_shards,
    plan_shards,
    save_optimizer,
    shard_on_cpu,
)
from hfgpt.training.speed import SpeedMeter
from hfgpt.training.trackers import check_installed

# The arguments that affect the result of training. The recipe.yaml of a run contains all of them, so that it keeps its
# meaning if a default changes, here or in transformers.
LEARNED = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size", "auto_find_batch_size"),
    "num_train_epochs",
    *("max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay"),
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
    ("above 0", lambda value: 0 < value < math.inf, "num_train_epochs logging_steps eval_steps save_steps"),
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
        if self.parallelism_config is not None or parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
            raise InputError(
                "training with a parallelism_config (tensor or context parallelism) is not supported: remove it, and "
                "divide the model among processes with training.fsdp"
            )
        if self.world_size > 1 and not self.average_tokens_across_devices:
            raise InputError(
                "training.average_tokens_across_devices is false, so the loss would depend on how rows are divided "
                "among processes: leave it out"
            )
        self.fsdp_plugin_args = plan_shards(self)
        self.fsdp = self.fsdp and self.is_sharded  # Trainer would refuse it on one process
        if self.global_batch_size is not None:
            self._check_global_batch(self.global_batch_size, self.world_size)
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
        """Whether each process has only a part of the weights, by FSDP."""
        return self.fsdp_plugin_args is not None

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step, in all processes."""
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size
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


class HfGPTTrainer(Trainer):
    """Trainer for causal language models, and for classifiers with a suitable `measure` and loss.

    Args:
        measure: Called by `evaluate` with the model, the batches, and `spread`, see `measure_perplexity`; its result
            has `to_dict(prefix)`.
        args, kwargs: Arguments of `transformers.Trainer`; blocks of equal length do not need a collator.
    """

    def __init__(
        self,
        model=None,
        args=None,
        data_collator=None,
        train_dataset=None,
        *others,
        measure: Callable[..., Any] = measure_perplexity,
        **kwargs,
    ):
        is_stream = isinstance(train_dataset, IterableDataset) or not has_length(train_dataset)
        if isinstance(model, torch.nn.Module) and any(isinstance(weight, DTensor) for weight in model.parameters()):
            # With tensor parallelism, processes need the same rows, but different dropout for their attention heads.
            raise InputError(
                "the model was divided among processes when it was loaded (distributed_config or tp_plan), which is "
                "not supported in training: load it without, and set training.fsdp"
            )
        # Whether the rows of each step are known in advance.
        self.has_step_batches = args.has_fixed_batches and not is_stream
        if args.global_batch_size is not None and train_dataset is not None:
            if not self.has_step_batches:
                raise InputError("training.global_batch_size needs a dataset with a length: remove it")
            args = copy.copy(args)
            args.gradient_accumulation_steps = count_rounds(args, args.rows_per_step)
        super().__init__(model, args, data_collator or default_data_collator, train_dataset, *others, **kwargs)
        if self.args.n_gpu > 1:  # Trainer would use DataParallel, and scale some losses by the number of GPUs
            raise InputError(
                f"this process sees {self.args.n_gpu} GPUs: use accelerate launch, or select one GPU with "
                "CUDA_VISIBLE_DEVICES"
            )
        self.batches: StepBatches | None = None
        # Whether the current and the last batch only keep this process in step with the others.
        self.is_filler = self.was_filler = False
        self.measure, self.sums = measure, None
        self.speed: SpeedMeter | None = None  # adds speed and memory to the log
        self.last_scheduled: Path | None = None  # the checkpoint to roll back to
        self.rolled_back_at = 0  # step of the last rollback
        self.checks_each_step = self.args.device.type == "cpu"  # an accelerator would have to be waited for
        self.save_error: Exception | None = None
        if self.args.muon_learning_rate is not None:
            self.optimizer_cls_and_kwargs = (
                MuonFactory,
                {
                    "decay_names": set(self.get_decay_parameter_names(self.model)),
                    "muon_learning_rate": self.args.muon_learning_rate,
                    "muon_momentum": self.args.muon_momentum,
                    "weight_decay": self.args.weight_decay,
                    "lr": self.args.learning_rate,
                    "betas": (self.args.adam_beta1, self.args.adam_beta2),
                    "eps": self.args.adam_epsilon,
                    "fused": True,
                },
            )

    def create_accelerator_and_postprocess(self):
        """Accelerate ignores FSDP on a CPU."""
        super().create_accelerator_and_postprocess()
        if self.args.is_sharded and self.args.device.type == "cpu":
            shard_on_cpu(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def get_train_dataloader(self) -> DataLoader:
        """Trainer's batches depend on the number of processes, and on the random state at the start of an epoch.

        Workers ignore signals, which schedulers send to all processes of a job: the run must save first.
        """
        loader = self._step_loader() if self.has_step_batches else super().get_train_dataloader()
        loader.worker_init_fn = functools.partial(_start_worker, loader.worker_init_fn)
        return loader

    def _step_loader(self) -> StepLoader:
        args, rows, collate = self.args, self.train_dataset, self.data_collator
        if isinstance(rows, datasets.Dataset):
            rows = self._remove_unused_columns(rows, description="Training")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="Training")
        groups = args.train_sampling_strategy == "group_by_length"
        order = RowOrder(
            len(rows),
            args.seed if args.data_seed is None else args.data_seed,
            args.train_sampling_strategy,
            self._row_lengths() if groups else None,
            args.rows_per_step,
        )
        self.batches = StepBatches(order, args)
        self.remove_callback(EpochCallback)
        self.add_callback(EpochCallback(self.batches.steps, rows))
        return StepLoader(
            rows,
            batch_sampler=self.batches,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            in_order=args.dataloader_in_order,
        )

    def _row_lengths(self) -> list[int]:
        rows, column = self.train_dataset, self.args.length_column_name
        if isinstance(rows, datasets.Dataset) and column in rows.column_names:
            return list(rows[column])
        return [len(row["input_ids"]) for row in rows]

    def get_decay_parameter_names(self, model) -> list[str]:
        if self.args.decay_all_parameters:
            return [name for name, _ in model.named_parameters()]
        return super().get_decay_parameter_names(model)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Trainer's label smoothing shifts the labels itself, and so loses the last target of `shift_labels`."""
        if self.label_smoother is None or "shift_labels" not in inputs:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss, outputs = loss if return_outputs else (loss, None)
        else:
            outputs = model(
                **{name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
            )
            loss = self.label_smoother(outputs, inputs["shift_labels"], num_items_in_batch=num_items_in_batch)
            if num_items_in_batch is not None:
                loss = loss * self.accelerator.num_processes
        loss = loss * 0 if self.is_filler else loss
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Trainer would count the labels of batches that only keep this process in step with the others."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        first = self.args.process_index * len(batches)
        self.indices = iter(range(first, first + len(batches)))  # of the batches in the step that begins
        real = self.batches.count_batches(self.state.global_step) - first if self.batches else len(batches)
        learned = [batch if index < real else ignore_labels(batch) for index, batch in enumerate(batches)]
        if self.sums:
            self.sums.clear()
        return batches, self._get_num_items_in_batch(learned, device)

    def training_step(self, model, *args, **kwargs):
        """Trainer's dropout and sums of gradients depend on the number of processes."""
        index = next(self.indices)
        self.is_filler = self.batches is not None and index >= self.batches.count_batches(self.state.global_step)
        torch.manual_seed(draw_seed(self.args.seed, self.state.global_step, index))
        syncs_each = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        sums_pairwise = self.args.device.type == "cpu" and not self.is_fsdp_enabled and not syncs_each
        if sums_pairwise and (self.sums is None or self.sums.model is not model):
            self.sums = PairwiseSums(model)
        try:
            loss = super().training_step(model, *args, **kwargs)
        finally:
            self.was_filler, self.is_filler = self.is_filler, False
        if self.sums:
            self.sums.add(is_last=self.accelerator.sync_gradients)
        return loss

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, **kwargs):
        """Trainer logs non-finite values and goes on, and saves such weights.

        On a CPU, every step is checked. On an accelerator, the losses since the last logging step are checked together
        when Trainer waits for the device anyway: at the next logging step, evaluation or checkpoint. All processes
        come to the same result at the same step.
        """
        control, step = self.control, self.state.global_step
        writes = control.should_evaluate or control.should_save
        if step > self.rolled_back_at and (writes or control.should_log or self.checks_each_step):
            fault = self._find_divergence(tr_loss, grad_norm, check_weights=writes)
            if fault and self.args.on_divergence == "stop":
                raise InputError(f"{fault}: {self._advise_after_divergence()}")
            if fault:
                self._roll_back(fault)
                tr_loss.zero_()
        begun = time.perf_counter()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
        if self.speed:
            self.speed.leave_out(time.perf_counter() - begun)

    def _find_divergence(self, loss: torch.Tensor, grad_norm: torch.Tensor | float | None, check_weights: bool):
        """What is not finite in any process, with the step, in words; None: all is finite.

        Args:
            loss: Sum of the losses since the last logging step.
            grad_norm: Gradient norm of the last step.
            check_weights: Whether to check the weights, too.
        """
        weights = self.model.parameters() if check_weights else ()
        finite = all(gather_whole(weight.isfinite().all()) for weight in weights)
        norm = 0.0 if grad_norm is None else float(gather_whole(grad_norm))
        # float16 gradients overflow occasionally: the scaler then skips the step and halves its scale. At a scale
        # below 1 the gradient itself is too large: DeepSpeed and Megatron also stop then.
        if not math.isfinite(norm) and self.accelerator.scaler and self.accelerator.scaler.get_scale() >= 1:
            norm = 0.0
        values = torch.tensor([loss.item(), norm, 0.0 if finite else math.nan], device=self.args.device)
        names = ("the loss", "the gradient norm", "a weight")
        for name, value in zip(names, self.accelerator.reduce(values, "sum").tolist(), strict=True):
            if not math.isfinite(value):
                first, last = self._globalstep_last_logged + 1, self.state.global_step
                is_exact = first == last or self.checks_each_step or name == "the gradient norm"
                return f"{name} is {value} " + (f"at step {last}" if is_exact else f"between steps {first} and {last}")
        return None

    def _advise_after_divergence(self) -> str:
        advice = "start a new run with a lower training.learning_rate or training.max_grad_norm"
        if (last := find_last_checkpoint(self.args.output_dir)) is None:
            return advice
        advice += f", from the last checkpoint with --model.path {quote_path(last)}"
        if self.args.on_divergence == "stop":
            advice += ", or pass --resume --training.on_divergence rollback"
        return advice

    def _roll_back(self, fault: str):
        """Restores weights and optimizer of the last checkpoint; the run continues with the rows of the next step.

        The step and the learning-rate schedule are kept, so every other step takes the same rows at the same rate as
        in a run without divergence. The log is the record of rollbacks; being part of every checkpoint, it makes a run
        that is resumed from an earlier one roll back in the same way.

        Raises:
            InputError: There is no checkpoint, or there have been too many rollbacks.
        """
        rollbacks, checkpoint = len(find_rollbacks(self.state.log_history)), self.last_scheduled
        if checkpoint is None:
            raise InputError(
                f"{fault}, before the first checkpoint of training.save_strategy: {self._advise_after_divergence()}"
            )
        if rollbacks >= self.args.max_rollbacks:
            done = f"after {counted(rollbacks, 'rollbacks')} (training.max_rollbacks)"
            raise InputError(f"{fault}, {done}: {self._advise_after_divergence()}")
        if damage := find_damage(checkpoint):
            raise InputError(f"{fault}, and '{checkpoint}' is damaged: {damage}; rerun the command with --resume")
        rates = [group["lr"] for group in self.optimizer.param_groups]
        schedule = copy.deepcopy(self.lr_scheduler.state_dict())
        self._load_from_checkpoint(str(checkpoint))
        self._load_optimizer_and_scheduler(str(checkpoint))
        self._load_scaler(str(checkpoint))
        self.lr_scheduler.load_state_dict(schedule)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.rolled_back_at = self._globalstep_last_logged = self.state.global_step
        self.log({ROLLBACK: step_of(checkpoint)})

    def _is_scheduled(self, state: TrainerState) -> bool:
        """Whether a checkpoint is one of `save_strategy`, and not of a run that was stopped, or that ended, there.

        A run that is stopped and resumed rolls back to the same checkpoint as one that is not stopped.
        """
        if self.args.save_strategy == SaveStrategy.STEPS:
            return state.global_step % state.save_steps == 0
        if self.args.save_strategy == SaveStrategy.EPOCH:
            return float(state.epoch).is_integer()
        return state.global_step == state.best_global_step

    def log(self, logs: dict[str, float], start_time: float | None = None):
        scaler = self.accelerator.scaler
        if scaler and not math.isfinite(logs.get("grad_norm", 0.0)):  # of a step that the scaler skipped
            logs = {name: value for name, value in logs.items() if name != "grad_norm"}
            logs["loss_scale"] = scaler.get_scale()
        if self.speed and "loss" in logs:
            logs |= self.speed.measure(self.state.global_step, self.state.max_steps)
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Trainer averages batch means, and advances the random state used by dropout.

        This sums over tokens or rows, and does not affect training, however often it is called.
        """
        dataloader = self.get_eval_dataloader(eval_dataset)
        self.callback_handler.eval_dataloader = dataloader
        start = time.perf_counter()
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self.compute_loss_context_manager():
            result = self.measure(self.model, dataloader, spread=self._evaluate_batches)
        metrics = result.to_dict(metric_key_prefix)
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - start
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate_batches(self, function: Callable[[Any], Any], batches: DataLoader) -> Iterator[Any]:
        """The results for the rows of all processes, of which accelerate repeats some to fill the last batches."""
        for batch in batches:
            yield self.accelerator.gather_for_metrics(function(batch))
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)

    def floating_point_ops(self, inputs: dict[str, torch.Tensor]) -> float:
        """Trainer iterates over all parameters at every micro-batch, and ignores attention and the output head."""
        config = getattr(self.model, "config", None)
        if self.was_filler:
            return 0
        if not isinstance(config, HfGPTConfig):
            return super().floating_point_ops(inputs)
        return inputs["input_ids"].numel() * training_flops_per_token(config, inputs["input_ids"].shape[-1])

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        """Trainer would save `config.use_cache` as False, its value during training, which makes generation slow.

        For an adapter, PEFT writes an empty README.md, and does not save a classifier's labels, which loading needs.
        """
        config, folder = self.model.config, Path(output_dir or self.args.output_dir)
        config.use_cache, use_cache = True, config.use_cache
        try:
            with quiet_bars():
                super()._save(output_dir, state_dict)
        finally:
            config.use_cache = use_cache
        if is_adapted(self.model):
            (folder / "README.md").unlink(missing_ok=True)
            if config.problem_type:  # a classifier
                save_labels(list(config.id2label.values()), folder)

    def _save_checkpoint(self, model, trial):
        """Trainer would resume from an incomplete or damaged checkpoint, and deletes old ones by timestamp.

        Here a checkpoint is complete once its checksums are written, after all processes have saved their files. If
        one of them cannot, all stop.
        """
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        self.save_error = None
        try:
            with self._keeping_checkpoints(), self._noting_errors(folder):
                if self.args.should_save:
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / CHECKSUMS_FILE).write_text("")
                super()._save_checkpoint(model, trial)
            self._stop_together()
            with self._noting_errors(folder):
                if self.args.should_save:
                    write_checksums(folder)
            self._stop_together()
        except BaseException:
            if not read_checksums(folder):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        if self._is_scheduled(self.state):
            self.last_scheduled = folder
        self._remove_old_checkpoints()
        self.accelerator.wait_for_everyone()  # a process that exits now may stop the others

    @contextmanager
    def _noting_errors(self, folder: str | Path) -> Iterator[None]:
        """Keeps an error of writing a checkpoint for `_stop_together`; until then the other processes expect this one.

        Trainer's methods exchange data between processes before and after they write.
        """
        try:
            with explain_full_disk(folder, self._following()):
                yield
        except (OSError, InputError) as error:
            self.save_error = self.save_error or error

    def _stop_together(self):
        """Raises the error of writing a checkpoint in all processes, if there is one in any."""
        said = None
        if self.save_error:
            is_foreign = isinstance(self.save_error, OSError) and self.save_error.strerror
            said = f"{self.save_error.strerror}: {self.save_error.filename}" if is_foreign else str(self.save_error)
        everyone = gather_object([said])
        if self.save_error:
            raise self.save_error
        for rank, reason in enumerate(everyone):
            if reason:
                raise InputError(f"process {rank} could not save its part of the checkpoint: {reason}")

    def _save_rng_state(self, output_dir: str):
        with self._noting_errors(output_dir):
            super()._save_rng_state(output_dir)

    def _finalize_training(self, *args, **kwargs):
        """Trainer deletes the newest checkpoint, even of a stopped run, if the limit is 1 and another one is best."""
        with self._keeping_checkpoints():
            output = super()._finalize_training(*args, **kwargs)
        self._remove_old_checkpoints(finished=self.state.global_step >= self.state.max_steps)
        return output

    @contextmanager
    def _keeping_checkpoints(self) -> Iterator[None]:
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # keeps Trainer from deleting any
        try:
            yield
        finally:
            self.args.save_total_limit = limit

    def _remove_old_checkpoints(self, finished: bool = False):
        if self.args.should_save:
            limit, kept = self.args.save_total_limit, [self.state.best_model_checkpoint]
            if self.args.on_divergence == "rollback" and not finished:
                kept.append(self.last_scheduled)
            remove_old_checkpoints(self.args.output_dir, limit, list(filter(None, kept)), keep_newest=not finished)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """Trainer takes an extra step when it resumes at `max_steps`, as does a run that stopped after training."""
        self.last_scheduled, self.rolled_back_at = None, 0
        if resume_from_checkpoint is None:
            return super().train(**kwargs)
        with _readable(resume_from_checkpoint):
            state = _read_state(Path(resume_from_checkpoint))
        self.last_scheduled = self._find_last_scheduled(Path(resume_from_checkpoint))
        if not 0 < self.args.max_steps <= state.global_step:
            return super().train(resume_from_checkpoint, **kwargs)
        self._load_from_checkpoint(resume_from_checkpoint)
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint:
            self._load_best_model()
        self._remove_old_checkpoints(finished=True)
        return TrainOutput(state.global_step, math.nan, {})

    def _find_last_scheduled(self, resumed: Path) -> Path | None:
        """The newest checkpoint of `save_strategy`, up to that which a run is resumed from."""
        earlier = [path for path in list_checkpoints(resumed.parent) if step_of(path) <= step_of(resumed)]
        for checkpoint in reversed(earlier):
            if read_checksums(checkpoint) and (checkpoint / "trainer_state.json").is_file():
                with _readable(str(checkpoint)):
                    if self._is_scheduled(_read_state(checkpoint)):
                        return checkpoint
        return None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None):
        with _readable(resume_from_checkpoint):
            if self.is_fsdp_enabled:
                load_shards(saved_tensors(self.unwrapped), Path(resume_from_checkpoint))
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    @property
    def unwrapped(self) -> torch.nn.Module:
        """The model itself; with FSDP, `model` may be a compiled one, with other names of weights."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _load_best_model(self):
        if self.is_fsdp_enabled:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _save_optimizer_and_scheduler(self, output_dir: str):
        """With FSDP, Trainer would save pickles, and the weights as shards that only FSDP can load."""
        with self._noting_errors(output_dir):
            if not self.is_fsdp_enabled:
                return super()._save_optimizer_and_scheduler(output_dir)
            save_optimizer(self.optimizer, Path(output_dir))
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None):
        with _readable(checkpoint):
            if checkpoint is None:
                return
            settings, rates = _settings_of(self.optimizer), getattr(self.lr_scheduler, "base_lrs", [])
            # Trainer could not load a state that was saved with FSDP without it, or the other way round.
            load_optimizer(self.optimizer, Path(checkpoint))
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
            for before, now in zip(settings, _settings_of(self.optimizer), strict=True):
                if changed := [name for name in before.keys() & now.keys() if now[name] != before[name]]:
                    raise ValueError(f"{changed[0]} of its optimizer is {now[changed[0]]!r}")
            _check_moments(getattr(self.optimizer, "optimizer", self.optimizer))
            _check_schedule(self.lr_scheduler, rates)

    def _load_scaler(self, checkpoint: str | None):
        with _readable(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None):
        with _readable(checkpoint):
            super()._load_rng_state(checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """With FSDP, Trainer saves shards of the weights, or none; here it is always the whole model."""
        folder = output_dir or self.args.output_dir
        # Internal calls are those of `_save_checkpoint`.
        noting = self._noting_errors(folder) if _internal_call else explain_full_disk(folder, self._following())
        with noting:
            if not self.is_fsdp_enabled:
                return super().save_model(output_dir, _internal_call)
            weights = gather_weights(self.unwrapped)  # by all processes
            if self.args.should_save:
                self._save(output_dir, weights)

    def _following(self) -> str:
        """Advice for a full disk."""
        last = find_last_checkpoint(self.args.output_dir)
        start = f"resumes from {last.name}" if last else "starts over, since no checkpoint was saved"
        return f"then rerun the command with --resume, which {start}"


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


def _start_worker(start: Callable[[int], None] | None, index: int):
    """Ignores signals in a worker; the main process stops its workers."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if start is not None:
        start(index)


@contextmanager
def _readable(checkpoint: str | None) -> Iterator[None]:
    """Turns errors of torch, safetensors and json on an invalid checkpoint into one line."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, OSError):
        raise  # errors of the machine
    # Hand-made files, checksums included, can raise anything.
    except Exception as error:
        raise InputError(
            f"cannot resume from the checkpoint '{checkpoint}' ({fact_of(error)}): remove it to resume from the "
            "previous one"
        ) from error


def _settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The settings of each parameter group that come from the recipe; the learning rate comes from the schedule."""
    varying = ("params", "lr", "initial_lr")
    return [{name: value for name, value in group.items() if name not in varying} for group in optimizer.param_groups]


def _check_schedule(scheduler: torch.optim.lr_scheduler.LRScheduler, rates: list[float]):
    """Checks that a loaded schedule gives the learning rates of the recipe; `rates` are its base rates."""
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):  # its rates depend on metrics
        return
    if scheduler.base_lrs != rates:
        raise ValueError(f"base_lrs of its schedule is {scheduler.base_lrs!r}, not {rates}")
    factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    scheduled = [rate * factor for rate, factor in zip(rates, factors, strict=True)]
    saved = [group["lr"] for group in scheduler.optimizer.param_groups]
    for name, found in (("lr of its optimizer", saved), ("_last_lr of its schedule", scheduler.get_last_lr())):
        if not all(map(math.isclose, found, scheduled)) or len(found) != len(scheduled):
            raise ValueError(f"{name} is {found!r}, not {scheduled}")


def _check_moments(optimizer: torch.optim.Optimizer):
    """Checks the shapes of the optimizer state, which Adam's fused kernel reads without checking."""
    if not isinstance(optimizer, torch.optim.Adam | MuonWithAdamW):
        return
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            shape = () if name == "step" else parameter.shape
            if value.shape != shape or not (value.is_contiguous() or value.stride() == parameter.stride()):
                raise ValueError(f"{name} of its optimizer has the shape {tuple(value.shape)}, not {tuple(shape)}")


def _read_state(checkpoint: Path) -> TrainerState:
    """The validated trainer state in a checkpoint."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if state.global_step != step_of(checkpoint):
        raise ValueError(f"global_step in trainer_state.json is {state.global_step}, not {step_of(checkpoint)}")
    for name in ("logging_steps", "eval_steps", "save_steps", "epoch", "total_flos", "num_input_tokens_seen"):
        value = getattr(state, name)
        if not _is_number(value) or not 0 <= value < math.inf or (value == 0 and name.endswith("_steps")):
            raise ValueError(f"{name} in trainer_state.json is {value!r}")
    for name in ("best_metric", "best_global_step", "train_batch_size"):
        if not (getattr(state, name) is None or _is_number(getattr(state, name))):
            raise ValueError(f"{name} in trainer_state.json is {getattr(state, name)!r}")
    if not isinstance(state.stateful_callbacks, dict) or "TrainerControl" not in state.stateful_callbacks:
        raise ValueError("stateful_callbacks in trainer_state.json has no TrainerControl")
    if not isinstance(state.best_model_checkpoint, str | None):
        raise ValueError(f"best_model_checkpoint in trainer_state.json is {state.best_model_checkpoint!r}")
    for row in state.log_history:
        if not all(map(_is_number, [row["step"], *row.values()])):
            raise ValueError(f"log_history in trainer_state.json has the entry {row!r}")
    return state


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
