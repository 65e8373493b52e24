"""Multi-head self-attention (Vaswani et al. 2017, section 3.2.2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from distiljax.nn.config import EncoderConfig
from distiljax.nn.kernels import (
    CUDNN,
    ROWWISE,
    SPLASH,
    Visible,
    choose,
    cudnn_attention,
    may_be_spread,
    splash_attention,
)
from distiljax.nn.linear import Array, Dense, DType, dropout, einsum
from distiljax.nn.rowwise import rowwise_attention
from distiljax.nn.target import target_platform


class SelfAttention(nn.Module):
    """Scaled dot-product attention over H heads: [B, S, E] → [B, S, E].

    Attributes:
      config: shape and drop rate.
      dtype: compute dtype.
      kernel: "auto", "plain" or "fused"; see `kernels.choose`.
    """

    config: EncoderConfig
    dtype: DType = jnp.float32
    kernel: str = "auto"

    @nn.compact
    def __call__(self, x: Array, visible: Visible | None, dropout_keys: Array | None, site: int) -> Array:
        config = self.config
        B, S, E = x.shape
        H, D = config.num_heads, config.head_size
        kernel, _ = choose(
            self.kernel,
            platform=target_platform(),
            dtype=self.dtype,
            dropout=0.0 if dropout_keys is None else config.attention_dropout,
            shape=(B, H, S, D),
            spread=may_be_spread(),
        )

        def dense(name: str) -> Dense:
            return Dense(E, self.dtype, config.initializer_range, name=name)

        def heads(name: str) -> Array:
            return dense(name)(x).reshape(B, S, H, D)

        query, key, value = heads("query"), heads("key"), heads("value")
        if kernel == CUDNN:
            context = cudnn_attention(query, key, value, visible)
        else:
            # Heads before positions: XLA:CPU has no bfloat16 kernel for every gradient product of the other order.
            query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
            if kernel == SPLASH:
                context = splash_attention(query, key, value, visible)
            else:
                mask = None if visible is None else visible.mask
                compute = rowwise_attention if kernel == ROWWISE else plain_attention
                context = compute(
                    query,
                    key,
                    value,
                    mask,
                    dropout_keys,
                    rate=config.attention_dropout,
                    site=site,
                    dtype=self.dtype,
                )
            context = context.transpose(0, 2, 1, 3)
        return dense("output")(context.reshape(B, S, E))


def plain_attention(
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
    """Scaled dot-product attention, written down: [B, H, S, D] of each → [B, H, S, D] in `dtype`.

    Args:
      query, key, value: in `dtype`.
      mask: bool, broadcast to [B, H, S, S]: which keys a query sees; None for all.
      dropout_keys, rate, site: of the weights' dropout, as in `linear.dropout`.
      dtype: of the products' operands; softmax is in float32.
    """
    scores = einsum("bhqd,bhkd->bhqk", query * query.shape[-1] ** -0.5, key, dtype)  # float32
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(dtype)
    weights = dropout(weights, rate, dropout_keys, site)
    return einsum("bhqk,bhkd->bhqd", weights, value, dtype).astype(dtype)
