"""transformers' Trainer, and its arguments, changed only where they are wrong for a causal language model.

Each override says what Trainer 5.23 does instead. Everything else, from accumulation to distribution, is Trainer's.
"""

import functools
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import Trainer, TrainerState, TrainingArguments, default_data_collator
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import TrainOutput

from hfgpt.adapters import is_adapted
from hfgpt.configuration_hfgpt import HfGPTConfig
from hfgpt.errors import InputError
from hfgpt.evaluation.perplexity import measure_perplexity
from hfgpt.models import fact_of, find_device, quiet_bars, save_labels
from hfgpt.saving import CHECKSUMS_FILE, explain_full_disk, quote_path, read_checksums, write_checksums
from hfgpt.training.checkpoints import find_last_checkpoint, remove_old_checkpoints, step_of
from hfgpt.training.flops import training_flops_per_token
from hfgpt.training.hardware import has_native_bf16
from hfgpt.training.optimizers import MuonFactory, MuonWithAdamW

# The arguments that decide what is learned. The recipe.yaml of a run has all of them, so that it means the same when a
# default changes, here or in transformers.
LEARNED = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "auto_find_batch_size", "num_train_epochs"),
    *("max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay"),
    *("decay_all_parameters", "optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2"),
    *("adam_epsilon", "muon_learning_rate", "muon_momentum", "max_grad_norm", "label_smoothing_factor"),
    *("neftune_noise_alpha", "average_tokens_across_devices", "bf16", "fp16", "tf32", "seed", "data_seed"),
    *("dataloader_drop_last", "train_sampling_strategy", "load_best_model_at_end", "trainable", "last_blocks"),
)
# What numbers must be, for the arguments below: TrainingArguments takes any, or refuses one without its key.
LIMITS = (
    (
        "at least 1",
        lambda value: value >= 1,
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps save_total_limit "
        "block_size",
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
    """Refuses numbers that are not within `LIMITS`; None is no number.

    Args:
        section: The recipe's section that these arguments are, for the message.
        arguments: What has some of the names in `LIMITS`.

    Raises:
        InputError: One is not.
    """
    for limit, holds, names in LIMITS:
        for name in names.split():
            value = getattr(arguments, name, None)
            if value is not None and not holds(value):
                raise InputError(f"{section}.{name} is {value}; it must be {limit}")


# For weights drawn at random, where a recipe leaves these open; TrainingArguments' own are for trained weights.
FROM_SCRATCH = {"learning_rate": 1e-3, "num_train_epochs": 10.0, "warmup_steps": 0.05}


@dataclass
class HfGPTTrainingArguments(TrainingArguments):
    """The recipe's section `training`: the fields of `TrainingArguments`, with defaults for small GPTs, and more.

    A recipe that trains new weights, without `model.path` and without a first pass, has other defaults for three of
    them: `learning_rate` 0.001 (lower it for a wide model: 6e-4 is usual for the size of GPT-2), `num_train_epochs` 10
    and `warmup_steps` 0.05, which is 5 % of all steps.

    Args:
        bf16: Mixed precision in bfloat16; None turns it on where the hardware has it, never where it is emulated.
        muon_learning_rate: When given, the matrices inside the blocks are trained by Muon at this rate, and the rest
            by AdamW at `learning_rate`; both follow the one schedule.
        muon_momentum: Of Muon; below the usual 0.95 for runs of some hundred steps.
        decay_all_parameters: Whether biases and norms decay too, as in the book.
    """

    bf16: bool | None = None
    muon_learning_rate: float | None = None
    muon_momentum: float = 0.95
    decay_all_parameters: bool = False
    logging_steps: float = 10
    # Trainer's default waits for the device at every micro-batch and hides what it filters.
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool = False
    disable_tqdm: bool | None = True
    save_total_limit: int | None = 2
    dataloader_pin_memory: bool | None = None
    # Every parameter has a gradient at every step; looking for those without costs a walk of the graph.
    ddp_find_unused_parameters: bool | None = False

    def __post_init__(self):
        if self.max_steps < 1 and self.max_steps != -1:
            raise InputError(
                f"training.max_steps is {self.max_steps}; it must be at least 1, or -1 to train for num_train_epochs"
            )
        check_numbers("training", self)
        if self.push_to_hub:
            raise InputError(
                "training.push_to_hub would push checkpoints without the model's code, and hide what fails: use the "
                "section hub, with repo_id, instead"
            )
        _check_reporters(self.report_to)
        device = torch.device("cpu") if self.use_cpu else find_device()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and has_native_bf16(device)
        if self.dataloader_pin_memory is None:
            self.dataloader_pin_memory = device.type == "cuda"
        # TrainingArguments refuses bf16 on a CPU that was not asked for by name.
        self.use_cpu = device.type == "cpu"
        super().__post_init__()


@dataclass
class FineTuningArguments(HfGPTTrainingArguments):
    """The recipe's section `training` for classification and instructions.

    Args:
        trainable: What is trained: `all` weights; `last_blocks`, with the final norm and the head; the `head` alone;
            or the `adapters` of that section. None: the adapters if there are any, else all.
        last_blocks: How many blocks `last_blocks` means; None: one.
    """

    trainable: Literal["all", "last_blocks", "head", "adapters"] | None = None
    last_blocks: int | None = None
    # Rows of like length together need the least padding.
    train_sampling_strategy: str = "group_by_length"

    def __post_init__(self):
        if self.trainable not in (None, "all", "last_blocks", "head", "adapters"):
            raise InputError(
                f"training.trainable is '{self.trainable}'; it must be all, last_blocks, head or adapters"
            )
        if self.last_blocks is not None and self.last_blocks < 1:
            raise InputError(f"training.last_blocks is {self.last_blocks}; it must be at least 1")
        if self.last_blocks is not None and self.trainable != "last_blocks":
            raise InputError("training.last_blocks is set: set training.trainable to last_blocks too, or leave it out")
        super().__post_init__()


@dataclass
class FirstPassArguments:
    """The recipe's section `pretraining`: what the first pass does otherwise than the section `training`.

    It models the language of the texts of the training split, and of those left out of it to balance the classes;
    never of those of validation and test (Gururangan et al., "Don't Stop Pretraining", 2020).

    Args:
        max_steps: Optimizer steps.
        per_device_train_batch_size: Blocks in a batch.
        block_size: Tokens predicted a block; None: the context length of the model.
        learning_rate: Of AdamW.
        muon_learning_rate: Of Muon in the blocks' matrices; None: AdamW there, too.
        muon_momentum: Of Muon.
        weight_decay: Of both.
        warmup_steps: Steps of rising learning rate; it falls linearly afterwards.
        dropout: In place of the three dropouts of the section `model`.
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
    """Trainer for causal language models, and for classifiers with a `measure` and a loss of theirs.

    Args:
        measure: What `evaluate` calls with the model, the batches and the arguments `gather` and `on_batch`; its
            result has `to_dict(prefix)`.
        args, kwargs: Those of `transformers.Trainer`; blocks of one length need no collator.
    """

    def __init__(self, *args, measure: Callable[..., Any] = measure_perplexity, **kwargs):
        kwargs.setdefault("data_collator", default_data_collator)
        super().__init__(*args, **kwargs)
        if (
            self.args.n_gpu > 1
        ):  # Trainer would split each batch between threads, and scale some losses by their number
            raise InputError(
                f"this process sees {self.args.n_gpu} GPUs: start it with accelerate launch, or show it one by "
                "CUDA_VISIBLE_DEVICES"
            )
        self.measure = measure
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

    def get_train_dataloader(self):
        """Schedulers signal every process of a job: workers that died of it would end the run before it has saved."""
        loader = super().get_train_dataloader()
        loader.worker_init_fn = functools.partial(_start_worker, loader.worker_init_fn)
        return loader

    def get_decay_parameter_names(self, model) -> list[str]:
        if self.args.decay_all_parameters:
            return [name for name, _ in model.named_parameters()]
        return super().get_decay_parameter_names(model)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Trainer smooths labels it shifts itself, and so leaves out the last target that `shift_labels` has."""
        if self.label_smoother is None or "shift_labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**{name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")})
        loss = self.label_smoother(outputs, inputs["shift_labels"], num_items_in_batch=num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        # On a CPU the value is at hand; on an accelerator reading it would stall every step, so `log` looks.
        if loss.device.type == "cpu":
            self._refuse_non_finite(loss.item(), f"at step {self.state.global_step + 1}")
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None):
        last = self.state.log_history[-1]["step"] if self.state.log_history else 0
        where = f"between steps {last + 1} and {self.state.global_step}"
        if "loss" in logs:
            self._refuse_non_finite(logs["loss"], where)
        if not math.isfinite(logs.get("grad_norm", 0.0)):
            # A float16 gradient overflows now and then: the scaler then skips the step and halves its scale. Below 1
            # nothing is left to scale down, the gradient itself is too large: DeepSpeed and Megatron stop there, too.
            scale = self.accelerator.scaler.get_scale() if self.accelerator.scaler else 0.0
            if scale < 1:
                self._refuse_non_finite(logs["grad_norm"], where, "grad_norm")
            logs = {name: value for name, value in logs.items() if name != "grad_norm"} | {"loss_scale": scale}
        super().log(logs, start_time)

    def _refuse_non_finite(self, value: float, where: str, name: str = "loss"):
        if math.isfinite(value):
            return
        last = find_last_checkpoint(self.args.output_dir)
        remedy = f", from the last checkpoint with --model.path {quote_path(last)}" if last else ""
        raise InputError(
            f"the {name} is {value} {where}: start another run with a lower training.learning_rate or "
            f"training.max_grad_norm{remedy}"
        )

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Trainer averages the means of batches, and moves on the random state that dropout draws from.

        This sums over tokens, or rows, and leaves what is learned the same however often it is called.
        """
        dataloader = self.get_eval_dataloader(eval_dataset)
        self.callback_handler.eval_dataloader = dataloader
        start = time.perf_counter()
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self.compute_loss_context_manager():
            result = self.measure(
                self.model,
                dataloader,
                gather=self.accelerator.gather_for_metrics,
                on_batch=lambda: self.callback_handler.on_prediction_step(self.args, self.state, self.control),
            )
        metrics = result.to_dict(metric_key_prefix)
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - start
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def floating_point_ops(self, inputs: dict[str, torch.Tensor]) -> float:
        """Trainer walks all parameters at every micro-batch, and counts neither attention nor the output head."""
        config = getattr(self.model, "config", None)
        if not isinstance(config, HfGPTConfig):
            return super().floating_point_ops(inputs)
        return inputs["input_ids"].numel() * training_flops_per_token(config, inputs["input_ids"].shape[-1])

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        """Trainer turns `config.use_cache` off for training and would save it so: slow generation for every user.

        Beside an adapter PEFT writes an empty README.md, and not the classes of a classifier, without which nobody can
        load it.
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
        """Trainer would resume from a checkpoint that was half written, or damaged since, and deletes by time stamps.

        Here the checksums of its files, written when all processes have saved theirs, complete a checkpoint.
        """
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            self._refuse_non_finite(math.nan, f"after step {self.state.global_step}", "weights")
        try:
            with explain_full_disk(folder, self._following()), self._keeping_checkpoints():
                if self.args.should_save:
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / CHECKSUMS_FILE).write_text("")
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    write_checksums(folder)
        except BaseException:
            if not read_checksums(folder):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        self._remove_old_checkpoints()
        self.accelerator.wait_for_everyone()  # one that ends now may take the others with it

    def _finalize_training(self, *args, **kwargs):
        """Trainer deletes the newest checkpoint, even of a stopped run, if one is to be kept and another is best."""
        with self._keeping_checkpoints():
            output = super()._finalize_training(*args, **kwargs)
        self._remove_old_checkpoints(finished=self.state.global_step >= self.state.max_steps)
        return output

    @contextmanager
    def _keeping_checkpoints(self) -> Iterator[None]:
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # Trainer then deletes none
        try:
            yield
        finally:
            self.args.save_total_limit = limit

    def _remove_old_checkpoints(self, finished: bool = False):
        if self.args.should_save:
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            remove_old_checkpoints(self.args.output_dir, limit, best, keep_newest=not finished)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """Trainer takes one step more when it resumes at `max_steps`, as a run stopped after training does."""
        if resume_from_checkpoint is None:
            return super().train(**kwargs)
        with _readable(resume_from_checkpoint):
            state = _read_state(Path(resume_from_checkpoint))
        if not 0 < self.args.max_steps <= state.global_step:
            return super().train(resume_from_checkpoint, **kwargs)
        self._load_from_checkpoint(resume_from_checkpoint)
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint:
            self._load_best_model()
        self._remove_old_checkpoints(finished=True)
        return TrainOutput(state.global_step, math.nan, {})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None):
        with _readable(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None):
        with _readable(checkpoint):
            if checkpoint is None:
                return
            settings, rates = _settings_of(self.optimizer), getattr(self.lr_scheduler, "base_lrs", [])
            super()._load_optimizer_and_scheduler(checkpoint)
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
        with explain_full_disk(output_dir or self.args.output_dir, self._following()):
            super().save_model(output_dir, _internal_call)

    def _following(self) -> str:
        """What to do once there is space again."""
        last = find_last_checkpoint(self.args.output_dir)
        start = f"resumes from {last.name}" if last else "starts anew, as no checkpoint was saved"
        return f"then run the same command with --resume, which {start}"


def _check_reporters(report_to: str | list[str] | None):
    """Refuses a tool to report to that is unknown or not installed; transformers would do so when the data is ready.

    Raises:
        InputError: Names the tool and the command that installs it.
    """
    modules = {"azure_ml": "azureml", "flyte": "flytekit"}
    packages = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "dagshub": "dagshub mlflow", "flyte": "flytekit"}
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if name in ("none", "all", "kubeflow"):  # kubeflow has no package
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise InputError(f"training.report_to is '{name}'; it must be one of {', '.join(INTEGRATION_TO_CALLBACK)}")
        found = [modules.get(name, name), *(["tensorboardX"] if name == "tensorboard" else [])]
        if not any(map(find_spec, found)):
            command = f"pip install {packages.get(name, name)}"
            raise InputError(f"training.report_to is '{name}', which is not installed: {command}")


def _start_worker(start: Callable[[int], None] | None, index: int):
    """Leaves signals to the main process, which ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if start is not None:
        start(index)


@contextmanager
def _readable(checkpoint: str | None) -> Iterator[None]:
    """Turns what torch, safetensors and json raise on a checkpoint that hfgpt did not write into one line."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, OSError):
        raise  # of the machine
    # Files that someone wrote by hand, checksums included, raise whatever their bytes spell.
    except Exception as error:
        raise InputError(
            f"the checkpoint '{checkpoint}' cannot be resumed from ({fact_of(error)}): move it away, and --resume "
            "takes the one before it"
        ) from error


def _settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What the recipe decides of each group of parameters; the schedule decides its learning rate."""
    varying = ("params", "lr", "initial_lr")
    return [{name: value for name, value in group.items() if name not in varying} for group in optimizer.param_groups]


def _check_schedule(scheduler: torch.optim.lr_scheduler.LRScheduler, rates: list[float]):
    """Refuses the state of a schedule that gives other learning rates than the recipe's, or none.

    Args:
        scheduler: As it was loaded.
        rates: Its learning rates before the schedule scales them, as the recipe has them.

    Raises:
        ValueError: It does.
    """
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):  # its rates depend on what was measured
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
    """Refuses a state that does not fit its parameters: Adam's fused kernel reads it without looking at its size.

    Raises:
        ValueError: It does not.
    """
    if not isinstance(optimizer, torch.optim.Adam | MuonWithAdamW):
        return
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            shape = () if name == "step" else parameter.shape
            if value.shape != shape or not (value.is_contiguous() or value.stride() == parameter.stride()):
                raise ValueError(f"{name} of its optimizer has the shape {tuple(value.shape)}, not {tuple(shape)}")


def _read_state(checkpoint: Path) -> TrainerState:
    """The state in a checkpoint, which must be of its step."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if state.global_step != step_of(checkpoint):
        raise ValueError(f"trainer_state.json is not that of step {step_of(checkpoint)}")
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
