"""`hfgpt plan`: estimates the cost of a recipe before it runs."""

from hfgpt.output import output_width, render_pairs
from hfgpt.recipe import Recipe
from hfgpt.runs.first_pass import prepare_first_pass
from hfgpt.runs.run import main_process_first
from hfgpt.tasks import TASKS
from hfgpt.training.estimate import Estimate, describe_steps, plan_run

SECONDS = 2.0  # of the benchmark
CHARACTERS = 1 << 21  # of text to tokenize; the total number of tokens is estimated from these


def plan_recipe(recipe: Recipe) -> Estimate:
    """Reads the data, tokenizes enough of it, builds the model, and benchmarks this machine for two seconds.

    Raises:
        InputError: As the run itself would.
    """
    task = TASKS[recipe.task]
    with main_process_first():
        data = task.load(recipe, characters=CHARACTERS)
    model = task.build(recipe, data)
    estimate = plan_run(model, recipe.training, data.row_length, data.train_rows, SECONDS)
    if recipe.training.max_steps <= 0 and recipe.training.max_seconds is None:
        estimate.share = data.share
    if recipe.pretraining:
        estimate.first_pass = prepare_first_pass(recipe, data, SECONDS).estimate
    return estimate


def render_plan(estimate: Estimate) -> str:
    """The estimate as text for the terminal."""
    mib = 1024**2
    known = "{:,}".format if estimate.steps else "unknown".format
    estimated = "" if estimate.share == 1 else f", estimated from {estimate.share:.2%} of the text"
    rows = [
        ("parameters", f"{estimate.parameters:,}"),
        ("memory: weights", f"{estimate.weights_bytes / mib:,.1f} MiB"),
        ("memory: gradients", f"{estimate.gradients_bytes / mib:,.1f} MiB"),
        ("memory: optimizer", f"{estimate.optimizer_bytes / mib:,.1f} MiB"),
        ("memory: activations", f"{estimate.activations_bytes / mib:,.1f} MiB"),
        ("memory: libraries and data", f"{estimate.process_bytes / mib:,.1f} MiB (this process now)"),
        ("memory: total", f"{estimate.memory_bytes / mib:,.1f} MiB"),
        ("steps", f"{known(estimate.steps)} of {estimate.tokens_per_step:,} tokens on average{estimated}"),
        ("tokens", known(estimate.tokens)),
        ("FLOPs per token", f"{estimate.flops_per_token:.3g}, forward and backward"),
        ("FLOPs", f"{estimate.flops:.3g}" if estimate.steps else "unknown"),
        ("speed", f"{_speed(estimate)} on {estimate.device}"),
        ("time", f"{_duration(estimate.seconds)}, not including evaluation"),
    ]
    if not estimate.process_bytes:  # an accelerator
        rows[5:7] = [("memory: total", f"{estimate.memory_bytes / mib:,.1f} MiB on the device, excluding its context")]
    if first := estimate.first_pass:
        memory = f"{first.memory_bytes / mib:,.1f} MiB"
        rows.insert(-6, ("first pass", f"{describe_steps(first)}, {_duration(first.seconds)}, {memory}"))
        known = first.seconds is not None and estimate.seconds is not None
        total = _duration(first.seconds + estimate.seconds if known else None)
        rows[-1] = ("time", f"{_duration(estimate.seconds)}, {total} with the first pass; not including evaluation")
    if estimate.processes > 1:
        sharing = ", each with a part of the model" if estimate.shards > 1 else ", each with the whole model"
        rows.insert(1, ("processes", f"{estimate.processes}{sharing}; memory is that of each"))
        rows_per_step = ("rows per step", f"at most {estimate.rows_per_process:,} in each process")
        rows.insert([name for name, _ in rows].index("steps") + 1, rows_per_step)
    if estimate.gathered_bytes:
        gathered = ("memory: gathered weights", f"{estimate.gathered_bytes / mib:,.1f} MiB (of other processes)")
        rows.insert([name for name, _ in rows].index("memory: gradients"), gathered)
    return render_pairs(rows, output_width())


def _speed(estimate: Estimate) -> str:
    return f"{estimate.tokens_per_second:,.0f} tokens/s" if estimate.tokens_per_second else "unknown"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.0f} seconds"
