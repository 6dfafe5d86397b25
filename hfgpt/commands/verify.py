"""`hfgpt verify`: checks that a copy of a model, or a server, still computes the answers recorded with the weights."""

import itertools
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hfgpt.errors import InputError
from hfgpt.known_answers import Comparison, compare_answers, compute_with, count_sure, find_limit
from hfgpt.models import SavedModel, explained, find_model, quiet_bars
from hfgpt.records import Answer, KnownAnswers

PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ASKED = 5  # the most log-probabilities that OpenAI's API returns for a token
SECONDS = 120  # to wait for a server


def verify(path: str, against: str | None = None, precision: str | None = None) -> str:
    """Compares a model with its known answers.

    Args:
        path: A folder or Hub id with known_answers.json: a model, an adapter, or an exported GPT-2.
        against: URL of an OpenAI-compatible server that runs the model, such as http://127.0.0.1:8000/v1; None: load
            the model here.
        precision: `float32`, `float16` or `bfloat16`, in which it must have been computed; None: that of the saved
            weights, and float32 for a server.

    Returns:
        What was verified, in one line.

    Raises:
        InputError: There are no known answers, the model cannot be loaded, the server does not answer, or something
            differs: the message names the first of tokenizer, weights, positions and precision.
    """
    if precision not in (None, *PRECISIONS):
        raise InputError(f"--precision is '{precision}'; it must be {', '.join(PRECISIONS)}")
    saved = find_model(path)
    known, tokenizer = read_answers(saved), saved.load_tokenizer()
    check_tokens(known, tokenizer, path)
    if against is not None:
        with explained("known answers", path):
            return _verify_server(known, tokenizer, Server(against), precision or "float32")
    model = load_as_it_is(saved, PRECISIONS.get(precision, "auto"))
    limit = find_limit(known, model.dtype)
    with explained("known answers", path):
        comparison = compare_answers(known, compute_with(model), limit)
    if comparison.prompt:
        same = known.weights_sha256 is not None and known.weights_sha256 == saved.hash()
        raise InputError(f"'{path}' {diagnose(known, comparison, limit, same)}")
    return _verified(known, comparison, limit, str(model.dtype).removeprefix("torch."))


def read_answers(saved: SavedModel) -> KnownAnswers:
    """The known answers saved with a model.

    Raises:
        InputError: There are none, or they cannot be read.
    """
    folder = Path(saved.path)
    if not saved.is_local:
        with explained("known answers", saved.path):
            from huggingface_hub import hf_hub_download

            folder = Path(hf_hub_download(saved.path, KnownAnswers.FILE, revision=saved.revision)).parent
    if (known := KnownAnswers.read(folder)) is None:
        raise InputError(
            f"'{saved.path}' does not have {KnownAnswers.FILE}, which hfgpt saves with every model: there is nothing "
            "to compare with"
        )
    return known


def load_as_it_is(saved: SavedModel, dtype: torch.dtype | str):
    """The model as its users load it: an exported GPT-2 with transformers' own class."""
    if saved.adapter or saved.config.model_type != "gpt2":
        return saved.load(dtype=dtype)
    with explained("a model", saved.path), quiet_bars():
        return saved.auto_class.from_pretrained(saved.path, dtype=dtype).eval()


def check_tokens(known: KnownAnswers, tokenizer: PreTrainedTokenizerBase, path: str):
    """Checks that a tokenizer encodes the prompts as when the model was measured.

    Raises:
        InputError: Names the first token that differs.
    """
    for name, answer in known.answers.items():
        ids = tokenizer(answer.text)["input_ids"]
        for index, (found, expected) in enumerate(itertools.zip_longest(ids, answer.ids, fillvalue="missing")):
            if found != expected:
                raise InputError(
                    f"'{path}' differs in its tokenizer: token {index} of the prompt '{name}' is {found}, and was "
                    f"{expected} when the model was measured on {known.measured}"
                )


def diagnose(known: KnownAnswers, comparison: Comparison, limit: float, same_weights: bool) -> str:
    """What differs, in words.

    Args:
        known: The known answers.
        comparison: Their comparison with the computed ones.
        limit: Largest allowed difference.
        same_weights: Whether the weights are known to be those that were measured.
    """
    is_small = comparison.largest <= 4 * known.bfloat16_difference
    if comparison.continues_differently:
        cause = "greedy continuation, though the first tokens agree: check the settings of generation"
    elif comparison.pools_first:
        cause = "pooling: it classifies by the first token, and must by the last one"
    elif same_weights and is_small:
        cause = "precision: it computes as if in bfloat16"
    elif same_weights:
        cause = "computation, with the same weights: check config.json, positions and mask"
    elif is_small:
        cause = "precision or weights"
    elif comparison.starts_agree:
        cause = "mask, or weights of attention: it agrees only at the first position of each prompt"
    else:
        cause = "weights or positions"
    return (
        f"differs in its {cause}; the largest difference is {comparison.largest:.1e} (limit {limit:.1e}), and the "
        f"first in the prompt '{comparison.prompt}'"
    )


def _verified(known: KnownAnswers, comparison: Comparison, limit: float, precision: str) -> str:
    return (
        f"verified: this is the model measured on {known.measured}; largest difference {comparison.largest:.1e} "
        f"({precision}, limit {limit:.1e})"
    )


class Server:
    """An OpenAI-compatible server of completions.

    Args:
        url: Up to the version, such as `http://127.0.0.1:8000/v1`.
    """

    def __init__(self, url: str):
        if not url.startswith(("http://", "https://")):
            raise InputError(f"--against is '{url}'; it must be the URL of a server, such as http://127.0.0.1:8000/v1")
        self.url = url.rstrip("/")

    def name_model(self) -> str:
        """The name of the model that it serves, the first if there are several."""
        models = self._ask("models").get("data")
        if not models:
            raise InputError(f"the server at {self.url} does not list a model: check that it runs one")
        return models[0]["id"]

    def complete(self, model: str, prompt: str, tokens: int) -> dict[str, Any]:
        """The greedy completion of a prompt, with log-probabilities."""
        job = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": ASKED}
        answer = self._ask("completions", job)
        try:
            choice = answer["choices"][0]
            likeliest = choice["logprobs"]["top_logprobs"][0]
            return {"text": choice["text"], "likeliest": dict(likeliest), "read": answer["usage"]["prompt_tokens"]}
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise InputError(
                f"the server at {self.url} answered without log-probabilities: start it with support for the "
                "logprobs of completions"
            ) from error

    def _ask(self, path: str, job: dict[str, Any] | None = None) -> dict[str, Any]:
        body = None if job is None else json.dumps(job).encode()
        request = urllib.request.Request(f"{self.url}/{path}", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(500).decode(errors="replace").split())[:200]
            raise InputError(f"{self.url}/{path} answered with status {error.code} ({said}): check the URL") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise InputError(f"no server answers at {self.url} ({reason}): start it, or check the URL") from error


def _verify_server(known: KnownAnswers, tokenizer: PreTrainedTokenizerBase, server: Server, precision: str) -> str:
    if any(answer.probabilities for answer in known.answers.values()):
        raise InputError("--against is for language models: a classifier has no completions")
    limit, model = find_limit(known, PRECISIONS[precision]), server.name_model()
    comparison = Comparison(starts_agree=False)  # not known
    for name, answer in known.answers.items():
        if name != "context":  # which has no room for a token
            sure = count_sure(answer, limit)
            found = server.complete(model, answer.text, max(sure, 1))
            if found["read"] != len(answer.ids):
                raise InputError(
                    f"{server.url} differs in its tokenizer: the prompt '{name}' has {found['read']} tokens there, "
                    f"and had {len(answer.ids)} when the model was measured on {known.measured}"
                )
            comparison.note(_difference(answer, found["likeliest"], tokenizer), limit, name)
            if found["text"] != tokenizer.decode(answer.continuation[:sure]) and sure and not comparison.prompt:
                comparison.prompt, comparison.continues_differently = name, True
    if comparison.prompt:
        raise InputError(f"{server.url} {diagnose(known, comparison, limit, same_weights=False)}")
    return _verified(known, comparison, limit, precision)


def _difference(answer: Answer, likeliest: dict[str, float], tokenizer: PreTrainedTokenizerBase) -> float:
    """The largest difference of the log-probabilities of the next token; infinite if its likeliest is not named.

    Servers name tokens by their text, so tokens that are only a part of a character cannot be compared. They may leave
    out the ids without a token, which adds the same to all log-probabilities, so these are compared with the first.
    """
    texts = [tokenizer.decode([index]) for index in answer.top_ids[-1]]
    expected = {
        text: score
        for text, score in zip(texts, answer.log_probabilities[-1], strict=True)
        if "\ufffd" not in text and texts.count(text) == 1
    }
    if texts[0] in expected and texts[0] not in likeliest:
        return torch.inf
    added = [likeliest[text] - score for text, score in expected.items() if text in likeliest]
    return max((abs(difference - added[0]) for difference in added), default=0.0)
