"""What a trained model is worth: measured, token-weighted, on the weights that were saved."""

from dataclasses import dataclass, field


@dataclass
class EvaluationArguments:
    """The recipe's section `evaluation`.

    Args:
        stride: Tokens that each window of the final evaluation predicts; the rest of the window is context only. None:
            the whole window, so that a token has half a window of context on average.
        prompts: Texts the trained model continues at the end, for a look at what it learned.
        max_new_tokens: Tokens of each continuation.
        temperature: Divides the logits before sampling.
        top_k: Sample among the k likeliest tokens only; 0: among all.
    """

    stride: int | None = None
    prompts: list[str] = field(default_factory=list)
    max_new_tokens: int = 60
    temperature: float = 0.8
    top_k: int = 50
