"""Rows that are run a few at a time give what they give all at once."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import distiljax
from distiljax.nn import HeadConfig, TaskModel
from distiljax.tasks import chunks
from distiljax.tasks.features import Features
from distiljax.tasks.forward import Forward
from distiljax.train.parallel import Parallel

S = 8


@pytest.fixture
def four_rows(monkeypatch):
    monkeypatch.setattr(chunks, "CPU_TOKENS", 4 * S)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 11])
def test_each_row_is_met_once_and_in_its_place(four_rows, rows):
    met = []

    def forward(batch):
        met.append(len(batch["ids"]))
        return {"sum": batch["ids"].sum(-1), "last": (batch["ids"][:, -1:], batch["weight"] * 2)}

    rng = np.random.default_rng(0)
    batch = {"ids": rng.integers(1000, size=(rows, S)), "weight": rng.random(rows, np.float32)}
    found = jax.jit(lambda batch: chunks.over_rows(forward, batch, S))(batch)
    np.testing.assert_array_equal(found["sum"], batch["ids"].sum(-1))
    np.testing.assert_array_equal(found["last"][0], batch["ids"][:, -1:])
    np.testing.assert_array_equal(found["last"][1], batch["weight"] * 2)
    assert set(met) == {1: {1}, 3: {3}, 4: {4}, 5: {3, 2}, 8: {4}, 11: {4, 3}}[rows]


def test_no_more_tokens_than_the_limit_but_at_least_a_row():
    assert [chunks.most_rows(32, length) for length in (1, 32, 128, 512, 4096)] == [32, 32, 16, 4, 1]
    assert chunks.most_rows(3, 512) == 3


@pytest.fixture(scope="module")
def model():
    """A small model that labels tokens, and its parameters."""
    config = distiljax.EncoderConfig(
        vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, max_positions=S
    )
    module = TaskModel(config.replace(initializer_range=0.2), HeadConfig("token_classification", ("A", "B")))
    return module, jax.device_get(module.init(jax.random.key(0), np.zeros((1, S), np.int32))["params"])


@pytest.mark.parametrize(("mode", "ways"), [("jit", 1), ("pmap", 1), ("jit", 2)])
def test_a_model_gives_every_row_the_same_logits_on_all_devices(four_rows, model, mode, ways):
    module, params = model
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, S + 1, 13)
    features = Features(
        kind="token_classification",
        tokens=rng.integers(64, size=lengths.sum(), dtype=np.int32),
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        second=lengths.astype(np.int32),
        examples=np.arange(13, dtype=np.int32),
    )
    parallel = Parallel(mode, jax.devices()[: 2 * ways], model=ways)
    forward = Forward(module, parallel, 10, (S,))  # five rows a device: three, then two
    found = forward(parallel.replicate(params), features)
    for row, logits in enumerate(found):
        ids = features.tokens[None, features.starts[row] : features.starts[row + 1]]
        expected = module.apply({"params": params}, ids)
        assert np.abs(expected).max() > 1e-2
        np.testing.assert_allclose(logits, expected[0], atol=1e-6)
