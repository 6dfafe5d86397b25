"""Renders untrusted chat templates; run as a script in a separate process that its parent can kill.

Never imported: `hfgpt.data.templates` starts it, writes one job per line to stdin (JSON: the arguments of
transformers' `render_jinja_template`), and reads one result per line from stdout.
"""

import json
import sys

from transformers.utils.chat_template_utils import render_jinja_template

MEMORY_BYTES = 2**29  # in addition to the memory of the imports
LONGEST_TEXT = 2**24  # characters of a rendered conversation


def limit_memory():
    """Limits the address space on Linux, which enforces it. Elsewhere only the parent's time limit applies."""
    if sys.platform == "linux":
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        limit, hard = taken + MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def render(job: dict) -> list[str]:
    """The rendered conversation as alternating pieces: prompt text, answer text, prompt text, ..."""
    (text,), (spans,) = render_jinja_template(return_assistant_tokens_mask=True, **job)
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"the rendered text has {len(text):,} characters, the limit is {LONGEST_TEXT:,}")
    pieces, end = [], 0
    for start, stop in spans:
        pieces += [text[end:start], text[start:stop]]
        end = stop
    pieces.append(text[end:])
    if "".join(pieces) != text:
        raise ValueError("its {% generation %} blocks overlap")
    return pieces


def main():
    """Processes jobs until stdin is closed."""
    limit_memory()
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            answer = {"pieces": render(json.loads(line))}
        except Exception as error:  # a template can raise anything
            answer = {"error": f"{type(error).__name__}: {error}"[:300].rstrip(": .")}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
