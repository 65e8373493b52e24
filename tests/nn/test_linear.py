"""Matrix products in a compute dtype, LayerNorm and dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distiljax.nn import linear
from distiljax.nn.linear import Dense, LayerNorm, dropout, einsum, keep_mask

SPECS = {
    "bsi,io->bso": ((3, 4, 5), (5, 6)),
    "bhqd,bhkd->bhqk": ((2, 3, 4, 5), (2, 3, 6, 5)),
    "bhqk,bhkd->bhqd": ((2, 3, 4, 6), (2, 3, 6, 5)),
    "abe,ve->abv": ((2, 3, 5), (7, 5)),
    "ae,ve->av": ((3, 5), (7, 5)),
}


def operands(spec, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in SPECS[spec])


@pytest.mark.parametrize("spec", SPECS)
def test_float32_is_exact(spec):
    """Full float32 precision, against float64; TensorFloat-32 or bfloat16 would be off by 1e-3."""
    a, b = operands(spec)
    result = einsum(spec, a, b, jnp.float32)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, np.einsum(spec, np.float64(a), np.float64(b)), atol=2e-6)
    jaxpr = str(jax.make_jaxpr(lambda a, b: einsum(spec, a, b, jnp.float32))(a, b))
    assert "Precision.HIGHEST" in jaxpr and "bf16" not in jaxpr


@pytest.mark.parametrize("spec", SPECS)
def test_bfloat16_rounds_the_operands_only(spec):
    """bfloat16 in, float32 sums and result: equal to the float32 product of rounded operands."""
    a, b = operands(spec)
    result = einsum(spec, a, b, jnp.bfloat16)
    assert result.dtype == jnp.float32
    rounded = np.einsum(spec, *(np.float64(x.astype(jnp.bfloat16)) for x in (a, b)))
    np.testing.assert_allclose(result, rounded, atol=2e-6)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("input_dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16_gradient(spec, input_dtype):
    """Gradients in the operands' own dtype, within bfloat16 rounding (2^-8 relative) of the float32 ones."""
    a, b = operands(spec, input_dtype)
    out = jax.eval_shape(lambda a, b: einsum(spec, a, b, jnp.bfloat16), a, b)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=out.shape), jnp.float32)

    def gradients(dtype, a, b):
        return jax.vjp(lambda a, b: einsum(spec, a, b, dtype), a, b)[1](cotangent)

    low = gradients(jnp.bfloat16, a, b)
    exact = gradients(jnp.float32, a.astype(jnp.float32), b.astype(jnp.float32))
    for mine, reference, operand in zip(low, exact, (a, b), strict=True):
        assert mine.dtype == operand.dtype
        error = np.abs(np.float32(mine) - reference).max() / np.abs(reference).max()
        assert error < 0.02
    # To rounding, it is the float32 gradient of rounded operands and rounded cotangent.
    cotangent = cotangent.astype(jnp.bfloat16).astype(jnp.float32)
    rounded = gradients(jnp.float32, *(x.astype(jnp.bfloat16).astype(jnp.float32) for x in (a, b)))
    for mine, reference in zip(low, rounded, strict=True):
        rtol = 1e-5 if mine.dtype == jnp.float32 else 2**-8
        np.testing.assert_allclose(np.float32(mine), reference, rtol=rtol, atol=1e-5)


def test_bfloat16_einsum_under_jit_scan_and_shared_operand():
    """A weight used in every step of a scan, as in gradient accumulation, gets the sum of its gradients."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 4, 5)), jnp.float32)
    w = operands("bsi,io->bso")[1]

    def loss(w, dtype):
        def body(total, x):
            return total + jnp.square(einsum("bsi,io->bso", x, w, dtype)).mean(), None

        return jax.lax.scan(body, 0.0, x)[0]

    low, exact = (
        jax.jit(jax.grad(loss), static_argnums=1)(w, dtype) for dtype in (jnp.bfloat16, jnp.float32)
    )
    assert low.dtype == jnp.float32
    assert np.abs(low - exact).max() / np.abs(exact).max() < 0.02


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dense(leading, dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(*leading, 5)), jnp.float32)
    layer = Dense(7, dtype, stddev=0.5)
    params = {"kernel": np.random.default_rng(1).normal(size=(5, 7)), "bias": np.arange(7.0)}
    y = layer.apply({"params": jax.tree.map(jnp.float32, params)}, x)
    assert y.dtype == dtype and y.shape == (*leading, 7)
    tolerance = 1e-5 if dtype == jnp.float32 else 0.05
    np.testing.assert_allclose(
        np.float32(y), np.asarray(x) @ params["kernel"] + params["bias"], atol=tolerance
    )


def test_fresh_kernels_are_normal_of_the_given_width():
    params = Dense(300, stddev=0.02).init(jax.random.key(0), jnp.zeros((1, 200)))["params"]
    assert abs(params["kernel"].std() - 0.02) < 2e-4 and not params["bias"].any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layer_norm(dtype):
    """Against float64, also where the mean is large beside the spread (statistics in float32)."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(4, 64)) + np.array([[0], [1], [100], [-300]])).astype(np.float32)
    scale, bias = rng.normal(size=64), rng.normal(size=64)
    y = LayerNorm(1e-5, dtype).apply({"params": {"scale": jnp.float32(scale), "bias": jnp.float32(bias)}}, x)
    x = np.float64(x)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias
    assert y.dtype == dtype
    np.testing.assert_allclose(np.float32(y), expected, atol=1e-4 if dtype == jnp.float32 else 0.03)


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def test_dropout_in_bfloat16_divides_by_the_share_that_it_keeps():
    x = jnp.full((8, 512), 1.5, jnp.bfloat16)
    y = np.asarray(dropout(x, 0.1, keys(8), 0), np.float32)
    # A quotient that is rounded once; by bfloat16's 0.8984 for 0.9 it would be another number.
    expected = np.float32(jnp.bfloat16(1.5 / (1 - round(0.1 * 65536) / 65536)))
    assert expected != np.float32(jnp.bfloat16(1.5) / jnp.bfloat16(0.9))
    assert set(np.unique(y)) == {0.0, expected}


@settings(max_examples=20, deadline=None)
@given(shape=st.lists(st.integers(1, 9), min_size=1, max_size=3), seed=st.integers(0, 1000))
def test_what_dropout_keeps_of_any_shape(shape, seed):
    given = keys(5, seed)
    whole = np.asarray(keep_mask(given, 0.25, tuple(shape)))
    assert whole.shape == (5, *shape) and whole.dtype == bool
    np.testing.assert_array_equal(keep_mask(given[1:3], 0.25, tuple(shape)), whole[1:3])


@settings(max_examples=20, deadline=None)
@given(shape=st.lists(st.integers(1, 9), min_size=1, max_size=3), seed=st.integers(0, 1000))
def test_accelerators_keep_what_a_cpu_keeps(shape, seed):
    given = keys(2, seed)
    of_cpu = keep_mask(given, 0.5, tuple(shape))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "target_platform", lambda: "gpu")
        np.testing.assert_array_equal(keep_mask(given, 0.5, tuple(shape)), of_cpu)


def test_every_draw_of_a_hash_is_uniform_and_apart_from_the_others():
    kept = np.asarray(keep_mask(keys(1), 0.25, (4, 50_000)))[0]  # each row from other bits of the hashes
    assert np.abs(kept.mean(1) - 0.75).max() < 5 * np.sqrt(0.25 * 0.75 / kept.shape[1])
    correlation = np.corrcoef(kept)[~np.eye(4, dtype=bool)]
    assert np.abs(correlation).max() < 5 / np.sqrt(kept.shape[1])


@settings(max_examples=20, deadline=None)
@given(rate=st.floats(0, 0.99), seed=st.integers(0, 1000))
def test_dropout_rate_and_scale(rate, seed):
    x = jnp.ones((8, 4096))
    y = np.asarray(dropout(x, rate, keys(8, seed), 0))
    quantised = round(rate * 65536) / 65536
    kept = y != 0
    # Five standard deviations of a binomial share.
    assert abs((~kept).mean() - quantised) <= 5 * np.sqrt(rate * (1 - rate) / y.size) + 1e-4
    if kept.any():
        np.testing.assert_allclose(y[kept], 1 / (1 - quantised), rtol=1e-6)


def test_dropout_is_independent_between_examples_sites_and_columns():
    x = jnp.ones((4, 64, 64))
    masks = np.stack([np.asarray(dropout(x, 0.5, keys(4), site)) > 0 for site in range(3)]).reshape(12, -1)
    correlation = np.corrcoef(masks)[~np.eye(12, dtype=bool)]
    assert np.abs(correlation).max() < 5 / np.sqrt(masks.shape[1])
    assert abs(masks.mean(0).mean() - 0.5) < 5 * 0.5 / np.sqrt(masks.size)


def test_dropout_does_not_depend_on_the_batch():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5, 7)), jnp.float32)
    whole = dropout(x, 0.3, keys(6), 2)
    parts = [dropout(x[i : i + 2], 0.3, keys(6)[i : i + 2], 2) for i in (0, 2, 4)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_no_dropout_without_keys_or_rate():
    x = jnp.ones((2, 3))
    assert dropout(x, 0.5, None, 0) is x and dropout(x, 0.0, keys(2), 0) is x


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dropout_keeps_dtype_and_passes_gradient_where_it_kept(dtype):
    x = jnp.ones((2, 100), dtype)
    y = dropout(x, 0.5, keys(2), 0)
    grad = jax.grad(lambda x: dropout(x, 0.5, keys(2), 0).astype(jnp.float32).sum())(x)
    assert y.dtype == grad.dtype == dtype
    np.testing.assert_array_equal(np.float32(grad), np.float32(y))
