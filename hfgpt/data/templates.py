"""Chat templates: Jinja that renders a conversation as text, saved with the tokenizer.

`{% generation %}` and `{% endgeneration %}` enclose the text that the model generates, so that transformers'
`return_assistant_tokens_mask` marks the same tokens as hfgpt. The role markers are ordinary text: no tokens are added
to the vocabulary, and no embeddings to the model. An answer starts on a new line without surrounding spaces, so that
no token spans prompt and answer.

Sources: the Alpaca headings are from github.com/tatsu-lab/stanford_alpaca, with the single preamble used in chapter 7
of Build a Large Language Model (From Scratch); the Phi-3 markers are from its model card, as plain text and without
`<|end|>`, as in the same chapter.
"""

import atexit
import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from hfgpt.errors import InputError

_ANSWER = "{% generation %}{{ message['content'] | trim }}{{ eos_token }}{% endgeneration %}"


def _render(system: str, user: str, assistant: str) -> str:
    """A template from the prefixes of system, user and assistant messages."""
    return (
        "{%- for message in messages %}"
        f"{{%- if message['role'] == 'system' %}}{{{{ {system!r} + message['content'] | trim + '\\n\\n' }}}}"
        f"{{%- elif message['role'] == 'user' %}}{{{{ {user} }}}}"
        f"{{%- elif message['role'] == 'assistant' %}}{{{{ {assistant!r} }}}}{_ANSWER}"
        "{%- else %}{{ raise_exception('roles are system, user and assistant, not ' + message['role']) }}"
        "{%- endif %}{%- endfor %}"
        f"{{%- if add_generation_prompt %}}{{{{ {assistant!r} }}}}{{%- endif %}}"
    )


TEMPLATES = {
    "chat": _render("### System:\n", "'### User:\\n' + message['content'] | trim + '\\n\\n'", "### Assistant:\n"),
    "alpaca": _render(
        "",
        "('Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\\n\\n' if loop.first else '') + '### Instruction:\\n' + message['content'] | trim + '\\n\\n'",
        "### Response:\n",
    ),
    "phi3": _render("<|system|>\n", "'<|user|>\\n' + message['content'] | trim + '\\n'", "<|assistant|>\n"),
}
# Text between an instruction and its input.
BEFORE_INPUT = {"alpaca": "\n\n### Input:\n"}
LONGEST_TEMPLATE = 100_000  # characters; the longest templates of well-known models have about 20,000
RENDERING_SECONDS = 5.0  # per conversation, which normally takes milliseconds
SCRIPT = Path(__file__).with_name("template_process.py")
# Passes text that is already rendered to transformers, which then computes the mask of the answer tokens.
_RENDERED = (
    "{% for piece in pieces %}{% if loop.index is divisibleby 2 %}{% generation %}{{ piece }}{% endgeneration %}"
    "{% else %}{{ piece }}{% endif %}{% endfor %}"
)


def render_letters(name: str) -> str:
    """A rendered conversation of empty messages: the template's characters, which a new tokenizer must know.

    Args:
        name: `chat`, `alpaca` or `phi3`; "" is returned for any other name.
    """
    roles = ("system", "user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": ""} for role in roles]
    if name not in TEMPLATES:
        return ""
    first, _ = render_jinja_template(conversations=[messages[1:]], chat_template=TEMPLATES[name], eos_token="")
    both, _ = render_jinja_template(conversations=[messages], chat_template=TEMPLATES[name], eos_token="")
    return first[0] + both[0]


def set_chat_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> str:
    """Sets the chat template of a tokenizer.

    Args:
        tokenizer: Changed in place.
        name: `chat`, `alpaca` or `phi3`; None keeps the tokenizer's own template, or sets `chat` if it has none.

    Returns:
        The text between an instruction and its input.

    Raises:
        InputError: The name is unknown, the tokenizer does not have an end-of-text token, or its own template fails or
            does not mark the answers.
    """
    if tokenizer.eos_token is None:
        raise InputError("the tokenizer has no end-of-text token to end answers with: use another tokenizer")
    if name is None and tokenizer.chat_template:
        template = check_chat_template(tokenizer)
        if "generation %}" not in template:
            raise InputError(
                "the tokenizer's chat template does not mark the answers with {% generation %}, which training needs: "
                f"set data.template to one of {', '.join(TEMPLATES)}"
            )
        return next((BEFORE_INPUT.get(key, "\n") for key, text in TEMPLATES.items() if text == template), "\n")
    if name is not None and name not in TEMPLATES:
        raise InputError(f"data.template is '{name}'; it must be one of {', '.join(TEMPLATES)}")
    tokenizer.chat_template = TEMPLATES[name or "chat"]
    return BEFORE_INPUT.get(name, "\n")


def write_inputs(messages: Sequence[dict[str, str]], before_input: str = "\n") -> list[dict[str, str]]:
    """The messages with each `input` appended to its `content`.

    Args:
        messages: Each with `role`, `content` and optionally `input`.
        before_input: Text between an instruction and its input, see `set_chat_template`.
    """
    return [
        {"role": message["role"], "content": f"{message['content'].strip()}{before_input}{message['input'].strip()}"}
        if message.get("input")
        else {"role": message["role"], "content": message["content"]}
        for message in messages
    ]


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, str]],
    add_generation_prompt: bool = False,
    return_assistant_tokens_mask: bool = False,
) -> BatchEncoding:
    """Applies the tokenizer's chat template to a conversation; returns the same as `apply_chat_template`.

    A template is a program. jinja2's sandbox blocks access to files and Python, but not endless loops or unlimited
    memory, and a template may misbehave only for certain messages. So every rendering of a template that is not one of
    ours runs in a separate process, with limits on memory (Linux) and time.

    Args:
        tokenizer: With a chat template.
        messages: Each with `role` and `content`.
        add_generation_prompt: End with the prompt for an answer.
        return_assistant_tokens_mask: Also return `assistant_masks`, 1 for answer tokens.

    Raises:
        InputError: The template fails or exceeds a limit.
    """
    settings = {"return_dict": True, "return_assistant_tokens_mask": return_assistant_tokens_mask}
    template = _chat_template(tokenizer)
    if template in TEMPLATES.values():
        return tokenizer.apply_chat_template(list(messages), add_generation_prompt=add_generation_prompt, **settings)
    pieces = _render_apart(tokenizer, template, messages, add_generation_prompt)
    return tokenizer.apply_chat_template(list(messages), chat_template=_RENDERED, pieces=pieces, **settings)


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template, tested on one question.

    Raises:
        InputError: The template fails or exceeds a limit.
    """
    template = _chat_template(tokenizer)
    if template not in TEMPLATES.values():
        _render_apart(tokenizer, template, [{"role": "user", "content": "Hello"}], True)
    return template


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # none, or several without a default
        raise InputError(
            f"the tokenizer does not have a default chat template ({' '.join(str(error).split())})"
        ) from error
    if len(template) > LONGEST_TEMPLATE:
        raise InputError(
            f"the tokenizer's chat template has {len(template):,} characters, the limit is {LONGEST_TEMPLATE:,}: "
            "shorten its chat_template.jinja"
        )
    return template


def _render_apart(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: Sequence[dict[str, str]],
    add_generation_prompt: bool,
) -> list[str]:
    """Renders a conversation in a separate process, see `template_process.render`."""
    job = {
        "conversations": [list(messages)],
        "chat_template": template,
        "add_generation_prompt": add_generation_prompt,
        **tokenizer.special_tokens_map,
    }
    with _RENDERING:
        answer = _ask_renderer(job)
    if "error" in answer:
        fact = " ".join(answer["error"].split())
        raise InputError(f"the tokenizer's chat template fails ({fact}): fix its chat_template.jinja")
    return answer["pieces"]


_RENDERING = threading.Lock()  # one job at a time


def _ask_renderer(job: dict[str, Any]) -> dict[str, Any]:
    process = _start_renderer()
    if process.poll() is not None:  # Ctrl-C in the terminal also ends this process
        _start_renderer.cache_clear()
        process = _start_renderer()
    timer = threading.Timer(RENDERING_SECONDS, process.kill)
    timer.start()
    try:
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        line = ""
    finally:
        timer.cancel()
    if line:
        return json.loads(line)
    process.kill()
    process.wait()  # the next rendering starts a new process
    return {"error": f"rendering took more than {RENDERING_SECONDS:g} seconds, or crashed"}


@functools.cache
def _start_renderer() -> subprocess.Popen:
    # Same import paths as this process, and nothing else of its environment.
    process = subprocess.Popen(
        [sys.executable, "-P", str(SCRIPT)],
        env={
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            **{name: os.environ[name] for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if name in os.environ},
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
    )
    atexit.register(process.kill)
    process.stdout.readline()  # wait for its imports
    return process
