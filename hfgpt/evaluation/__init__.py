"""Evaluation of trained models: token-weighted metrics, measured on the saved weights."""

from dataclasses import dataclass, field

from hfgpt.errors import InputError
from hfgpt.evaluation.judge import JudgeArguments


@dataclass
class EvaluationArguments:
    """The recipe's section `evaluation` for pre-training.

    Args:
        stride: Tokens predicted per window in the final evaluation; the rest of the window is context only. None: the
            whole window, which gives each token half a window of context on average.
        prompts: Texts that the trained model continues at the end, as samples.
        max_new_tokens: Maximum number of tokens per continuation.
        temperature: Sampling temperature.
        top_k: Sample only from the k most likely tokens; 0: from all.
    """

    stride: int | None = None
    prompts: list[str] = field(default_factory=list)
    max_new_tokens: int = 60
    temperature: float = 0.8
    top_k: int = 50


@dataclass
class ClassifierEvaluationArguments:
    """The recipe's section `evaluation` for classification.

    Args:
        baseline: Whether to fit a logistic regression on character n-grams of the same rows as a baseline.
        prompts: Texts that the trained model classifies at the end, as samples.
    """

    baseline: bool = True
    prompts: list[str] = field(default_factory=list)


@dataclass
class AnswerEvaluationArguments:
    """The recipe's section `evaluation` for instructions.

    Args:
        max_new_tokens: Maximum number of tokens per answer.
        batch_size: Prompts per batch.
        max_answers: Answer only the first N test rows; None: all.
        answers: Folder for `answers.jsonl` and the judge's scores, for `hfgpt evaluate`; None: they are not saved. A
            training run saves them in its own folder.
        prompts: Instructions that the trained model answers at the end, as samples.
        judge: A model that scores the answers.
    """

    max_new_tokens: int = 256
    batch_size: int = 16
    max_answers: int | None = None
    answers: str | None = None
    prompts: list[str] = field(default_factory=list)
    judge: JudgeArguments = field(default_factory=JudgeArguments)

    def __post_init__(self):
        for name in ("max_new_tokens", "batch_size", "max_answers"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"evaluation.{name} is {getattr(self, name)}; it must be at least 1")
