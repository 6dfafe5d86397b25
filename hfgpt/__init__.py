"""hfgpt: a GPT written from scratch, fully integrated with the Hugging Face ecosystem.

Importing this package registers hfgpt with transformers' Auto classes, in either import order, without importing torch
or transformers: the names are added to transformers' mappings when those modules are loaded, and the classes are
imported on first use. So `hfgpt --help` is fast, and `import hfgpt` is almost free.
"""

import importlib
import importlib.abc
import importlib.machinery
import logging
import sys

__version__ = "0.1.0"

_LAZY = {
    "HfGPTConfig": "configuration_hfgpt",
    "HfGPTModel": "modeling_hfgpt",
    "HfGPTPreTrainedModel": "modeling_hfgpt",
    "HfGPTForCausalLM": "modeling_hfgpt",
    "HfGPTForSequenceClassification": "modeling_hfgpt",
    "HfGPTTrainer": "training.trainer",
    "HfGPTTrainingArguments": "training.arguments",
    "speed_up_generation": "evaluation.fast_generation",
    "InputError": "errors",
}
__all__ = [*_LAZY, "__version__"]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'hfgpt' has no attribute '{name}'")
    return getattr(importlib.import_module(f"hfgpt.{_LAZY[name]}"), name)


def __dir__():
    return sorted([*globals(), *_LAZY])


def _name_configuration():
    from transformers.models.auto import configuration_auto

    # The module in which transformers looks for the classes of a model type.
    sys.modules["transformers.models.hfgpt"] = sys.modules[__name__]
    configuration_auto.CONFIG_MAPPING_NAMES["hfgpt"] = "HfGPTConfig"


def _name_models():
    from transformers.models.auto import modeling_auto

    # The public register() needs the classes, whose import takes seconds, even for users of other models. transformers
    # also uses these names to decide whether a model takes labels and whether label smoothing must shift them
    # (Trainer.compute_loss): without them, the result would be silently wrong.
    for names, model in (
        ("MODEL_MAPPING", "HfGPTModel"),
        ("MODEL_FOR_CAUSAL_LM_MAPPING", "HfGPTForCausalLM"),
        ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING", "HfGPTForSequenceClassification"),
    ):
        getattr(modeling_auto, f"{names}_NAMES")["hfgpt"] = model
        getattr(modeling_auto, names)._reverse_config_mapping["HfGPTConfig"] = "hfgpt"


def _name_adapter_targets():
    # PEFT's default target modules. Our modules have Llama's names, and Llama is in almost all tables; otherwise use
    # LoRA's default.
    constants = vars(importlib.import_module("peft.utils.constants"))
    ours = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    norms = ("input_layernorm", "post_attention_layernorm", "norm")
    for name, table in constants.items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING"):
            table["hfgpt"] = [module for module in table.get("llama", ["q_proj", "v_proj"]) if module in ours + norms]


def _read_gpt2():
    importlib.import_module("hfgpt.conversion.gpt2").register_loading()


_AFTER_IMPORT = {
    "transformers.models.auto.configuration_auto": _name_configuration,
    "transformers.models.auto.modeling_auto": _name_models,
    "hfgpt.modeling_hfgpt": _read_gpt2,
    "peft.utils.constants": _name_adapter_targets,
}


class _ImportHook(importlib.abc.MetaPathFinder):
    """Calls the function in `_AFTER_IMPORT` for a module right after the module is executed."""

    def find_spec(self, name, path, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if name in _AFTER_IMPORT else None
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_call(module):
            execute(module)
            _AFTER_IMPORT[name]()

        spec.loader.exec_module = execute_and_call
        return spec


# transformers' Trainer imports PEFT, which imports bitsandbytes if it is installed, which warns on CPUs with
# AVX512_BF16 about a missing optional inference kernel that hfgpt does not use.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))
sys.meta_path.insert(0, _ImportHook())
for _name, _call in _AFTER_IMPORT.items():
    if _name in sys.modules:
        _call()
