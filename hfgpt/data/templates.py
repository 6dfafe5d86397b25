"""Chat templates: how a conversation becomes text, in Jinja, saved with the tokenizer.

Between `{% generation %}` and `{% endgeneration %}` lies what the model is to say, so that transformers' own
`return_assistant_tokens_mask` finds the same tokens as hfgpt. The markers are ordinary text: no token is added to the
vocabulary, and no embedding to the model. An answer begins on a line of its own and without spaces around it, so that
no token joins it to the prompt.

Sources: the headings of Alpaca are those of github.com/tatsu-lab/stanford_alpaca with the one preamble that chapter 7
of Build a Large Language Model (From Scratch) uses; the markers of Phi-3 are those of its model card, as plain text
and without its `<|end|>`, as in the same chapter.
"""

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from hfgpt.errors import InputError

_ANSWER = "{% generation %}{{ message['content'] | trim }}{{ eos_token }}{% endgeneration %}"


def _render(system: str, user: str, assistant: str) -> str:
    """A template from what stands before a system message, a question and an answer."""
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
# What stands between an instruction and its input.
BEFORE_INPUT = {"alpaca": "\n\n### Input:\n"}


def render_letters(name: str) -> str:
    """A conversation of empty messages in a template: the letters that a new tokenizer has to know.

    Args:
        name: `chat`, `alpaca` or `phi3`; nothing for another.
    """
    roles = ("system", "user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": ""} for role in roles]
    if name not in TEMPLATES:
        return ""
    first, _ = render_jinja_template(conversations=[messages[1:]], chat_template=TEMPLATES[name], eos_token="")
    both, _ = render_jinja_template(conversations=[messages], chat_template=TEMPLATES[name], eos_token="")
    return first[0] + both[0]


def set_chat_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> str:
    """Gives a tokenizer the template of a recipe.

    Args:
        tokenizer: Changed in place.
        name: `chat`, `alpaca` or `phi3`; None keeps the tokenizer's own, and gives one that has none `chat`.

    Returns:
        What stands between an instruction and its input.

    Raises:
        InputError: The name is unknown, the tokenizer has no end-of-text token, or its own template does not mark what
            the model is to say.
    """
    if tokenizer.eos_token is None:
        raise InputError("the tokenizer has no end-of-text token, so an answer could not end: use one that has")
    if name is None and tokenizer.chat_template:
        if "generation %}" not in tokenizer.chat_template:
            raise InputError(
                "the tokenizer's own chat template does not mark the answers with {% generation %}, so what is to be "
                f"learned cannot be told: set data.template to one of {', '.join(TEMPLATES)}"
            )
        return next(
            (BEFORE_INPUT.get(key, "\n") for key, text in TEMPLATES.items() if text == tokenizer.chat_template), "\n"
        )
    if name is not None and name not in TEMPLATES:
        raise InputError(f"data.template is '{name}'; it must be one of {', '.join(TEMPLATES)}")
    tokenizer.chat_template = TEMPLATES[name or "chat"]
    return BEFORE_INPUT.get(name, "\n")
