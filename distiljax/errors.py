"""What ends a command without a traceback: bad input, a run that fails, and being told to stop."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input from the user: one line with the value, what was expected and the fix.

    The command line prints it without a traceback and exits with status 2.
    """


class Failed(RuntimeError):
    """The run cannot go on, through no fault of the input: one line; the command line exits with status 1."""


class Stopped(KeyboardInterrupt):
    """A signal ended the work before there was anything to save.

    Args:
      number: the signal's.
      line: what to say.
    """

    def __init__(self, number: int, line: str):
        super().__init__(line)
        self.number = number
