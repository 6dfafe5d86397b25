"""Exceptions that the command line reports in one line, and escaping of text for terminals."""

import re
import signal

# Characters that move the cursor, change colors or reorder text: C0 except tab and line feed, DEL, C1, and Unicode's
# bidirectional embeddings, overrides and isolates.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def make_visible(text: str) -> str:
    r"""Escapes control characters, as in `\x1b`; labels, names and texts can be untrusted."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class InputError(ValueError):
    """An error that the user can fix: a wrong value, a missing file, an empty dataset.

    The message is one line with the value, the limit and the fix. The command line prints it to stderr and exits with
    status 2; any other exception is a bug and keeps its traceback.
    """


class Interrupted(Exception):
    """A signal stopped a run after saving a checkpoint or the weights; the message tells how to resume."""


# Ctrl-C; what schedulers send when a job's time is over; and what they send some time before (SLURM's --signal).
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
