"""The distillation itself: losses, masking, the student, the train step, and the runs made of them.

The package is also the function `distiljax.distill(config, workdir)`: a function and a folder of one name cannot both
be attributes of `distiljax`, so the folder is made callable (Python data model, 3.3.2.1).
"""

from __future__ import annotations

import os
import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from distiljax.distill.runs import Result


class _CallableModule(types.ModuleType):
    def __call__(self, config: ConfigDict, workdir: str | os.PathLike[str]) -> Result:
        """See `distiljax.distill.runs.distill`."""
        from distiljax.distill.runs import distill

        return distill(config, workdir)


sys.modules[__name__].__class__ = _CallableModule
