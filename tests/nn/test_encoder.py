"""The encoder: sizes, packing, masks, positions and dropout."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distiljax.nn import Encoder, EncoderConfig, MaskedLM
from distiljax.nn.encoder import gelu, sinusoidal_positions
from tests import compiling

DISTILBERT = {"type_vocab_size": 0, "drop_attention_output": False}
SMALL = EncoderConfig(
    vocab_size=40, hidden_size=16, num_layers=2, num_heads=4, intermediate_size=24, max_positions=24
)


def count(module):
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 1), np.int32))
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("module", "parameters"),
    [
        (MaskedLM(EncoderConfig()), 109_514_298),
        (Encoder(EncoderConfig()), 108_891_648),
        (MaskedLM(EncoderConfig(num_layers=6, **DISTILBERT)), 66_985_530),
        (Encoder(EncoderConfig(num_layers=6, **DISTILBERT)), 66_362_880),
    ],
)
def test_parameter_counts_are_the_published_ones(module, parameters):
    assert count(module) == parameters


def random_params(module, seed=0):
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (rng.normal(size=x.shape) * x.shape[0] ** -0.3).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def model():
    module = MaskedLM(SMALL)
    return module, random_params(module)


@pytest.fixture(scope="module")
def one_layer():
    """A compiled model of one layer, for the tests of dropout, which is slow to compile."""
    module = MaskedLM(SMALL.replace(num_layers=1))
    params = random_params(module)
    return jax.jit(lambda ids, **arguments: module.apply({"params": params}, ids, **arguments))


@pytest.fixture(scope="module")
def apply(model):
    """Compiled once for each set of arguments."""
    module, params = model
    return jax.jit(lambda ids, **arguments: module.apply({"params": params}, ids, **arguments))


def test_parameters_are_float32_and_outputs_have_their_shapes(model, apply):
    module, _ = model
    fresh = jax.jit(module.init)(jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    assert {x.dtype for x in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    out = apply(np.zeros((3, 7), np.int32))
    assert out.logits.shape == (3, 7, 40) and out.last_hidden_state.shape == (3, 7, 16)
    assert len(out.hidden_states) == 3 and out.pooled is None
    np.testing.assert_array_equal(out.hidden_states[-1], out.last_hidden_state)
    low = jax.eval_shape(
        module.clone(dtype=jnp.bfloat16).apply, {"params": fresh}, np.zeros((3, 7), np.int32)
    )
    assert low.logits.dtype == jnp.float32 and low.last_hidden_state.dtype == jnp.bfloat16


def test_encode_and_decode_are_the_two_halves(model, apply):
    module, params = model
    ids = np.arange(14, dtype=np.int32).reshape(2, 7)
    out = apply(ids)
    hidden = module.apply({"params": params}, ids, method="encode")
    np.testing.assert_allclose(hidden, out.last_hidden_state, atol=1e-5)
    # Any leading axes: the gathered positions of a row, or one list of all.
    for some in (out.last_hidden_state, out.last_hidden_state.reshape(14, 16)):
        logits = module.apply({"params": params}, some, method="decode")
        np.testing.assert_allclose(logits.reshape(14, 40), out.logits.reshape(14, 40), atol=1e-5)
    encoder = Encoder(SMALL).apply({"params": params["encoder"]}, ids)
    np.testing.assert_allclose(encoder.last_hidden_state, out.last_hidden_state, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 999))
def test_packing_is_exact(model, apply, lengths, seed):
    """An example in a packed row has the hidden states and logits that it has alone in a padded row."""
    row = 24
    lengths = [n for i, n in enumerate(lengths) if sum(lengths[: i + 1]) <= row]
    rng = np.random.default_rng(seed)
    packed = {name: np.zeros((1, row), np.int32) for name in ("input_ids", "segment_ids", "positions")}
    alone = {name: np.zeros((4, row), np.int32) for name in packed}
    start = 0
    for i, length in enumerate(lengths):
        ids, positions = rng.integers(1, 40, length), np.arange(length)
        for batch, where, segment in (
            (packed, np.s_[0, start : start + length], i + 1),
            (alone, np.s_[i, :length], 1),
        ):
            batch["input_ids"][where], batch["positions"][where] = ids, positions
            batch["segment_ids"][where] = segment
        start += length
    together = apply(packed["input_ids"], segment_ids=packed["segment_ids"], positions=packed["positions"])
    single = apply(alone["input_ids"], segment_ids=alone["segment_ids"], positions=alone["positions"])
    masked = apply(alone["input_ids"], attention_mask=(alone["segment_ids"] > 0).astype(np.int32))
    start = 0
    for i, length in enumerate(lengths):
        for state in range(SMALL.num_layers + 1):
            here = together.hidden_states[state][0, start : start + length]
            assert np.abs(here - single.hidden_states[state][i, :length]).max() <= 1e-5
            assert np.abs(here - masked.hidden_states[state][i, :length]).max() <= 1e-5
        here = together.logits[0, start : start + length]
        assert np.abs(here - single.logits[i, :length]).max() <= 5e-5
        start += length


def test_padding_and_other_segments_are_not_seen(model, apply):
    ids = np.arange(1, 13, dtype=np.int32)[None]
    segments = np.array([[1] * 4 + [2] * 5 + [0] * 3], np.int32)
    before = apply(ids, segment_ids=segments).last_hidden_state
    changed = np.where(segments == 2, ids, 39)
    after = apply(changed, segment_ids=segments).last_hidden_state
    np.testing.assert_array_equal(before[0, 4:9], after[0, 4:9])
    assert np.isfinite(np.asarray(after)).all()
    # Nor do they get any gradient.
    module, params = model

    def second_segment(embedding):
        tree = {**params["encoder"], "embeddings": {**params["encoder"]["embeddings"], "word": embedding}}
        out = Encoder(SMALL).apply({"params": tree}, ids, segment_ids=segments)
        return jnp.square(out.last_hidden_state[0, 4:9]).sum()

    grad = jax.jit(jax.grad(second_segment))(params["encoder"]["embeddings"]["word"])["embedding"]
    assert set(np.flatnonzero(np.abs(grad).sum(-1))) == set(ids[segments == 2])


def test_segment_ids_take_the_place_of_the_attention_mask(apply):
    ids = np.arange(1, 7, dtype=np.int32)[None]
    segments = np.array([[1, 1, 1, 2, 2, 0]], np.int32)
    alone = apply(ids, segment_ids=segments).last_hidden_state
    both = apply(ids, segment_ids=segments, attention_mask=np.ones((1, 6), np.int32)).last_hidden_state
    np.testing.assert_array_equal(alone, both)


def test_token_types_default_to_zero_and_are_used(apply):
    ids = np.arange(1, 7, dtype=np.int32)[None]
    default = apply(ids).last_hidden_state
    np.testing.assert_array_equal(default, apply(ids, token_type_ids=np.zeros_like(ids)).last_hidden_state)
    assert np.abs(default - apply(ids, token_type_ids=np.ones_like(ids)).last_hidden_state).max() > 1e-3


def test_gradients_are_finite_where_a_row_is_all_padding(model):
    module, params = model
    ids = np.ones((2, 6), np.int32)
    masks = ({"segment_ids": np.zeros((2, 6), np.int32)}, {"attention_mask": np.zeros((2, 6), np.int32)})
    for mask in masks:
        loss = jax.jit(lambda p, m: module.apply({"params": p}, ids, **m).logits.sum())
        grads = jax.jit(jax.grad(loss))(params, mask)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


def test_gelu_is_that_of_double_precision():
    x = np.concatenate([np.linspace(-15, 15, 4001), [-1e4, 1e4]]).astype(np.float32)
    wide = x.astype(float)
    below = np.array([0.5 * math.erfc(-value / 2**0.5) for value in wide])  # Φ
    # Φ is right to some roundings of a number below one; PyTorch's is off by 5.4 × 2⁻²⁴.
    assert np.all(np.abs(np.float64(gelu(x)) - wide * below) <= np.abs(wide) * 4 * 2**-24)
    slope = below + wide * np.exp(-(wide**2) / 2) / (2 * np.pi) ** 0.5
    assert np.all(np.abs(np.float64(jax.vmap(jax.grad(gelu))(x)) - slope) <= 4 * 2**-24)
    # Of 16 bits only the result is rounded.
    short = jnp.asarray(x, jnp.bfloat16)
    expected = gelu(short.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(gelu(short), expected)


def test_sinusoidal_positions_follow_the_formula():
    table = sinusoidal_positions(50, 10)
    assert table.dtype == np.float32
    for position in (0, 1, 49):
        for i in range(5):
            angle = position / 10000 ** (2 * i / 10)
            np.testing.assert_allclose(
                table[position, 2 * i : 2 * i + 2], [np.sin(angle), np.cos(angle)], atol=1e-6
            )


def test_sinusoidal_positions_are_never_trained():
    config = SMALL.replace(num_layers=1, **DISTILBERT, position_kind="sinusoidal")
    module = MaskedLM(config)
    ids = np.arange(12, dtype=np.int32).reshape(2, 6)
    fresh = jax.jit(module.init)(jax.random.key(0), ids)["params"]
    position = fresh["encoder"]["embeddings"]["position"]["embedding"]
    np.testing.assert_array_equal(position, sinusoidal_positions(24, 16))

    def loss(params, module):
        return jnp.square(module.apply({"params": params}, ids).logits).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    fixed = gradient(fresh, module)["encoder"]["embeddings"]
    learned = gradient(fresh, MaskedLM(config.replace(position_kind="learned")))["encoder"]["embeddings"]
    assert not np.any(fixed["position"]["embedding"]) and np.any(fixed["word"]["embedding"])
    assert np.any(learned["position"]["embedding"])


def keys(seeds):
    return jax.vmap(jax.random.key)(jnp.asarray(seeds))


def test_dropout_depends_on_the_example_alone(one_layer):
    """However a batch is split or ordered, an example's draw is that of its key."""
    ids = np.random.default_rng(0).integers(0, 40, (6, 8)).astype(np.int32)
    whole = one_layer(ids, dropout_keys=keys(range(6))).logits
    part = one_layer(ids[2:4], dropout_keys=keys([2, 3])).logits
    np.testing.assert_allclose(part, whole[2:4], atol=1e-4)
    order = np.array([4, 0, 5, 2, 1, 3])
    np.testing.assert_allclose(
        one_layer(ids[order], dropout_keys=keys(order)).logits, whole[order], atol=1e-4
    )
    assert np.abs(whole - one_layer(ids).logits).max() > 0.1
    same = one_layer(ids[[0, 0]], dropout_keys=keys([7, 8])).logits
    assert np.abs(same[0] - same[1]).max() > 0.1


def test_every_place_draws_its_own_mask():
    """The places that drop are told apart: embeddings, and three in every layer (DistilBERT: two)."""
    from distiljax.nn import attention, encoder

    seen = []
    real = encoder.dropout

    def spy(x, rate, dropout_keys, site):
        seen.append((site, rate))
        return real(x, rate, dropout_keys, site)

    ids = np.zeros((2, 3), np.int32)
    for changes, sites in (({}, 1 + 3 * 2), (DISTILBERT, 1 + 2 * 2)):
        seen.clear()
        module = Encoder(SMALL.replace(hidden_dropout=0.25, attention_dropout=0.5, **changes))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encoder, "dropout", spy)
            patch.setattr(attention, "dropout", spy)
            module.init(jax.random.key(0), ids)
        assert len({site for site, _ in seen}) == len(seen) == sites
        assert sorted(rate for _, rate in seen) == [0.25] * (sites - 2) + [0.5] * 2


@pytest.mark.parametrize("pooler", [True, False])
def test_pooler_is_a_tanh_layer_on_the_first_token(pooler):
    module = Encoder(SMALL.replace(pooler=pooler))
    params = random_params(module)
    out = module.apply({"params": params}, np.arange(8, dtype=np.int32).reshape(2, 4))
    if not pooler:
        assert out.pooled is None and "pooler" not in params
        return
    expected = np.tanh(out.last_hidden_state[:, 0] @ params["pooler"]["kernel"] + params["pooler"]["bias"])
    np.testing.assert_allclose(out.pooled, expected, atol=1e-5)


def test_rematerialised_layers_give_the_same_gradients():
    """The same parameters, dropout and gradients; each layer is one that the backward pass computes again."""
    config = SMALL.replace(hidden_dropout=0.0, attention_dropout=0.25)
    kept, again = Encoder(config), Encoder(config, remat=True)
    params = random_params(kept)
    assert jax.tree.structure(params) == jax.tree.structure(random_params(again))
    ids = np.random.default_rng(0).integers(0, 40, (2, 24)).astype(np.int32)
    segments = np.repeat(np.array([[1] * 9 + [2] * 11 + [0] * 4], np.int32), 2, 0)

    def found(module):
        def loss(params):
            out = module.apply({"params": params}, ids, segment_ids=segments, dropout_keys=keys(range(2)))
            return jnp.square(out.last_hidden_state).mean()

        recomputed = str(jax.make_jaxpr(loss)(params)).count("prevent_cse=")
        with compiling.in_haste():
            return recomputed, jax.jit(jax.value_and_grad(loss))(params)

    (none, plain), (each, rematerialised) = found(kept), found(again)
    # Of each layer the activation function in any case, and then the layer itself.
    assert (none, each) == (config.num_layers, 2 * config.num_layers)
    for mine, reference in zip(jax.tree.leaves(rematerialised), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(mine, reference, atol=1e-6, rtol=1e-5)
