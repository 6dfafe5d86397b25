"""Output for the terminal: consoles without markup, wrapped text; and text in plots."""

import shutil
import sys
import textwrap
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.text import Text

from hfgpt.errors import make_visible


class PlainConsole(Console):
    """Prints strings as they are, without rich's markup, with control characters made visible.

    If an indented line is wrapped, its continuation lines are indented further.
    """

    def __init__(self, **settings):
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def print(self, *objects: Any, **settings):
        if not (self.soft_wrap or settings.get("soft_wrap")):
            objects = tuple(self._indent(item) if isinstance(item, str) else item for item in objects)
        super().print(*objects, **settings)

    def _indent(self, text: str) -> str:
        lines = []
        for line in text.split("\n"):
            content = line.lstrip(" ")
            indent = len(line) - len(content)
            broken = indent and len(line) > self.width
            lines.append(wrap_text(content, self.width, indent, indent + 4) if broken else line)
        return "\n".join(lines)

    def render_str(self, text: str, **settings) -> Text:
        return super().render_str(make_visible(text), **settings)

    def status(self, status: str, **settings) -> Status:
        return super().status(Text(make_visible(status)), **settings)


def stderr_console(quiet: bool = False) -> Console:
    """The console for progress and messages: stderr, plain if it is not a terminal."""
    return PlainConsole(file=sys.stderr, soft_wrap=not sys.stderr.isatty(), quiet=quiet)


def output_width() -> int | None:
    """Width of the terminal in columns; None: standard output is not a terminal, so lines are not wrapped."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def wrap_text(text: str, width: int | None, indent: int = 0, hanging: int | None = None) -> str:
    """A paragraph, wrapped between words only.

    Args:
        text: One paragraph.
        width: Columns; None: the text is not wrapped.
        indent: Spaces before the first line.
        hanging: Spaces before the other lines; None: `indent`.
    """
    first, others = " " * indent, " " * (indent if hanging is None else hanging)
    if width is None:
        return first + text
    options = {"break_long_words": False, "break_on_hyphens": False}
    lines = textwrap.wrap(text, max(width, 20), initial_indent=first, subsequent_indent=others, **options)
    return "\n".join(line.rstrip() for line in lines)


def render_pairs(pairs: Iterable[tuple[str, str]], width: int | None) -> str:
    """Names and values in two columns; on a narrow terminal, each value below its name.

    Args:
        pairs: Names and values.
        width: Columns to wrap lines at; None: lines are not wrapped.
    """
    pairs = list(pairs)
    column = max(len(name) for name, _ in pairs) + 2
    if width is not None and column + 20 > width:
        return "\n".join(f"{wrap_text(name, width)}\n{wrap_text(value, width, 4)}" for name, value in pairs)
    return "\n".join(wrap_text(f"{name:{column}}{value}", width, 0, column) for name, value in pairs)


def drawable(text: str, otherwise: str) -> str:
    """A text for a plot; `otherwise` if matplotlib's font does not have all characters (Chinese, emoji)."""
    from matplotlib import font_manager

    known = font_manager.get_font(font_manager.findfont(font_manager.FontProperties())).get_charmap()
    if any(ord(character) not in known for character in text):
        return otherwise
    return text.replace("$", r"\$")  # would start a formula
