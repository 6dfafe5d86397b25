"""The exceptions that the command line turns into one line."""


class InputError(ValueError):
    """An input that cannot be used: a wrong value, a missing file, an empty data set.

    The message is one line that names the value, the limit and the remedy. The command line prints it on stderr and
    exits with status 2; every other exception is a bug and keeps its traceback.
    """


class Interrupted(Exception):
    """Ctrl-C ended a run after it had saved a checkpoint; the message says how to go on."""
