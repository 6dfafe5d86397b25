"""OpenAI's original GPT-2 release: a TensorFlow checkpoint folder, read with transformers' names.

Source: openai/gpt-2, download_model.py and src/model.py.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from hfgpt.errors import InputError

# TensorFlow variable, without `model/` -> GPT-2's name in transformers.
SCOPES = (
    (r"^h(\d+)/", r"h.\1/"),
    ("/[wg]$", "/weight"),
    ("/b$", "/bias"),
    (r"^(wte|wpe)$", r"\1/weight"),
)


def is_tensorflow_folder(folder: Path) -> bool:
    """Whether a folder contains such a checkpoint."""
    return (folder / "hparams.json").is_file() and any(folder.glob("*.index"))


def read_tensorflow(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads the weights, under transformers' names, and the `hparams.json`.

    Raises:
        InputError: TensorFlow is not installed, or the files are damaged.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # otherwise, it logs that there is no GPU
    try:
        from tensorflow.train import latest_checkpoint, load_checkpoint
    except ImportError as error:
        raise InputError(
            f"'{folder}' is a TensorFlow checkpoint, and TensorFlow is not installed: pip install 'hfgpt[tf]'"
        ) from error
    try:
        hparams = json.loads((folder / "hparams.json").read_text(encoding="utf-8"))
        if not isinstance(hparams, dict):
            raise ValueError("hparams.json is not a JSON object")
        reader = load_checkpoint(latest_checkpoint(str(folder)) or str(next(folder.glob("*.index")).with_suffix("")))
        weights = {}
        for variable in sorted(reader.get_variable_to_shape_map()):
            name = variable.removeprefix("model/")
            for pattern, replacement in SCOPES:
                name = re.sub(pattern, replacement, name)
            # Their 1D convolutions have a leading axis of size 1.
            tensor = torch.from_numpy(reader.get_tensor(variable))
            weights[name.replace("/", ".")] = tensor.squeeze(0) if tensor.ndim == 3 else tensor
    # TensorFlow's errors have no common base class other than Exception.
    except Exception as error:
        raise InputError(f"the TensorFlow checkpoint in '{folder}' cannot be read ({error}): copy it again") from error
    return weights, hparams
