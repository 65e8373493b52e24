"""Heads on the encoder."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from distiljax.nn.config import EncoderConfig
from distiljax.nn.encoder import ACTIVATIONS, Encoder
from distiljax.nn.linear import Array, Dense, DType, LayerNorm, dropout, einsum

SEQUENCES, TOKENS, ANSWERS = "sequence_classification", "token_classification", "question_answering"
KINDS = (SEQUENCES, TOKENS, ANSWERS)

# Behind the numbers of all the encoder's places that drop.
_HEAD_SITE = 2**20
# DistilBERT's own rates in transformers, where a config does not say.
_DISTILBERT_SEQUENCE_DROPOUT, _DISTILBERT_ANSWER_DROPOUT = 0.2, 0.1


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


@struct.dataclass
class Decoder:
    """The last product of a masked language model, not carried out: logits = states · embeddingᵀ + bias.

    Attributes:
      states: [..., E], what the head makes of hidden states.
      embedding: float32 [V, E], the word embeddings.
      bias: float32 [V].
      dtype: compute dtype of the product.
    """

    states: Array
    embedding: Array
    bias: Array
    dtype: DType = struct.field(pytree_node=False, default=jnp.float32)

    def logits(self) -> Array:
        """float32 [..., V]."""
        axes = "abcd"[: self.states.ndim - 1]
        return einsum(f"{axes}e,ve->{axes}v", self.states, self.embedding, self.dtype) + self.bias


class MaskedLMHead(nn.Module):
    """Transform, then decode with the word embeddings (Devlin et al. 2019, task 1): [..., E] → `Decoder`."""

    config: EncoderConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, hidden: Array, word_embedding: Array) -> Decoder:
        config = self.config
        x = Dense(config.hidden_size, self.dtype, config.initializer_range, name="transform")(hidden)
        x = LayerNorm(config.layer_norm_eps, self.dtype, name="norm")(ACTIVATIONS[config.activation](x))
        bias = self.param("bias", nn.initializers.zeros, (config.vocab_size,))
        return Decoder(x, word_embedding, bias, self.dtype)


class MaskedLM(nn.Module):
    """An encoder with a masked-language-model head whose decoder is tied to the word embeddings.

    `module.apply({"params": params}, input_ids, attention_mask=…)` gives a `MaskedLMOutput`; the arguments are
    those of `Encoder.__call__`. `method="encode"` stops at the encoder's output and `method="decode"` goes from
    hidden states to logits, for callers that need the logits of a few positions only.

    Attributes:
      config: the encoder's shape.
      dtype, attention, remat: how it is computed, as in `Encoder`.
    """

    config: EncoderConfig
    dtype: DType = jnp.float32
    attention: str = "auto"
    remat: bool = False

    def setup(self) -> None:
        self.encoder = Encoder(self.config, self.dtype, self.attention, self.remat)
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
        return self.decoder(hidden).logits()

    def decoder(self, hidden: Array) -> Decoder:
        """What gives the vocabulary logits of hidden states [..., E], for losses that never hold all of them."""
        return self.head(hidden, self.encoder.word_embedding)


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """What a task asks of a model beside its encoder.

    Attributes:
      kind: "sequence_classification", "token_classification" or "question_answering" (start and end of a span).
      labels: the name of each class id; one name for regression, none for question answering.
      regression: whether the head of sequences gives a number.
      dropout: drop rate before the last layer; None for that of the architecture.

    Raises:
      ValueError: an unknown kind, labels that do not fit it, or a rate outside its range.
    """

    kind: str
    labels: tuple[str, ...] = ()
    regression: bool = False
    dropout: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; expected one of {', '.join(KINDS)}")
        object.__setattr__(self, "labels", tuple(map(str, self.labels)))
        if self.regression and (self.kind != SEQUENCES or len(self.labels) != 1):
            raise ValueError(
                f"a regression of {self.kind} with labels {self.labels}; expected one name, of sequences"
            )
        if (self.kind == ANSWERS) != (not self.labels):
            raise ValueError(
                f"{len(self.labels)} labels for {self.kind}; expected some, and none for {ANSWERS}"
            )
        if self.dropout is not None and not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}; expected 0 ≤ rate < 1")

    @property
    def num_outputs(self) -> int:
        """L, numbers for each sequence or token: one a label, or two, start and end."""
        return len(self.labels) or 2

    def encoder_config(self, config: EncoderConfig) -> EncoderConfig:
        """The encoder's shape under this head: BERT classifies sequences by its pooler, which others do without."""
        bare = config.replace(pooler=False)
        return bare.replace(pooler=self.kind == SEQUENCES and bare.model_type == "bert")

    def dropout_rate(self, config: EncoderConfig) -> float:
        """The drop rate before the last layer on an encoder of this shape."""
        if self.dropout is not None:
            return self.dropout
        if config.model_type == "distilbert":
            own = {SEQUENCES: _DISTILBERT_SEQUENCE_DROPOUT, ANSWERS: _DISTILBERT_ANSWER_DROPOUT}
            return own.get(self.kind, config.hidden_dropout)
        return 0.0 if self.kind == ANSWERS else config.hidden_dropout


class TaskHead(nn.Module):
    """From an encoder's output to a task's logits.

    Sequences: the pooled first token, which DistilBERT makes here, not in its encoder. Tokens and answers: one map for
    every position (Devlin et al. 2019, section 4).
    """

    config: EncoderConfig
    head: HeadConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, hidden: Array, pooled: Array | None, dropout_keys: Array | None = None) -> Array:
        config = self.config
        x = hidden if self.head.kind != SEQUENCES else pooled
        if x is None:
            first = Dense(config.hidden_size, self.dtype, config.initializer_range, name="transform")
            x = jax.nn.relu(first(hidden[:, 0]))
        x = dropout(x, self.head.dropout_rate(config), dropout_keys, _HEAD_SITE)
        # So small a product is worth its full precision.
        return Dense(self.head.num_outputs, jnp.float32, config.initializer_range, name="classifier")(x)


class TaskModel(nn.Module):
    """An encoder with the head of a task; parameters under `encoder` and `head`.

    Attributes:
      config: the encoder's shape, as `head.encoder_config` has it.
      head: the task.
      dtype, attention, remat: how it is computed, as in `Encoder`; parameters are float32 whatever `dtype` is.
    """

    config: EncoderConfig
    head: HeadConfig
    dtype: DType = jnp.float32
    attention: str = "auto"
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        dropout_keys: Array | None = None,
    ) -> Array:
        """Logits float32: [B, L] of sequences, [B, S, L] of tokens, [B, S, 2] (start, end) of answers.

        The arguments are those of `Encoder.__call__`.
        """
        encoder = Encoder(self.config, self.dtype, self.attention, self.remat, name="encoder")
        out = encoder(input_ids, attention_mask, token_type_ids, dropout_keys=dropout_keys)
        to_logits = TaskHead(self.config, self.head, self.dtype, name="head")
        return to_logits(out.last_hidden_state, out.pooled, dropout_keys)
