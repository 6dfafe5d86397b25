"""`hfgpt chat`: a conversation with a model in the terminal, within its context."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

from hfgpt.data.templates import check_chat_template, encode_chat
from hfgpt.errors import InputError
from hfgpt.evaluation.generation import SamplingArguments, TerminalStreamer, generate_ids
from hfgpt.models import find_model
from hfgpt.output import stderr_console

HELP = "/reset clears the history; /system TEXT sets the system prompt and clears the history; /exit or Ctrl-D quits"


@dataclass
class Chat:
    """A conversation that never outgrows the model's context: its oldest turns are forgotten first.

    Args:
        model: A causal language model.
        tokenizer: Its own, with a chat template and an end of text.
        sampling: How to choose each token; `max_new_tokens` of an answer, None: a quarter of the context.
        messages: What was said so far, without the system message.
        system: How to behave; None: nothing is said of it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sampling: SamplingArguments
    messages: list[dict[str, str]] = field(default_factory=list)
    system: str | None = None

    def __post_init__(self):
        if not self.tokenizer.chat_template:
            raise InputError(
                "the model's tokenizer has no chat template, so it was not trained to chat: train it with task: "
                "instruct, or use hfgpt generate"
            )
        if self.tokenizer.eos_token_id is None:
            raise InputError("the model's tokenizer has no end-of-text token, so an answer could not end")
        check_chat_template(self.tokenizer)
        if self.max_new_tokens >= self.model.config.max_position_embeddings:
            raise InputError(
                f"--max-new-tokens is {self.max_new_tokens}, and the context of "
                f"{self.model.config.max_position_embeddings} tokens has to hold the question, too: ask for fewer"
            )
        set_seed(self.sampling.seed)

    @property
    def max_new_tokens(self) -> int:
        return self.sampling.max_new_tokens or max(self.model.config.max_position_embeddings // 4, 1)

    def reset(self):
        """Forgets all but the system message."""
        self.messages.clear()

    def answer(self, text: str, streamer: TextStreamer | None = None) -> str:
        """Says something to the model.

        Args:
            text: What is said.
            streamer: Receives the tokens of the answer as they come.

        Returns:
            The answer.

        Raises:
            InputError: The text holds a special token, or alone, with room for an answer, exceeds the context; it is
                then not part of the conversation.
        """
        if special := [token for token in self.tokenizer.all_special_tokens if token in text]:
            raise InputError(f"the text holds {special[0]}, which ends or pads texts: leave it out")
        question = {"role": "user", "content": text}
        ids = self._fit([*self.messages, question])
        prompt = torch.tensor([ids], device=self.model.device)
        sampling = {"do_sample": False}
        if not self.sampling.greedy:
            names = ("temperature", "top_k", "top_p")
            sampling = {"do_sample": True, **{name: getattr(self.sampling, name) for name in names}}
        end = self.tokenizer.eos_token_id
        generated = generate_ids(
            self.model,
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=self.max_new_tokens,
            eos_token_id=end,
            pad_token_id=end,
            streamer=streamer,
            **sampling,
        )
        answer = self.tokenizer.decode(generated[0, len(ids) :], skip_special_tokens=True).strip()
        # An empty answer is no turn: the template would have nothing to end.
        self.messages += [question, {"role": "assistant", "content": answer}] if answer else []
        return answer

    def _fit(self, messages: list[dict[str, str]]) -> list[int]:
        """The ids of as many of the last messages as leave room for an answer; forgets the others."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        room = self.model.config.max_position_embeddings - self.max_new_tokens
        while True:
            ids = encode_chat(self.tokenizer, [*system, *messages], add_generation_prompt=True)["input_ids"]
            if len(ids) <= room:
                self.messages = messages[:-1]
                return ids
            if len(messages) == 1:
                raise InputError(
                    f"the message has {len(ids)} tokens with its template, but the context has room for {room} before "
                    f"an answer of {self.max_new_tokens}: shorten it, or lower --max-new-tokens"
                )
            messages = messages[2:]


def run_chat(path: str, sampling: SamplingArguments, system: str | None = None, lines: Iterator[str] | None = None):
    """Talks with a model until the input ends.

    Args:
        path: A folder or Hub id.
        sampling: How to choose each token.
        system: How the model is to behave.
        lines: What is said; None: asked for on the terminal, or read from standard input.

    Raises:
        InputError: There is no model, or it was not trained to chat.
    """
    model, tokenizer = find_model(path).load_with_tokenizer(AutoModelForCausalLM, changed_weights="warn")
    chat = Chat(model, tokenizer, sampling, system=system)
    console = stderr_console()
    if sys.stdin.isatty() and lines is None:
        console.print(HELP, style="dim")
    for line in lines if lines is not None else _ask(sys.stdin.isatty()):
        text = line.strip()
        command, _, rest = text.partition(" ")
        if command in ("/exit", "/quit"):
            return
        if command == "/reset":
            chat.reset()
        elif command == "/system":
            chat.system = rest.strip() or None
            chat.reset()
        elif command.startswith("/"):
            console.print(HELP, style="dim")
        elif text:
            try:
                chat.answer(text, TerminalStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
            except InputError as error:  # the conversation goes on
                console.print(f"hfgpt: {error}")


def _ask(interactive: bool, read: Callable[[str], str] = input) -> Iterator[str]:
    while True:
        try:
            yield read("> " if interactive else "")
        except EOFError:
            return
