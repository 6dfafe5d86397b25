"""`hfgpt chat`: a conversation in the terminal."""

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from hfgpt.data.templates import TEMPLATES
from hfgpt.errors import InputError
from hfgpt.evaluation.fast_generation import speed_up_generation
from hfgpt.evaluation.generation import SamplingArguments, TerminalStreamer
from hfgpt.models import find_model
from hfgpt.output import stderr_console
from hfgpt.records import RunRecord, is_checkpoint, public_name
from hfgpt.serving.conversation import Chat

QUIT = "/exit or Ctrl-D quits"
HELP = (
    "/reset clears the history; /system TEXT sets the system prompt and clears the history; Ctrl-C stops an answer; "
    f"{QUIT}"
)


def run_chat(
    path: str,
    sampling: SamplingArguments,
    system: str | None = None,
    lines: Iterator[str] | None = None,
    fast: bool = False,
):
    """Chats with a model until the input ends. On a terminal, Ctrl-C only interrupts the current answer.

    Args:
        path: A folder or Hub id.
        sampling: Sampling settings.
        system: System prompt.
        lines: The user's messages; None: read from the terminal or standard input.
        fast: Generate faster on a CPU, see `speed_up_generation`.

    Raises:
        InputError: The model does not exist, was not trained to chat, or does not support `fast`.
    """
    model, tokenizer = find_model(path).load_with_tokenizer(AutoModelForCausalLM, changed_weights="warn")
    if fast:
        speed_up_generation(model, half=True)
    chat = Chat(model, tokenizer, sampling, system=system)
    console, interactive = stderr_console(), lines is None and sys.stdin.isatty()
    if interactive:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # otherwise it would only stop an answer, as Ctrl-C does
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
            except InputError as error:  # the conversation continues
                console.print(f"hfgpt: {error}")
            except KeyboardInterrupt:
                if not interactive:
                    raise


def describe_training(path: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Describes in one line what a model was trained on, according to the record of its run.

    Args:
        path: A folder or Hub id.
        tokenizer: Its tokenizer, with a chat template.

    Returns:
        The line; None if the model has no record of its run.

    Raises:
        InputError: The record is damaged.
    """
    folder = Path(path)
    run = RunRecord.read(folder.parent if is_checkpoint(folder) else folder)
    if run is None or run.data_source is None:
        return None
    data = public_name(run.data_source)
    if run.task != "instruct":
        return f"trained on {data}, but not on instructions"
    template = next(
        (f" with the template {name}" for name in TEMPLATES if TEMPLATES[name] == tokenizer.chat_template), ""
    )
    return f"trained on {data}{template}; answers follow the style of the training data"


def _ask(console: Console | None, read: Callable[[str], str] = input) -> Iterator[str]:
    """The lines typed by a user or, without a console, those of standard input."""
    interrupted = False
    while True:
        try:
            if interrupted:  # here, so that another Ctrl-C meanwhile is handled too
                console.print(f"\n{QUIT}", style="dim")
                interrupted = False
            yield read("> " if console else "")
        except EOFError:
            if console:
                console.print()  # so that the shell's prompt starts on a new line
            return
        except KeyboardInterrupt:
            if not console:
                raise
            interrupted = True
