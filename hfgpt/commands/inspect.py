"""`hfgpt inspect`: how a recipe's data is prepared, and which tokens are learned."""

import functools
import itertools
import sys
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from hfgpt.data.blocks import IGNORED
from hfgpt.errors import InputError, make_visible
from hfgpt.output import PlainConsole
from hfgpt.recipe import Recipe
from hfgpt.tasks import TASKS
from hfgpt.tasks.classify import ClassificationData
from hfgpt.tasks.instruct import InstructionData
from hfgpt.tasks.pretrain import PretrainingData
from hfgpt.tasks.task import Data

LEARNED = ("green", "cyan")  # alternating, so that adjacent tokens are distinct
CONTEXT_ONLY = "dim"


def inspect_recipe(recipe: Recipe, rows: int, console: Console | None = None):
    """Prints the data report and the first rows of the training split.

    Args:
        recipe: Its data is read and tokenized as for training.
        rows: Number of rows, or blocks, to show.
        console: The console to print to; None: standard output.

    Raises:
        InputError: As in a run of the recipe; or `rows` is negative.
    """
    if rows < 0:
        raise InputError(f"--rows is {rows}; it must be at least 0")
    console = console or PlainConsole(soft_wrap=not sys.stdout.isatty())
    data = TASKS[recipe.task].load(recipe)
    console.print(data.report.summary(), highlight=False, markup=False)
    for line in show_rows(data, rows):
        console.print(line, highlight=False)


@functools.singledispatch
def show_rows(data: Data, rows: int) -> Iterator[Text]:
    """The first rows of the training split, in a form that depends on the task."""
    raise NotImplementedError(type(data).__name__)


@show_rows.register
def show_blocks(data: PretrainingData, rows: int) -> Iterator[Text]:
    """The first blocks of the training split of pre-training."""
    yield _legend()
    blocks = data.splits["train"]
    for index in range(min(rows, len(blocks))):
        item = blocks[index]
        yield Text(f"\nblock {index} of {len(blocks):,}:")
        yield color_tokens(item["input_ids"].tolist(), item["shift_labels"].tolist(), data.tokenizer)


@show_rows.register
def show_texts(data: ClassificationData, rows: int) -> Iterator[Text]:
    """The first texts of the training split of a classifier, with their labels and as tokens."""
    yield Text.assemble("\nThe colors of the tokens alternate: ", *_alternating())
    encoded = data.splits["train"]
    for index in range(min(rows, len(encoded))):
        label = make_visible(data.labels[encoded[index]["labels"]])
        yield Text(f"\nrow {index} of {len(encoded):,}, {label}:")
        text = Text()
        for position, token in enumerate(encoded[index]["input_ids"]):
            text.append(make_visible(data.tokenizer.decode([token])), style=LEARNED[position % 2])
        yield text


@show_rows.register
def show_conversations(data: InstructionData, rows: int) -> Iterator[Text]:
    """The first rows of the training split of instructions; tokens in « » are context only."""
    for test, train in data.report.near_duplicate_examples[:rows]:
        yield Text(make_visible(f"\nin test:  {test}\nin train: {train}"))
    yield _legend()
    encoded = data.splits["train"]
    for index in range(min(rows, len(encoded))):
        row = encoded[index]
        yield Text(f"\nrow {index} of {len(encoded):,}:")
        yield color_tokens(row["input_ids"], row["shift_labels"], data.tokenizer)


def color_tokens(input_ids: Sequence[int], shift_labels: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Text:
    """A row as text: tokens with a loss in alternating colors, the others dim and in « ».

    Args:
        input_ids: T inputs.
        shift_labels: T targets, -100 where ignored. T + 1 tokens are shown, or T if the last target is ignored, since
            it is then not part of the row; the first token is never a target.
        tokenizer: The tokenizer of the row.
    """
    pairs = zip([*input_ids, shift_labels[-1]], [IGNORED, *shift_labels], strict=True)
    tokens = [(token, target != IGNORED) for token, target in pairs if token != IGNORED]
    text = Text()
    for is_learned, run in itertools.groupby(enumerate(tokens), key=lambda item: item[1][1]):
        text.append("" if is_learned else "«", style=CONTEXT_ONLY)
        for position, (token, _) in run:
            style = LEARNED[position % 2] if is_learned else CONTEXT_ONLY
            text.append(make_visible(tokenizer.decode([token])), style=style)
        text.append("" if is_learned else "»", style=CONTEXT_ONLY)
    return text


def _legend() -> Text:
    return Text.assemble(
        "\nTokens in ", ("« »", CONTEXT_ONLY), " are context only; all others count toward the loss: ", *_alternating()
    )


def _alternating() -> list[tuple[str, str]]:
    return [("one ", LEARNED[0]), ("after ", LEARNED[1]), ("another", LEARNED[0])]
