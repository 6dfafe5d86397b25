"""Third-party Python code in model files: detected, never run and never published.

A model repository may contain Python files, and its JSON files may refer to classes in them. transformers runs those
with `trust_remote_code=True`, which users of published models pass, or asks on the terminal.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import dynamic_module_utils

from hfgpt import configuration_hfgpt
from hfgpt.configuration_hfgpt import AUTO_MAP
from hfgpt.errors import InputError

# The two Python files that are saved with a model, as installed here.
CODE = {
    name: Path(configuration_hfgpt.__file__).with_name(name)
    for name in sorted({f"{reference.partition('.')[0]}.py" for reference in AUTO_MAP.values()})
}
# JSON keys, at any depth, by which transformers 5.23 and PEFT 0.21 find code: classes and functions in Python files of
# the repository, packages to import, kernels on the Hub, and class names, which must not be module paths.
CODE_KEYS = ("auto_map", "custom_pipelines", "custom_generate", "auto_mapping", "megatron_config")
KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
CLASS_KEYS = (
    *("tokenizer_class", "processor_class", "image_processor_type", "feature_extractor_type", "video_processor_type"),
    *("base_model_class", "parent_library"),
)


@contextmanager
def without_remote_code(path: str) -> Iterator[None]:
    """Makes transformers refuse to run Python code from a model's repository instead of asking on the terminal.

    It asks where `trust_remote_code` is not passed on, for example for nested models, or for a tokenizer whose class
    is `AutoProcessor`.

    Raises:
        InputError: Loading needs such code.
    """
    before, dynamic_module_utils.TIME_OUT_REMOTE_CODE = dynamic_module_utils.TIME_OUT_REMOTE_CODE, 0
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise InputError(
            f"'{path}' needs Python code from its repository, which hfgpt never runs: use a model of type hfgpt or "
            "gpt2, or a tokenizer class of transformers"
        ) from error
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = before


def find_foreign_code(folder: Path, names: Iterable[str]) -> str | None:
    """Describes the first file of a model that is or refers to Python code other than hfgpt's; None if there is none.

    Args:
        folder: Folder of the files.
        names: File names relative to it; only `.py` and `.json` files are checked.
    """
    for name in names:
        if name.endswith(".py") and (name not in CODE or (folder / name).read_bytes() != CODE[name].read_bytes()):
            return f"'{name}' is not a Python file of this version of hfgpt"
        if name.endswith(".json") and (fault := find_fault_of_json((folder / name).read_bytes())):
            return f"'{name}' {fault}"
    return None


def find_fault_of_json(content: bytes) -> str | None:
    """The problem with the content of a model's JSON file; None if it is valid and refers to no third-party code."""
    try:
        key = _find_code_key(json.loads(content.decode("utf-8")))
    except (ValueError, RecursionError):  # JSON and decoding errors are ValueErrors
        return "is not valid JSON"
    return f"refers to third-party code ({key})" if key else None


def _find_code_key(content: Any) -> str | None:
    """The first key in a JSON file, at any depth, that refers to code other than hfgpt's."""
    waiting = [content]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            if found := [key for key, value in item.items() if _names_code(key, value)]:
                return found[0]
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
    return None


def _names_code(key: str, value: Any) -> bool:
    if key in KERNEL_KEYS:
        return "/" in json.dumps(value)
    if key in CLASS_KEYS:
        return isinstance(value, str) and not value.isidentifier()
    # A number is the id of a token or class with that name.
    return key in CODE_KEYS and isinstance(value, dict | list | str) and value not in ({}, [], "", AUTO_MAP)
