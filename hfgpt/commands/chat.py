"""`hfgpt chat`: a conversation with a model in the terminal, within its context."""

import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from hfgpt.data.templates import TEMPLATES, check_chat_template, encode_chat
from hfgpt.errors import InputError
from hfgpt.evaluation.generation import SamplingArguments, TerminalStreamer, generate_ids
from hfgpt.models import find_model
from hfgpt.output import stderr_console
from hfgpt.records import RunRecord, is_checkpoint, public_name

QUIT = "/exit or Ctrl-D quits"
HELP = (
    "/reset clears the history; /system TEXT sets the system prompt and clears the history; Ctrl-C stops an answer; "
    f"{QUIT}"
)


class RecordingStreamer:
    """Passes the tokens of an answer on, and keeps them: of one that is stopped, `generate` returns nothing.

    Args:
        streamer: Receives all that `generate` gives, the prompt first.
    """

    def __init__(self, streamer: TextStreamer):
        self.streamer, self._received = streamer, []

    @property
    def ids(self) -> list[int]:
        """The tokens of the answer so far."""
        return [token for values in self._received[1:] for token in values]

    def put(self, value: torch.Tensor):
        self._received.append(value.flatten().tolist())
        self.streamer.put(value)

    def end(self):
        self.streamer.end()


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
        torch.manual_seed(self.sampling.seed)

    @property
    def max_new_tokens(self) -> int:
        return self.sampling.max_new_tokens or max(self.model.config.max_position_embeddings // 4, 1)

    def reset(self):
        """Forgets all but the system message."""
        self.messages.clear()

    def answer(self, text: str, streamer: TextStreamer | None = None) -> str:
        """Says something to the model.

        An answer that Ctrl-C stops is part of the conversation as far as it was streamed: the model then knows what
        the user has read, and can be asked to continue. A question whose answer had not begun is not part of it.

        Args:
            text: What is said.
            streamer: Receives the tokens of the answer as they come.

        Returns:
            The answer.

        Raises:
            KeyboardInterrupt: Ctrl-C stopped the answer; what the streamer held back of it has then been shown.
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
        recorder = RecordingStreamer(streamer) if streamer else None
        try:
            generated = generate_ids(
                self.model,
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=self.max_new_tokens,
                eos_token_id=end,
                pad_token_id=end,
                streamer=recorder,
                **sampling,
            )
        except KeyboardInterrupt:
            if recorder:
                self._remember(question, recorder.ids)
                recorder.end()
            raise
        return self._remember(question, generated[0, len(ids) :])

    def _remember(self, question: dict[str, str], ids: torch.Tensor | list[int]) -> str:
        """Adds a question and its answer to the conversation; returns the answer."""
        answer = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
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
    """Talks with a model until the input ends. On a terminal, Ctrl-C stops an answer only.

    Args:
        path: A folder or Hub id.
        sampling: How to choose each token.
        system: System prompt.
        lines: What is said; None: asked for on the terminal, or read from standard input.

    Raises:
        InputError: There is no model, or it was not trained to chat.
    """
    model, tokenizer = find_model(path).load_with_tokenizer(AutoModelForCausalLM, changed_weights="warn")
    chat = Chat(model, tokenizer, sampling, system=system)
    console, interactive = stderr_console(), lines is None and sys.stdin.isatty()
    if interactive:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # else it would stop an answer, as Ctrl-C does
        console.print("\n".join(filter(None, [describe_training(path, tokenizer), HELP])), style="dim")
    for line in lines if lines is not None else _ask(console if interactive else None):
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
            except KeyboardInterrupt:
                if not interactive:
                    raise


def describe_training(path: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What a model was trained on, in one line, from the record of its run.

    Args:
        path: A folder or Hub id.
        tokenizer: Its own, with a chat template.

    Returns:
        The line; None: the model has no record of its run.

    Raises:
        InputError: The record is damaged.
    """
    folder = Path(path)
    run = RunRecord.read(folder.parent if is_checkpoint(folder) else folder)
    if run is None or run.data_source is None:
        return None
    data = public_name(run.data_source)
    if run.task != "instruct":
        return f"trained on {data}, but not to answer instructions"
    template = next(
        (f" with the template {name}" for name in TEMPLATES if TEMPLATES[name] == tokenizer.chat_template), ""
    )
    return f"trained on {data}{template}; it answers in the manner of its training data"


def _ask(console: Console | None, read: Callable[[str], str] = input) -> Iterator[str]:
    """The lines of a user, or, without a console, of standard input."""
    interrupted = False
    while True:
        try:
            if interrupted:  # another Ctrl-C meanwhile is as good as this one
                console.print(f"\n{QUIT}", style="dim")
                interrupted = False
            yield read("> " if console else "")
        except EOFError:
            if console:
                console.print()  # the shell's prompt gets a line of its own
            return
        except KeyboardInterrupt:
            if not console:
                raise
            interrupted = True
