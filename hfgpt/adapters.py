"""Stage 7.0, adapters through PEFT: the only file that imports it."""

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from hfgpt.errors import InputError


def read_adapter(path: str) -> tuple[str, str | None]:
    """The base model that a saved adapter belongs to, and PEFT's name of its task.

    Args:
        path: The adapter's folder.

    Raises:
        InputError: Its configuration cannot be read, or names no base model.
    """
    try:
        config = PeftConfig.from_pretrained(path)
    # PEFT and json each raise errors of their own on a damaged file.
    except Exception as error:
        raise InputError(f"the adapter '{path}' cannot be read ({_in_one_line(error)}): save it again") from error
    if not config.base_model_name_or_path:
        raise InputError(f"the adapter '{path}' does not name its base model: set base_model_name_or_path in its file")
    return config.base_model_name_or_path, config.task_type


def merge_into(base: PreTrainedModel, path: str) -> PreTrainedModel:
    """Adds the updates of an adapter to the weights of its base model.

    Args:
        base: The model that `read_adapter` names; changed.
        path: The adapter's folder.

    Returns:
        An ordinary model in evaluation mode.

    Raises:
        InputError: The adapter does not fit the model, or its kind cannot be merged.
    """
    try:
        return PeftModel.from_pretrained(base, path).merge_and_unload(safe_merge=True).eval()
    # PEFT and safetensors each raise errors of their own on an adapter that does not fit.
    except Exception as error:
        raise InputError(
            f"the adapter '{path}' cannot be merged into its base model ({_in_one_line(error)})"
        ) from error


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
