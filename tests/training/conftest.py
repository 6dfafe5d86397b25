"""A model of two small layers, blocks of random tokens, and a Trainer for them: a step takes milliseconds."""

import numpy as np
import pytest
import torch
from transformers import PrinterCallback

from hfgpt.configuration_hfgpt import HfGPTConfig
from hfgpt.data.blocks import BlockDataset
from hfgpt.data.streams import TokenStream
from hfgpt.modeling_hfgpt import HfGPTForCausalLM
from hfgpt.training.trainer import HfGPTTrainer, HfGPTTrainingArguments

VOCAB_SIZE = 61
TINY = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@pytest.fixture
def make_model():
    def build(**fields) -> HfGPTForCausalLM:
        torch.manual_seed(0)
        # Ten times the usual scale, so that losses, gradients and rows differ by much more than rounding.
        return HfGPTForCausalLM(HfGPTConfig(**{**TINY, "initializer_range": 0.2, **fields}))

    return build


@pytest.fixture
def make_blocks():
    def build(tokens: int, block_size: int = 16, document_length: int | None = None, **options) -> BlockDataset:
        values = np.random.default_rng(0).integers(0, VOCAB_SIZE, tokens).astype(np.uint16)
        offsets = np.unique([*range(0, tokens, document_length or tokens), tokens])
        return BlockDataset(TokenStream(values, offsets, max_token_id=VOCAB_SIZE - 1), block_size, **options)

    return build


@pytest.fixture
def make_trainer(tmp_path):
    def build(model, blocks=None, *, eval_dataset=None, callbacks=(), data_collator=None, **arguments) -> HfGPTTrainer:
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "bf16": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "lr_scheduler_type": "constant",
            "train_sampling_strategy": "sequential",
        }
        trainer = HfGPTTrainer(
            model=model,
            args=HfGPTTrainingArguments(**{**defaults, **arguments}),
            train_dataset=blocks,
            eval_dataset=eval_dataset,
            callbacks=list(callbacks),
            **({"data_collator": data_collator} if data_collator else {}),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    return build
