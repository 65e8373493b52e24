"""Kernels in int8: what rounding may change, and what it may not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

import distiljax
from distiljax.nn import HeadConfig, TaskModel
from distiljax.nn.int8 import INT8_KERNEL, SCALE, int8_product, quantize
from distiljax.nn.linear import Dense, compute_params


def test_a_kernel_is_rounded_to_the_nearest_of_255_levels_of_its_output():
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((48, 20)).astype(np.float32) * np.logspace(-4, 3, 20, dtype=np.float32)
    kernel[:, 7] = 0
    kernel[3, 9] = np.nan
    bias = rng.standard_normal(20).astype(np.float32)
    params = {"layer_0": {"up": {"kernel": kernel, "bias": bias}}, "head": {"kernel": kernel}}
    found = quantize(params)
    assert found["head"]["kernel"] is kernel and found["layer_0"]["up"]["bias"] is bias
    whole, scale = found["layer_0"]["up"][INT8_KERNEL], found["layer_0"]["up"][SCALE]
    assert set(found["layer_0"]["up"]) == {INT8_KERNEL, SCALE, "bias"}
    assert whole.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == (20,)
    assert whole.shape == (20, 48) and whole.flags.c_contiguous
    largest = np.abs(whole.astype(int)).max(1)
    finite = np.arange(20) != 9
    assert largest[7] == 0 and set(np.delete(largest, [7, 9])) == {127}
    assert np.all(np.abs(whole.T * scale - kernel)[:, finite] <= 0.5001 * scale[finite])
    assert np.isnan(scale[9]) and np.isfinite(scale[finite]).all()  # no finite result hides a NaN
    # Kernels in int8 stay what they are, whatever the compute dtype.
    again = quantize(found)["layer_0"]["up"]
    assert again[INT8_KERNEL] is whole and again[SCALE] is scale
    assert compute_params(found, jnp.bfloat16)["layer_0"]["up"][INT8_KERNEL].dtype == np.int8
    assert compute_params(params, jnp.bfloat16)["layer_0"]["up"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64)])
def test_a_product_of_whole_numbers_is_exact_and_off_by_no_more_than_the_rounding(shape):
    rng = np.random.default_rng(1)
    x = rng.standard_normal(shape).astype(np.float32) * 10.0 ** rng.integers(-3, 4, (*shape[:-1], 1))
    x.reshape(-1, 64)[0] = 0.0
    kernel = rng.standard_normal((64, 24)).astype(np.float32)
    stored = quantize({"encoder": {"kernel": kernel}})["encoder"]
    found = np.asarray(jax.jit(int8_product)(x.astype(np.float32), stored[INT8_KERNEL], stored[SCALE]), float)

    single = x.astype(np.float32)
    row = np.abs(single).max(-1, keepdims=True) / np.float32(127)
    row[row == 0] = 1
    whole = np.round(single / row).astype(int)
    exact = (whole @ stored[INT8_KERNEL].T.astype(int)) * row.astype(float) * stored[SCALE]
    np.testing.assert_allclose(found, exact, rtol=1e-6, atol=0)
    bound = 0.5 * row * np.abs(kernel).sum(0) + 0.5 * stored[SCALE] * np.abs(x).sum(-1, keepdims=True)
    bound += 0.25 * 64 * row * stored[SCALE]
    assert np.all(np.abs(found - x.astype(float) @ kernel) <= 1.01 * bound)
    assert not found.reshape(-1, 24)[0].any()  # a row of zeros
    x[..., -1, 5] = np.nan
    found = np.asarray(int8_product(x.astype(np.float32), stored[INT8_KERNEL], stored[SCALE]))
    assert np.isnan(found[..., -1, :]).all() and np.isfinite(found[..., :-1, :]).all()


def test_every_kernel_of_a_models_encoder_multiplies_in_int8_and_takes_less_memory():
    config = distiljax.EncoderConfig(
        vocab_size=64, hidden_size=64, num_layers=3, num_heads=4, intermediate_size=256, max_positions=16
    )
    module = TaskModel(
        config.replace(initializer_range=0.125), HeadConfig("token_classification", ("A", "B"))
    )
    rng = np.random.default_rng(0)
    ids = rng.integers(64, size=(4, 16))
    mask = (np.arange(16) < np.array([16, 9, 4, 12])[:, None]).astype(np.int32)
    params = module.init(jax.random.key(0), ids)["params"]
    small = quantize(params)

    @jax.jit
    def logits(params):
        return module.apply({"params": params}, ids, mask)

    met = []

    def note(next_function, arguments, options, context):
        found = next_function(*arguments, **options)
        if isinstance(context.module, Dense) and "head" not in context.module.path:
            met.append((context.module.path, np.asarray(arguments[0]), np.asarray(found)))
        return found

    with nn.intercept_methods(note):
        found = module.apply({"params": small}, ids, mask)
    # Each layer by itself, from what it was given: where rounding falls next to a border, one result sends the
    # following ones another way.
    flat = traverse_util.flatten_dict(small)
    assert len(met) == len({path for path, _, _ in met}) == 3 * 6
    for path, x, y in met:
        row = np.abs(x).max(-1, keepdims=True) / np.float32(127)
        whole = np.round(x / row).astype(int) @ flat[*path, INT8_KERNEL].T.astype(int)
        expected = whole * row.astype(float) * flat[*path, SCALE] + flat[*path, "bias"]
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    exact = logits(params)[mask > 0]
    assert (
        exact.std() > 0.3 and np.abs(found[mask > 0] - exact).mean() > 1e-3 * exact.std()
    )  # rounding is seen

    def kernels(params):
        return sum(
            leaf.nbytes for path, leaf in jax.tree_util.tree_leaves_with_path(params) if "kernel" in str(path)
        )

    assert kernels(small["encoder"]) < 0.27 * kernels(params["encoder"])
