"""The vocabulary losses in chunks against the plain ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distiljax.distill.losses import agreement, logit_mse_loss, masked_lm_loss, soft_target_loss
from distiljax.distill.vocab_loss import GROUPS, Targets, vocabulary_losses
from distiljax.nn.heads import Decoder
from tests import compiling

V, N = 97, 50
SCALES = {"ce": 0.11, "mlm": 0.07, "mse": 0.003}


@pytest.fixture
def in_haste():
    with compiling.in_haste():
        yield


def decoder(seed, width, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (N, width), (V, width), (V,)
    return Decoder(*(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)), dtype)


@functools.cache
def make_targets():
    rng = np.random.default_rng(0)
    masked = rng.random(N) < 0.3
    soft = masked | (rng.random(N) < 0.7)
    return Targets(*map(jnp.asarray, (rng.integers(0, V, N), masked.astype("f"), soft.astype("f"))))


@pytest.fixture
def targets():
    return make_targets()


def plain(student, teacher, targets, scales, temperature):
    logits = student.logits()
    terms = {
        "mlm": masked_lm_loss(logits, targets.labels, targets.masked),
        "mlm_accuracy": agreement(logits, targets.labels, targets.masked),
    }
    if teacher is not None:
        soft = teacher.logits()
        terms["teacher_agreement"] = agreement(logits, soft.argmax(-1), targets.masked)
        terms["ce"] = soft_target_loss(logits, soft, targets.soft, temperature)
        terms["mse"] = logit_mse_loss(logits, soft, targets.soft)
    return sum(scale * terms[name].sum for name, scale in scales.items()), terms


def values(loss, student, *args, **kwargs):
    def of(student):
        return loss(student, *args, **kwargs)

    (value, terms), gradient = jax.jit(jax.value_and_grad(of, has_aux=True))(student)
    return value, terms, gradient


def models_and_scales(names):
    return decoder(1, 16), decoder(2, 24), make_targets(), {name: SCALES[name] for name in names}


@functools.cache
def plain_values(names):
    return values(plain, *models_and_scales(names), 2.0)


@pytest.mark.parametrize(
    ("names", "chunk"),
    [
        *((("ce", "mlm", "mse"), chunk) for chunk in (0, 7, 25, N)),
        *((names, 16) for names in (("ce", "mlm"), ("ce",), ("mlm",), ("mse",))),
    ],
)
def test_equal_to_the_plain_losses_and_their_gradients(in_haste, names, chunk):
    value, terms, gradient = values(
        vocabulary_losses, *models_and_scales(names), temperature=2.0, chunk=chunk
    )
    expected, expected_terms, expected_gradient = plain_values(names)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert set(terms) == {*names, "mlm", "mlm_accuracy", "teacher_agreement"}
    for name, term in terms.items():
        np.testing.assert_allclose(term.sum, expected_terms[name].sum, rtol=1e-5, err_msg=name)
        assert term.count == expected_terms[name].count
    for ours, theirs in zip(*map(jax.tree.leaves, (gradient, expected_gradient)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_any_temperature_and_without_a_gradient(in_haste, targets, temperature):
    student, teacher = decoder(1, 16), decoder(2, 16)

    @jax.jit
    def both(student):
        ours = vocabulary_losses(student, teacher, targets, SCALES, temperature=temperature, chunk=16)
        return ours, plain(student, teacher, targets, SCALES, temperature)

    (value, terms), (expected, expected_terms) = both(student)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(terms["ce"].sum, expected_terms["ce"].sum, rtol=1e-5)


def test_without_a_teacher_and_without_any_loss(in_haste, targets):
    student = decoder(1, 16)
    value, terms, gradient = values(
        vocabulary_losses, student, None, targets, {"mlm": 0.1}, temperature=2.0, chunk=20
    )
    expected, expected_terms, expected_gradient = values(plain, student, None, targets, {"mlm": 0.1}, 2.0)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert set(terms) == {"mlm", "mlm_accuracy"}
    np.testing.assert_allclose(gradient.embedding, expected_gradient.embedding, atol=1e-6)

    value, terms, gradient = values(vocabulary_losses, student, None, targets, {}, temperature=2.0)
    np.testing.assert_allclose(terms["mlm"].sum, expected_terms["mlm"].sum, rtol=1e-5)
    assert value == 0 and all(not leaf.any() for leaf in jax.tree.leaves(gradient))


def test_bfloat16_follows_the_plain_losses_in_bfloat16(targets):
    """In one chunk of positions that do not divide by 8, of which XLA:CPU once could not compute a product."""
    assert N % GROUPS
    student, teacher = decoder(1, 16, jnp.bfloat16), decoder(2, 16, jnp.bfloat16)
    ours = values(vocabulary_losses, student, teacher, targets, SCALES, temperature=2.0, chunk=N)
    theirs = values(plain, student, teacher, targets, SCALES, 2.0)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    for one, other in zip(*map(jax.tree.leaves, (ours[2], theirs[2])), strict=True):
        # Both round the gradient of the logits to bfloat16 before the products: two ways to the same number.
        np.testing.assert_allclose(one, other, rtol=0.02, atol=0.01 * float(jnp.abs(other).max()))


def test_logits_that_are_not_finite_at_a_position_of_weight_zero_stay_there(in_haste, targets):
    student, teacher = decoder(1, 16), decoder(2, 16)
    nowhere = int(np.flatnonzero(np.asarray(targets.soft) == 0)[0])
    student = student.replace(states=student.states.at[nowhere].set(jnp.finfo("f").max))
    assert not np.isfinite(student.logits()[nowhere]).any()
    value, _, gradient = values(
        vocabulary_losses, student, teacher, targets, SCALES, temperature=2.0, chunk=10
    )
    assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_memory_does_not_grow_with_positions_times_vocabulary():
    def temporary(positions, chunk):
        shapes = Decoder(*(jax.ShapeDtypeStruct(s, "f") for s in ((positions, 8), (4096, 8), (4096,))))
        flat = jax.ShapeDtypeStruct((positions,), "f")
        targets = Targets(jax.ShapeDtypeStruct((positions,), "i"), flat, flat)

        def loss(student, teacher, targets):
            return vocabulary_losses(student, teacher, targets, SCALES, temperature=2.0, chunk=chunk)[0]

        compiled = jax.jit(jax.grad(loss)).lower(shapes, shapes, targets).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # 4,096 positions more would take 64 MiB a copy of their logits.
    assert temporary(8192, 64) - temporary(4096, 64) < 2**20
    assert temporary(4096, 4096) > 64 * 2**20
