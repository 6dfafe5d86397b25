"""`hfgpt plan`: what a recipe will cost, before anything is spent."""

from rich.table import Table

from hfgpt.recipe import Recipe
from hfgpt.tasks.classify import build_classifier, first_pass_blocks, load_classification_data
from hfgpt.tasks.first_pass import plan_first_pass
from hfgpt.tasks.instruct import build_follower, load_instruction_data
from hfgpt.tasks.pretrain import build_pretraining_model, load_pretraining_data
from hfgpt.tasks.training_run import plan_rows
from hfgpt.training.callbacks import PlainConsole
from hfgpt.training.estimate import Estimate, plan_run

SECONDS = 2.0  # of the probe


def plan_recipe(recipe: Recipe) -> Estimate:
    """Reads and tokenizes the data, builds the model, and probes this machine for two seconds; writes nothing.

    Raises:
        InputError: As the run itself would.
    """
    if recipe.task == "classify":
        labelled = load_classification_data(recipe)
        estimate = plan_rows(build_classifier(recipe, labelled), recipe, labelled.encoded["train"], SECONDS)
        if blocks := first_pass_blocks(recipe, labelled):
            estimate.first_pass = plan_first_pass(recipe, blocks, labelled.tokenizer, SECONDS)
        return estimate
    if recipe.task == "instruct":
        answers = load_instruction_data(recipe)
        return plan_rows(build_follower(recipe, answers), recipe, answers.encoded["train"], SECONDS)
    data = load_pretraining_data(recipe)
    model = build_pretraining_model(recipe, data)
    return plan_run(model, recipe.training, data.train.block_size, len(data.train), SECONDS)


def render_plan(estimate: Estimate) -> str:
    """The estimate as a table for the terminal."""
    mib = 1024**2
    rows = [
        ("parameters", f"{estimate.parameters:,}"),
        ("memory: weights", f"{estimate.weights_bytes / mib:,.1f} MiB"),
        ("memory: gradients", f"{estimate.gradients_bytes / mib:,.1f} MiB"),
        ("memory: optimizer", f"{estimate.optimizer_bytes / mib:,.1f} MiB"),
        ("memory: activations", f"{estimate.activations_bytes / mib:,.1f} MiB"),
        ("memory: libraries and data", f"{estimate.process_bytes / mib:,.1f} MiB, held by this process now"),
        ("memory: total", f"{estimate.memory_bytes / mib:,.1f} MiB"),
        ("steps", f"{estimate.steps:,} of {estimate.tokens_per_step:,} tokens"),
        ("tokens", f"{estimate.tokens:,}"),
        ("operations a token", f"{estimate.flops_per_token:.3g} FLOP, forward and backward"),
        ("operations", f"{estimate.flops:.3g} FLOP"),
        ("speed", f"{estimate.tokens_per_second:,.0f} tokens/s on {estimate.device}"),
        ("time", f"{_duration(estimate.seconds)}, evaluations not counted"),
    ]
    if not estimate.process_bytes:  # an accelerator
        rows[5:7] = [("memory: total", f"{estimate.memory_bytes / mib:,.1f} MiB on the device, without its context")]
    if first := estimate.first_pass:
        steps = f"{first.steps:,} steps of {first.tokens_per_step:,} tokens"
        rows.insert(-6, ("first pass", f"{steps}, {_duration(first.seconds)}, {first.memory_bytes / mib:,.1f} MiB"))
    table = Table(show_header=False, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console = PlainConsole(width=100)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.0f} seconds"
