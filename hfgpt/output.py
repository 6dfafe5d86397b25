"""Output for people: consoles without markup, and text in plots."""

import sys

from rich.console import Console
from rich.status import Status
from rich.text import Text

from hfgpt.errors import make_visible


class PlainConsole(Console):
    """Prints strings without rich's markup, with control characters escaped."""

    def __init__(self, **settings):
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings) -> Text:
        return super().render_str(make_visible(text), **settings)

    def status(self, status: str, **settings) -> Status:
        return super().status(Text(make_visible(status)), **settings)


def stderr_console(quiet: bool = False) -> Console:
    """The console for progress and messages: stderr, plain if it is not a terminal."""
    return PlainConsole(file=sys.stderr, soft_wrap=not sys.stderr.isatty(), quiet=quiet)


def drawable(text: str, otherwise: str) -> str:
    """A text for a plot; `otherwise` if matplotlib's font does not have all characters (Chinese, emoji)."""
    from matplotlib import font_manager

    known = font_manager.get_font(font_manager.findfont(font_manager.FontProperties())).get_charmap()
    if any(ord(character) not in known for character in text):
        return otherwise
    return text.replace("$", r"\$")  # would start a formula
