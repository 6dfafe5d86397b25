"""The endpoints of `hfgpt serve`: transformers' own server, for one model that hfgpt has loaded.

It needs the packages of the extra `serve`, which transformers imports conditionally.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse
from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.completion_choice import Logprobs
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

from hfgpt.errors import InputError
from hfgpt.serving.requests import read_chat, read_completion

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health")
LARGEST_BODY = 2**22  # bytes
TOO_LARGE = f"the body of the request has more than {LARGEST_BODY:,} bytes"


class OneModel(ModelManager):
    """Has one model, and never loads another.

    Args:
        name: The model's name in requests.
        model: A causal language model.
        tokenizer: Its tokenizer.
    """

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.force_model, self.model, self.tokenizer = name, model, tokenizer
        self.context = model.config.max_position_embeddings
        self.started = int(time.time())
        generate = model.generate

        def generate_seeded(*args, **kwargs):
            # Here, in the thread that generates, so that no other request draws from the same generator in between.
            if (seed := getattr(kwargs.get("generation_config"), "_seed", None)) is not None:
                torch.manual_seed(seed)
            return generate(*args, **kwargs)

        model.generate = generate_seeded

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def load_model_and_processor(self, *args, **kwargs) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return self.model, self.tokenizer

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        return [{"id": self.force_model, "object": "model", "created": self.started, "owned_by": ""}]


class Checked:
    """A handler of transformers' server that answers with status 400 what it would ignore or fail on."""

    read = None  # checks the fields of a request

    def _validate_request(self, body: dict[str, Any]):
        super()._validate_request(body)
        served = self.model_manager
        if body.get("model") not in (None, served.force_model):
            raise HTTPException(404, f"this server only has the model '{served.force_model}'")
        try:
            type(self).read(body, served.tokenizer, served.context)
        except InputError as error:
            raise HTTPException(400, str(error)) from error

    def _build_generation_config(self, body: dict[str, Any], *args, **kwargs) -> GenerationConfig:
        seed = body.pop("seed", None)  # transformers would set it before earlier requests have ended
        config = super()._build_generation_config(body, *args, **kwargs)
        config._seed = seed
        if body.get("temperature"):  # transformers samples only if generation_config.json says so
            config.do_sample, config.top_k = True, config.top_k or 0
        config.logprobs = body.get("logprobs")
        return config


class Chat(Checked, ChatCompletionHandler):
    """Answers in conversations."""

    read = staticmethod(read_chat)


class Completions(Checked, CompletionHandler):
    """Continuations of a text."""

    read = staticmethod(read_completion)

    async def _non_streaming(self, request_id: str, *arguments) -> JSONResponse:
        """Like transformers, with log-probabilities, and with texts that end before a stop text."""
        model, tokenizer, name, inputs, config, manager, _ = arguments
        config.return_dict_in_generate, config.output_logits = True, config.logprobs is not None
        output = await manager.async_submit(model.generate, **inputs, generation_config=config, tokenizer=tokenizer)
        prompt = inputs["input_ids"].shape[-1]
        ids = output.sequences[0, prompt:]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        ends = [text.index(stop) for stop in config.stop_strings or [] if stop in text]
        length = len(ids) >= config.max_new_tokens and not ends and int(ids[-1]) != tokenizer.eos_token_id
        logprobs = None
        if config.logprobs is not None:
            logprobs = describe_tokens(ids, torch.cat(output.logits), config.logprobs, tokenizer)
        choice = CompletionChoice(
            text=text[: min(ends, default=None)],
            index=0,
            logprobs=logprobs,
            finish_reason="length" if length else "stop",
        )
        usage = CompletionUsage(prompt_tokens=prompt, completion_tokens=len(ids), total_tokens=prompt + len(ids))
        result = Completion(
            id=request_id,
            created=int(time.time()),
            model=name,
            choices=[choice],
            object="text_completion",
            usage=usage,
        )
        return JSONResponse(result.model_dump(exclude_none=True))


def describe_tokens(ids: torch.Tensor, logits: torch.Tensor, count: int, tokenizer) -> Logprobs:
    """The log-probabilities of tokens, by their texts.

    Args:
        ids: (T), the generated tokens.
        logits: (T, V), before temperature.
        count: How many of the likeliest tokens to describe at each position.
        tokenizer: The tokenizer.
    """
    scores = logits.double().log_softmax(-1)
    top = scores.topk(min(count, scores.shape[-1]))
    texts = [tokenizer.decode([token]) for token in ids.tolist()]
    offsets = [0]
    for text in texts:
        offsets.append(offsets[-1] + len(text))
    return Logprobs(
        tokens=texts,
        token_logprobs=scores.gather(-1, ids.unsqueeze(-1)).squeeze(-1).tolist(),
        # Of tokens with the same text, such as parts of characters, the likeliest is kept.
        top_logprobs=[
            {tokenizer.decode([token]): value for value, token in reversed(list(zip(*row, strict=True)))}
            for row in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ],
        text_offset=offsets[:-1],
    )


class BodyLimit:
    """Answers requests whose body is too large with status 413."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            more = message.get("more_body", False)
            size += len(message.get("body", b""))
            if size <= LARGEST_BODY:
                parts.append(message.get("body", b""))  # the rest is read, since clients send all before they read
        if size > LARGEST_BODY:
            return await JSONResponse({"detail": TOO_LARGE}, 413)(scope, receive, send)
        body = [{"type": "http.request", "body": b"".join(parts)}]

        async def receive_body():
            return body.pop() if body else await receive()

        return await self.app(scope, receive_body, send)


class Server(uvicorn.Server):
    """Ends the streams of open pages before it waits for its connections to close."""

    async def shutdown(self, *args, **kwargs):
        for route in self.config.app.routes:
            if stop := getattr(getattr(route, "app", None), "stop_event", None):  # of gradio, which sets it in close()
                stop.set()
        await super().shutdown(*args, **kwargs)


def build_app(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[FastAPI, Callable[..., Future]]:
    """The server's application, and the function that runs another one in the thread in which the model generates.

    Args:
        name: The model's name in requests.
        model: A causal language model on its device.
        tokenizer: Its tokenizer.
    """
    served, state = OneModel(name, model, tokenizer), GenerationState()
    handlers = [kind(model_manager=served, generation_state=state) for kind in (Chat, Completions)]
    others = dict.fromkeys(("response_handler", "transcription_handler", "systemone_handler"))
    known = build_server.__annotations__
    app = build_server(
        served, *handlers, generation_state=state, **{key: value for key, value in others.items() if key in known}
    )
    # transformers' other routes load, unload or describe models.
    app.router.routes = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]
    app.add_middleware(BodyLimit)
    return app, state.get_manager(name).submit
