"""Requests to `hfgpt serve`: what the server would ignore, misread or fail on is refused before it gets there."""

import math
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from hfgpt.data.templates import encode_chat
from hfgpt.errors import InputError
from hfgpt.evaluation.generation import encode_prompt

MOST_LOG_PROBABILITIES = 20  # per token; OpenAI's API returns at most 5, vLLM 20
ROLES = ("system", "user", "assistant")
# Fields with one value that changes nothing; any other would change the answer, and is not supported.
WITHOUT_EFFECT = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": (),
    "functions": (),
    "generation_config": (),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "chat_template_kwargs": ({},),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}


def read_completion(body: dict[str, Any], tokenizer: PreTrainedTokenizerBase, context: int) -> list[int]:
    """Checks a request for a completion, and sets its `max_tokens` to what fits in the context.

    Args:
        body: The fields of the request; an empty prompt becomes the end-of-text token.
        tokenizer: The tokenizer of the served model.
        context: Its context length.

    Returns:
        The token ids of the prompt.

    Raises:
        InputError: A field has a wrong or unsupported value, or the prompt does not fit.
    """
    _check_settings(body)
    _check(body, "logprobs", int, lambda value: 0 <= value <= MOST_LOG_PROBABILITIES, f"0 to {MOST_LOG_PROBABILITIES}")
    if body.get("stream") and any(body.get(name) is not None for name in ("logprobs", "stop")):
        raise InputError("logprobs and stop are not supported with stream: set stream to false")
    stop = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop") or []
    if not (isinstance(stop, list) and all(isinstance(text, str) and text for text in stop)):
        raise InputError("stop must be a text, or a list of texts, none of them empty")
    body["stop"] = stop or None
    if not isinstance(body.get("prompt"), str):
        raise InputError("prompt must be one text")
    # As every server does; `hfgpt verify` relies on it.
    ids = encode_prompt(tokenizer, body["prompt"], 1, context, allow_unknown=True)
    body["prompt"] = body["prompt"] or tokenizer.eos_token
    body["max_tokens"] = _fit(body, "max_tokens", len(ids), context)
    return ids


def read_chat(body: dict[str, Any], tokenizer: PreTrainedTokenizerBase, context: int) -> list[int]:
    """Checks a request for an answer in a conversation, and sets its `max_completion_tokens` to what fits.

    Args:
        body: The fields of the request.
        tokenizer: The tokenizer of the served model.
        context: Its context length.

    Returns:
        The token ids of the conversation, with the prompt for an answer.

    Raises:
        InputError: The model has no chat template, a field has a wrong or unsupported value, or the conversation does
            not fit.
    """
    if not tokenizer.chat_template:
        raise InputError("the model has no chat template, so it was not trained to chat: use /v1/completions")
    _check_settings(body)
    for name in ("logprobs", "top_logprobs", "stop"):
        if body.get(name):
            raise InputError(f"{name} is not supported for chat: leave it out, or use /v1/completions")
    messages = _read_messages(body.get("messages"), tokenizer)
    ids = encode_chat(tokenizer, messages, add_generation_prompt=True)["input_ids"]
    if len(ids) >= context:
        raise InputError(
            f"the messages have {len(ids)} tokens with the chat template, which leaves no room for an answer in the "
            f"context of {context}: shorten them to at most {context - 1} tokens"
        )
    body["max_completion_tokens"] = body["max_tokens"] = min(
        _fit(body, name, len(ids), context) for name in ("max_tokens", "max_completion_tokens")
    )
    return ids


def _read_messages(messages: Any, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    if not (isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages)):
        raise InputError("messages must be a list of objects with role and content")
    found = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if isinstance(content, list) and all(isinstance(part, dict) for part in content):
            texts = [part.get("text") if part.get("type") == "text" else None for part in content]
            content = " ".join(texts) if all(isinstance(text, str) for text in texts) else None  # as transformers does
        if role not in ROLES or not isinstance(content, str):
            raise InputError(f"a message must have a role ({', '.join(ROLES)}) and a text as content")
        if special := [token for token in tokenizer.all_special_tokens if token in content]:
            raise InputError(f"a message contains the special token {special[0]}: remove it")
        found.append({"role": role, "content": content})
    return found


def _check_settings(body: dict[str, Any]):
    for name, allowed in WITHOUT_EFFECT.items():
        if body.get(name) is not None and body[name] not in allowed:
            raise InputError(f"{name} is not supported: leave it out")
    _check(body, "temperature", float, lambda value: 0 <= value <= 100, "0 to 100")
    _check(body, "top_p", float, lambda value: 0 < value <= 1, "above 0, at most 1")
    _check(body, "seed", int, lambda value: 0 <= value < 2**64, "0 to 2**64 - 1")
    for name in ("max_tokens", "max_completion_tokens"):
        _check(body, name, int, lambda value: value >= 1, "at least 1")
    if not isinstance(body.get("stream"), bool | None):
        raise InputError("stream must be true or false")


def _check(body: dict[str, Any], name: str, kind: type, is_valid: Callable[[Any], bool], limits: str):
    """Checks a number; JSON as Python reads it may contain NaN and infinity."""
    value = body.get(name)
    is_number = type(value) is int or (kind is float and type(value) is float and math.isfinite(value))
    if value is not None and not (is_number and is_valid(value)):
        raise InputError(f"{name} is {value!r}; it must be {'an integer' if kind is int else 'a number'}, {limits}")


def _fit(body: dict[str, Any], name: str, prompt: int, context: int) -> int:
    """The number of new tokens: those asked for, or those that fit."""
    return min(body.get(name) or context, context - prompt)
