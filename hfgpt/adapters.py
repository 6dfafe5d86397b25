"""Stage 7.0, adapters with PEFT: attach, load, merge, check; the only file that imports PEFT.

Each function imports PEFT when called, since that takes seconds and most commands do not need it.

Sources: Hu et al., "LoRA" (2021); Dettmers et al., "QLoRA" (2023), for 4-bit base models.
"""

import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from hfgpt.errors import InputError

if TYPE_CHECKING:
    from peft import PeftModel

CAUSAL_LM, SEQ_CLS = "CAUSAL_LM", "SEQ_CLS"
WEIGHTS_FILE = "adapter_model.safetensors"
# Initializations that change neither the base model nor, before training, its logits. Others change the base weights
# or need a pass over the data, so their adapters do not work on the original base model.
INITIALIZATIONS = (True, "gaussian", "orthogonal", "mica")


@dataclass
class AdapterArguments:
    """The recipe's section `adapters`: LoRA, with the names and meanings of `peft.LoraConfig`.

    Args:
        r: Rank of the updates.
        lora_alpha: Scaling numerator: updates are multiplied by lora_alpha / r.
        lora_dropout: Dropout on the input of the updates.
        target_modules: `all-linear` (all linear layers but the head), or module names.
        exclude_modules: Names of modules to exclude from these.
        bias: Biases to train: `none`, `all` or `lora_only`.
        use_rslora: Scale by lora_alpha / sqrt(r) instead.
        use_dora: Learn the magnitude of each weight row separately (DoRA).
        init_lora_weights: true, `gaussian`, `orthogonal` or `mica`, which do not change the base model.
        modules_to_save: Modules to train fully and save with the adapter; always includes a classifier's head.
        layers_to_transform: Indices of the blocks to adapt; None: all.
        rank_pattern: Module -> rank, where it differs.
        alpha_pattern: Module -> alpha, where it differs.
        trainable_token_indices: Token ids whose embeddings to train, without the rest of the vocabulary.
    """

    r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    trainable_token_indices: list[int] | None = None

    def __post_init__(self):
        if self.r < 1:
            raise InputError(f"adapters.r is {self.r}; it must be at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"adapters.lora_dropout is {self.lora_dropout}; it must be at least 0 and below 1")
        if self.bias not in ("none", "all", "lora_only"):
            raise InputError(f"adapters.bias is '{self.bias}'; it must be none, all or lora_only")
        if self.init_lora_weights not in INITIALIZATIONS:
            raise InputError(
                f"adapters.init_lora_weights is {self.init_lora_weights!r}; it must be one of true, gaussian, "
                "orthogonal, mica: others change the base model or need a pass over the data"
            )


class SavedAdapter(NamedTuple):
    """The configuration of a saved adapter: base model, its revision, and PEFT's name of the task."""

    base: str
    revision: str | None
    task: str | None


def attach_adapter(
    model: PreTrainedModel, arguments: AdapterArguments, task_type: str, revision: str | None = None
) -> "PeftModel":
    """Attaches a new adapter to a model and freezes the base model.

    Args:
        model: The base model; its modules are wrapped.
        arguments: The recipe's section `adapters`.
        task_type: PEFT's name of the task, `CAUSAL_LM` or `SEQ_CLS`.
        revision: Branch, tag or commit of the base model on the Hub, saved with the adapter.

    Raises:
        InputError: The target modules do not match, or there is nothing to train.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    fields = {name: value for name, value in vars(arguments).items() if value is not None}
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if arguments.target_modules == "all-linear" and arguments.layers_to_transform is not None:
        fields["target_modules"] = sorted(linear - {"lm_head", "score"})  # PEFT needs names to select layers
    tied = model.config.tie_word_embeddings and {"embed_tokens", "lm_head"} & set(arguments.modules_to_save or [])
    config = LoraConfig(task_type=task_type, ensure_weight_tying=bool(tied), **fields)
    if getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        for module in model.modules():
            # On a CPU with AVX512_BF16, bitsandbytes 0.49 and later repack the weights in eval mode for a kernel that
            # always computes in bfloat16 and has no gradient; `train` does not unpack them.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    try:
        with _quiet_peft():
            adapted = get_peft_model(model, config, revision=revision)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"adapters.target_modules {arguments.target_modules!r} cannot be adapted ({_in_one_line(error)}): use "
            f"linear layers, {', '.join(sorted(linear))}"
        ) from error
    if not any(parameter.requires_grad for parameter in adapted.parameters()):
        raise InputError("the adapter has no trainable parameters: set adapters.target_modules to existing modules")
    return adapted


def read_adapter(path: str, revision: str | None = None) -> SavedAdapter:
    """Reads the configuration of a saved adapter.

    Args:
        path: The adapter's folder or Hub id.
        revision: Branch, tag or commit on the Hub.

    Raises:
        InputError: The configuration cannot be read, or does not name a base model.
    """
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(path, revision=revision)
    # PEFT and json raise different errors for a damaged file.
    except Exception as error:
        raise InputError(f"the adapter '{path}' cannot be read ({_in_one_line(error)}): save it again") from error
    for name in ("base_model_name_or_path", "revision", "task_type"):
        if not isinstance(value := getattr(config, name), str | None):
            raise InputError(f"the adapter '{path}' has {name} {value!r}, which is not a string: save it again")
    if not config.base_model_name_or_path:
        raise InputError(f"the adapter '{path}' does not name its base model: set its base_model_name_or_path")
    if getattr(config, "megatron_config", None):  # PEFT would import a package named there
        raise InputError(f"the adapter '{path}' is for Megatron layers: set its megatron_config to null")
    return SavedAdapter(config.base_model_name_or_path, config.revision, config.task_type)


def put_adapter_on(base: PreTrainedModel, path: str, revision: str | None = None) -> "PeftModel":
    """Loads a saved adapter onto its base model, strictly.

    Args:
        base: The base model, see `read_adapter`; its modules are wrapped.
        path: The adapter's folder or Hub id.
        revision: Branch, tag or commit of the adapter on the Hub.

    Returns:
        The adapted model in evaluation mode.

    Raises:
        InputError: The adapter does not fit the model.
    """
    from peft import PeftModel, get_peft_model_state_dict

    with _explained(path, "loaded onto"), _quiet_peft():
        # Before PEFT, which would unpickle an adapter_model.bin if this file is missing.
        saved = load_file(cached_file(path, WEIGHTS_FILE, revision=revision or "main"))
        adapted = PeftModel.from_pretrained(base, path, revision=revision).eval()
    # PEFT only warns about missing weights, and ignores unexpected ones.
    expected = get_peft_model_state_dict(adapted)
    for kind, keys in (
        ("missing", expected.keys() - saved.keys()),
        ("unexpected", saved.keys() - expected.keys()),
    ):
        if keys:
            raise InputError(
                f"the adapter '{path}' does not fit its base model: {kind} weights such as {min(keys)} "
                f"({len(keys)} in all); use the base model it was trained on"
            )
    if broken := next((name for name, value in saved.items() if not value.isfinite().all()), None):
        raise InputError(
            f"the adapter '{path}' contains NaN or infinite values in {broken} (the file is damaged, or training "
            "diverged): use another copy or an earlier checkpoint"
        )
    return adapted


def merge_adapter(adapted: "PeftModel", path: str) -> PreTrainedModel:
    """Adds the updates of an adapter to the weights of its base model.

    Args:
        adapted: See `put_adapter_on`; changed in place.
        path: The adapter's folder, for error messages.

    Returns:
        An ordinary model in evaluation mode.

    Raises:
        InputError: This type of adapter cannot be merged.
    """
    with _explained(path, "merged into"):
        return adapted.merge_and_unload(safe_merge=True).eval()


def count_saved_parameters(path: str) -> int:
    """Number of parameters of the saved adapter in a folder."""
    return sum(value.numel() for value in load_file(cached_file(path, WEIGHTS_FILE)).values())


def is_adapted(model: Any) -> bool:
    """Whether a model has an adapter."""
    return "peft" in sys.modules and isinstance(model, sys.modules["peft"].PeftModel)


def base_of(model: "PreTrainedModel | PeftModel") -> PreTrainedModel:
    """The base model of an adapted model, or the model itself."""
    return model.get_base_model() if is_adapted(model) else model


def saved_tensors(model: "PreTrainedModel | PeftModel") -> dict[str, torch.Tensor]:
    """The tensors that a checkpoint of a model, or of its adapter, has, by their names there; not copied."""
    if is_adapted(model):
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """Number of trainable and of all parameters, tied ones counted once; a byte of 4-bit weights counts as two."""
    trained = everything = 0
    for parameter in model.parameters():
        size = parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)
        everything += size
        trained += size * parameter.requires_grad
    return trained, everything


@contextmanager
def _quiet_peft():
    """Silences PEFT 0.21's use of a deprecated name in transformers 5.23, and its warning about missing weights."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


@contextmanager
def _explained(path: str, done: str):
    try:
        yield
    # PEFT and safetensors raise different errors for an adapter that does not fit.
    except Exception as error:
        raise InputError(
            f"the adapter '{path}' cannot be {done} its base model ({_in_one_line(error)}): use the base model it was "
            "trained on"
        ) from error


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
