"""What is imported where."""

import subprocess
import sys

PROGRAM = """
import sys
from distiljax.data import RowLoader
from distiljax.tasks.loader import TaskLoader
assert "grain" not in sys.modules
try:
    {make}
except Exception:
    pass
assert "grain" in sys.modules
"""


def test_loaders_import_grain_where_they_are_made():
    """Its import puts a lazy `__import__` in place of Python's for all threads; one that reads must not do that."""
    for make in ("RowLoader('nowhere', 1, 0)", "TaskLoader([], 1, 0, ())"):
        subprocess.run([sys.executable, "-c", PROGRAM.format(make=make)], check=True)
