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
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerState, default_data_collator
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import SaveStrategy, TrainOutput, has_length

from hfgpt.adapters import base_of, is_adapted, saved_tensors
from hfgpt.configuration_hfgpt import HfGPTConfig
from hfgpt.data.report import counted
from hfgpt.errors import STOP_SIGNALS, InputError
from hfgpt.evaluation.perplexity import measure_perplexity
from hfgpt.modeling_hfgpt import HfGPTForCausalLM
from hfgpt.models import quiet_bars, save_labels
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
from hfgpt.training.callbacks import read_log
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
from hfgpt.training.hardware import training_heap
from hfgpt.training.optimizers import MuonFactory
from hfgpt.training.sharding import (
    gather_weights,
    gather_whole,
    load_optimizer,
    load_shards,
    save_optimizer,
    shard_on_cpu,
)
from hfgpt.training.speed import SpeedMeter
from hfgpt.training.state import check_moments, check_schedule, read_state, readable_checkpoint, settings_of
from hfgpt.training.tensor_parallel import divide_model, enable_parallelism
from hfgpt.training.time_limit import PARTS, TimeLimit, without_step_limit


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
            raise InputError(
                "the model was divided among processes when it was loaded (distributed_config or tp_plan), which is "
                "not supported in training: load it whole, and set parallelism_config or training.fsdp"
            )
        # Whether the rows of each step are known in advance.
        self.has_step_batches = args.has_fixed_batches and not is_stream
        if args.is_tensor_parallel and train_dataset is not None and not self.has_step_batches:
            raise InputError("tensor parallelism needs batches of a fixed size, and a dataset with a length")
        if args.global_batch_size is not None and train_dataset is not None:
            if not self.has_step_batches:
                raise InputError("training.global_batch_size needs a dataset with a length: remove it")
            args = copy.copy(args)
            args.gradient_accumulation_steps = count_rounds(args, args.rows_per_step)
        if args.max_seconds is not None:
            args = without_step_limit(args, train_dataset is not None and is_stream)
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
        if self.args.max_seconds is not None:
            self.add_callback(TimeLimit(self.args.max_seconds))
        # Label smoothing needs the logits.
        self.skips_logits = isinstance(base_of(self.model), HfGPTForCausalLM) and self.label_smoother is None
        self.speed: SpeedMeter | None = None  # adds speed and memory to the log
        self.last_scheduled, self.rolled_back_at = None, 0  # checkpoint to roll back to, step of the last rollback
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
        """On a CPU, accelerate ignores FSDP, and refuses tensor parallelism."""
        parallelism, self.args.parallelism_config = self.args.parallelism_config, None
        super().create_accelerator_and_postprocess()
        self.args.parallelism_config = parallelism
        if parallelism:
            enable_parallelism(self.accelerator, parallelism)
        if self.args.is_fully_sharded and self.args.device.type == "cpu":
            shard_on_cpu(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def create_optimizer(self, model=None):
        """Trainer does not divide a model; here, the first optimizer is created when a training begins."""
        if self.args.is_tensor_parallel and not self.is_distributed_loading_by_transformers:
            divide_model(self.model, self.accelerator.torch_device_mesh["tp"])
            self.is_distributed_loading_by_transformers = True  # so that accelerate does not wrap it
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Trainer's schedule counts steps; with `max_seconds`, it counts parts of the time."""
        return super().create_scheduler(num_training_steps if self.args.max_seconds is None else PARTS, optimizer)

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
            if self.skips_logits and model.training and not return_outputs:
                inputs = {**inputs, "skip_logits": True}
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss, outputs = loss if return_outputs else (loss, None)
        else:
            outputs = model(
                **{name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
            )
            loss = self.label_smoother(outputs, inputs["shift_labels"], num_items_in_batch=num_items_in_batch)
            if num_items_in_batch is not None:
                loss = loss * self.args.data_processes
        loss = loss * 0 if self.is_filler else loss
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Trainer would count the labels of batches that only keep this process in step with the others."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        first = self.args.data_index * len(batches)
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
            InputError: No checkpoint has been saved yet, or the limit of rollbacks is reached.
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
        has_all = self.args.is_tensor_parallel
        for batch in batches:
            result = function(batch)
            yield result if has_all else self.accelerator.gather_for_metrics(result)
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

    def _finalize_training(self, trial, num_train_samples, start_time):
        """Trainer deletes the newest checkpoint, even of a stopped run, if the limit is 1 and another one is best."""
        if self.args.max_seconds is not None:  # Trainer's number is that of `MOST_STEPS`
            num_train_samples = self.state.max_steps * self.args.rows_per_step
        with self._keeping_checkpoints():
            output = super()._finalize_training(trial, num_train_samples, start_time)
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
        with training_heap(self.args.device, self.args.gradient_checkpointing):
            return self._train(resume_from_checkpoint, **kwargs)

    def _train(self, resume_from_checkpoint: str | None, **kwargs) -> TrainOutput:
        self.last_scheduled, self.rolled_back_at = None, 0
        if resume_from_checkpoint is None:
            return super().train(**kwargs)
        with readable_checkpoint(resume_from_checkpoint):
            state = read_state(Path(resume_from_checkpoint))
        self.last_scheduled = self._find_last_scheduled(Path(resume_from_checkpoint))
        last_step = self.args.max_steps if self.args.max_seconds is None else state.max_steps
        if not 0 < last_step <= state.global_step:
            return super().train(resume_from_checkpoint, **kwargs)
        self._load_from_checkpoint(resume_from_checkpoint)
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint:
            self._load_best_model()
        self._remove_old_checkpoints(finished=True)
        # Trainer's last entry, if the run was killed between its last checkpoint and this entry.
        if self.is_world_process_zero() and not any("total_flos" in entry for entry in read_log(self.args.output_dir)):
            self.log({"total_flos": state.total_flos})
        return TrainOutput(state.global_step, math.nan, {})

    def _find_last_scheduled(self, resumed: Path) -> Path | None:
        """The newest checkpoint of `save_strategy`, up to that which a run is resumed from."""
        earlier = [path for path in list_checkpoints(resumed.parent) if step_of(path) <= step_of(resumed)]
        for checkpoint in reversed(earlier):
            if read_checksums(checkpoint) and (checkpoint / "trainer_state.json").is_file():
                with readable_checkpoint(str(checkpoint)):
                    if self._is_scheduled(read_state(checkpoint)):
                        return checkpoint
        return None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None):
        with readable_checkpoint(resume_from_checkpoint):
            if self.args.is_sharded:
                load_shards(saved_tensors(self.unwrapped), Path(resume_from_checkpoint))
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    @property
    def unwrapped(self) -> torch.nn.Module:
        """The model itself; with FSDP, `model` may be a compiled one, with other names of weights."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _load_best_model(self):
        if self.args.is_sharded:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _save_optimizer_and_scheduler(self, output_dir: str):
        """With FSDP, Trainer would save pickles, and the weights as shards that only FSDP can load."""
        with self._noting_errors(output_dir):
            if not self.args.is_sharded:
                return super()._save_optimizer_and_scheduler(output_dir)
            save_optimizer(self.optimizer, Path(output_dir))
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None):
        with readable_checkpoint(checkpoint):
            if checkpoint is None:
                return
            settings, rates = settings_of(self.optimizer), getattr(self.lr_scheduler, "base_lrs", [])
            # Trainer could not load a state that was saved with FSDP without it, or the other way round.
            load_optimizer(self.optimizer, Path(checkpoint))
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
            for before, now in zip(settings, settings_of(self.optimizer), strict=True):
                if changed := [name for name in before.keys() & now.keys() if now[name] != before[name]]:
                    raise ValueError(f"{changed[0]} of its optimizer is {now[changed[0]]!r}")
            check_moments(getattr(self.optimizer, "optimizer", self.optimizer))
            check_schedule(self.lr_scheduler, rates)

    def _load_scaler(self, checkpoint: str | None):
        with readable_checkpoint(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None):
        with readable_checkpoint(checkpoint):
            super()._load_rng_state(checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """With FSDP, Trainer saves shards of the weights, or none; here it is always the whole model."""
        folder = output_dir or self.args.output_dir
        # Internal calls are those of `_save_checkpoint`.
        noting = self._noting_errors(folder) if _internal_call else explain_full_disk(folder, self._following())
        with noting:
            if not self.args.is_sharded:
                return super().save_model(output_dir, _internal_call)
            weights = gather_weights(self.unwrapped)  # by all processes
            if self.args.should_save:
                self._save(output_dir, weights)

    def _following(self) -> str:
        """Advice for a full disk."""
        last = find_last_checkpoint(self.args.output_dir)
        start = f"resumes from {last.name}" if last else "starts over, since no checkpoint was saved"
        return f"then rerun the command with --resume, which {start}"


def _start_worker(start: Callable[[int], None] | None, index: int):
    """Ignores signals in a worker; the main process stops its workers."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if start is not None:
        start(index)
