"""Known answers: what a saved model computes for eight prompts, with which every copy of it can be compared.

They are computed in float64. How far the same weights are from them in float32 and bfloat16 is recorded, too: it
depends on the model, and is the measure for other machines and implementations.
"""

import datetime
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

import hfgpt
from hfgpt.records import Answer, KnownAnswers
from hfgpt.tokenizer import tokenizer_hash

PROMPTS = {
    "words": "Once upon a time there was a little girl who had a red ball and a blue kite",
    "spaces": "  two  spaces before, between  and after  ",
    "lines": "first line\nsecond line\n\n\tindented\r\nlast line\n",
    "letters": "naïve café, Straße, Ελληνικά, Русский, 中文, 日本語, a\u0301, 👩\u200d💻 and 🇨🇭",
    "signs": 'It\'s 12:30 on 2024-05-01; 1,234.56 (50%) of "x = [y**2 for y in z]" & <b>so on</b>...',
    "special": "the end{}The start",  # with the end-of-text token
    "letter": "A",
    "context": "Line {}: the quick brown fox jumps over the lazy dog, and then it runs all the way home. ",  # repeated
}
CONTINUED = ("words", "letter")  # each token takes a forward pass, in float64
TOP = 10  # recorded tokens of each distribution
NEW_TOKENS = 16  # of a greedy continuation
SHORT = 64  # tokens of a prompt that is computed even if the weights are known to be those that were measured

# (token ids, positions) -> log-probabilities: (positions, V) of the tokens after these positions, or (classes,).
Compute = Callable[[list[int], list[int]], torch.Tensor]


@dataclass
class Comparison:
    """How far computed answers are from the known ones.

    Args:
        largest: Largest difference of a log-probability, or of the probability of a class.
        prompt: Name of the first prompt with a larger difference than the limit, or another continuation.
        continues_differently: Whether only the continuation differs.
        starts_agree: Whether all differences at the first position of a prompt, which depend on no other position, are
            within the limit.
        pools_first: Whether a classifier uses only the first token.
    """

    largest: float = 0.0
    prompt: str | None = None
    continues_differently: bool = False
    starts_agree: bool = True
    pools_first: bool = False

    def note(self, difference: float, limit: float, prompt: str, is_start: bool = False):
        """Adds a difference."""
        difference = math.inf if math.isnan(difference) else difference
        self.largest = max(self.largest, difference)
        if difference > limit:
            self.prompt = self.prompt or prompt
            self.starts_agree &= not is_start


def record_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, weights_sha256: str | None
) -> KnownAnswers:
    """Computes the known answers of a model.

    Args:
        model: A language model or a classifier in evaluation mode, on any device; unchanged afterwards.
        tokenizer: Its tokenizer.
        weights_sha256: Hash of its saved weights; None: they are not in a single file.
    """
    context, answers = model.config.max_position_embeddings, {}
    with computed_in(model, torch.float64) as compute:
        for name, text in fit_prompts(tokenizer, context, model.config.vocab_size).items():
            answer = answers[name] = Answer(text=text, ids=tokenizer(text)["input_ids"])
            if not model.can_generate():
                answer.probabilities = compute(answer.ids, []).exp().tolist()
                continue
            last = len(answer.ids) - 1
            answer.positions = sorted({0, last // 3, 2 * last // 3, last})
            best = compute(answer.ids, answer.positions).topk(min(TOP, model.config.vocab_size))
            answer.top_ids, answer.log_probabilities = best.indices.tolist(), best.values.round(decimals=9).tolist()
            new_tokens = min(NEW_TOKENS, context - last - 1) if name in CONTINUED else 0
            answer.continuation, answer.gaps = _continue(model, answer.ids, new_tokens)
    known = KnownAnswers(
        measured=datetime.datetime.now(datetime.UTC).date().isoformat(),
        hfgpt=hfgpt.__version__,
        weights_sha256=weights_sha256,
        tokenizer_sha256=tokenizer_hash(tokenizer),
        answers=answers,
    )
    with computed_in(model, torch.float32) as compute:
        single = compare_answers(known, compute, torch.inf).largest
    with computed_in(model, torch.bfloat16) as compute:  # CPUs without bfloat16 units are slow with a long prompt
        low = compare_answers(known, compute, torch.inf, SHORT).largest
    # Other machines and implementations round in another order, which makes a small multiple of the difference.
    # float16 has three more bits than bfloat16.
    limits = {"float32": min(30 * single, low / 4), "float16": low / 2, "bfloat16": 4 * low}
    known.limits = {precision: max(limit, 1e-6) for precision, limit in limits.items()}
    return known


def fit_prompts(tokenizer: PreTrainedTokenizerBase, context: int, vocab_size: int) -> dict[str, str]:
    """The prompts with room for a continuation, and one that fills the context; none without tokens."""
    special = {"special": PROMPTS["special"].format(tokenizer.eos_token or " ")}
    long = {"context": "".join(PROMPTS["context"].format(number) for number in range(1, context + 1))}
    fitted = {}
    for name, text in (PROMPTS | special | long).items():
        room = context if name == "context" else max(context - NEW_TOKENS, 1)
        cut = _cut(text, tokenizer, room, vocab_size)
        if cut and tokenizer(cut)["input_ids"]:
            fitted[name] = cut
    return fitted


def _cut(text: str, tokenizer: PreTrainedTokenizerBase, room: int, vocab_size: int) -> str:
    """The longest start of a text with at most `room` tokens, and no character that cannot be encoded."""
    least, most = 0, min(len(text), 16 * room)  # tokens of this text are shorter
    while least < most:
        middle = (least + most + 1) // 2
        fits = _count_tokens(text[:middle], tokenizer, vocab_size) <= room
        least, most = (middle, most) if fits else (least, middle - 1)
    return text[:least]


def _count_tokens(text: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> float:
    """The number of tokens; infinite for an unknown character, if the vocabulary has no token for them."""
    try:
        ids = tokenizer(text, verbose=False)["input_ids"]
    except Exception as error:
        if "UNK" not in str(error):  # the tokenizers library raises a plain Exception
            raise
        return math.inf
    return len(ids) if max(ids, default=0) < vocab_size else math.inf


@torch.no_grad()
def _continue(model: nn.Module, ids: list[int], new_tokens: int) -> tuple[list[int], list[float]]:
    """The greedy continuation, and how much likelier each token is than the next likely one, in nats."""
    cache, rows, continuation, gaps = DynamicCache(), torch.tensor([ids], device=model.device), [], []
    for _ in range(new_tokens):
        logits = model(input_ids=rows, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        best = logits.double().log_softmax(-1).topk(2)
        continuation.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
        rows = best.indices[None, :1]
    return continuation, gaps


@contextmanager
def computed_in(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[Compute]:
    """A function for the log-probabilities of a model whose weights are converted to a precision for the block."""
    weights = [(weight, weight.data) for weight in model.parameters()]
    try:
        yield compute_with(model.to(dtype))
    finally:
        for weight, data in weights:
            weight.data = data


def compute_with(model: nn.Module) -> Compute:
    """A function for the log-probabilities of a transformers model; in float64, on the CPU."""

    @torch.no_grad()
    def compute(ids: list[int], positions: list[int]) -> torch.Tensor:
        rows = torch.tensor([ids], device=model.device)
        kept = {"logits_to_keep": torch.tensor(positions, device=model.device)} if positions else {}
        logits = model(input_ids=rows, use_cache=False, **kept).logits[0]
        return logits.double().log_softmax(-1).cpu()

    return compute


def compare_answers(known: KnownAnswers, compute: Compute, limit: float, longest: float = math.inf) -> Comparison:
    """Compares known answers with computed ones.

    A token of the continuation counts only if it is clearly likelier than any other; after the first that is not, an
    equally correct continuation could be another one.

    Args:
        known: The known answers.
        compute: A function for the log-probabilities of the model.
        limit: Largest allowed difference.
        longest: The most tokens of a prompt to compute; longer ones are left out.
    """
    comparison = Comparison()
    for name, answer in known.answers.items():
        if len(answer.ids) > longest:
            continue
        if answer.probabilities is not None:
            found = compute(answer.ids, []).exp()
            comparison.note(_differences(found, answer.probabilities).item(), limit, name)
            if comparison.prompt == name:
                alone = compute(answer.ids[:1], []).exp()
                comparison.pools_first = len(answer.ids) > 1 and bool((found - alone).abs().max() <= limit)
            continue
        sure = count_sure(answer, limit)
        ids, last = [*answer.ids, *answer.continuation[: max(sure - 1, 0)]], len(answer.ids) - 1
        scores = compute(ids, [*answer.positions, *range(last, last + sure)])
        at = len(answer.positions)
        found = scores[:at].gather(-1, torch.tensor(answer.top_ids))
        differences = _differences(found, answer.log_probabilities).tolist()
        for position, difference in zip(answer.positions, differences, strict=True):
            comparison.note(difference, limit, name, is_start=position == 0)
        if scores[at:].argmax(-1).tolist() != answer.continuation[:sure] and not comparison.prompt:
            comparison.prompt, comparison.continues_differently = name, True
    return comparison


def _differences(found: torch.Tensor, expected: list) -> torch.Tensor:
    """The largest difference of each row."""
    return (found - torch.tensor(expected, dtype=torch.float64)).abs().amax(-1)


def count_sure(answer: Answer, limit: float) -> int:
    """How many tokens of the continuation a model within the limit must generate."""
    return next((index for index, gap in enumerate(answer.gaps) if gap <= 2 * limit), len(answer.gaps))
