"""`hfgpt demo`: all stages on generated text, without network access, and a table of the results."""

import itertools
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hfgpt.errors import Interrupted
from hfgpt.evaluation.classification import predict
from hfgpt.evaluation.generation import SamplingArguments, generate_texts
from hfgpt.models import find_model, load_classifier
from hfgpt.output import PlainConsole, stderr_console
from hfgpt.recipe import Recipe, load_recipe
from hfgpt.records import RunRecord
from hfgpt.runs.run import run
from hfgpt.serving.conversation import Chat

TABLE_WIDTH = 72  # columns that the table at the end needs
PROMPTS = ("Once upon a time", "One rainy day,", "In a small village")


def run_demo(
    output_dir: Path | None = None,
    overrides: Mapping[str, Sequence[str]] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Trains the recipe `demo`, generates stories with the model, and fine-tunes it on two tasks.

    Args:
        output_dir: Run folder of the pre-trained model, with those of the fine-tuned models in it; None: the first of
            `runs/demo`, `runs/demo-2`, ... that does not exist.
        overrides: Recipe -> `--section.key value` as on the command line, for `demo`, `demo-messages` and
            `demo-instructions`.
        console: Where to show the stories and the table; None: standard output.

    Returns:
        The content of the three `metrics.json`, by recipe.

    Raises:
        InputError: The folder contains another run.
        Interrupted: Ctrl-C; the message tells how to finish the run that was stopped.
    """
    console, progress, overrides = console or PlainConsole(), stderr_console(), overrides or {}
    folder = output_dir or _free_folder(Path("runs"))
    folders = {"demo": folder, "demo-messages": folder / "messages", "demo-instructions": folder / "instructions"}

    def words(name: str) -> list[str]:
        base = [] if name == "demo" else ["--model.path", str(folder)]
        return [name, *base, *overrides.get(name, ()), "--training.output_dir", str(folders[name])]

    progress.rule("1  Train a small GPT on generated stories")
    progress.print(f"everything is saved in {folder}", highlight=False, markup=False)
    metrics = {"demo": _train(words("demo"), progress)}

    progress.rule("2  Load it like any transformers model and generate text")
    model, tokenizer = find_model(str(folder)).load_with_tokenizer()
    for seed, prompt in enumerate(PROMPTS):
        arguments = SamplingArguments(max_new_tokens=200, temperature=0.6, seed=seed)
        console.print(generate_texts(model, tokenizer, prompt, arguments)[0], highlight=False, end="\n\n")

    progress.rule("3  Fine-tune it with LoRA to classify notes")
    metrics["demo-messages"] = _train(words("demo-messages"), progress)
    model, tokenizer, _ = load_classifier(find_model(str(folders["demo-messages"])))
    for found in predict(model, tokenizer, _load(words("demo-messages")).evaluation.prompts):
        console.print(f"{found.text}\n  -> {found.label} ({found.score:.3f})", highlight=False, end="\n\n")

    progress.rule("4  Fine-tune all its weights to follow instructions")
    metrics["demo-instructions"] = _train(words("demo-instructions"), progress)
    model, tokenizer = find_model(str(folders["demo-instructions"])).load_with_tokenizer()
    for question in _load(words("demo-instructions")).evaluation.prompts:
        answer = Chat(model, tokenizer, SamplingArguments(greedy=True)).answer(question)
        console.print(f"{question}\n  -> {answer}", highlight=False, end="\n\n")

    table = render_table(metrics, folders)
    console.print(table if console.width >= TABLE_WIDTH else stack_cells(table))
    return metrics


def render_table(metrics: Mapping[str, Mapping[str, Any]], folders: Mapping[str, Path]) -> Table:
    """The metrics and the training time of each stage."""
    records = {name: RunRecord.read(path) for name, path in folders.items()}
    stories, messages, answers = (metrics[name] for name in folders)
    rows = [
        ("pre-training", f"loss on {stories['eval_tokens']:,} tokens of unseen stories",
         f"{stories['eval_loss']:.3f} nats", "demo"),
        ("classification", f"accuracy on {messages['eval_rows']:,} unseen notes",
         f"{messages['eval_accuracy']:.1%}", "demo-messages"),
        ("with LoRA", "  baseline: regression on character n-grams", f"{messages['baseline_accuracy']:.1%}", None),
        ("instructions", f"exact match on {answers['eval_answers']:,} unseen instructions",
         f"{answers['eval_exact_match']:.1%}", "demo-instructions"),
    ]  # fmt: skip
    table = Table("stage", "metric", "result", "trained weights", "time")
    for *cells, name in rows:
        plan, actual = (records[name].plan, records[name].actual) if name else (None, None)
        table.add_row(*cells, *([f"{plan['parameters']:,}", f"{actual['training_seconds']:.0f} s"] if name else []))
    return table


def stack_cells(table: Table) -> str:
    """A table for a narrow terminal: the cells of a row below its first one."""
    rows = zip(*(column.cells for column in table.columns), strict=True)
    return "\n".join("\n    ".join(str(cell).strip() for cell in row if cell) for row in rows)


def _load(words: list[str]) -> Recipe:
    """The recipe of a command `hfgpt train WORDS`."""
    return load_recipe(words[0], words[1:])


def _train(words: list[str], console: Console) -> dict[str, Any]:
    """Trains it; if it is stopped, the message has a command that finishes it."""
    try:
        return run(_load(words), console=console)
    except Interrupted as error:
        command = shlex.join(["hfgpt", "train", *words, "--resume"])
        raise Interrupted(f"the demo was stopped; to finish this run, without the rest: {command}") from error


def _free_folder(parent: Path) -> Path:
    names = itertools.chain(["demo"], (f"demo-{number}" for number in itertools.count(2)))
    return next(parent / name for name in names if not (parent / name).exists())
