"""Where this directory is on PYTHONPATH, Python starts with this: PyTorch is as if it were not installed."""

import sys
from importlib.machinery import PathFinder


class WithoutTorch(PathFinder):
    """Finds all modules but one."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == "torch" else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTorch
