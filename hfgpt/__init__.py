"""hfgpt: a GPT written from scratch, a first-class citizen of the Hugging Face ecosystem.

Importing this package makes transformers' Auto classes know hfgpt, whichever of the two is imported first, and imports
neither torch nor transformers itself: the registration happens when the Auto classes are loaded. So `hfgpt --help`
answers at once, and `import hfgpt` costs nothing beside the Auto classes.
"""

import importlib
import importlib.abc
import importlib.util
import sys

__version__ = "0.1.0"

_LAZY = {
    "HfGPTConfig": "configuration_hfgpt",
    "HfGPTModel": "modeling_hfgpt",
    "HfGPTPreTrainedModel": "modeling_hfgpt",
    "HfGPTForCausalLM": "modeling_hfgpt",
    "HfGPTForSequenceClassification": "modeling_hfgpt",
    "InputError": "errors",
}
__all__ = [*_LAZY, "__version__"]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'hfgpt' has no attribute '{name}'")
    return getattr(importlib.import_module(f"hfgpt.{_LAZY[name]}"), name)


def __dir__():
    return sorted([*globals(), *_LAZY])


def _register_configuration():
    from transformers import AutoConfig

    from hfgpt.configuration_hfgpt import HfGPTConfig

    AutoConfig.register("hfgpt", HfGPTConfig)


def _register_models():
    from transformers.models.auto import modeling_auto

    from hfgpt import modeling_hfgpt

    # From these tables of names, not from what is registered, transformers decides whether a class takes labels and
    # whether label smoothing has to shift them (Trainer.compute_loss): without the names it is silently wrong.
    for auto_class, names, model in (
        ("AutoModel", "MODEL_MAPPING_NAMES", "HfGPTModel"),
        ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "HfGPTForCausalLM"),
        (
            "AutoModelForSequenceClassification",
            "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
            "HfGPTForSequenceClassification",
        ),
    ):
        getattr(modeling_auto, auto_class).register(modeling_hfgpt.HfGPTConfig, getattr(modeling_hfgpt, model))
        getattr(modeling_auto, names)["hfgpt"] = model


# The Auto classes bring in ours, and ours register themselves once they are whole: importing the model file imports
# the Auto classes half-way, when there is nothing to register yet.
_AFTER_IMPORT = {
    "transformers.models.auto.configuration_auto": lambda: importlib.import_module("hfgpt.configuration_hfgpt"),
    "transformers.models.auto.modeling_auto": lambda: importlib.import_module("hfgpt.modeling_hfgpt"),
    "hfgpt.configuration_hfgpt": _register_configuration,
    "hfgpt.modeling_hfgpt": _register_models,
}


class _ImportHook(importlib.abc.MetaPathFinder):
    """Calls what `_AFTER_IMPORT` holds for a module, once, right after somebody has imported it."""

    def find_spec(self, name, path, target=None):
        if name not in _AFTER_IMPORT:
            return None
        call = _AFTER_IMPORT.pop(name)
        spec = importlib.util.find_spec(name)  # by the other finders: the name is no longer ours
        execute = spec.loader.exec_module

        def execute_and_call(module):
            execute(module)
            call()

        spec.loader.exec_module = execute_and_call
        return spec


sys.meta_path.insert(0, _ImportHook())
for _name in [name for name in _AFTER_IMPORT if name in sys.modules]:
    _AFTER_IMPORT.pop(_name)()
