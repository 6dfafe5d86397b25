"""The exceptions that the command line turns into one line, and what a terminal may be given to print."""

import re

# Everything that moves the cursor, changes colours or reorders what is read: C0 but tab and line feed, DEL, C1, and
# Unicode's embeddings, overrides and isolates of direction.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def make_visible(text: str) -> str:
    r"""The text with control characters written out, as in `\x1b`: labels, names and texts come from others."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class InputError(ValueError):
    """An input that cannot be used: a wrong value, a missing file, an empty data set.

    The message is one line that names the value, the limit and the remedy. The command line prints it on stderr and
    exits with status 2; every other exception is a bug and keeps its traceback.
    """


class Interrupted(Exception):
    """Ctrl-C ended a run after it had saved a checkpoint; the message says how to go on."""
