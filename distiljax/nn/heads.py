"""Heads on the encoder."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from distiljax.nn.config import EncoderConfig
from distiljax.nn.encoder import ACTIVATIONS, Encoder
from distiljax.nn.linear import Array, Dense, DType, LayerNorm, einsum


@struct.dataclass
class MaskedLMOutput:
    """What a masked language model gives.

    Attributes:
      logits: float32 [B, S, V].
      last_hidden_state: [B, S, E].
      hidden_states: the embeddings and every layer's output, num_layers + 1 arrays [B, S, E].
      pooled: [B, E], or None without a pooler.
    """

    logits: Array
    last_hidden_state: Array
    hidden_states: tuple[Array, ...]
    pooled: Array | None = None


class MaskedLMHead(nn.Module):
    """Transform, then decode with the word embeddings (Devlin et al. 2019, task 1): [..., E] → [..., V]."""

    config: EncoderConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, hidden: Array, word_embedding: Array) -> Array:
        config = self.config
        x = Dense(config.hidden_size, self.dtype, config.initializer_range, name="transform")(hidden)
        x = LayerNorm(config.layer_norm_eps, self.dtype, name="norm")(ACTIVATIONS[config.activation](x))
        bias = self.param("bias", nn.initializers.zeros, (config.vocab_size,))
        axes = "abcd"[: x.ndim - 1]
        return einsum(f"{axes}e,ve->{axes}v", x, word_embedding, self.dtype) + bias


class MaskedLM(nn.Module):
    """An encoder with a masked-language-model head whose decoder is tied to the word embeddings.

    `module.apply({"params": params}, input_ids, attention_mask=…)` gives a `MaskedLMOutput`; the arguments are
    those of `Encoder.__call__`. `method="encode"` stops at the encoder's output and `method="decode"` goes from
    hidden states to logits, for callers that need the logits of a few positions only.
    """

    config: EncoderConfig
    dtype: DType = jnp.float32

    def setup(self) -> None:
        self.encoder = Encoder(self.config, self.dtype)
        self.head = MaskedLMHead(self.config, self.dtype)

    def __call__(self, input_ids: Array, *args: Any, **kwargs: Any) -> MaskedLMOutput:
        out = self.encoder(input_ids, *args, **kwargs)
        return MaskedLMOutput(
            self.decode(out.last_hidden_state), out.last_hidden_state, out.hidden_states, out.pooled
        )

    def encode(self, input_ids: Array, *args: Any, **kwargs: Any) -> Array:
        """Last hidden states [B, S, E]; the arguments are those of `Encoder.__call__`."""
        return self.encoder(input_ids, *args, **kwargs).last_hidden_state

    def decode(self, hidden: Array) -> Array:
        """Vocabulary logits float32 [..., V] of hidden states [..., E]."""
        return self.head(hidden, self.encoder.word_embedding)
