"""A forward pass over many rows: on a CPU a few at a time, as the activations of all of them fall out of its caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Tokens at once, of which a CPU gains nothing from more: the activations of a base-size feed-forward layer take 25 MB.
CPU_TOKENS = 2048


def most_rows(rows: int, seq_len: int) -> int:
    """How many of so many rows to compute at once, on the backend in use; at least one."""
    return max(1, min(rows, CPU_TOKENS // seq_len)) if jax.default_backend() == "cpu" else rows


def over_rows(forward: Callable[[Any], Any], batch: Any, seq_len: int) -> Any:
    """`forward(batch)` with no more than `most_rows` at once.

    Args:
      forward: a function of rows, each of which it treats by itself.
      batch: arrays [B, …].
      seq_len: S, tokens in a row.

    Returns:
      What `forward` returns: arrays [B, …].
    """
    rows = len(jax.tree.leaves(batch)[0])
    size = most_rows(rows, seq_len)
    if size == rows:
        return forward(batch)
    size = -(-rows // -(-rows // size))  # as even as can be: what is left over is compiled once more
    whole = rows // size * size

    def chunked(x: jax.Array) -> jax.Array:
        return x[:whole].reshape(-1, size, *x.shape[1:])

    found = lax.map(forward, jax.tree.map(chunked, batch))
    found = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), found)
    if whole == rows:
        return found
    rest = forward(jax.tree.map(lambda x: x[whole:], batch))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), found, rest)
