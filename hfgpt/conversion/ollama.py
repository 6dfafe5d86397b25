"""Ollama: a Modelfile that runs a GGUF file with the model's chat template.

Ollama's templates are written in Go's template language and not in Jinja, so each of hfgpt's templates is here
again. They cannot trim: messages should not start or end with spaces.

Source: github.com/ollama/ollama, docs/modelfile.mdx and docs/template.mdx.
"""

import json

from transformers import PreTrainedTokenizerBase

from hfgpt.data.templates import TEMPLATES
from hfgpt.errors import InputError

MODELFILE = "Modelfile"
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
# Template -> the text before a conversation that starts with a user message, the text before a system message, those
# before and after a user message, and the one before an answer.
PARTS = {
    "chat": ("", "### System:\n", "### User:\n", "\n\n", "### Assistant:\n"),
    "alpaca": (ALPACA, "", "### Instruction:\n", "\n\n", "### Response:\n"),
    "phi3": ("", "<|system|>\n", "<|user|>\n", "\n", "<|assistant|>\n"),
}


def render_modelfile(gguf_file: str, tokenizer: PreTrainedTokenizerBase, context: int) -> str:
    """The Modelfile of a model.

    Args:
        gguf_file: Name of the GGUF file in the same folder.
        tokenizer: The model's tokenizer, with its chat template, if any.
        context: Context length in tokens.

    Raises:
        InputError: The chat template is not one of hfgpt's.
    """
    lines = [
        f"FROM ./{gguf_file}",
        f'TEMPLATE """{render_template(tokenizer)}"""',
        f"PARAMETER num_ctx {context}",
        "PARAMETER repeat_penalty 1",  # as in `generate`
    ]
    if tokenizer.eos_token is not None:
        lines.append(f"PARAMETER stop {json.dumps(tokenizer.eos_token, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def render_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template in Go's template language; without one, the prompt alone.

    Raises:
        InputError: It is not one of hfgpt's.
    """
    if not tokenizer.chat_template:
        return "{{ .Prompt }}"
    name = next((name for name, template in TEMPLATES.items() if template == tokenizer.chat_template), None)
    if name is None:
        raise InputError(
            f"the chat template is not one of {', '.join(TEMPLATES)}, the ones that can be written for Ollama: use "
            "--format gguf, and write a Modelfile with your own TEMPLATE"
        )
    first, system, user, after_user, answer = (_print_text(part) for part in PARTS[name])
    first = first and f"{{{{ if eq $index 0 }}}}{first}{{{{ end }}}}"
    end = _print_text(tokenizer.eos_token)
    return (
        "{{ range $index, $message := .Messages }}"
        f'{{{{ if eq .Role "system" }}}}{system}{{{{ .Content }}}}{_print_text(chr(10) * 2)}'
        f'{{{{ else if eq .Role "user" }}}}{first}{user}{{{{ .Content }}}}{after_user}'
        f'{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ .Content }}}}{end}{{{{ end }}}}{{{{ end }}}}{answer}'
    )


def _print_text(text: str) -> str:
    """An action that prints a text, so that its line breaks are exactly those of the text."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
