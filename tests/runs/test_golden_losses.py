"""The losses of short runs, step by step: a change in them changes what every recipe learns."""

import io

import pytest
from rich.console import Console

from hfgpt.recipe import load_recipe
from hfgpt.runs.run import run
from hfgpt.training import estimate
from hfgpt.training.callbacks import read_log

MODEL = "{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, max_position_embeddings: 64}"
TRAINING = "{per_device_train_batch_size: 8, max_steps: 6, logging_steps: 1, eval_strategy: 'no', use_cpu: true,"
TRAINING += " bf16: false, save_strategy: 'no', learning_rate: 0.003, lr_scheduler_type: linear}"
RECIPES = {
    "pretrain": """
tokenizer: {kind: char}
data: {path: "synthetic:stories", max_documents: 12, validation_fraction: 0.25}
""",
    "classify": """
tokenizer: {kind: bpe, vocab_size: 300}
data: {path: "synthetic:messages", max_rows: 60}
pretraining: {max_steps: 4, block_size: 32}
adapters: {r: 4}
evaluation: {baseline: false}
""",
    "instruct": """
tokenizer: {kind: bpe, vocab_size: 300}
model: {max_position_embeddings: 128}
data: {path: "synthetic:instructions", max_rows: 40, packing: true}
evaluation: {max_answers: 2, max_new_tokens: 4}
""",
}
LOSSES = {
    "pretrain": [4.004702, 4.002750, 3.870396, 3.780866, 3.746664, 3.692286],
    "classify": [1.398606, 1.358418, 1.368909, 1.442129, 1.256125, 1.307153],
    "instruct": [5.692620, 5.709655, 5.279264, 5.214828, 4.947879, 4.763494],
}


@pytest.mark.parametrize("task", RECIPES)
def test_a_short_run_reproduces_the_recorded_losses(task, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "probe_tokens_per_second", lambda *args, **kwargs: 1000.0)
    text = f"task: {task}\n{RECIPES[task]}\ntraining: {TRAINING}\n"
    text += "" if "model:" in text else f"model: {MODEL}\n"
    (tmp_path / "short.yaml").write_text(text)
    overrides = ["--training.output_dir", str(tmp_path / "run")]
    overrides += ["--data.cache_dir", str(tmp_path / "cache")] if task == "pretrain" else []
    run(load_recipe(str(tmp_path / "short.yaml"), overrides), console=Console(file=io.StringIO()))
    losses = [entry["loss"] for entry in read_log(tmp_path / "run") if "loss" in entry]
    # CPUs sum in different orders; with and without AVX2 these losses differ by 1e-7.
    assert losses == pytest.approx(LOSSES[task], rel=1e-4)
