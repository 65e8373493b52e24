"""Multi-head self-attention (Vaswani et al. 2017, section 3.2.2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from distiljax.nn.config import EncoderConfig
from distiljax.nn.linear import Array, Dense, DType, dropout, einsum


def visible_keys(attention_mask: Array | None, segment_ids: Array | None) -> Array | None:
    """Which key each query may see: bool, [B, 1, S, S] or [B, 1, 1, S]; None where all may see all.

    With `segment_ids` [B, S] (0 = padding) a query sees the keys of its own segment only. With `attention_mask`
    [B, S] (1 = token, 0 = padding) every query sees all tokens, as in transformers.
    """
    if segment_ids is not None:
        return segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    if attention_mask is not None:
        return attention_mask[:, None, None, :] > 0
    return None


class SelfAttention(nn.Module):
    """Scaled dot-product attention over H heads: [B, S, E] → [B, S, E]."""

    config: EncoderConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array | None, dropout_keys: Array | None, site: int) -> Array:
        config = self.config
        B, S, E = x.shape
        H, D = config.num_heads, config.head_size

        def dense(name: str) -> Dense:
            return Dense(E, self.dtype, config.initializer_range, name=name)

        def heads(name: str) -> Array:
            return dense(name)(x).reshape(B, S, H, D).transpose(0, 2, 1, 3)

        # Heads before positions: XLA:CPU has no bfloat16 kernel for every gradient product of the other order.
        query, key, value = heads("query"), heads("key"), heads("value")
        scores = einsum("bhqd,bhkd->bhqk", query * D**-0.5, key, self.dtype)  # float32
        if mask is not None:
            scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        weights = dropout(weights, config.attention_dropout, dropout_keys, site)
        context = einsum("bhqk,bhkd->bhqd", weights, value, self.dtype).astype(self.dtype)
        return dense("output")(context.transpose(0, 2, 1, 3).reshape(B, S, E))
