"""What a trained model is worth: measured, token-weighted, on the weights that were saved."""

from dataclasses import dataclass, field

from hfgpt.errors import InputError
from hfgpt.evaluation.judge import JudgeArguments


@dataclass
class EvaluationArguments:
    """The recipe's section `evaluation` for pre-training.

    Args:
        stride: Tokens that each window of the final evaluation predicts; the rest of the window is context only. None:
            the whole window, so that a token has half a window of context on average.
        prompts: Texts the trained model continues at the end, for a look at what it learned.
        max_new_tokens: Maximum number of tokens in a continuation.
        temperature: Divides the logits before sampling.
        top_k: Sample from the k most likely tokens; 0: from all.
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
        baseline: Whether a logistic regression on character n-grams is fitted to the same rows, to compare with.
        prompts: Texts the trained model classifies at the end, for a look at what it learned.
    """

    baseline: bool = True
    prompts: list[str] = field(default_factory=list)


@dataclass
class AnswerEvaluationArguments:
    """The recipe's section `evaluation` for instructions.

    Args:
        max_new_tokens: Maximum number of tokens in an answer.
        batch_size: Prompts answered at a time.
        max_answers: Answer only the first N test rows; None: all.
        answers: Folder for `answers.jsonl` and the judge's scores when a saved model is evaluated; None: answers are
            not kept. A run keeps them in its own.
        prompts: Instructions the trained model answers at the end, for a look at what it learned.
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
                raise InputError(f"evaluation.{name} is {getattr(self, name)}, the least is 1")
