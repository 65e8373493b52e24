"""Matrix products in a compute dtype, and the layers made of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.extend.random import threefry2x32_p

from distiljax.nn.int8 import INT8_KERNEL, SCALE, int8_product, is_quantizable
from distiljax.nn.target import target_platform

Array = jax.Array
DType = Any

_LEVELS = 65536  # of a drop rate


def einsum(spec: str, a: Array, b: Array, dtype: DType) -> Array:
    """Two-operand einsum with operands in `dtype`, accumulated and returned in float32.

    Every index of an operand must stand in the other operand or in the result. The gradient follows the same rule:
    its products take operands in `dtype` and give float32, so that XLA:CPU runs them on its bfloat16 units too
    (it does so only where the product is asked for in float32), and float32 master weights get float32 gradients.

    Args:
      spec: subscripts such as "bsi,io->bso", without ellipsis.
      a, b: operands of any float dtype.
      dtype: float32 (full precision on every backend) or bfloat16.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return jnp.einsum(
            spec,
            a.astype(jnp.float32),
            b.astype(jnp.float32),
            precision=lax.Precision.HIGHEST,
        )
    return _low_precision_einsum(spec, jnp.dtype(dtype), a.dtype, b.dtype, a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _low_precision_einsum(
    spec: str, dtype: DType, a_dtype: DType, b_dtype: DType, a: Array, b: Array
) -> Array:
    del a_dtype, b_dtype
    return jnp.einsum(spec, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


def _forward(
    spec: str, dtype: DType, a_dtype: DType, b_dtype: DType, a: Array, b: Array
) -> tuple[Array, tuple[Array, Array]]:
    a, b = a.astype(dtype), b.astype(dtype)
    return _low_precision_einsum(spec, dtype, a_dtype, b_dtype, a, b), (a, b)


def _backward(
    spec: str, dtype: DType, a_dtype: DType, b_dtype: DType, residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    a, b = residuals
    operands, out = spec.split("->")
    of_a, of_b = operands.split(",")
    gradient = gradient.astype(dtype)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    grad_a = product(f"{out},{of_b}->{of_a}", gradient, b)
    grad_b = product(f"{of_a},{out}->{of_b}", a, gradient)
    return grad_a.astype(a_dtype), grad_b.astype(b_dtype)


_low_precision_einsum.defvjp(_forward, _backward)


class Dense(nn.Module):
    """An affine map of the last axis: [..., I] → [..., features], in `dtype`.

    Attributes:
      features: output width O.
      dtype: compute dtype; the kernel [I, O] and the bias [O] are float32 masters. Where no training is to follow, a
        kernel may be in `dtype` (`compute_params`), or one in int8 in its place (`int8.quantize`).
      stddev: standard deviation of the fresh kernel.
    """

    features: int
    dtype: DType = jnp.float32
    stddev: float = 0.02

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.has_variable("params", INT8_KERNEL):
            y = int8_product(x, *(self.get_variable("params", name) for name in (INT8_KERNEL, SCALE)))
        else:
            kernel = self.param("kernel", nn.initializers.normal(self.stddev), (x.shape[-1], self.features))
            axes = "abcdefgh"[: x.ndim - 1]
            y = einsum(f"{axes}i,io->{axes}o", x, kernel, self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return (y + bias).astype(self.dtype)


def compute_params(params: Any, dtype: DType) -> Any:
    """A model's parameters (or None) with its encoder's kernels [I, O] in `dtype`, for a model that is not trained.

    Only speed and memory change: a product would convert its kernel to the very same numbers, again in every call.
    Kernels in int8 stay so.
    """

    def converted(path: Any, array: Any) -> Any:
        return array.astype(dtype) if is_quantizable(tuple(key.key for key in path)) else array

    return jax.tree_util.tree_map_with_path(converted, params)


def place_compute_params(params: Any, dtype: DType) -> Any:
    """What `compute_params` gives, on the device."""
    return jax.device_put(compute_params(params, dtype))


class LayerNorm(nn.Module):
    """LayerNorm over the last axis, statistics in float32 (Ba et al. 2016), the result in `dtype`."""

    eps: float
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return (centred * lax.rsqrt(variance + self.eps) * scale + bias).astype(self.dtype)


def dropout(x: Array, rate: float, keys: Array | None, site: int) -> Array:
    """Inverted dropout with one key an example, so that the draw does not depend on how a batch is split.

    Args:
      x: [B, ...].
      rate: share of elements set to zero; quantised to 1/65536.
      keys: typed PRNG keys [B], or None for no dropout (evaluation).
      site: a number of its own for each place in the network that drops.
    """
    if keys is None or not drops(rate):
        return x
    kept = keep_mask(site_keys(keys, site), rate, x.shape[1:])
    # In float32, as a share in bfloat16 would be off by up to 0.4 %.
    return jnp.where(kept, x.astype(jnp.float32) / kept_share(rate), 0).astype(x.dtype)


def drops(rate: float) -> bool:
    """Whether a rate, quantised, drops anything."""
    return _threshold(rate) > 0


def kept_share(rate: float) -> float:
    """The share of elements that dropout keeps: what it divides by."""
    return 1 - _threshold(rate) / _LEVELS


def site_keys(keys: Array, site: int) -> Array:
    """The keys [B] of one place in the network that drops, from those of the examples [B]."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, site)


def keep_mask(keys: Array, rate: float, shape: tuple[int, ...]) -> Array:
    """Which elements dropout keeps, the same on every backend: bool [B, *shape].

    Args:
      keys: of `site_keys`, Threefry's [B].
      rate: share of elements to drop; quantised to 1/65536.
      shape: of an example; at least one axis.
    """
    # A hash of Threefry makes two words, which are four draws, where `jax.random.bits` makes one: of element i in each
    # quarter of the rows. A CPU takes all four of them. In a program for an accelerator every element makes the hash
    # again: so the draws are part of what uses them and never go through memory.
    draw = _draw_fours if target_platform() == "cpu" else _draw_each
    rows, width = math.prod(shape[:-1]), shape[-1]
    with jax.named_scope("dropout"):
        draws = jax.vmap(lambda key: draw(key, rows, width))(keys)
        return (draws >= _threshold(rate)).reshape(len(keys), *shape)


def _draw_fours(key: Array, rows: int, width: int) -> Array:
    """Numbers below `_LEVELS`, uint32 [rows, width]."""
    quarter = math.ceil(rows / 4)
    words = _hashes(key, *_places(quarter, width), width)
    return jnp.concatenate([half for word in words for half in (word % _LEVELS, word // _LEVELS)])[:rows]


def _draw_each(key: Array, rows: int, width: int) -> Array:
    """What `_draw_fours` gives."""
    quarter = math.ceil(rows / 4)
    row, column = _places(rows, width)
    first, second = _hashes(key, row % quarter, column, width)
    word = jnp.where(row < 2 * quarter, first, second)
    return jnp.where(row // quarter % 2 == 0, word % _LEVELS, word // _LEVELS)


def _places(rows: int, width: int) -> tuple[Array, Array]:
    """Row and column of every element, uint32 [rows, width]."""
    row, column = (lax.broadcasted_iota(jnp.uint32, (rows, width), axis) for axis in (0, 1))
    return row, column


def _hashes(key: Array, row: Array, column: Array, width: int) -> Sequence[Array]:
    """The two words, uint32, that Threefry (Salmon et al. 2011) makes of each place."""
    first, second = jax.random.key_data(key)
    return threefry2x32_p.bind(first, second, jnp.zeros_like(row), width * row + column)


def _threshold(rate: float) -> int:
    return round(rate * _LEVELS)
