"""`hfgpt verify`: checks that a copy of a model, or a server, still computes the answers recorded with the weights."""

import itertools
import json
import math
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfgpt.conversion import gguf, onnx
from hfgpt.errors import InputError
from hfgpt.known_answers import SHORT, Comparison, Compute, compare_answers, compute_with, count_sure
from hfgpt.models import SavedModel, explained, quiet_bars
from hfgpt.records import Answer, KnownAnswers
from hfgpt.saving import check_model_path, hash_file

PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ASKED = 5  # the most log-probabilities that OpenAI's API returns for a token
SECONDS = 120  # to wait for a server


@dataclass(frozen=True)
class Copy:
    """A copy of a model, in any of hfgpt's formats.

    Args:
        known: The known answers saved with it.
        tokenizer: Its tokenizer.
        load: Loads the model in a precision, or that of the saved weights if it is None; returns a function for its
            log-probabilities, and the precision.
        hash: SHA-256 of the weights; None: they are not in a single file.
        has_unused: Whether the model has ids without a token, which servers may leave out.
    """

    known: KnownAnswers
    tokenizer: PreTrainedTokenizerBase
    load: Callable[[torch.dtype | None], tuple[Compute, torch.dtype]]
    hash: Callable[[], str | None]
    has_unused: bool = False


def verify(path: str, against: str | None = None, precision: str | None = None) -> str:
    """Compares a model with its known answers.

    Args:
        path: A folder or Hub id with known_answers.json: a model, an adapter, or an exported GPT-2; or the folder of
            another export.
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
    copy = open_copy(path)
    known = copy.known
    check_tokens(known, copy.tokenizer, path)
    if against is not None:
        with explained("known answers", path):
            return _verify_server(copy, Server(against), precision or "float32")
    compute, dtype = copy.load(PRECISIONS.get(precision))
    computed, sha256 = str(dtype).removeprefix("torch."), copy.hash()
    same = sha256 is not None and sha256 == known.weights_sha256
    with explained("known answers", path):
        limit = known.limits[computed if computed in PRECISIONS else "float32"]
        comparison = compare_answers(known, compute, limit, SHORT if same else math.inf)
    if comparison.prompt:
        raise InputError(f"'{path}' {diagnose(known, comparison, limit, same)}")
    return _verified(known, comparison, limit, computed)


def open_copy(path: str) -> Copy:
    """Opens a model or an export with known answers.

    Raises:
        InputError: It does not exist, has no known answers, or cannot be read.
    """
    folder, saved = Path(path), SavedModel(path)
    if (file := folder / gguf.GGUF_FILE).is_file():
        known, (model, tokenizer) = read_answers(saved), gguf.read_gguf(file)
        # By hfgpt, since the engine of this format is another program.
        return Copy(known, tokenizer, lambda dtype: _run(model.to(dtype or torch.float32)), lambda: hash_file(file))
    check_model_path(path)
    known, tokenizer = read_answers(saved), saved.load_tokenizer()
    if (file := folder / onnx.ONNX_FILE).is_file():
        return Copy(known, tokenizer, lambda dtype: _run_onnx(folder, dtype), lambda: hash_file(file))
    # The weights of an adapter are not all that computes.
    hash_weights = saved.hash if saved.adapter is None else lambda: None
    has_unused = saved.config.vocab_size > max(tokenizer.get_vocab().values()) + 1
    return Copy(known, tokenizer, lambda dtype: _run(load_as_it_is(saved, dtype or "auto")), hash_weights, has_unused)


def _run(model: PreTrainedModel) -> tuple[Compute, torch.dtype]:
    return compute_with(model), model.dtype


def _run_onnx(folder: Path, dtype: torch.dtype | None) -> tuple[Compute, torch.dtype]:
    if dtype not in (None, torch.float32):
        raise InputError("an ONNX file is computed in float32: leave out --precision")
    onnx.check_installed()
    logits_of = onnx.compute_with_onnx(folder)

    def compute(ids: list[int], positions: list[int]) -> torch.Tensor:
        return logits_of(torch.tensor([ids]), torch.float32)[0][positions].double().log_softmax(-1)

    return compute, torch.float32


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
    is_small = comparison.largest <= known.limits["bfloat16"]
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


def _verify_server(copy: Copy, server: Server, precision: str) -> str:
    known, tokenizer = copy.known, copy.tokenizer
    if any(answer.probabilities for answer in known.answers.values()):
        raise InputError("--against is for language models: a classifier has no completions")
    limit, model = known.limits[precision], server.name_model()
    comparison = Comparison(starts_agree=False)  # not known
    for name, answer in known.answers.items():
        if name != "context":  # which has no room for a token
            sure = count_sure(answer, limit)
            expected = answer.continuation[:sure]
            if tokenizer.eos_token_id in expected:  # where servers end
                expected = expected[: expected.index(tokenizer.eos_token_id)]
            found = server.complete(model, answer.text, max(sure, 1))
            if found["read"] != len(answer.ids):
                raise InputError(
                    f"{server.url} differs in its tokenizer: the prompt '{name}' has {found['read']} tokens there, "
                    f"and had {len(answer.ids)} when the model was measured on {known.measured}"
                )
            comparison.note(_difference(answer, found["likeliest"], tokenizer, copy.has_unused), limit, name)
            if found["text"] != tokenizer.decode(expected) and sure and not comparison.prompt:
                comparison.prompt, comparison.continues_differently = name, True
    if comparison.prompt:
        raise InputError(f"{server.url} {diagnose(known, comparison, limit, same_weights=False)}")
    return _verified(known, comparison, limit, precision)


def _difference(
    answer: Answer, likeliest: dict[str, float], tokenizer: PreTrainedTokenizerBase, has_unused: bool
) -> float:
    """The largest difference of the log-probabilities of the next token; infinite if its likeliest is not named.

    Servers name tokens by their text, so tokens that are only a part of a character cannot be compared. Leaving out
    the ids without a token adds the same to all log-probabilities, so these are compared with the first.
    """
    texts = [tokenizer.decode([index]) for index in answer.top_ids[-1]]
    expected = {
        text: score
        for text, score in zip(texts, answer.log_probabilities[-1], strict=True)
        if "\ufffd" not in text and texts.count(text) == 1
    }
    if texts[0] in expected and texts[0] not in likeliest:
        return torch.inf
    differences = [likeliest[text] - score for text, score in expected.items() if text in likeliest]
    added = max(differences[0], 0.0) if differences and has_unused else 0.0
    return max((abs(difference - added) for difference in differences), default=0.0)
