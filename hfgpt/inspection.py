"""`hfgpt inspect`: what a recipe's data becomes, and which tokens are learned, in colour."""

from rich.console import Console
from rich.text import Text

from hfgpt.data.blocks import BlockDataset
from hfgpt.errors import InputError
from hfgpt.recipe import Recipe
from hfgpt.tasks.pretrain import load_pretraining_data

LEARNED = ("green", "cyan")  # in turn, so that tokens can be told apart
CONTEXT_ONLY = "dim strike"


def inspect_recipe(recipe: Recipe, rows: int, console: Console | None = None):
    """Prints the data report and the first blocks of the training split.

    Args:
        recipe: Its data is read and tokenized as for training.
        rows: Blocks to show.
        console: Where; None: standard output.

    Raises:
        InputError: As the run itself would; or `rows` is negative.
    """
    if rows < 0:
        raise InputError(f"--rows is {rows}; it must be at least 0")
    console = console or Console()
    data = load_pretraining_data(recipe)
    console.print(data.report.summary(), highlight=False)
    console.print(
        Text.assemble(
            "\ntokens that are learned: ",
            ("one ", LEARNED[0]),
            ("after ", LEARNED[1]),
            ("the other", LEARNED[0]),
            "; context only: ",
            ("like this", CONTEXT_ONLY),
        )
    )
    for index in range(min(rows, len(data.train))):
        console.print(f"\nblock {index} of {len(data.train):,}:", highlight=False)
        console.print(colour_block(data.train, index, data.tokenizer))


def colour_block(blocks: BlockDataset, index: int, tokenizer) -> Text:
    """One block as text: each token learned by some position in colour, the others struck out.

    A block of T inputs has T targets, so T + 1 tokens are shown; the first is never a target.
    """
    item = blocks[index]
    ids = [*item["input_ids"].tolist(), int(item["shift_labels"][-1])]
    targets = [-100, *item["shift_labels"].tolist()]
    text = Text()
    for position, (token, target) in enumerate(zip(ids, targets, strict=True)):
        if token == -100:
            continue  # the last target is ignored, and so its token is not part of the block
        style = CONTEXT_ONLY if target == -100 else LEARNED[position % 2]
        text.append(tokenizer.decode([token]), style=style)
    return text
