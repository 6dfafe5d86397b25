"""The page of `hfgpt serve --web` and `hfgpt chat --web`: a conversation, or a text that the model continues.

It needs the packages of the extra `web`.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace

from fastapi import FastAPI
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer

from hfgpt.errors import InputError
from hfgpt.evaluation.generation import SamplingArguments, generate_texts
from hfgpt.serving.conversation import Chat

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio

TITLE = "hfgpt"
LABEL = "A small language model. What it writes may be wrong."


class Stopped(Exception):
    """The visitor stopped the answer, or left the page."""


class PageStreamer(TextIteratorStreamer):
    """The text of an answer in parts, until it is stopped."""

    stopped = False

    def put(self, value):
        if self.stopped:
            raise Stopped
        super().put(value)


class Page:
    """What the page does.

    Args:
        submit: Runs a function in the thread in which the model generates.
        model: A causal language model.
        tokenizer: Its tokenizer.
        sampling: Sampling settings.
        system: System prompt of a model with a chat template.
    """

    def __init__(
        self,
        submit: Callable[..., Future],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingArguments,
        system: str | None = None,
    ):
        self.submit, self.model, self.tokenizer, self.sampling, self.system = (
            submit,
            model,
            tokenizer,
            sampling,
            system,
        )
        self.seeds = itertools.count(sampling.seed)  # so that the same question can get another answer

    def answer(self, text: str, history: list[dict]) -> Iterator[str]:
        """The answer to a message, as it grows."""
        turns = [{"role": turn["role"], "content": read_text(turn["content"])} for turn in history]
        pairs = itertools.pairwise([*turns, {"role": None}])
        # A message that was refused has no answer.
        answered = [(turn, after) for turn, after in pairs if (turn["role"], after["role"]) == ("user", "assistant")]
        messages = [turn for pair in answered if pair[1]["content"] for turn in pair]

        def write(sampling: SamplingArguments, streamer: PageStreamer):
            Chat(self.model, self.tokenizer, sampling, messages, self.system).answer(text, streamer)

        yield from self._stream(write)

    def continue_text(self, prompt: str) -> Iterator[str]:
        """A text and its continuation, as it grows."""

        def write(sampling: SamplingArguments, streamer: PageStreamer):
            generate_texts(self.model, self.tokenizer, prompt, sampling, streamer)

        yield from (prompt + text for text in self._stream(write))

    def _stream(self, write: Callable[[SamplingArguments, PageStreamer], None]) -> Iterator[str]:
        streamer = PageStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        future = self.submit(write, replace(self.sampling, seed=next(self.seeds) % 2**32), streamer)
        future.add_done_callback(lambda _: streamer.text_queue.put(streamer.stop_signal))
        try:
            yield from itertools.accumulate(streamer)
            future.result()
        except InputError as error:
            gradio.Warning(str(error))  # after an Error, gradio's text box would stay disabled
        finally:
            streamer.stopped = True


def add_page(app: FastAPI, page: Page) -> FastAPI:
    """Adds a page to a server, at its root: a conversation if the model has a chat template.

    Raises:
        InputError: The chat template fails, or the settings leave no room for a question.
    """
    about = {"title": TITLE, "description": LABEL, "analytics_enabled": False, "flagging_mode": "never"}
    if page.tokenizer.chat_template:
        Chat(page.model, page.tokenizer, page.sampling, system=page.system)  # checks them
        # Text is shown as it is: images in Markdown could be on other hosts.
        chatbot = gradio.Chatbot(label="Conversation", buttons=["copy", "copy_all"], render_markdown=False)
        shown = gradio.ChatInterface(page.answer, chatbot=chatbot, **about)
    else:
        text = gradio.Textbox(label="Text", lines=10, placeholder="Once upon a time")
        continuation = gradio.Textbox(label="Continuation", lines=10)
        shown = gradio.Interface(page.continue_text, text, continuation, submit_btn="Continue", **about)
    # Without a server for Node.js.
    return gradio.mount_gradio_app(app, shown, path="/", footer_links=[], ssr_mode=False)


def read_text(content: str | list[dict]) -> str:
    """The text of a turn, which gradio may pass in parts."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
