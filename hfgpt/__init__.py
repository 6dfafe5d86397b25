"""hfgpt: a GPT written from scratch, a first-class citizen of the Hugging Face ecosystem.

Importing this package makes transformers' Auto classes know hfgpt, whichever of the two is imported first, and imports
neither torch nor transformers itself: the names are written into transformers' tables when those are loaded, and the
classes behind them imported when one is asked for. So `hfgpt --help` answers at once, and `import hfgpt` costs nothing
beside the Auto classes.
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
    "HfGPTTrainingArguments": "training.trainer",
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

    # Where transformers looks for the classes of a model type, when one is asked for.
    sys.modules["transformers.models.hfgpt"] = sys.modules[__name__]
    configuration_auto.CONFIG_MAPPING_NAMES["hfgpt"] = "HfGPTConfig"


def _name_models():
    from transformers.models.auto import modeling_auto

    # The public register() wants the classes themselves, and importing those takes seconds that somebody who loads
    # another model need not wait. From these names transformers also decides whether a class takes labels and whether
    # label smoothing has to shift them (Trainer.compute_loss): without them it is silently wrong.
    for names, model in (
        ("MODEL_MAPPING", "HfGPTModel"),
        ("MODEL_FOR_CAUSAL_LM_MAPPING", "HfGPTForCausalLM"),
        ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING", "HfGPTForSequenceClassification"),
    ):
        getattr(modeling_auto, f"{names}_NAMES")["hfgpt"] = model
        getattr(modeling_auto, names)._reverse_config_mapping["HfGPTConfig"] = "hfgpt"


def _name_adapter_targets():
    # Which modules PEFT adapts where the user names none. Ours have the names of Llama's, which has an entry in each
    # method's table but one or two; there LoRA's choice stands in.
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
    """Calls what `_AFTER_IMPORT` holds for a module right after it is executed, not when it is only looked for."""

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


# transformers' Trainer imports PEFT, and PEFT bitsandbytes where that is installed, which then warns on CPUs with
# AVX512_BF16 that an optional kernel for inference is missing: nobody has asked for it.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))
sys.meta_path.insert(0, _ImportHook())
for _name, _call in _AFTER_IMPORT.items():
    if _name in sys.modules:
        _call()
