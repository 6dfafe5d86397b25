"""Where text goes that people read: consoles without markup, and pictures."""

import shutil
import sys
import textwrap

from rich.console import Console
from rich.status import Status
from rich.text import Text

from hfgpt.errors import make_visible


class PlainConsole(Console):
    """Prints strings as they are, without rich's markup, with control characters made visible."""

    def __init__(self, **settings):
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings) -> Text:
        return super().render_str(make_visible(text), **settings)

    def status(self, status: str, **settings) -> Status:
        return super().status(Text(make_visible(status)), **settings)


def stderr_console(quiet: bool = False) -> Console:
    """The console of progress and notices: standard error, plain where it is not a terminal."""
    return PlainConsole(file=sys.stderr, soft_wrap=not sys.stderr.isatty(), quiet=quiet)


def output_width() -> int | None:
    """Columns of the terminal that standard output goes to; None: it goes elsewhere, where lines are not broken."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def wrap_text(text: str, width: int | None, indent: int = 0, hanging: int | None = None) -> str:
    """A paragraph, broken between words only.

    Args:
        text: One paragraph.
        width: Columns; None: no line is broken.
        indent: Blanks before the first line.
        hanging: Blanks before the others; None: `indent`.
    """
    first, others = " " * indent, " " * (indent if hanging is None else hanging)
    if width is None:
        return first + text
    options = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(text, max(width, 20), initial_indent=first, subsequent_indent=others, **options)


def drawable(text: str, otherwise: str) -> str:
    """A text for a picture: `otherwise` if matplotlib's font lacks one of its characters, as of Chinese or emoji."""
    from matplotlib import font_manager

    known = font_manager.get_font(font_manager.findfont(font_manager.FontProperties())).get_charmap()
    if any(ord(character) not in known for character in text):
        return otherwise
    return text.replace("$", r"\$")  # which would begin a formula
