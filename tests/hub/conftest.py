"""Small finished runs to publish: a language model, a classifier, an adapter, an instruction-tuned model."""

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

PRETRAIN = """
task: pretrain
tokenizer: {{kind: char}}
model: {{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, max_position_embeddings: 64}}
data: {{path: "synthetic:stories", max_documents: 9, validation_fraction: 0.25, num_proc: 1, cache_dir: {cache}}}
training: {{per_device_train_batch_size: 16, max_steps: 3, save_steps: 2, use_cpu: true, bf16: false}}
evaluation: {{prompts: ["The"], max_new_tokens: 8}}
hub: {{license: mit, language: [en]}}
"""
CLASSIFY = """
task: classify
tokenizer: {kind: char}
data: {path: "synthetic:messages", max_rows: 60, validation_fraction: 0.2, test_fraction: 0.2}
training: {per_device_train_batch_size: 16, max_steps: 2, use_cpu: true, bf16: false}
evaluation: {prompts: ["Dear Mia!"], baseline: false}
"""


INSTRUCT = """
task: instruct
tokenizer: {kind: bpe, vocab_size: 300}
model: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 1, max_position_embeddings: 96}
data: {path: "synthetic:instructions", max_rows: 30}
training: {per_device_train_batch_size: 16, max_steps: 1, use_cpu: true, bf16: false}
evaluation: {max_new_tokens: 4, prompts: ["Who is there?"]}
"""


@pytest.fixture(scope="session")
def recipes(tmp_path_factory) -> Path:
    """The folder with the recipes."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.yaml").write_text(PRETRAIN.format(cache=folder / "cache"))
    (folder / "classes.yaml").write_text(CLASSIFY)
    (folder / "answers.yaml").write_text(INSTRUCT)
    return folder


@pytest.fixture(scope="session")
def finish(recipes):
    """Runs a recipe to completion."""
    from hfgpt.recipe import load_recipe
    from hfgpt.runs.run import run
    from hfgpt.training import estimate

    def finish(name: str, out: str, *overrides: str) -> Path:
        output = ["--training.output_dir", str(recipes / out)]
        run(load_recipe(str(recipes / f"{name}.yaml"), [*output, *overrides]), console=Console(file=io.StringIO()))
        return recipes / out

    with pytest.MonkeyPatch.context() as patch:
        probe = estimate.probe_tokens_per_second
        patch.setattr(estimate, "probe_tokens_per_second", lambda *args, **kwargs: probe(*args[:3], seconds=0.02))
        yield finish


@pytest.fixture(scope="session")
def text_run(finish) -> Path:
    """The run of a language model. Tests must not change it."""
    return finish("text", "text")


@pytest.fixture(scope="session")
def runs(text_run, finish) -> Path:
    """A folder with the runs `text`, `classes`, `adapter` and `answers`. Tests must not change it."""
    path = ["--model.path", str(text_run)]
    finish("classes", "classes", *path)
    finish("classes", "adapter", *path, "--adapters.r", "2")
    finish("answers", "answers")
    return text_run.parent


@pytest.fixture
def run(text_run, tmp_path) -> Path:
    """A copy of the language model's run, which tests may modify."""
    return shutil.copytree(text_run, tmp_path / "text")
