"""Every way to compute attention gives what the plain one gives, and each is chosen where it can serve."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from distiljax.nn import EncoderConfig, MaskedLM, kernels, rowwise
from distiljax.nn.attention import plain_attention
from distiljax.nn.kernels import Visible, choose, choose_for
from distiljax.nn.target import target_platform
from distiljax.train.parallel import AXIS, Parallel
from tests import compiling

SHAPE = {"platform": "tpu", "dtype": jnp.bfloat16, "dropout": 0.0, "shape": (8, 12, 512, 64)}


@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        ({}, "splash"),
        ({"shape": (8, 12, 128, 64)}, "plain"),  # moves less memory
        ({"shape": (8, 12, 500, 64)}, "plain"),
        ({"dtype": jnp.float32}, "plain"),
        ({"dropout": 0.1}, "plain"),
        ({"spread": True}, "plain"),
        ({"capable": False}, "plain"),
        ({"platform": "cpu"}, "rowwise"),
        ({"platform": "cpu", "dtype": jnp.float32, "dropout": 0.1}, "rowwise"),
        ({"platform": "cpu", "shape": (1, 12, 512, 64)}, "rowwise"),  # a few heads at once
        ({"platform": "cpu", "shape": (1, 12, 128, 64)}, "plain"),
        ({"platform": "cpu", "shape": (8, 2, 32, 16)}, "plain"),
        ({"platform": "gpu"}, "plain"),  # there is none here
    ],
)
def test_the_kernel_is_chosen_for_what_it_can_do(changes, kernel):
    found = choose("auto", **SHAPE | changes)
    assert found.kernel == kernel and found.why
    assert choose("plain", **SHAPE | changes).kernel == "plain"


def test_on_a_gpu_cudnn_is_chosen_where_it_serves():
    arguments = SHAPE | {"platform": "gpu", "capable": True}
    assert choose("auto", **arguments).kernel == choose("fused", **arguments).kernel == "cudnn"
    assert choose("auto", **arguments | {"dtype": jnp.float16, "shape": (8, 12, 96, 64)}).kernel == "cudnn"
    for changes in (
        {"capable": False},
        {"spread": True},
        {"dropout": 0.1},
        {"dtype": jnp.float32},
        {"shape": (8, 12, 127, 64)},
        {"shape": (8, 12, 128, 256)},
        {"shape": (8, 12, 128, 20)},
    ):
        assert choose("auto", **arguments | changes).kernel == "plain"


@pytest.mark.parametrize(
    ("kind", "kernel"),
    [("TPU v2", "plain"), ("TPU v3", "plain"), ("TPU v4", "splash"), ("TPU v5 lite", "splash")],
)
def test_the_devices_that_a_program_is_for_must_be_capable(kind, kernel):
    device = jax.sharding.AbstractDevice(kind, None, "tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)):
        assert target_platform() == "tpu"
        assert choose("auto", **SHAPE).kernel == kernel


@pytest.mark.parametrize(("devices", "model"), [(4, 4), (4, 2), (4, 1), (1, 1)])
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_a_step_knows_whether_it_is_spread_over_a_model_axis(monkeypatch, platform, devices, model):
    """Where it is, no kernel may be chosen, on a GPU neither."""
    monkeypatch.setattr(kernels, "target_platform", lambda: platform)
    parallel = Parallel("jit", jax.devices()[:devices], model)
    found = []

    def step(rows):
        found.append(kernels.may_be_spread())
        return jax.lax.psum(rows.sum(), AXIS)

    parallel.wrap(step)(parallel.shard(np.ones((4, 2), np.int32)))
    assert found and set(found) == {model > 1}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dropout": 0.1}, "attention_dropout 0.1"),
        ({"dtype": jnp.float32}, "bfloat16, not in float32"),
        ({"shape": (8, 12, 500, 64)}, "multiple of 128 tokens, not 500"),
        ({"spread": True}, "cannot split a fused kernel over devices"),
        ({"platform": "cpu"}, "no fused kernel for cpu"),
        ({"platform": "gpu"}, "NVIDIA GPU"),
        ({"capable": False}, "needs a TPU v4 or a later one"),
    ],
)
def test_what_cannot_be_fused_is_not_forced(changes, words):
    with pytest.raises(ValueError, match=f"attention is fused, but .*{words}.*; expected plain or auto"):
        choose("fused", **SHAPE | changes)


def test_a_kernel_can_be_forced_on_short_rows_and_a_choice_must_be_known():
    assert choose("fused", **SHAPE | {"shape": (8, 12, 128, 64)}).kernel == "splash"
    with pytest.raises(ValueError, match="attention is 'flash'; expected one of auto, plain, fused"):
        choose("flash", **SHAPE)


def test_a_module_drops_weights_in_training_and_its_longest_rows_count():
    module = MaskedLM(EncoderConfig(num_layers=1), jnp.bfloat16)
    where = {"platform": "tpu", "rows": 8, "seq_lens": (512, 128)}
    assert choose_for(module, training=True, **where).why.startswith("no fused kernel drops")
    assert choose_for(module, training=False, **where) == ("splash", "fused on tpu in bfloat16")
    assert not choose_for(module, training=False, **where, spread=True).fused


def test_a_program_knows_the_devices_that_it_is_for():
    """Whether the compiler splits it over them tells whether there may be a Pallas kernel in it."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    seen = []

    def look(x):
        seen.append((target_platform(), kernels.may_be_spread()))
        return x

    for manual in ({"data"}, {"data", "model"}):
        spec = P("data") if len(manual) == 1 else P(("data", "model"))
        over = jax.shard_map(look, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=manual)
        jax.jit(over).trace(jnp.zeros(8))
    jax.jit(look).trace(jnp.zeros(8))  # here nothing is known
    assert seen == [("cpu", True), ("cpu", False), ("cpu", True)]


def operands(B, H, S, D, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(B, H, S, D)), dtype) for _ in range(4))


def segments(B, S):
    """Two segments and padding in each row; the last row is nothing but padding."""
    ids = np.zeros((B, S), np.int32)
    ids[:-1, : S // 2], ids[:-1, S // 2 : S - 20] = 1, 2
    return Visible.of(None, jnp.asarray(ids))


def padded(B, S):
    mask = np.ones((B, S), np.int32)
    mask[0, S // 2 :] = mask[-1] = 0
    return Visible.of(jnp.asarray(mask), None)


def with_gradients(attention, *arrays):
    *arrays, cotangent = arrays

    @jax.jit
    def run(*arrays):
        out, backward = jax.vjp(attention, *arrays)
        return out, backward(cotangent)

    with compiling.in_haste():
        out, gradients = run(*arrays)
    return [np.float32(x) for x in (out, *gradients)]


def no_mask(B, S):
    return None


@pytest.mark.parametrize(
    ("visible", "dtype", "tolerance", "rate", "matrices", "at_once"),
    [
        (segments, jnp.float32, 1e-5, 0.25, 8, (2, 4)),
        (segments, jnp.float32, 1e-5, 0.25, 3, (1, 2)),
        (padded, jnp.float32, 1e-5, 0.0, 8, (2, 4)),
        (padded, jnp.float32, 1e-5, 0.0, 1, (1, 1)),
        (no_mask, jnp.bfloat16, 0.05, 0.25, 2, (1, 2)),
    ],
)
def test_row_by_row_is_the_plain_form(monkeypatch, visible, dtype, tolerance, rate, matrices, at_once):
    """Outputs and gradients, and the very same weights dropped, however rows and heads are split."""
    B, H, S, D = 4, 4, 40, 8
    monkeypatch.setattr(rowwise, "CHUNK_BYTES", matrices * 4 * S * S)
    assert (rowwise.rows_at_once((B, H, S, D)), rowwise.heads_at_once((B, H, S, D))) == at_once
    seen = visible(B, S)
    options = {
        "mask": None if seen is None else seen.mask,
        "dropout_keys": jax.vmap(jax.random.key)(jnp.arange(B)),
        "rate": rate,
        "site": 3,
        "dtype": dtype,
    }
    arrays = operands(B, H, S, D, dtype)
    plain = with_gradients(lambda *x: plain_attention(*x, **options), *arrays)
    found = with_gradients(lambda *x: rowwise.rowwise_attention(*x, **options), *arrays)
    for mine, reference in zip(found, plain, strict=True):
        assert np.isfinite(mine).all()
        np.testing.assert_allclose(mine, reference, atol=tolerance)


def test_rows_at_once_divide_the_rows_and_fit(monkeypatch):
    monkeypatch.setattr(rowwise, "CHUNK_BYTES", 4 * 2 * 8 * 8 * 5)  # five rows
    counts = [rowwise.rows_at_once((B, 2, 8, 4)) for B in (1, 3, 4, 6, 7, 10, 12)]
    assert counts == [1, 3, 4, 3, 1, 5, 4]
    assert rowwise.rows_at_once((4, 2, 512, 4)) == 1 and rowwise.heads_at_once((4, 2, 512, 4)) == 1
    monkeypatch.setattr(rowwise, "CHUNK_BYTES", 4 * 8 * 8 * 5)  # five heads
    assert [rowwise.heads_at_once((1, H, 8, 4)) for H in (1, 5, 7, 12, 16)] == [1, 5, 1, 4, 4]


@pytest.mark.parametrize("S", [128, 256])
def test_splash_attention_is_the_plain_form(monkeypatch, S):
    """Its operations one by one; that it compiles for a TPU is tests/plan's to show.

    Of 256 positions in blocks of 128 some see nothing in the first block.
    """
    monkeypatch.setattr(kernels, "_BLOCKS", (128,))
    B, H, D = 4, 1, 16
    arrays, packed, alone = operands(B, H, S, D), segments(2, S), padded(2, S)
    queries = jnp.concatenate([packed.queries, jnp.broadcast_to(alone.queries, (2, S))])
    seen = Visible(queries, jnp.concatenate([packed.keys, alone.keys]))
    options = {"mask": seen.mask, "dropout_keys": None, "rate": 0.0, "site": 0, "dtype": jnp.float32}
    plain = with_gradients(lambda *x: plain_attention(*x, **options), *arrays)
    found = with_gradients(lambda *x: kernels.splash_attention(*x, seen, interpret=True), *arrays)
    for mine, reference in zip(found, plain, strict=True):
        assert np.isfinite(mine).all()
        np.testing.assert_allclose(mine, reference, atol=1e-5)


def test_cudnn_attention_lowers_for_a_gpu_that_is_not_here(monkeypatch):
    """Forward and backward, with packed rows, in a mesh that leaves an axis to the compiler."""
    module = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(module, "check_cudnn_version", lambda: 91_000)
    mesh = jax.make_mesh((8, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def loss(query, key, value, ids):
        out = kernels.cudnn_attention(query, key, value, Visible.of(None, ids))
        return out.astype(jnp.float32).sum()

    step = jax.shard_map(
        jax.grad(loss, argnums=(0, 1, 2)),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
        axis_names={"data"},
        check_vma=False,
    )
    x = jax.ShapeDtypeStruct((8, 128, 2, 64), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((8, 128), jnp.int32)
    text = jax.jit(step).trace(x, x, x, ids).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"__cudnn\$\w+", text)
    assert sorted(set(calls)) == ["__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"]
