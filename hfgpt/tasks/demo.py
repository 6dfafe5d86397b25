"""The tour: every stage on text that hfgpt generates itself, offline, with a table of what was measured at the end."""

import itertools
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hfgpt.evaluation.generation import SamplingArguments, generate_texts
from hfgpt.loading import load_model, load_model_tokenizer
from hfgpt.recipe import load_recipe
from hfgpt.tasks.pretrain import pretrain
from hfgpt.training.callbacks import stderr_console

PROMPTS = ("Once upon a time", "One rainy day,", "In a small village")


def run_demo(output_dir: Path | None = None, overrides: tuple[str, ...] = (), console: Console | None = None) -> dict:
    """Trains the recipe `demo` and tells stories with the model.

    Args:
        output_dir: The run folder; None: the first free of `runs/demo`, `runs/demo-2`, ...
        overrides: Of the recipe, `--section.key value` as on the command line.
        console: Where to show the stories and the table; None: standard output.

    Returns:
        The content of `metrics.json`.

    Raises:
        InputError: The folder holds another run.
    """
    console = console or Console()
    progress = stderr_console()
    folder = output_dir or _free_folder(Path("runs"))
    progress.rule("1  Train a small GPT on generated stories")
    metrics = pretrain(load_recipe("demo", [*overrides, "--training.output_dir", str(folder)]), console=progress)

    progress.rule("2  Load it as any transformers model, and let it write")
    model, tokenizer = load_model(str(folder)), load_model_tokenizer(str(folder))
    for seed, prompt in enumerate(PROMPTS):
        arguments = SamplingArguments(max_new_tokens=200, temperature=0.6, seed=seed)
        console.print(generate_texts(model, tokenizer, prompt, arguments)[0], highlight=False, end="\n\n")

    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    table = Table("stage", "what was measured", "result", "time")
    seconds = run["actual"]["training_seconds"]
    table.add_row(
        "pre-training",
        f"loss on {metrics['eval_tokens']:,} tokens of unseen stories",
        f"{metrics['eval_loss']:.3f} nats (perplexity {metrics['eval_perplexity']:.2f})",
        f"{seconds:.0f} s",
    )
    table.add_row("", "speed", f"{run['actual']['tokens_per_second']:,.0f} tokens/s", "")
    table.add_row("", "model", f"{run['plan']['parameters']:,} parameters in {folder}", "")
    console.print(table)
    return metrics


def _free_folder(parent: Path) -> Path:
    names = itertools.chain(["demo"], (f"demo-{number}" for number in itertools.count(2)))
    return next(parent / name for name in names if not (parent / name).exists())
