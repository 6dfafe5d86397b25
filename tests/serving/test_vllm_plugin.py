"""The plugin of vLLM, with stubs in its place; tests/engines/test_vllm.py runs the models in vLLM."""

import ast
import importlib
import importlib.metadata
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers.models.auto import modeling_auto

from hfgpt.serving import vllm

ROOT = Path(__file__).parents[2]


class Backend:
    """vLLM's class, which computes the logits 0, 1, 2, ... for each position."""

    def __init__(self, *, vllm_config, prefix: str = ""):
        self.vocabulary = vllm_config.vocabulary

    def compute_logits(self, hidden_states):
        return self.vocabulary and torch.arange(float(self.vocabulary)).repeat(len(hidden_states), 1)


@pytest.fixture
def registered(monkeypatch) -> dict[str, str]:
    """What the plugin registers in a stub of vLLM."""
    found, names = {}, ("TransformersForCausalLM", "TransformersForSequenceClassification")
    backend = ModuleType("transformers")
    for name in names:
        setattr(backend, name, type(name, (Backend,), {"default_seq_pooling_type": "CLS"}))
    contents = {
        "vllm": {"ModelRegistry": SimpleNamespace(register_model=found.__setitem__)},
        "vllm.config": {"VllmConfig": object},
        "vllm.model_executor": {},
        "vllm.model_executor.models": {"transformers": backend},
        "vllm.model_executor.models.utils": {"WeightsMapper": dict},
    }
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "hfgpt.serving.vllm_models", raising=False)
    vllm.register()
    return found


def load(place: str) -> type:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def test_the_entry_point_is_the_plugin_and_imports_nothing_by_itself():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ((name, place),) = project["entry-points"]["vllm.general_plugins"].items()
    entry = importlib.metadata.EntryPoint(name, place, "vllm.general_plugins")
    assert entry.load() is vllm.register
    tree = ast.parse(Path(vllm.__file__).read_text())
    assert not [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]


def test_the_classes_with_a_head_are_registered_under_the_names_of_the_backend(registered):
    tables = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )
    assert list(registered) == [table["hfgpt"] for table in tables]
    for architecture, place in registered.items():
        model = load(place)
        assert issubclass(model, Backend)
        assert model.__name__ == architecture.replace("HfGPT", "Transformers")
    assert model.default_seq_pooling_type == "LAST"


@pytest.mark.parametrize("suppressed", [[3, 4], None])
def test_suppressed_tokens_are_impossible(suppressed, registered):
    generation = {"suppress_tokens": suppressed} if suppressed else None
    config = SimpleNamespace(vocabulary=5, model_config=SimpleNamespace(try_get_generation_config=lambda: generation))
    language_model = load(registered["HfGPTForCausalLM"])
    logits = language_model(vllm_config=config).compute_logits(torch.zeros(2, 4))
    expected = [0, 1, 2, *([-torch.inf] * 2 if suppressed else [3, 4])]
    assert logits.tolist() == [expected, expected]
    config.vocabulary = None
    assert language_model(vllm_config=config).compute_logits(torch.zeros(2, 4)) is None
