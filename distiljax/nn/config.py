"""The shape of an encoder, and its Hugging Face spelling."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")

# Hugging Face spells some activations in several ways.
_HF_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_TO_HF_ACTIVATION = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}

# field of EncoderConfig → key of config.json, where the value carries over as it is.
_BERT_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "layer_norm_eps": "layer_norm_eps",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "pad_token_id": "pad_token_id",
    "initializer_range": "initializer_range",
}
_DISTILBERT_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "max_positions": "max_position_embeddings",
    "hidden_dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "pad_token_id": "pad_token_id",
    "initializer_range": "initializer_range",
}
# What a config.json may hold for a field, by the field's annotation.
_FIELD_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "bool": (bool, "true or false"),
    "str": (str, "a string"),
}
_DISTILBERT_EPS = 1e-12  # fixed in transformers' DistilBERT


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shape of a BERT-family encoder; teacher and student are two of these.

    Attributes:
      vocab_size: V, rows of the word embedding.
      hidden_size: E, width of the residual stream; divides by `num_heads`.
      num_layers: transformer blocks; 0 leaves the embeddings alone.
      num_heads: H, attention heads.
      intermediate_size: width of the feed-forward layer.
      max_positions: rows of the position embedding; the longest segment.
      type_vocab_size: rows of the token-type embedding; 0 for none (DistilBERT).
      activation: "gelu" (exact), "gelu_tanh", "relu" or "silu".
      layer_norm_eps: added to the variance in every LayerNorm.
      hidden_dropout: drop rate of the embeddings and of each sub-layer's output.
      attention_dropout: drop rate of the attention weights.
      drop_attention_output: whether `hidden_dropout` also applies to the attention sub-layer's output
        (BERT: yes; DistilBERT: no).
      pooler: whether there is a tanh layer over the first token.
      position_kind: "learned", or "sinusoidal" (a fixed table, kept with the parameters but never trained).
      pad_token_id: the token of padding.
      initializer_range: standard deviation of freshly drawn weights.

    Raises:
      ValueError: a field outside its range, with its value.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    max_positions: int = 512
    type_vocab_size: int = 2
    activation: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    drop_attention_output: bool = True
    pooler: bool = False
    position_kind: str = "learned"
    pad_token_id: int = 0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, (kind, expected) = getattr(self, field.name), _FIELD_KINDS[str(field.type)]
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise ValueError(f"{field.name} is {value!r}; expected {expected}")
        if not 0 < self.layer_norm_eps < 1:
            raise ValueError(f"layer_norm_eps is {self.layer_norm_eps}; expected 0 < eps < 1")
        for name in ("vocab_size", "hidden_size", "num_heads", "intermediate_size", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.num_layers < 0:
            raise ValueError(f"num_layers is {self.num_layers}; expected 0 or more")
        if self.type_vocab_size < 0:
            raise ValueError(f"type_vocab_size is {self.type_vocab_size}; expected 0 or more")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} does not divide by num_heads {self.num_heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}; expected one of {', '.join(ACTIVATIONS)}")
        if self.position_kind not in ("learned", "sinusoidal"):
            raise ValueError(f"position_kind is {self.position_kind!r}; expected learned or sinusoidal")
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 ≤ rate < 1")

    @property
    def head_size(self) -> int:
        """D, the width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def model_type(self) -> str:
        """The Hugging Face architecture that holds this shape exactly: "distilbert" or "bert"."""
        distilbert = self.type_vocab_size == 0 and not self.pooler and self.layer_norm_eps == _DISTILBERT_EPS
        return "distilbert" if distilbert else "bert"

    def replace(self, **changes: Any) -> EncoderConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, pooler: bool = False) -> EncoderConfig:
        """The shape that a Hugging Face `config.json` of BERT or DistilBERT describes.

        Args:
          config: the parsed `config.json`.
          pooler: whether the weights beside it hold a pooler (the file does not say).

        Raises:
          ValueError: another architecture, an unknown activation, relative positions, or a decoder.
        """
        model_type = config.get("model_type")
        if model_type not in ("bert", "distilbert"):
            raise ValueError(f"model_type is {model_type!r}; expected bert or distilbert")
        if config.get("position_embedding_type", "absolute") != "absolute":
            raise ValueError(
                f"position_embedding_type is {config['position_embedding_type']!r}; expected absolute"
            )
        if config.get("is_decoder"):
            raise ValueError("is_decoder is true; expected an encoder")
        distilbert = model_type == "distilbert"
        keys = _DISTILBERT_KEYS if distilbert else _BERT_KEYS
        fields = {field: config[key] for field, key in keys.items() if config.get(key) is not None}
        if distilbert:
            # transformers' own defaults where the file is silent.
            fields = {"num_layers": 6, **fields}
            fields |= {
                "type_vocab_size": 0,
                "layer_norm_eps": _DISTILBERT_EPS,
                "drop_attention_output": False,
            }
            fields["position_kind"] = "sinusoidal" if config.get("sinusoidal_pos_embds") else "learned"
        activation = config.get("activation" if distilbert else "hidden_act", "gelu")
        if activation not in _HF_ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; expected one of {', '.join(_HF_ACTIVATIONS)}")
        return cls(**fields, activation=_HF_ACTIVATIONS[activation], pooler=pooler)

    def to_hf(self) -> dict[str, Any]:
        """The architecture part of a Hugging Face `config.json` (no `architectures`, no special tokens)."""
        distilbert = self.model_type == "distilbert"
        keys = _DISTILBERT_KEYS if distilbert else _BERT_KEYS
        config: dict[str, Any] = {"model_type": self.model_type}
        config |= {key: getattr(self, field) for field, key in keys.items()}
        config["activation" if distilbert else "hidden_act"] = _TO_HF_ACTIVATION[self.activation]
        if distilbert:
            config["sinusoidal_pos_embds"] = self.position_kind == "sinusoidal"
        else:
            # transformers' BERT always has the table: a model without one gets a single row of zeros.
            config["type_vocab_size"] = max(self.type_vocab_size, 1)
        return config | {"tie_word_embeddings": True}
