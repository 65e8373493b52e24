"""The precisions in which a model can be run that is not trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import jax.numpy as jnp

from distiljax.errors import UserError
from distiljax.hub import Model
from distiljax.nn.int8 import quantize
from distiljax.nn.linear import compute_params

INT8 = "int8"
M = TypeVar("M", bound=Model)
# Compute dtypes; beside the products of int8 kernels everything is float32.
PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, INT8: jnp.float32}


def check_precision(name: str) -> None:
    """Looks at a name from outside.

    Raises:
      UserError: it is unknown.
    """
    if name not in PRECISIONS:
        raise UserError(f"dtype is {name!r}; expected one of {', '.join(PRECISIONS)}")


def check_precisions(names: Iterable[str]) -> None:
    """Looks at several names from outside.

    Raises:
      UserError: none, one twice, or an unknown one.
    """
    names = list(names)
    if not names or not set(names) <= set(PRECISIONS) or len(set(names)) != len(names):
        raise UserError(
            f"dtype is {','.join(names) or 'empty'}; expected some of {','.join(PRECISIONS)}, each once"
        )


def in_precision(module: M, params: Any, name: str) -> tuple[M, Any]:
    """The module with the compute dtype of a precision, and its parameters as that has them.

    Args:
      module, params: of `from_pretrained`.
      name: "float32", "bfloat16" or "int8".
    """
    dtype = PRECISIONS[name]
    other: Any = module.clone(dtype=dtype)
    return other, compute_params(quantize(params) if name == INT8 else params, dtype)
