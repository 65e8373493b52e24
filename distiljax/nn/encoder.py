"""The encoder that teacher and student share (Devlin et al. 2019; Sanh et al. 2019, section 3)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax import lax

from distiljax.nn.attention import SelfAttention
from distiljax.nn.config import EncoderConfig
from distiljax.nn.kernels import Visible
from distiljax.nn.linear import Array, Dense, DType, LayerNorm, dropout


def gelu(x: Array) -> Array:
    """x Φ(x) by the error function (Hendrycks and Gimpel 2016), in float32, given in the dtype of `x`.

    `jax.nn.gelu` takes the complementary error function, whose better relative accuracy far below zero is of no use
    here, and which takes a CPU twice as long.
    """
    wide = x.astype(jnp.float32)
    return (wide * (0.5 + 0.5 * lax.erf(wide * np.float32(0.5**0.5)))).astype(x.dtype)


def _in_float32(activation: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """An activation that is computed in float32 and given in the dtype of its argument."""
    return lambda x: activation(x.astype(jnp.float32)).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_tanh": _in_float32(functools.partial(jax.nn.gelu, approximate=True)),
    "relu": jax.nn.relu,
    "silu": _in_float32(jax.nn.silu),
}

# Numbers of the places that drop: one for the embeddings, then three a layer.
_EMBEDDING_SITE = 0
_SITES_PER_LAYER = 3


@struct.dataclass
class EncoderOutput:
    """What an encoder gives.

    Attributes:
      last_hidden_state: [B, S, E].
      hidden_states: the embeddings and every layer's output, num_layers + 1 arrays [B, S, E].
      pooled: [B, E], or None without a pooler.
    """

    last_hidden_state: Array
    hidden_states: tuple[Array, ...]
    pooled: Array | None = None


def sinusoidal_positions(max_positions: int, hidden_size: int) -> np.ndarray:
    """Fixed position table [max_positions, E], sines at even and cosines at odd columns (Vaswani 2017, 3.5)."""
    position = np.arange(max_positions)[:, None]
    column = np.arange(hidden_size)[None, :]
    angle = position / np.power(10000.0, 2 * (column // 2) / hidden_size)
    return np.where(column % 2 == 0, np.sin(angle), np.cos(angle)).astype(np.float32)


class Embeddings(nn.Module):
    """Word, position and (optional) token-type embeddings, summed, normalised and dropped: [B, S] → [B, S, E]."""

    config: EncoderConfig
    dtype: DType = jnp.float32

    def setup(self) -> None:
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        table = functools.partial(nn.Embed, features=config.hidden_size, embedding_init=init)
        self.word = table(config.vocab_size)
        if config.position_kind == "sinusoidal":

            def init_positions(key: Array, shape: tuple[int, int], dtype: DType = jnp.float32) -> Array:
                return jnp.asarray(sinusoidal_positions(*shape), dtype)

            self.position = table(config.max_positions, embedding_init=init_positions)
        else:
            self.position = table(config.max_positions)
        if config.type_vocab_size:
            self.token_type = table(config.type_vocab_size)
        self.norm = LayerNorm(config.layer_norm_eps, self.dtype)

    def __call__(
        self,
        input_ids: Array,
        token_type_ids: Array | None = None,
        positions: Array | None = None,
        dropout_keys: Array | None = None,
    ) -> Array:
        if positions is None:
            if input_ids.shape[1] > self.config.max_positions:
                raise ValueError(
                    f"{input_ids.shape[1]} tokens a row; expected at most the model's {self.config.max_positions}"
                )
            positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        position = self.position(positions)
        if self.config.position_kind == "sinusoidal":
            position = jax.lax.stop_gradient(position)
        x = self.word(input_ids) + position
        if self.config.type_vocab_size:
            x = x + self.token_type(jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids)
        return dropout(self.norm(x), self.config.hidden_dropout, dropout_keys, _EMBEDDING_SITE)


class FeedForward(nn.Module):
    """Position-wise feed-forward layer: [B, S, E] → [B, S, intermediate] → [B, S, E]."""

    config: EncoderConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config = self.config
        y = Dense(config.intermediate_size, self.dtype, config.initializer_range, name="up")(x)
        # The backward pass takes it from `y` again, as several arrays of this size would be kept otherwise.
        y = jax.checkpoint(ACTIVATIONS[config.activation])(y)
        return Dense(config.hidden_size, self.dtype, config.initializer_range, name="down")(y)


class Layer(nn.Module):
    """One transformer block with LayerNorm after each residual sum: [B, S, E] → [B, S, E]."""

    config: EncoderConfig
    dtype: DType = jnp.float32
    kernel: str = "auto"

    @nn.compact
    def __call__(self, x: Array, visible: Visible | None, dropout_keys: Array | None, site: int) -> Array:
        config = self.config
        attention = SelfAttention(config, self.dtype, self.kernel, name="attention")
        y = attention(x, visible, dropout_keys, site)
        if config.drop_attention_output:
            y = dropout(y, config.hidden_dropout, dropout_keys, site + 1)
        x = LayerNorm(config.layer_norm_eps, self.dtype, name="attention_norm")(x + y)
        y = FeedForward(config, self.dtype, name="ffn")(x)
        y = dropout(y, config.hidden_dropout, dropout_keys, site + 2)
        return LayerNorm(config.layer_norm_eps, self.dtype, name="ffn_norm")(x + y)


class Encoder(nn.Module):
    """A BERT-family encoder.

    Attributes:
      config: its shape.
      dtype: compute dtype; parameters are float32 whatever it is.
      attention: the kernel of attention: "auto", "plain" or "fused"; see `kernels.choose`.
      remat: keep only the layers' inputs for the backward pass, which computes each layer again.
    """

    config: EncoderConfig
    dtype: DType = jnp.float32
    attention: str = "auto"
    remat: bool = False

    def setup(self) -> None:
        self.embeddings = Embeddings(self.config, self.dtype)
        layer = nn.remat(Layer, static_argnums=(4,)) if self.remat else Layer  # `self` is 0, `site` 4
        self.layers = [
            layer(self.config, self.dtype, self.attention, name=f"layer_{i}")
            for i in range(self.config.num_layers)
        ]
        if self.config.pooler:
            self.pooler = Dense(self.config.hidden_size, self.dtype, self.config.initializer_range)

    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        dropout_keys: Array | None = None,
    ) -> EncoderOutput:
        """Encode token rows.

        Args:
          input_ids: int32 [B, S].
          attention_mask: [B, S], 1 for tokens and 0 for padding; ignored where `segment_ids` is given.
          token_type_ids: int32 [B, S]; zeros by default. Ignored by a model without token types.
          positions: int32 [B, S]; 0, 1, 2, … by default.
          segment_ids: int32 [B, S], 0 for padding, 1, 2, … for the examples packed into a row, which then do not
            see one another.
          dropout_keys: typed PRNG keys [B], one an example; None (evaluation) drops nothing.

        Raises:
          ValueError: rows longer than the model has positions.
        """
        visible = Visible.of(attention_mask, segment_ids)
        x = self.embeddings(input_ids, token_type_ids, positions, dropout_keys)
        hidden_states = [x]
        for i, layer in enumerate(self.layers):
            x = layer(x, visible, dropout_keys, _EMBEDDING_SITE + 1 + _SITES_PER_LAYER * i)
            hidden_states.append(x)
        pooled = jnp.tanh(self.pooler(x[:, 0])) if self.config.pooler else None
        return EncoderOutput(x, tuple(hidden_states), pooled)

    @property
    def word_embedding(self) -> Array:
        """The word-embedding table [V, E] of a bound module, for tied decoders."""
        return self.embeddings.word.embedding
