"""The program that races distiljax against PyTorch, at a small size."""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

import distiljax
from distiljax.errors import UserError
from tests import compiling

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark_inference.py"

pytest.importorskip("torch")


@pytest.fixture(scope="module", autouse=True)
def compiled_in_haste():
    with compiling.in_haste():
        yield


@pytest.fixture(scope="module")
def program():
    return runpy.run_path(str(SCRIPT), run_name="benchmark_inference")


@pytest.fixture(scope="module")
def models(program, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    config = distiljax.EncoderConfig(
        vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, max_positions=24
    )
    module = distiljax.MaskedLM(config)
    params = jax.jit(module.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    distiljax.save_pretrained(module, jax.device_get(params), root / "own")
    return program["make_models"](argparse.Namespace(teacher=str(root / "own"), student=""), root)


def test_both_sides_run_the_same_models_in_turn(program, models):
    assert set(models) == {"teacher", "student"}
    table = program["compare_outputs"]({"student": models["student"]}, ["float32"])
    assert table.splitlines()[2].startswith("| student | float32 | 0.0e+00, 0.0e+00 | ")
    race = program["Race"](models, ["float32"], compiled=False)
    race.run(2, 8, seconds=0.0)
    times = race.times[2, 8]
    assert list(times) == [(m, "float32", s) for m in models for s in ("PyTorch", "distiljax")]
    assert {len(taken) for taken in times.values()} == {3}
    columns, cells = race.rows({"float32": 1e12})
    assert [row[:3] for row in cells] == [["2 × 8", model, "float32"] for model in models]
    assert all(len(row) == len(columns) for row in cells)
    columns, cells = race.student_rows()
    assert columns[2:] == ["PyTorch", "distiljax"] and len(cells) == 1


def test_a_student_alone_is_refused(program, tmp_path):
    with pytest.raises(UserError, match="--teacher"):
        program["make_models"](argparse.Namespace(teacher="", student="x"), tmp_path)
