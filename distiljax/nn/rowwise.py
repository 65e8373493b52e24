"""Attention a few rows or heads at a time, for XLA's CPU backend: what the [S, S] matrices take stays in the cache.

The arithmetic is that of the plain form. Its backward pass, written by hand, computes the weights again from the
logarithm of their normaliser (Dao et al. 2022, algorithm 4), so they are never kept; only where dropout fell is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from distiljax.nn.linear import Array, DType, drops, einsum, keep_mask, kept_share, site_keys

# The scores that are computed at once take no more than this in float32, or are those of one head.
CHUNK_BYTES = 4 * 2**20


def rows_at_once(shape: tuple[int, ...]) -> int:
    """How many of the B rows of queries [B, H, S, D] to compute at once: a divisor of B."""
    B, H, S, _ = shape
    return _largest_divisor(B, CHUNK_BYTES // (4 * H * S * S))


def heads_at_once(shape: tuple[int, ...]) -> int:
    """How many of the H heads of queries [B, H, S, D] to compute at once: all of some rows, or a divisor of H."""
    _, H, S, _ = shape
    return _largest_divisor(H, CHUNK_BYTES // (4 * S * S))


def _largest_divisor(number: int, most: int) -> int:
    """The largest divisor that is not above `most`; at least 1."""
    return max(divisor for divisor in range(1, max(min(most, number), 1) + 1) if number % divisor == 0)


def rowwise_attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    dropout_keys: Array | None,
    *,
    rate: float,
    site: int,
    dtype: DType,
) -> Array:
    """Scaled dot-product attention: [B, H, S, D] of each → [B, H, S, D] in `dtype`.

    Args:
      query, key, value: in `dtype`.
      mask: bool [B, 1, S, S] or [B, 1, 1, S], which keys a query sees; None for all.
      dropout_keys, rate, site: of the weights' dropout, as in `linear.dropout`.
      dtype: of the products' operands.
    """
    # The mask and each place's keys are made for all rows, before the loop: within it XLA would make them again for
    # every score, which makes its loops several times slower.
    keys = None if dropout_keys is None or not drops(rate) else site_keys(dropout_keys, site)
    query = (query * query.shape[-1] ** -0.5).astype(dtype)
    return _attention(rate, jnp.dtype(dtype), query, key, value, mask, keys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    rate: float,
    dtype: DType,
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    keys: Array | None,
) -> Array:
    return _forward(rate, dtype, query, key, value, mask, keys)[0]


def _forward(
    rate: float,
    dtype: DType,
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    keys: Array | None,
) -> tuple[Array, tuple[Any, ...]]:
    def some(rows: Any) -> tuple[Array, Array, Array | None]:
        query, key, value, mask, keys = rows
        _, H, S, _ = query.shape
        kept = None if keys is None else keep_mask(keys, rate, (H, S, S))

        def heads(some: Any) -> tuple[Array, Array]:
            query, key, value, kept = some
            scores = _scores(query, key, mask, dtype)
            highest = scores.max(-1, keepdims=True)
            weights = jnp.exp(scores - highest)
            total = weights.sum(-1, keepdims=True)
            log_total = (highest + jnp.log(total))[..., 0]
            if kept is not None:
                weights, total = jnp.where(kept, weights, 0), total * kept_share(rate)
            context = einsum("bhqk,bhkd->bhqd", weights.astype(dtype), value, dtype) / total
            return context.astype(dtype), log_total

        return *_by_heads(heads, (query, key, value, kept)), kept

    rows = (query, key, value, mask, keys)
    context, log_total, kept = _by_rows(some, rows, rows_at_once(query.shape))
    return context, (query, key, value, mask, keys, context, log_total, kept)


def _backward(rate: float, dtype: DType, residuals: tuple[Any, ...], gradient: Array) -> tuple[Any, ...]:
    query, key, value, mask, keys, context, log_total, kept = residuals

    def some(rows: Any) -> tuple[Array, Array, Array]:
        mask, *by_head = rows

        def heads(some: Any) -> tuple[Array, Array, Array]:
            query, key, value, log_total, kept, gradient, inner, turned_query, turned_gradient = some
            weights = jnp.exp(_scores(query, key, mask, dtype) - log_total[..., None])
            weights_grad = einsum("bhqd,bhkd->bhqk", gradient, value, dtype)
            dropped = weights
            if kept is not None:
                dropped = jnp.where(kept, weights / kept_share(rate), 0)
                weights_grad = jnp.where(kept, weights_grad / kept_share(rate), 0)
            scores_grad = (weights * (weights_grad - inner[..., None])).astype(dtype)
            return (
                einsum("bhqk,bhkd->bhqd", scores_grad, key, dtype),
                einsum("bhdq,bhqk->bhdk", turned_query, scores_grad, dtype),
                einsum("bhdq,bhqk->bhdk", turned_gradient, dropped.astype(dtype), dtype),
            )

        return _by_heads(heads, by_head)

    # The CPU's fast product contracts the last axis of its first operand. So the small matrices are turned, not the
    # large ones; and here, for within the loop XLA would take the turn into the product.
    inner = (context.astype(jnp.float32) * gradient.astype(jnp.float32)).sum(-1)  # [B, H, S]
    turned = (query.swapaxes(2, 3), gradient.swapaxes(2, 3))
    rows = (mask, query, key, value, log_total, kept, gradient, inner, *turned)
    query_grad, key_grad, value_grad = _by_rows(some, rows, rows_at_once(query.shape))
    grads = (query_grad, key_grad.swapaxes(2, 3), value_grad.swapaxes(2, 3))
    return *(x.astype(dtype) for x in grads), *jax.tree.map(_no_gradient, (mask, keys))


_attention.defvjp(_forward, _backward)


def _scores(query: Array, key: Array, mask: Array | None, dtype: DType) -> Array:
    scores = einsum("bhqd,bhkd->bhqk", query, key, dtype)  # float32
    return scores if mask is None else jnp.where(mask, scores, jnp.finfo(scores.dtype).min)


def _by_rows(compute: Callable[[Any], Any], rows: Any, count: int) -> Any:
    """`compute` of arrays [B, …], so many rows after the other."""
    parts = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]), rows)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), lax.map(compute, parts))


def _by_heads(compute: Callable[[Any], Any], heads: Any) -> Any:
    """`compute` of arrays [B, H, …], the first of which is [B, H, S, D], a few heads after the other.

    Where not all heads find room at once, there is one row, by `rows_at_once`.
    """
    shape = heads[0].shape
    count = heads_at_once(shape)
    if count == shape[1]:
        return compute(heads)

    def some(heads: Any) -> Any:
        return _without_rows(compute(jax.tree.map(lambda x: x[None], heads)))

    found = _by_rows(some, _without_rows(heads), count)
    return jax.tree.map(lambda x: x[None], found)


def _without_rows(arrays: Any) -> Any:
    """Arrays [1, …] as those of their only row."""
    return jax.tree.map(lambda x: x[0], arrays)


def _no_gradient(x: Array) -> np.ndarray:
    return np.zeros(x.shape, jax.dtypes.float0)
