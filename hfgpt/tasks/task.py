"""What a task is: the few functions in which pre-training, classification and instructions differ."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from datasets import Dataset
from rich.console import Console
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from hfgpt.data.report import DataReport
from hfgpt.models import SavedModel
from hfgpt.recipe import Recipe
from hfgpt.training.estimate import Estimate

# Why evaluation does not read a key.
ALL_ROWS = "all rows are measured, and none are divided"
NO_TEXTS = "it writes no texts, as hfgpt {} does"
# Where two answers to a row are almost equally likely, rounding decides which is given. So what is counted may differ
# between machines by such rows: this share of them, or one.
FLIPPING = 0.01


@dataclass(kw_only=True)
class Data:
    """What a model learns from and is measured on.

    Args:
        splits: Split -> rows of token ids, with their `length`.
        tokenizer: What made them.
        report: What became of the source.
        labels: The classes of a classifier in the order of their ids; None: a language model.
        base: The model to go on from; None: training starts from random weights.
        pretraining_texts: What a first pass of language modelling may read.
        share: Of the training rows that `splits` holds; less than 1 only where a run is planned.
    """

    splits: dict[str, Dataset | TorchDataset]
    tokenizer: PreTrainedTokenizerBase
    report: DataReport
    labels: list[str] | None = None
    base: SavedModel | None = None
    pretraining_texts: list[str] = field(default_factory=list)
    share: float = 1.0

    @property
    def train_rows(self) -> int:
        """Rows of the training split."""
        return round(len(self.splits["train"]) / self.share)

    @property
    def row_length(self) -> int:
        """Tokens of a training row, on average."""
        lengths = self.splits["train"]["length"]
        return max(sum(lengths) // len(lengths), 1)

    def count_tokens_seen(self, state: TrainerState, estimate: Estimate) -> int:
        """Tokens that a training has read, padding not counted."""
        return round(state.epoch * sum(self.splits["train"]["length"]))

    def summary(self) -> str:
        """What became of the source, in a few lines."""
        return self.report.summary()


@dataclass
class Measured:
    """What was measured of a model.

    Args:
        metrics: Under the names of `metrics.json`.
        allowed: How far those that are counted may differ on another machine, which rounds differently.
        keep: Writes what else came of it into a folder: a picture, the answers; None: nothing.
        judge: Asks a model that scores the answers, and returns more metrics; None: there is none to ask.
    """

    metrics: dict[str, Any]
    allowed: dict[str, float] = field(default_factory=dict)
    keep: Callable[[Path], None] | None = None
    judge: Callable[[Path], dict[str, Any]] | None = None


def flips(rows: int) -> float:
    """How many of so many rows may come out differently on another machine."""
    return max(1, rows * FLIPPING) * (1 + 1e-9)


class Task(Protocol):
    """A task of a recipe.

    Args:
        measured_split: What the metrics at the end of a run are measured on.
        only_for_training: Keys of the sections `data` and `evaluation` that only a training reads, each with why
            evaluation does not.
    """

    measured_split: ClassVar[str]
    only_for_training: ClassVar[Mapping[str, str]]

    def check(self, recipe: Recipe):
        """Refuses a run whose end needs something that is not there; needs no data."""

    def load(self, recipe: Recipe, tokenizer_folder: Path | None = None, characters: int | None = None) -> Data:
        """Reads the rows, divides them, trains or loads the tokenizer, and makes token ids of them.

        Args:
            recipe: Its sections `data`, `tokenizer` and `model`.
            tokenizer_folder: A run to resume, whose tokenizer is used rather than trained again.
            characters: Of a text of any length, tokenize only about so many, which is enough to plan; None: all.

        Raises:
            InputError: The rows or the tokenizer cannot be used.
        """

    def build(self, recipe: Recipe, data: Data) -> PreTrainedModel:
        """The model to train, its new weights drawn from the seed, checked against the data and the prompts.

        Raises:
            InputError: The architecture is impossible, or the data or a prompt does not fit it.
        """

    def trainer_arguments(self, recipe: Recipe, data: Data) -> dict[str, Any]:
        """What `HfGPTTrainer` gets beside model, arguments and data: collator, loss, measure."""

    def measure(self, model: PreTrainedModel, data: Data, recipe: Recipe, console: Console) -> Measured:
        """Measures a saved model on the rows that were held out."""

    def sample(self, model: PreTrainedModel, data: Data, recipe: Recipe) -> dict[str, Any]:
        """`texts` that show what the model has learned from the recipe's prompts, and how they were sampled."""

    def evaluate(
        self, saved: SavedModel, data: Any, evaluation: Any, console: Console | None = None
    ) -> dict[str, Any]:
        """Measures a saved model on all rows of a source.

        Args:
            saved: The model.
            data: The section `data`.
            evaluation: The section `evaluation`.
            console: Where to show progress; None: standard error.

        Raises:
            InputError: The model is of another kind, there are no rows, or they do not fit it.
        """

    def describe(self, metrics: Mapping[str, Any]) -> str:
        """The metrics in one line."""

    def following(self, folder: str) -> str:
        """The command to try a trained model with."""
