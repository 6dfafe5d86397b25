"""Python that is not hfgpt's: never run, recognised in the files of a model, and never published.

A model's repository may hold Python files, and its JSON files may name classes in them. transformers runs those with
`trust_remote_code=True`, which readers of a published card pass, or asks on the terminal.
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

# The two Python files that travel with a model, as they are installed here.
CODE = {
    name: Path(configuration_hfgpt.__file__).with_name(name)
    for name in sorted({f"{reference.partition('.')[0]}.py" for reference in AUTO_MAP.values()})
}
# Keys of JSON files by which transformers 5.23 and PEFT 0.21 find code, at any depth: classes and functions in Python
# files of a repository, packages to import, kernels on the Hub, and names of classes, which are no module paths.
CODE_KEYS = ("auto_map", "custom_pipelines", "custom_generate", "auto_mapping", "megatron_config")
KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
CLASS_KEYS = (
    *("tokenizer_class", "processor_class", "image_processor_type", "feature_extractor_type", "video_processor_type"),
    *("base_model_class", "parent_library"),
)


@contextmanager
def without_remote_code(path: str) -> Iterator[None]:
    """Has transformers refuse to run Python from a model's repository, where it would ask on the terminal.

    It asks wherever `trust_remote_code` is not passed on, as for a model within a model, or for a tokenizer whose
    class is named `AutoProcessor`.

    Raises:
        InputError: What is loaded needs such code.
    """
    before, dynamic_module_utils.TIME_OUT_REMOTE_CODE = dynamic_module_utils.TIME_OUT_REMOTE_CODE, 0
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise InputError(
            f"'{path}' needs Python code from its own repository, which hfgpt never runs: use a model of type hfgpt "
            "or gpt2, or a tokenizer that transformers itself has"
        ) from error
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = before


def find_foreign_code(folder: Path, names: Iterable[str]) -> str | None:
    """The first of a model's files that is, or names, Python code other than hfgpt's own; None: there is none.

    Args:
        folder: Of the files.
        names: Theirs, relative to it; other files than `.py` and `.json` are passed over.
    """
    for name in names:
        if name.endswith(".py") and (name not in CODE or (folder / name).read_bytes() != CODE[name].read_bytes()):
            return f"'{name}' is not a Python file of this version of hfgpt"
        if name.endswith(".json") and (fault := find_fault_of_json((folder / name).read_bytes())):
            return f"'{name}' {fault}"
    return None


def find_fault_of_json(content: bytes) -> str | None:
    """What is wrong with the content of a model's JSON file; None: it is JSON, and names no code of others."""
    try:
        key = _find_code_key(json.loads(content.decode("utf-8")))
    except (ValueError, RecursionError):  # json's own errors and those of decoding are ValueErrors
        return "is not JSON"
    return f"names code of others ({key})" if key else None


def _find_code_key(content: Any) -> str | None:
    """The first key in a JSON file, at any depth, whose value names code other than hfgpt's own."""
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
    # A number is the id of a token or a class of that name.
    return key in CODE_KEYS and isinstance(value, dict | list | str) and value not in ({}, [], "", AUTO_MAP)
