"""The interface of a task: the few methods in which pre-training, classification and instructions differ."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from datasets import Dataset
from rich.console import Console
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from hfgpt.data.report import DataReport
from hfgpt.evaluation.spread import Map
from hfgpt.models import SavedModel
from hfgpt.recipe import Recipe
from hfgpt.training.estimate import Estimate

# Reasons why a key has no effect on evaluation.
ALL_ROWS = "all rows are evaluated, without splitting"
NO_TEXTS = "it does not generate texts, as hfgpt {} does"
# If two outputs for a row are almost equally likely, rounding decides between them. So counts may differ between
# machines by this fraction of the rows, or by one row.
FLIPPING = 0.01


@dataclass(kw_only=True)
class Data:
    """Training and evaluation data of a run.

    Args:
        splits: Split -> rows of token ids, with their `length`.
        tokenizer: The tokenizer of the rows.
        report: The data report.
        labels: Class names in the order of their ids; None: a language model.
        base: The base model; None: training starts from random weights.
        pretraining_texts: Texts for the first pass of a classifier.
        share: Fraction of the training rows in `splits`; below 1 only when planning a run.
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
        """Average number of tokens in a training row."""
        lengths = self.splits["train"]["length"]
        return max(sum(lengths) // len(lengths), 1)

    def count_tokens_seen(self, state: TrainerState, estimate: Estimate) -> int:
        """Number of tokens seen in training, without padding."""
        return round(state.epoch * sum(self.splits["train"]["length"]))

    def summary(self) -> str:
        """The data report in a few lines."""
        return self.report.summary()


@dataclass
class Measured:
    """Evaluation results of a model.

    Args:
        metrics: Metrics with their names in `metrics.json`.
        allowed: How much counted metrics may differ on another machine because of rounding.
        keep: Writes additional results (a plot, the answers) into a folder; None: there are none.
        judge: Has a judge model score the answers, and returns further metrics; None: no judge.
    """

    metrics: dict[str, Any]
    allowed: dict[str, float] = field(default_factory=dict)
    keep: Callable[[Path], None] | None = None
    judge: Callable[[Path], dict[str, Any]] | None = None


def flips(rows: int) -> float:
    """Maximum number of rows, out of `rows`, that may have a different result on another machine."""
    return max(1, rows * FLIPPING) * (1 + 1e-9)


class Task(Protocol):
    """A task of a recipe.

    Args:
        measured_split: The split of the final metrics of a run.
        only_for_training: Keys of the sections `data` and `evaluation` that have no effect on `hfgpt evaluate`, each
            with the reason.
    """

    measured_split: ClassVar[str]
    only_for_training: ClassVar[Mapping[str, str]]

    def check(self, recipe: Recipe):
        """Checks before reading any data that everything the end of a run needs is available."""

    def load(self, recipe: Recipe, tokenizer_folder: Path | None = None, characters: int | None = None) -> Data:
        """Reads and splits the rows, trains or loads the tokenizer, and tokenizes them.

        Args:
            recipe: Its sections `data`, `tokenizer` and `model`.
            tokenizer_folder: Folder of a run to resume, whose tokenizer is reused.
            characters: Tokenize only about this many characters, enough for a plan; None: all.

        Raises:
            InputError: The rows or the tokenizer cannot be used.
        """

    def build(self, recipe: Recipe, data: Data) -> PreTrainedModel:
        """Builds the model to train, with new weights initialized from the seed, and checks data and prompts.

        Raises:
            InputError: The architecture is invalid, or the data or a prompt does not fit it.
        """

    def trainer_arguments(self, recipe: Recipe, data: Data) -> dict[str, Any]:
        """Task-specific arguments of `HfGPTTrainer`: collator, loss, measure."""

    def measure(
        self, model: PreTrainedModel, data: Data, recipe: Recipe, console: Console, spread: Map = map
    ) -> Measured:
        """Evaluates a saved model on the held-out rows, in one process or in several, see `Map`."""

    def sample(self, model: PreTrainedModel, data: Data, recipe: Recipe) -> dict[str, Any]:
        """`texts` that the model produces for the recipe's prompts, and the sampling settings."""

    def evaluate(
        self, saved: SavedModel, data: Any, evaluation: Any, console: Console | None = None
    ) -> dict[str, Any]:
        """Evaluates a saved model on all rows of a source.

        Args:
            saved: The model.
            data: The section `data`.
            evaluation: The section `evaluation`.
            console: Shows progress; None: stderr.

        Raises:
            InputError: The model is of a different type, or there are no rows that fit it.
        """

    def describe(self, metrics: Mapping[str, Any]) -> str:
        """The metrics in one line."""

    def following(self, folder: str) -> str:
        """The command to try the trained model."""
