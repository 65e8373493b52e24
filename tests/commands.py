"""The environment of commands that tests run in processes of their own."""

import os
from pathlib import Path

_WITHOUT_TORCH = str(Path(__file__).parent / "without_torch")


def environment(python_path=(), **changes):
    """This process's, but without PyTorch, as where distiljax alone is installed.

    transformers imports PyTorch wherever it finds it, which would be half of what many of the commands take.
    """
    path = [_WITHOUT_TORCH, *python_path, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), **changes}
