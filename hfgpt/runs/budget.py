"""A time budget for a whole run: chooses the model and its training, and forecasts the loss."""

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, default_data_collator

from hfgpt.data.ngrams import measure_ngrams
from hfgpt.durations import Budget
from hfgpt.errors import InputError
from hfgpt.evaluation.perplexity import measure_perplexity
from hfgpt.recipe import Recipe, load_recipe, with_values
from hfgpt.records import RECIPE_FILE, Forecast
from hfgpt.tasks import TASKS
from hfgpt.tasks.preparation import context_length
from hfgpt.tasks.pretrain import PretrainingData
from hfgpt.training.arguments import HfGPTTrainingArguments
from hfgpt.training.estimate import explained_memory, probe_seconds
from hfgpt.training.scaling import FIXED, LEAST_NGRAMS, MOST_TOKENS, MOST_WEIGHTS, SHAPES, SPREAD, Outlook

PROBE = 0.25  # seconds to measure the speed of a model
PLANNING = 1.0  # seconds from the choice to the first step: the model is built, and the run is planned
RECORDING = 3.0  # seconds after the evaluation: known answers, plots and the model card
CONTEXT, SECONDS = "model.max_position_embeddings", "training.max_seconds"
ROWS = "training.per_device_train_batch_size"
HEADS = "num_attention_heads"
SIZES = {"model.num_hidden_layers", "model.hidden_size", f"model.{HEADS}"}
TASK = TASKS["pretrain"]


def check_budget(recipe: Recipe, budget: Budget):
    """Checks that a recipe trains a new language model in one process.

    Raises:
        InputError: It does not.
    """
    instead = "leave out --budget, and pass --training.max_seconds (with --training.max_steps -1) for a time limit"
    if recipe.task != "pretrain" or recipe.model.path is not None:
        fact = "this recipe does not train a new language model, whose size --budget chooses"
        raise InputError(f"{fact}: {instead}")
    if "model.preset" in budget.fixed:
        raise InputError("--budget chooses the size of the model, as does --model.preset: remove one of them")
    if recipe.training.world_size > 1:
        raise InputError(f"--budget is for one process, and there are {recipe.training.world_size}: {instead}")


def keep_choice(recipe: Recipe, budget: Budget) -> Recipe:
    """The recipe with the choice that was made when the run in its folder started, if there is one."""
    begun = Path(recipe.training.output_dir) / RECIPE_FILE
    if not begun.is_file():
        return recipe
    old = load_recipe(str(begun)).values
    chosen = {CONTEXT, SECONDS, *Outlook(*SHAPES[0], 1, 1).values()} - FIXED.keys()
    places = {key: key.partition(".")[::2] for key in chosen}
    return change(recipe, budget, FIXED | {key: old[section].get(name) for key, (section, name) in places.items()})


def change(recipe: Recipe, budget: Budget, values: dict[str, Any]) -> Recipe:
    """The recipe with other values, except for keys that are set on the command line."""
    return with_values(recipe, {key: value for key, value in values.items() if key not in budget.fixed})


def fit_to_budget(
    recipe: Recipe, data: PretrainingData, budget: Budget, console: Console
) -> tuple[Recipe, Forecast | None]:
    """Chooses the model with the lowest expected loss at the end of the budget.

    Args:
        recipe: The recipe; its tokenizer, data, context length and evaluation are kept.
        data: Its data.
        budget: The budget.
        console: The console to print to.

    Returns:
        The recipe with the choice, and the forecast; None if there is none, see `why_unknown`.

    Raises:
        InputError: The budget is too short, or there is too little memory.
    """
    recipe = change(recipe, budget, {CONTEXT: context_length(recipe, None)})  # also that of a preset
    ngrams = measure_ngrams(data.splits["train"], data.splits["validation"])
    candidate = choose(recipe, data, budget)
    outlook, recipe = candidate.outlook, change(recipe, budget, candidate.outlook.values())
    began = time.perf_counter()
    TASK.sample(TASK.build(recipe, data).to(recipe.training.device), data, recipe)
    ending = candidate.ending + time.perf_counter() - began
    seconds = round(budget.left - candidate.planning - ending, 1)
    if seconds <= 0:
        raise too_short(budget, candidate.planning + ending, data)
    recipe = change(recipe, budget, {SECONDS: seconds})
    parts = f"{seconds:,.0f} s for training and {ending:,.0f} s for the evaluation and the records"
    told = f"budget: {budget.seconds:,.0f} s, of which {parts}"
    if reason := why_unknown(outlook, ngrams, budget, recipe.training.device):
        console.print(f"{told}; no forecast of the loss, since {reason}", highlight=False)
        return recipe, None
    expected = outlook.expect_loss(min(ngrams))
    forecast = Forecast(loss=expected, low=expected / (1 + SPREAD), high=expected * (1 + SPREAD))
    console.print(f"{told}; forecast of the loss: {forecast.describe()}", highlight=False)
    return recipe, forecast


def why_unknown(outlook: Outlook, ngrams: list[float], budget: Budget, device: torch.device) -> str | None:
    """Why the scaling law may not hold for a run; None if it holds."""
    if device.type != "cpu":
        return "the scaling law was measured on CPUs only"
    if other := sorted(budget.fixed & outlook.values().keys() - SIZES):
        return f"--{other[0]} may differ from that of the measured runs"
    if outlook.weights > MOST_WEIGHTS or outlook.tokens > MOST_TOKENS:
        return "the run is more than ten times larger than the measured ones"
    if outlook.dropout:
        epochs = outlook.tokens / outlook.unique
        return f"the model may overfit in about {epochs:,.0f} epochs: use more text or a shorter budget"
    if min(ngrams) < LEAST_NGRAMS * ngrams[0]:
        return "the text repeats itself much more than those of the measured runs"
    return None


@dataclass
class Candidate:
    """A model for the time that is left.

    Args:
        outlook: Model and tokens.
        planning, ending: Seconds before the first step, and after the last one.
    """

    outlook: Outlook
    planning: float
    ending: float


def choose(recipe: Recipe, data: PretrainingData, budget: Budget) -> Candidate:
    """The best model for the time that is left.

    It tries models from small to large, and stops after two in a row that are no better.

    Raises:
        InputError: The budget is too short even for the smallest model, or there is too little memory for it.
    """
    best, best_loss, worse = None, math.inf, 0
    for layers, width in shapes_of(recipe, budget):
        try:
            candidate = measure(recipe, data, budget, layers, width)
        except InputError:  # too little time or memory
            if best is None:
                raise
            break
        loss = candidate.outlook.expect_loss(1.0)
        if loss < best_loss:
            best, best_loss, worse = candidate, loss, 0
        elif (worse := worse + 1) == 2:
            break
    return best


def shapes_of(recipe: Recipe, budget: Budget) -> list[tuple[int, int]]:
    """Blocks and hidden size of the models to choose from, with those that are set on the command line.

    Raises:
        InputError: None has the number of heads that is set on the command line.
    """
    fixed = {key: getattr(recipe.model, key.partition(".")[2]) for key in SIZES & budget.fixed}
    layers, width, heads = (fixed.get(f"model.{name}") for name in ("num_hidden_layers", "hidden_size", HEADS))
    shapes = dict.fromkeys((layers or deep, width or wide) for deep, wide in SHAPES)
    usable = [(deep, wide) for deep, wide in shapes if width or wide % (heads or 1) == 0]
    if not usable:
        raise InputError(
            f"none of the hidden sizes that --budget chooses from is divisible by {heads} heads: also pass "
            "--model.hidden_size"
        )
    return usable


def measure(recipe: Recipe, data: PretrainingData, budget: Budget, layers: int, width: int) -> Candidate:
    """Measures the speed of a model in training and evaluation, and so how many tokens it has time to train on.

    Raises:
        InputError: The budget is too short to train this model, or there is too little memory for it.
    """
    began, length = time.perf_counter(), data.row_length
    outlook = Outlook(layers, width, length, 1e6, data.report.split("train").tokens)
    shaped = change(recipe, budget, outlook.values())
    with explained_memory(shaped.training):
        model = TASK.build(shaped, data)
        row, step = probe_seconds(model, shaped.training, length, PROBE)
        planning = PLANNING + time.perf_counter() - began
        ending = RECORDING + estimate_evaluation(model, data, shaped.training)
    left = budget.left - planning - ending
    if left <= 0:
        raise too_short(budget, planning + ending, data)
    for _ in range(5):  # with more tokens, batches are larger, and take less time per token
        rows = shaped.training.rows_per_step if ROWS in budget.fixed else outlook.rows
        outlook = dataclasses.replace(outlook, tokens=left / (row + step / rows) * length)
    return Candidate(outlook, planning, ending)


def estimate_evaluation(model: PreTrainedModel, data: PretrainingData, arguments: HfGPTTrainingArguments) -> float:
    """Seconds to evaluate a model on the validation split, from its second batch."""
    blocks = data.splits["validation"]
    rows = min(arguments.per_device_eval_batch_size, len(blocks))
    batch = default_data_collator([blocks[index] for index in range(rows)])
    model = model.to(arguments.device)
    measure_perplexity(model, [batch])
    began = time.perf_counter()
    measure_perplexity(model, [batch])
    return (time.perf_counter() - began) * len(blocks) / rows


def too_short(budget: Budget, needed: float, data: PretrainingData) -> InputError:
    """The error of a budget that leaves no time for training; everything else still takes `needed` seconds."""
    tokens, used = data.report.split("validation").predicted_tokens, budget.seconds - budget.left
    return InputError(
        f"--budget is {budget.seconds:,.0f} s, which is too short: everything but the training takes about "
        f"{used + needed:,.0f} s, with the evaluation of {tokens:,} tokens at the end; raise it, or evaluate on less "
        "text (data.validation_fraction)"
    )
