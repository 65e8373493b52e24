"""Rows that are run a few at a time give what they give all at once."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import distiljax
from distiljax.nn import HeadConfig, TaskModel
from distiljax.tasks import chunks
from distiljax.tasks.objective import run

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
    assert set(met) == {size for size in (min(rows, 4), rows % 4 if rows > 4 else 0) if size}


def test_no_more_tokens_than_the_limit_but_at_least_a_row():
    assert [chunks.most_rows(32, length) for length in (1, 32, 128, 512, 4096)] == [32, 32, 16, 4, 1]
    assert chunks.most_rows(3, 512) == 3


def test_a_model_gives_the_same_logits(four_rows):
    config = distiljax.EncoderConfig(
        vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, max_positions=S
    )
    module = TaskModel(config.replace(initializer_range=0.2), HeadConfig("token_classification", ("A", "B")))
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, S + 1, 6)
    batch = {
        "input_ids": rng.integers(64, size=(6, S)),
        "attention_mask": (np.arange(S) < lengths[:, None]).astype(np.int32),
        "token_type_ids": rng.integers(2, size=(6, S)),
    }
    params = module.init(jax.random.key(0), batch["input_ids"])["params"]
    whole = run(module, params, batch, None)
    found = jax.jit(lambda batch: chunks.over_rows(lambda rows: run(module, params, rows, None), batch, S))(
        batch
    )
    assert np.abs(whole).max() > 0.1
    np.testing.assert_allclose(found, whole, atol=1e-6)
