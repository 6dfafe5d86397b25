"""Measures `hfgpt prepare` by hand: its speed, memory and disk space on generated text.

    python tests/time_prepare.py [MEGABYTES]

Compares, in one process each and by CPU time, with the tokenizer alone and with the usual recipe for `datasets`:
`map(tokenize)` and `map(group_texts)`.
"""

import itertools
import json
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets

from hfgpt.data.encoding import Encoding
from hfgpt.data.parts import find_parts
from hfgpt.data.report import DataReport
from hfgpt.data.rows import Reading, SourceArguments
from hfgpt.data.writing import OutputSettings, Rules, list_jobs, tokenize_part
from hfgpt.demo_corpus import generate_stories
from hfgpt.tokenizer import train_tokenizer

CONTEXT = 1024


def write_source(path: Path, megabytes: float) -> int:
    """Writes JSON Lines with documents of 5 to 20 stories; returns their number."""
    stories, rng, size, number = list(generate_stories(5000, 0)), random.Random(0), 0, 0
    with open(path, "w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            text = "\n".join(rng.choices(stories, k=rng.randint(5, 20)))
            size += file.write(json.dumps({"text": text}) + "\n")
            number += 1
    return number


def tokenize_alone(source: Path, encoding: Encoding) -> int:
    """Reads and tokenizes the texts; returns the number of tokens."""
    from tokenizers import Tokenizer

    tokenizer, count = Tokenizer.from_str(encoding.backend), 0
    with open(source, encoding="utf-8") as file:
        texts = (json.loads(line)["text"] for line in file)
        while batch := list(itertools.islice(texts, 100)):
            count += sum(len(found) for found in tokenizer.encode_batch_fast(batch, add_special_tokens=False))
    return count


def map_and_group(source: Path, tokenizer, cache: Path) -> int:
    """The usual recipe; returns the number of tokens in blocks."""

    def group(examples):
        joined = {key: list(itertools.chain(*examples[key])) for key in examples}
        total = len(joined["input_ids"]) // CONTEXT * CONTEXT
        found = {key: [ids[i : i + CONTEXT] for i in range(0, total, CONTEXT)] for key, ids in joined.items()}
        return found | {"labels": found["input_ids"].copy()}

    rows = datasets.load_dataset("json", data_files=str(source), split="train", cache_dir=str(cache))
    tokens = rows.map(lambda batch: tokenizer(batch["text"]), batched=True, remove_columns=["text"])
    return len(tokens.map(group, batched=True)) * CONTEXT


def prepare(source: Path, encoding: Encoding, out: Path) -> tuple[int, int]:
    """Tokenizes all parts; returns the number of tokens and the bytes on disk."""
    parts = find_parts(
        SourceArguments(str(source)), Reading({"text_column": "text"}, {"validation": None}), DataReport()
    )
    output = OutputSettings(str(out), "", encoding, None)
    records = [tokenize_part(output, job) for job in list_jobs([(parts, Rules("text", 0, 0.1))])]
    files = [file for record in records for file in record.files.values()]
    return sum(file.tokens for file in files), sum(file.size for file in files)


def main():
    megabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 20
    datasets.disable_progress_bars()
    tokenizer = train_tokenizer(generate_stories(2000, 1), vocab_size=4096)
    encoding = Encoding.of(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source.jsonl")
        print(f"{write_source(source, megabytes):,} documents, {source.stat().st_size / 1e6:,.0f} MB")
        seconds = {}

        def measure(name, function, *arguments):
            started = time.process_time()
            result = function(*arguments)
            seconds[name] = time.process_time() - started
            count = result[0] if isinstance(result, tuple) else result
            print(f"{name:30}{count:>14,} tokens {count / seconds[name]:>12,.0f} tokens per CPU second")
            return result

        measure("prepare, to warm up", prepare, source, encoding, Path(folder, "first"))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        tokens, size = measure("prepare", prepare, source, encoding, Path(folder, "out"))
        print(f"{size / tokens:.3f} bytes per token; peak memory {before:,.0f} MiB")
        measure("tokenizer alone", tokenize_alone, source, encoding)
        measure("map(tokenize), map(group_texts)", map_and_group, source, tokenizer, Path(folder, "cache"))
        print(f"prepare: {seconds['tokenizer alone'] / seconds['prepare']:.2f} of the tokenizer's speed, ", end="")
        print(f"{seconds['map(tokenize), map(group_texts)'] / seconds['prepare']:.1f} times that of map")


if __name__ == "__main__":
    main()
