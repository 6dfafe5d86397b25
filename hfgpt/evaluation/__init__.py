"""Evaluation of trained models: token-weighted metrics, measured on the saved weights."""

from collections.abc import Sequence
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


@dataclass
class BenchmarkArguments:
    """Options of `hfgpt evaluate --benchmarks`.

    Args:
        names: Tasks, groups or tags of the harness; YAML files; or folders with YAML files of tasks.
        batch_size: Requests per batch.
        limit: Evaluate only the first N rows of each benchmark; None: all.
        num_fewshot: Examples in each prompt; None: as the benchmark defines it.
        chat_template: Whether to format prompts with the tokenizer's chat template.
    """

    names: Sequence[str]
    batch_size: int = 8
    limit: int | None = None
    num_fewshot: int | None = None
    chat_template: bool = False

    def __post_init__(self):
        for name, least in (("batch_size", 1), ("limit", 1), ("num_fewshot", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise InputError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
        if not all(self.names):
            raise InputError("--benchmarks has an empty name: give names separated by commas, such as arc_easy,piqa")
