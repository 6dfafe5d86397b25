"""Stage 7.0, adapters through PEFT: the only file that imports it."""

from pathlib import Path

from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftConfig
from transformers import PreTrainedModel

from hfgpt.errors import InputError


def load_merged(path: str) -> PreTrainedModel:
    """Loads an adapter with its base model and adds its updates to the base model's weights.

    Args:
        path: The adapter's folder.

    Returns:
        An ordinary model in evaluation mode.

    Raises:
        InputError: The adapter or its base model cannot be loaded, or its kind cannot be merged.
    """
    try:
        classes = {"SEQ_CLS": AutoPeftModelForSequenceClassification}
        task = PeftConfig.from_pretrained(path).task_type
        model = classes.get(task, AutoPeftModelForCausalLM).from_pretrained(path)
        return model.merge_and_unload(safe_merge=True).eval()
    # PEFT, json and safetensors each raise errors of their own on a damaged or foreign folder.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"the adapter '{Path(path)}' cannot be merged into its base model ({reason})") from error
