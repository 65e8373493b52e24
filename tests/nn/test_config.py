"""Shapes: what is refused, and the way to config.json and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distiljax.nn import EncoderConfig
from distiljax.nn.config import ACTIVATIONS

DISTILBERT = {"type_vocab_size": 0, "drop_attention_output": False}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0; expected at least 1"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"intermediate_size": -1}, "intermediate_size is -1"),
        ({"max_positions": 0}, "max_positions is 0"),
        ({"num_layers": -1}, "num_layers is -1; expected 0 or more"),
        ({"type_vocab_size": -1}, "type_vocab_size is -1"),
        ({"num_heads": 7}, "hidden_size 768 does not divide by num_heads 7"),
        ({"activation": "tanh"}, "activation is 'tanh'; expected one of gelu, gelu_tanh, relu, silu"),
        ({"position_kind": "rotary"}, "position_kind is 'rotary'"),
        ({"hidden_dropout": 1.0}, "hidden_dropout is 1.0; expected 0 ≤ rate < 1"),
        ({"attention_dropout": -0.1}, "attention_dropout is -0.1"),
    ],
)
def test_fields_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        EncoderConfig(**changes)
    with pytest.raises(ValueError, match=message):
        EncoderConfig().replace(**changes)


@pytest.mark.parametrize("num_layers", [0, 1])
def test_edges_are_allowed(num_layers):
    config = EncoderConfig(num_layers=num_layers, type_vocab_size=0, hidden_dropout=0.0)
    assert config.head_size == 64


shapes = st.builds(
    dict,
    vocab_size=st.integers(1, 200_000),
    num_layers=st.integers(0, 48),
    hidden_size=st.integers(1, 64).map(lambda n: 12 * n),
    num_heads=st.sampled_from([1, 2, 3, 4, 6, 12]),
    intermediate_size=st.integers(1, 9000),
    max_positions=st.integers(1, 9000),
    activation=st.sampled_from(ACTIVATIONS),
    hidden_dropout=st.floats(0, 0.99),
    attention_dropout=st.floats(0, 0.99),
    pad_token_id=st.integers(0, 1000),
    initializer_range=st.floats(0, 1),
)


@given(shapes, st.integers(1, 4), st.floats(1e-15, 1, exclude_max=True), st.booleans())
def test_bert_round_trip(shape, token_types, eps, pooler):
    config = EncoderConfig(**shape, type_vocab_size=token_types, layer_norm_eps=eps, pooler=pooler)
    assert config.model_type == "bert"
    assert EncoderConfig.from_hf(config.to_hf(), pooler=pooler) == config


@given(shapes, st.sampled_from(["learned", "sinusoidal"]))
def test_distilbert_round_trip(shape, position_kind):
    config = EncoderConfig(**shape, **DISTILBERT, position_kind=position_kind)
    assert config.model_type == "distilbert"
    assert EncoderConfig.from_hf(config.to_hf()) == config


def test_configs_that_only_bert_holds():
    for changes in ({"layer_norm_eps": 1e-5}, {"pooler": True}):
        config = EncoderConfig(**DISTILBERT, **changes)
        assert config.model_type == "bert" and config.to_hf()["type_vocab_size"] == 1


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_agrees_with_transformers(kind):
    """Every key that is written is one that transformers knows, and a bare file means its defaults."""
    transformers = pytest.importorskip("transformers")
    theirs = (transformers.BertConfig if kind == "bert" else transformers.DistilBertConfig)()
    bare = EncoderConfig.from_hf({"model_type": kind})
    full = EncoderConfig.from_hf(theirs.to_dict())
    assert bare == full
    written = full.to_hf()
    assert written.items() <= theirs.to_dict().items()
    assert bare.num_layers == (12 if kind == "bert" else 6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "model_type is None; expected bert or distilbert"),
        ({"model_type": "roberta"}, "model_type is 'roberta'"),
        ({"model_type": "bert", "position_embedding_type": "relative_key"}, "expected absolute"),
        ({"model_type": "bert", "is_decoder": True}, "is_decoder is true"),
        ({"model_type": "bert", "hidden_act": "tanh"}, "activation is 'tanh'"),
        ({"model_type": "distilbert", "activation": "elu"}, "activation is 'elu'"),
        ({"model_type": "distilbert", "dim": 100}, "hidden_size 100 does not divide by num_heads 12"),
    ],
)
def test_foreign_configs(config, message):
    with pytest.raises(ValueError, match=message):
        EncoderConfig.from_hf(config)
