"""What the recipe says of masking, over more than 10⁵ tokens; tolerances are five standard errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distiljax.distill.masking import Masking, mask_tokens, masking_weights

V, MASK, PAD, CLS, SEP = 500, 4, 0, 2, 3
SPECIAL = (PAD, 1, CLS, SEP, MASK)
MASKING = Masking(mask_token_id=MASK, vocab_size=V)


def make_rows(B, S, seed=0, probabilities=None):
    """Rows of one to three segments and some padding."""
    rng = np.random.default_rng(seed)
    ids = rng.choice(np.arange(5, V), size=(B, S), p=probabilities).astype(np.int32)
    segments = np.ones((B, S), np.int32)
    for b in range(B):
        end = S - int(rng.integers(0, S // 4))
        cut = int(rng.integers(2, end - 2))
        segments[b, cut:end], segments[b, end:] = 2, 0
        ids[b, [0, cut]], ids[b, [cut - 1, end - 1]] = CLS, SEP
        ids[b, end:] = PAD
    return {
        "input_ids": jnp.asarray(ids),
        "segment_ids": jnp.asarray(segments),
        "positions": jnp.zeros_like(ids),
    }


def mask(rows, weights, seed=0, masking=MASKING):
    keys = jax.random.split(jax.random.key(seed), len(rows["input_ids"]))
    return jax.tree.map(np.asarray, jax.jit(mask_tokens, static_argnums=3)(keys, rows, weights, masking))


UNIFORM = masking_weights(np.ones(V, np.int64), SPECIAL, 0.7)


def shown_and_true(out):
    """What stands at the masked positions and what stood there: two flat arrays."""
    shown = np.take_along_axis(out.input_ids, out.masked_positions, axis=1)
    return shown[out.masked_weights > 0], out.labels[out.masked_weights > 0]


def test_rate_and_split_are_the_recipes():
    rows = make_rows(1024, 128)
    out = mask(rows, UNIFORM)
    eligible = np.isin(np.asarray(rows["input_ids"]), SPECIAL, invert=True) & (
        np.asarray(rows["segment_ids"]) > 0
    )
    n = eligible.sum()
    assert n > 1e5
    # The number of masked tokens in a row varies by less than one around 15 % of its eligible tokens.
    assert abs(out.masked_weights.sum() - 0.15 * n) < 5 * np.sqrt(len(eligible) / 4)
    per_row = out.masked_weights.sum(1) - 0.15 * eligible.sum(1)
    assert np.abs(per_row).max() < 1

    shown, true = shown_and_true(out)
    m = len(shown)
    for share, expected in (
        ((shown == MASK).mean(), 0.8 + 0.1 / V),
        ((shown == true).mean(), 0.1 + 0.1 / V),
        (((shown != MASK) & (shown != true)).mean(), 0.1 * (1 - 2 / V)),
    ):
        assert abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / m)


def test_random_replacements_are_uniform_over_the_vocabulary():
    masking = Masking(mask_token_id=MASK, vocab_size=V, mask=0.0, random=1.0)
    shown, _ = shown_and_true(mask(make_rows(1024, 128), UNIFORM, masking=masking))
    counts = np.bincount(shown, minlength=V)
    expected = len(shown) / V
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_squared - (V - 1)) < 5 * np.sqrt(2 * (V - 1))


def test_rare_tokens_are_masked_more_by_the_recipes_weights():
    # Two kinds of tokens, one ten times as frequent in the corpus as the other.
    counts = np.full(V, 100)
    counts[V // 2 :] = 1000
    weights = masking_weights(counts, SPECIAL, 0.7)
    np.testing.assert_allclose(weights[V // 2 - 1] / weights[V // 2], 10**0.7, rtol=1e-5)
    masking = Masking(mask_token_id=MASK, vocab_size=V, rate=0.01)  # few draws: replacement hardly matters
    rows = make_rows(2048, 200)
    out = mask(rows, weights, masking=masking)
    _, true = shown_and_true(out)
    ids = np.asarray(rows["input_ids"])
    rare, frequent = ((ids >= 5) & (ids < V // 2)).sum(), (ids >= V // 2).sum()
    expected = 1 / (1 + frequent / rare / 10**0.7)
    share = (true < V // 2).mean()
    assert len(true) > 3000
    assert abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / len(true))


def test_weights_are_zero_for_special_tokens_and_safe_for_unseen_ones():
    weights = masking_weights(np.array([50, 0, 7, 1, 100, 0]), (0, 2), 0.7)
    np.testing.assert_allclose(weights, [0, 1, 0, 1, 100**-0.7, 1], rtol=1e-6)
    assert weights.dtype == np.float32


def test_another_step_another_mask_and_the_same_step_the_same():
    rows = make_rows(16, 64)
    first, again, other = mask(rows, UNIFORM, 0), mask(rows, UNIFORM, 0), mask(rows, UNIFORM, 1)
    np.testing.assert_array_equal(first.input_ids, again.input_ids)
    assert (first.input_ids != other.input_ids).any(axis=1).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), rate=st.sampled_from([0.05, 0.15, 0.4]))
def test_only_eligible_tokens_change_and_labels_undo_the_mask(seed, rate):
    rows = make_rows(4, 32, seed)
    out = mask(rows, UNIFORM, seed, Masking(mask_token_id=MASK, vocab_size=V, rate=rate))
    ids, segments = np.asarray(rows["input_ids"]), np.asarray(rows["segment_ids"])
    touched = np.zeros_like(ids, bool)
    restored = out.input_ids.copy()
    for b in range(len(ids)):
        positions = out.masked_positions[b][out.masked_weights[b] > 0]
        assert len(set(positions.tolist())) == len(positions)
        touched[b, positions] = True
        restored[b, positions] = out.labels[b][out.masked_weights[b] > 0]
    assert not touched[segments == 0].any()
    assert not touched[np.isin(ids, SPECIAL)].any()
    np.testing.assert_array_equal(out.input_ids[~touched], ids[~touched])
    np.testing.assert_array_equal(restored, ids)


def test_a_row_of_padding_masks_nothing():
    rows = {name: jnp.zeros((2, 16), jnp.int32) for name in ("input_ids", "segment_ids", "positions")}
    out = mask(rows, UNIFORM)
    assert not out.masked_weights.any()
    assert not out.input_ids.any()


@pytest.mark.parametrize(
    "fields", [{"rate": 0.0}, {"rate": 1.0}, {"mask": 0.9, "random": 0.2}, {"random": -0.1}]
)
def test_shares_outside_their_range_are_refused(fields):
    with pytest.raises(ValueError, match="expected"):
        Masking(mask_token_id=MASK, vocab_size=V, **fields)
