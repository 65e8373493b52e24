"""Kernels in int8 for models that are not trained: a quarter of float32's memory, and products of whole numbers.

A kernel has one scale an output, and what it is multiplied with one a row, taken from the row itself when it comes
(Yao et al. 2022, "ZeroQuant": fine-grained weights, token-wise activations). Nothing has to be calibrated.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import lax

Array = jax.Array

KERNEL = "kernel"
# [O, I] and [O]: what an output is made of lies together, as a CPU's product reads it; of few rows its time is mostly
# that of bringing the kernel into this order.
INT8_KERNEL, SCALE = "kernel_int8", "kernel_scale"
LEVELS = 127  # −127 to 127: symmetric, so that zero is zero


def quantize(params: Any) -> Any:
    """A model's parameters with `kernel_int8` [O, I] and `kernel_scale` [O] in place of its encoder's kernels [I, O].

    The module stays as it is; `nn.linear.Dense` sees what kind of kernel it has. Embeddings, biases, LayerNorms and the
    head stay float32. For models that are run: int8 has no gradient, and no file that others could read.

    Args:
      params: float32, as `from_pretrained` gives them; kernels in int8 stay so.
    """
    found = {}
    for names, array in traverse_util.flatten_dict(params).items():
        if not is_quantizable(names):
            found[names] = array
            continue
        array = np.asarray(array, np.float32).T
        scale = _scale(np, array, 1)
        with np.errstate(invalid="ignore"):  # of a NaN, which is in the scale
            found[*names[:-1], INT8_KERNEL] = np.round(array / scale).astype(np.int8, "C")
        found[*names[:-1], SCALE] = scale[:, 0]
    return traverse_util.unflatten_dict(found)


def is_quantizable(names: tuple[str, ...]) -> bool:
    """Whether the parameter at a path is a kernel of the encoder; the head's are small, and worth their precision."""
    return names[-1] == KERNEL and "head" not in names


def int8_product(x: Array, kernel: Array, scale: Array) -> Array:
    """x · kernelᵀ · scale, float32: [..., I] · int8 [O, I] → [..., O]; each row of x is rounded to int8 first."""
    x = x.astype(jnp.float32)
    row = _scale(jnp, x, -1)
    whole = jnp.round(x / row).astype(jnp.int8)
    contracted = (((x.ndim - 1,), (1,)), ((), ()))
    product = lax.dot_general(whole, kernel, contracted, preferred_element_type=jnp.int32)
    return product.astype(jnp.float32) * row * scale


def _scale(numpy: Any, x: Any, axis: int) -> Any:
    """What one level is worth along an axis, which is kept; 1 where everything is zero, NaN where something is NaN."""
    largest = numpy.abs(x).max(axis, keepdims=True)
    return numpy.where(largest == 0, 1, largest / LEVELS)
