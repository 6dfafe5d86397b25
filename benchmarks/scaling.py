"""Measures runs for the scaling law of `hfgpt train --budget`, and fits it.

    python benchmarks/scaling.py measure TEXT:CONTEXT,CONTEXT:TOKENIZER[:VOCABULARY] ...     takes hours
    python benchmarks/scaling.py fit

`measure` adds runs to scaling.jsonl, and `fit` prints the numbers of hfgpt/training/scaling.py.

The 44 runs in scaling.jsonl were made by an earlier form of this script, one thread each, with validation splits of 1
to 2% (now 1.5%), n-grams measured on splits of 4%, and unrounded AdamW learning rates. They include two longer runs (6
and 8 million tokens), and leave out some of the largest in `RUNS`.

The runs in scaling.jsonl are on four texts, three of them from packages of Debian 12 (bible-kjv-text, anarchism,
fortunes-de):

    bible -f gen1:1-rev22:21 > kjv.txt
    zcat /usr/share/doc/anarchism/markdown/*.md.gz | head -c 8000000 > faq.txt
    cat $(ls -d /usr/share/games/fortunes/de/* | grep -v '[.]') > fortunes.txt
    stdlib.txt: the modules of Python 3.11's standard library, and of its packages asyncio, email, json, http, logging
        and unittest
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from scipy.optimize import least_squares

TABLE = Path(__file__).with_suffix(".jsonl")
LEAST = 150_000  # tokens of the runs to fit; with fewer, a model has hardly learned to use its context
# Blocks, hidden size, tokens and context of the runs on each text; SHORT and LONG are its two contexts.
SHORT, LONG = 0, 1
RUNS = (
    *((2, 64, 1e5, SHORT), (4, 128, 2e5, SHORT), (4, 192, 6e5, SHORT), (2, 64, 1.8e6, SHORT), (4, 256, 2e5, SHORT)),
    *((2, 64, 1e5, LONG), (2, 64, 2e5, LONG), (2, 128, 6e5, LONG), (4, 128, 1.8e6, LONG)),
)


def measure(texts: list[str]):
    """Trains each of `RUNS` on each text, and adds the results to the table."""
    for text in texts:
        path, contexts, kind, *size = text.split(":")
        tokenizer = {"kind": kind} | ({"vocab_size": int(size[0])} if size else {})
        for layers, width, tokens, which in RUNS:
            entry = train(path, tokenizer, layers, width, int(contexts.split(",")[which]), tokens)
            with TABLE.open("a") as table:
                table.write(json.dumps(entry) + "\n")


def train(
    path: str, tokenizer: dict[str, Any], layers: int, width: int, context: int, tokens: float
) -> dict[str, Any]:
    """One run with the batch size and the learning rates of `hfgpt train --budget`, and its loss."""
    import yaml
    from rich.console import Console

    from hfgpt.data.ngrams import measure_ngrams
    from hfgpt.recipe import load_recipe, with_values
    from hfgpt.runs.run import run
    from hfgpt.tasks import TASKS
    from hfgpt.training.scaling import Outlook

    outlook = Outlook(layers, width, context, tokens)
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "run.yaml"
        data = {"path": path, "validation_fraction": 0.015}
        training = {"output_dir": f"{folder}/run", "save_strategy": "no", "logging_steps": 100}
        model = {"max_position_embeddings": context}
        recipe.write_text(yaml.safe_dump({"tokenizer": tokenizer, "data": data, "model": model, "training": training}))
        recipe = with_values(load_recipe(str(recipe)), outlook.values() | {"training.max_steps": outlook.steps})
        splits = TASKS["pretrain"].load(recipe).splits
        loss = run(recipe, console=Console(quiet=True))["eval_loss"]
    text = " ".join([Path(path).stem, *map(str, tokenizer.values())])
    shape = {"layers": layers, "width": width, "context": context, "tokens": outlook.steps * outlook.rows * context}
    ngrams = min(measure_ngrams(splits["train"], splits["validation"]))
    return {"text": text, **shape, "ngrams": round(ngrams, 4), "loss": round(loss, 4)}


def read_table() -> list[dict[str, Any]]:
    """The measured runs to fit."""
    return [run for run in map(json.loads, TABLE.read_text().splitlines()) if run["tokens"] >= LEAST]


def fit(runs: list[dict[str, Any]]) -> np.ndarray:
    """The numbers of the law by least squares: log FACTOR, CONTEXT, and the log factor and the exponent of both terms.

    So few runs do not determine the exponents: those of larger models (Hoffmann et al., "Training Compute-Optimal
    Large Language Models", 2022, equation 10) count like one more run, with an error of 1% for a difference of 0.1.
    """
    start = np.array([np.log(0.2), 0.1, np.log(0.4), 0.34, np.log(3.0), 0.28])

    def errors(numbers: np.ndarray) -> np.ndarray:
        return np.concatenate([residuals(numbers, runs), 0.1 * (numbers - start)[[3, 5]]])

    return least_squares(errors, start).x


def residuals(numbers: np.ndarray, runs: list[dict[str, Any]]) -> np.ndarray:
    """Logarithms of the law's losses over the measured ones."""
    column = {name: np.array([run[name] for run in runs]) for name in ("layers", "width", "context", "tokens")}
    weights = np.log(12 * column["layers"] * column["width"] ** 2 / 1e6)
    tokens, context = np.log(column["tokens"] / 1e6), np.log(column["context"] / 128)
    excess = np.exp(numbers[2] - numbers[3] * weights) + np.exp(numbers[4] - numbers[5] * tokens)
    law = numbers[0] + numbers[1] * context + np.log1p(excess)
    return law - np.log([run["loss"] / run["ngrams"] for run in runs])


def errors_by_text(runs: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The logarithms of expected over measured losses on each text, by a law fitted to the others."""
    errors = {}
    for text in {run["text"]: None for run in runs}:
        numbers = fit([run for run in runs if run["text"] != text])
        errors[text] = residuals(numbers, [run for run in runs if run["text"] == text])
    return errors


def spread_of(errors: dict[str, np.ndarray]) -> float:
    """The error that 95 of 100 texts stay below, from the few in the table, by Student's distribution."""
    return stats.t.ppf(0.975, len(errors) - 1) * np.sqrt(np.mean(np.concatenate(list(errors.values())) ** 2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2:])
    else:
        law = fit(read_table())
        factor, weights, tokens = np.exp(law[[0, 2, 4]])
        print(f"FACTOR, CONTEXT = {factor:.4f}, {law[1]:.3f}")
        print(f"WEIGHTS, TOKENS = ({weights:.3f}, {law[3]:.3f}), ({tokens:.3f}, {law[5]:.3f})")
        errors = errors_by_text(read_table())
        for text, logarithms in errors.items():
            print(f"{text:12} mean {logarithms.mean():+.3f}  standard deviation {logarithms.std():.3f}")
        print(f"SPREAD = {spread_of(errors):.3f}")
