"""`import hfgpt` registers hfgpt with the Auto classes in any import order, and imports no heavy packages itself.

The effects of an import only show in a process that has imported nothing, hence the subprocesses. Checks are exact.
"""

import json
import os
import subprocess
import sys

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto import modeling_auto

import hfgpt

REGISTERED = {
    AutoModel: "HfGPTModel",
    AutoModelForCausalLM: "HfGPTForCausalLM",
    AutoModelForSequenceClassification: "HfGPTForSequenceClassification",
}


def run_python(script: str, folder, *arguments: str) -> str:
    """Runs a script in a new process in `folder`, and returns its stdout."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_importing_hfgpt_imports_no_heavy_packages(tmp_path):
    script = "import sys; before = set(sys.modules); import hfgpt; dir(hfgpt); print(*(set(sys.modules) - before))"
    imported = {name.split(".")[0] for name in run_python(script, tmp_path).split()}
    assert "hfgpt" in imported
    # Only the standard library: in particular not torch, transformers, datasets, peft or matplotlib.
    assert imported - {"hfgpt"} <= set(sys.stdlib_module_names)


# What runs before the check in a process where neither hfgpt nor the Auto classes have been imported.
ORDERS = {
    "hfgpt, then Auto": "import hfgpt; from transformers import AutoModelForCausalLM",
    "Auto, then hfgpt": "from transformers import AutoModelForCausalLM; import hfgpt",
    "hfgpt, then half of Auto": "import hfgpt; from transformers import AutoConfig; AutoConfig.for_model('hfgpt')",
    "half of Auto, then hfgpt": "from transformers import AutoConfig; import hfgpt; AutoConfig.for_model('hfgpt')",
    "half of Auto, then the model file": "from transformers import AutoConfig; import hfgpt.modeling_hfgpt",
    "the configuration alone": "from hfgpt import HfGPTConfig",
    "a model alone": "from hfgpt import HfGPTForCausalLM",
    "a look at each, then Auto": """
import hfgpt, importlib.util
assert all(importlib.util.find_spec(name) for name in hfgpt._AFTER_IMPORT if not name.startswith("peft"))
from transformers import AutoModelForCausalLM
""",
    "an import that fails half-way, then again": """
import hfgpt
sys.modules["hfgpt.configuration_hfgpt"] = None
try:
    import hfgpt.modeling_hfgpt
except ImportError:
    del sys.modules["hfgpt.configuration_hfgpt"]
""",
}
# These processes are forks of one that has imported everything else: a cold start takes 6 s, 5 s of it for torch.
FORKS = """
import json, os, sys
import accelerate, scipy.optimize, torch, torch.distributed.checkpoint, transformers.activations, transformers.models

orders, unwanted = json.loads(sys.argv[1])
CHECK = '''
import sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto
config = AutoConfig.for_model("hfgpt", hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
with torch.device("meta"):
    models = [
        auto.from_config(config) for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification)
    ]
report = {
    "classes": [type(config).__name__, *(type(model).__name__ for model in models)],
    "tables": [modeling_auto.MODEL_MAPPING_NAMES.get("hfgpt"),
               modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get("hfgpt"),
               modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get("hfgpt")],
    "reads GPT-2": get_checkpoint_conversion_mapping("HfGPTForCausalLM") is not None,
    "unwanted": [name for name in unwanted if name in sys.modules],
}
'''
for name, imports in orders.items():
    tables = ("hfgpt", "transformers.models.auto.configuration_auto", "transformers.models.auto.modeling_auto")
    loaded = [module for module in sys.modules if module.startswith((*tables, "transformers.modeling_utils"))]
    assert loaded == [], loaded
    child = os.fork()
    if child == 0:
        status = 1
        try:
            exec(imports)
            imported = [*sys.modules]
            exec(CHECK)
            report["imported"] = [module for module in imported if module.startswith(("hfgpt", "transformers.model"))]
            print(json.dumps({name: report}), flush=True)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert status == 0, name
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """The report of each of these processes."""
    unwanted = ["datasets", "peft", "matplotlib", "evaluate", "jsonargparse", "typer"]
    printed = run_python(FORKS, tmp_path_factory.mktemp("forks"), json.dumps([ORDERS, unwanted])).splitlines()
    return {name: report for line in printed for name, report in json.loads(line).items()}


def test_importing_hfgpt_after_the_auto_classes_costs_nothing(reports):
    """Our classes are imported on first access: their imports take as long as torch."""
    imported = reports["hfgpt, then Auto"]["imported"]
    assert "transformers.models.auto.modeling_auto" in imported
    ours = {name for name in imported if name.partition(".")[0] == "hfgpt"}
    assert ours == {"hfgpt"}
    assert "transformers.modeling_utils" not in imported


def test_auto_classes_know_hfgpt_in_any_import_order(reports):
    assert list(reports) == list(ORDERS)
    for name, report in reports.items():
        assert report["classes"] == ["HfGPTConfig", *REGISTERED.values()], name
        assert report["tables"] == list(REGISTERED.values()), name
        assert report["reads GPT-2"], name
        assert report["unwanted"] == [], name


# In this process


def test_there_is_no_warning_about_an_unused_kernel(caplog):
    operations = pytest.importorskip("bitsandbytes.backends.cpu.ops")
    operations.logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no kernels")
    operations.logger.warning("something else")
    assert caplog.messages == ["something else"]


def test_auto_classes_build_our_classes(tiny_config):
    config = AutoConfig.for_model("hfgpt", n_embd=24)
    assert type(config) is hfgpt.HfGPTConfig
    for auto_class, name in REGISTERED.items():
        assert type(auto_class.from_config(tiny_config())) is getattr(hfgpt, name)


def test_only_our_names_are_registered():
    """A fourth table would send an hfgpt model to a class that does not exist, or that treats labels differently."""
    tables = {name: table for name, table in vars(modeling_auto).items() if name.endswith("_MAPPING_NAMES")}
    assert len(tables) > 40
    assert {name: table["hfgpt"] for name, table in tables.items() if "hfgpt" in table} == {
        "CONFIG_MAPPING_NAMES": "HfGPTConfig",
        "MODEL_MAPPING_NAMES": "HfGPTModel",
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "HfGPTForCausalLM",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "HfGPTForSequenceClassification",
    }
    mappings = {
        name: mapping
        for name, mapping in vars(modeling_auto).items()
        if name.endswith("_MAPPING") and hfgpt.HfGPTConfig in mapping
    }
    assert {name: mapping[hfgpt.HfGPTConfig].__name__ for name, mapping in mappings.items()} == {
        "MODEL_MAPPING": "HfGPTModel",
        "MODEL_FOR_CAUSAL_LM_MAPPING": "HfGPTForCausalLM",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING": "HfGPTForSequenceClassification",
    }


def test_public_names_are_exactly_the_documented_ones():
    for name in hfgpt.__all__:
        assert getattr(hfgpt, name) is not None
        assert name in dir(hfgpt)
    with pytest.raises(AttributeError, match="'HfGPTForTokenClassification'"):
        hfgpt.HfGPTForTokenClassification  # noqa: B018 - the test reads the attribute
