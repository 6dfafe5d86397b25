"""From text to rows of token ids: hfgpt, the usual `map(tokenize)` and `map(group_texts)`, the tokenizer alone."""

import itertools
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import datasets
from transformers import PreTrainedTokenizerBase

from hfgpt.bench.measuring import HFGPT, Comparison, measure_in_turns
from hfgpt.data.blocks import BlockDataset
from hfgpt.data.cache import progress_bar
from hfgpt.data.streams import tokenize_documents
from hfgpt.demo_corpus import generate_stories
from hfgpt.tokenizer import train_tokenizer

STORIES, VOCABULARY, LENGTH = 20_000, 4096, 256
USUAL, ALONE = "map and group_texts", "tokenizer alone"


def measure_data(advance: Callable) -> list[Comparison]:
    """Compares the pipelines, on generated stories and from one Arrow file; the pipelines write their caches.

    Args:
        advance: Called after each measurement.
    """
    texts = list(generate_stories(STORIES))
    tokenizer = train_tokenizer(texts[:2000], kind="bpe", vocab_size=VOCABULARY)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6

    def measure(load: Callable) -> float:
        with tempfile.TemporaryDirectory() as folder:
            datasets.Dataset.from_dict({"text": texts}).save_to_disk(folder)
            documents = datasets.load_from_disk(folder)
            begun = time.perf_counter()
            load(documents, tokenizer)
            return megabytes / (time.perf_counter() - begun)

    contenders = {HFGPT: _load_blocks, USUAL: _map_and_group, ALONE: _tokenize}
    with progress_bar(worthwhile=False):
        values = measure_in_turns({name: partial(measure, load) for name, load in contenders.items()}, advance)
    encoder = "gigatoken" if find_spec("gigatoken") else "tokenizers"
    return [Comparison("data", f"text to rows, {megabytes:.0f} MB, {encoder}", "MB/s", values)]


def _load_blocks(documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase):
    blocks = BlockDataset(tokenize_documents(documents, tokenizer), LENGTH)
    return blocks[0], blocks[len(blocks) - 1]


def _map_and_group(documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase):
    def tokenize(batch):
        return tokenizer([text + tokenizer.eos_token for text in batch["text"]])

    def group_texts(batch):
        joined = {name: list(itertools.chain(*rows)) for name, rows in batch.items()}
        total = len(joined["input_ids"]) // LENGTH * LENGTH
        result = {name: [ids[i : i + LENGTH] for i in range(0, total, LENGTH)] for name, ids in joined.items()}
        return {**result, "labels": result["input_ids"].copy()}

    tokens = documents.map(tokenize, batched=True, remove_columns=["text"])
    rows = tokens.map(group_texts, batched=True)
    return rows[0], rows[len(rows) - 1]


def _tokenize(documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase):
    texts, backend = documents["text"][:], tokenizer.backend_tokenizer
    for start in range(0, len(texts), 1000):
        backend.encode_batch_fast(texts[start : start + 1000])
