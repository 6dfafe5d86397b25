"""A model of two small layers, blocks of random tokens, and a Trainer for them: a step takes milliseconds."""

import gc

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, LargeList, Value
from transformers import PrinterCallback

from hfgpt.data.blocks import BlockDataset
from hfgpt.data.streams import TokenStream
from hfgpt.modeling_hfgpt import HfGPTForCausalLM
from hfgpt.training.arguments import HfGPTTrainingArguments
from hfgpt.training.trainer import HfGPTTrainer

TOKENS = Features({"input_ids": LargeList(Value("uint16"))})
# Accelerate runs the garbage collector after every training; what is imported by now need not be scanned.
gc.freeze()


@pytest.fixture
def make_model(tiny_config):
    def build(**fields) -> HfGPTForCausalLM:
        torch.manual_seed(0)
        return HfGPTForCausalLM(tiny_config(**fields))

    return build


@pytest.fixture
def make_blocks(tiny_config):
    def build(tokens: int, block_size: int = 16, document_length: int | None = None, **options) -> BlockDataset:
        vocab_size = tiny_config().vocab_size
        values = np.random.default_rng(0).integers(0, vocab_size, tokens)
        length = document_length or tokens
        documents = [values[start : start + length] for start in range(0, tokens, length)]
        stream = TokenStream(Dataset.from_dict({"input_ids": documents}, features=TOKENS))
        return BlockDataset(stream, block_size, **options)

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
