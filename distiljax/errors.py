"""The one exception that stands for bad input rather than a defect."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input from the user: one line with the value, what was expected and the fix.

    The command line prints it without a traceback and exits with status 2.
    """
