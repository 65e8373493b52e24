"""The benchmark of the step: its two sides compute the same thing, on the same tokens, and what is made of that."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import signal
import statistics
from pathlib import Path

import numpy as np
import pytest

from distiljax.distill.masking import masking_weights
from distiljax.errors import UserError
from tests import compiling

SCRIPTS = Path(__file__).parents[2] / "scripts"
V, S, B = 96, 24, 4
ROOM = 2  # rows at once, in the tests that look for the largest


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch, compiling.in_haste():
        patch.syspath_prepend(SCRIPTS)
        yield importlib.import_module("benchmark_step")


@pytest.fixture(scope="module")
def sides(benchmark):
    return importlib.import_module("step_sides")


@pytest.fixture(scope="module")
def tables(benchmark):
    return importlib.import_module("step_tables")


@pytest.fixture(scope="module")
def torch_distillation(benchmark):
    return importlib.import_module("torch_distillation")


def packed_rows():
    """Two examples and some padding in most rows, one that fills the last."""
    rng = np.random.default_rng(0)
    ids = rng.integers(5, V, (B, S)).astype(np.int32)
    segments = np.ones((B, S), np.int32)
    positions = np.tile(np.arange(S, dtype=np.int32), (B, 1))
    for b in range(B - 1):
        begin, end = 6 + 3 * b, 20 + b
        segments[b, begin:end], segments[b, end:] = 2, 0
        positions[b, begin:] -= begin
    ids[segments == 0] = positions[segments == 0] = 0
    return {"input_ids": ids, "segment_ids": segments, "positions": positions}


@pytest.fixture(scope="module")
def prepared(benchmark, tmp_path_factory):
    """Rows and models as the sides read them, and the arguments."""
    directory = tmp_path_factory.mktemp("step")
    weights = masking_weights(np.arange(V), range(5), 0.7)
    extra = {"weights": weights, "mask_token_id": np.int64(4), "vocab_size": np.int64(V)}
    np.savez(directory / "rows.npz", **packed_rows(), **extra)
    args = benchmark.parse(["--size=tiny", "--teacher_layers=2", f"--seq_len={S}", f"--batch={B}"])
    benchmark.write_models(args, V, directory)
    return args, directory


@pytest.fixture
def run(benchmark, sides, torch_distillation, prepared, tmp_path, monkeypatch, capsys):
    """The program with the sides in this process: what it measured, and what it printed."""

    kept = {}  # our sides by their settings, so that none is compiled twice

    class Here:
        """Stands in for a process of a side, on a machine with room for so many rows at once."""

        room = B

        def __init__(self, side, directory, settings):
            self.arguments = side, directory, settings
            same = json.dumps(settings | {"masks": "", "memory_limit": 0}) if side == "jax" else object()
            self.made = kept.setdefault(same, [])
            self.process_memory = 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def call(self, do, **arguments):
            side, _, settings = self.arguments
            try:
                if settings["micro_batch"] > Here.room:
                    raise MemoryError("no room for the rows")
                if not self.made:
                    self.made.append(sides.make_side(*self.arguments))
                result = getattr(self.made[0], do)(**arguments)
            except Exception as error:
                raise sides.SideFailed(side, f"{type(error).__name__}: {error}") from error
            self.process_memory = sides.peak_memory()
            return result

    for module in (benchmark, sides):
        monkeypatch.setattr(module, "Side", Here)
        monkeypatch.setattr(module, "product_size", lambda platform: {"size": 64, "count": 1})

    def main(*flags, room=B):
        Here.room = room
        found = tmp_path / "found.json"
        shape = ["--size=tiny", "--teacher_layers=2", f"--rows={prepared[1] / 'rows.npz'}", "--dropout=0"]
        assert benchmark.main([*shape, f"--batch={B}", f"--json={found}", *flags]) == 0
        return json.loads(found.read_text()), capsys.readouterr().out

    return main


def cells(text, first):
    """The cells of the table's line that begins so."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_both_sides_compute_the_same_and_take_turns(run, tables):
    flags = ("--micro_batch=2", "--torch_micro_batch=2", "--torch_compile=no", "--rounds=2")
    result, text = run(*flags)
    assert [one["name"] for one in result["agreement"]] == [
        "distiljax",
        "PyTorch, packed rows",
        "PyTorch, grouped rows",
    ]
    ours, *theirs = (one["losses"] for one in result["agreement"])
    assert min(ours.values()) > 1e-3  # there is something to compare
    for losses in theirs:
        assert losses == {name: pytest.approx(value, rel=2e-5) for name, value in ours.items()}

    jax, torch = result["sides"]["jax"], result["sides"]["torch"]
    assert not jax["tried"]  # nothing was left open
    assert [one["settings"]["rows"] for one in torch["tried"]] == ["packed", "grouped"]
    faster = min(torch["tried"], key=lambda one: one["seconds"])
    assert torch["settings"] | {"memory_limit": faster["settings"]["memory_limit"]} == faster["settings"]
    assert f"Tried PyTorch, {tables.outcome('torch', faster)}." in text

    rounds = result["rounds"]
    tokens = np.count_nonzero(packed_rows()["segment_ids"])
    assert result["tokens_per_step"] == tokens and len(rounds) == 2
    ratios = [one["torch"]["seconds"] / one["jax"]["seconds"] for one in rounds]
    assert result["ratio"] == pytest.approx(statistics.median(ratios))
    assert f"distiljax over PyTorch: {result['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) ×" in text
    product = max(statistics.median(one[side]["product"] for one in rounds) for side in result["sides"])
    shares = []
    for side, found in result["sides"].items():
        seconds = statistics.median(one[side]["seconds"] for one in rounds)
        assert found["share"] == pytest.approx(result["flops"] / seconds / product)
        speed = statistics.median(one[side]["tokens_per_second"] for one in rounds)
        assert found["hours"] == pytest.approx(3 * 3.3e9 * 1.3 / speed / 3600)
        assert found["process_memory"] > 1e7
        shares.append(f"{100 * found['share']:.0f} %")
    assert cells(text, "share of the faster product in this precision") == shares
    # What is printed can be printed again from what is kept.
    assert tables.comparison_text(argparse.Namespace(**result["arguments"]), result) in text


def test_the_largest_is_found_also_where_nothing_compiles(benchmark, torch_distillation, run, monkeypatch):
    def broken(module):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch_distillation.torch, "compile", broken)
    where = {side: {"platform": "cpu", "machine": "one", "versions": "any"} for side in benchmark.SIDES}
    monkeypatch.setattr(benchmark, "check", lambda *_: ([], where))  # which the test above runs
    result, text = run("--largest", f"--micro_batch={2 * ROOM}", "--torch_rows=packed", room=ROOM)
    one, two = result["points"]
    assert [point["side"] for point in (one, two)] == ["torch", "torch"]
    assert [point["settings"]["micro_batch"] for point in (one, two)] == [1, ROOM]
    assert not one["settings"]["compile"] and not two["settings"]["compile"]
    assert two["flops"] == ROOM * one["flops"] > 0
    product = max(one["product"], two["product"])
    assert one["share"] == pytest.approx(one["flops"] / one["seconds"] / product)
    ours, failed, last = result["ends"]
    assert ours.startswith(f"distiljax, micro-batches of {2 * ROOM}") and "no room for the rows" in ours
    assert "torch.compile: PyTorch: RuntimeError: no C++ compiler; not compiled from there on" in failed
    assert "not compiled: no room" in last
    assert all(end in text for end in result["ends"])


def test_a_profile_divides_a_step_among_its_parts(run):
    result, text = run("--profile", "--micro_batch=2", "--rounds=2", "--dropout=0.1")
    parts, (point,) = result["parts"], result["points"]
    models = {
        f"{model}, {part}" for model in ("teacher", "student") for part in ("attention", "feed-forward")
    }
    for part in (*models, "losses over the vocabulary, L_cos"):
        assert parts[part]["products"] > 0, part
    assert parts["optimiser"]["rest"] > 0 and parts["optimiser"]["products"] == 0
    whole = sum(sum(seconds.values()) for seconds in parts.values())
    # Traced steps are slower, and never much faster than those that are timed alone.
    assert 0.3 * point["seconds"] < whole
    assert cells(text, "all")[:2] == [f"{whole:.3f}", "100.0 %"]


def test_a_sweep_is_told_and_drawn(run, tables):
    result, text = run("--sweep", "--batches=2", f"--lengths={S // 2},{S}", "--micro_batch=1", "--rounds=1")
    point, longer = result["points"]
    # As many tokens at both lengths.
    assert [one["settings"]["batch"] * one["length"] for one in (point, longer)] == [2 * S, 2 * S]
    assert [one["settings"]["micro_batch"] * one["length"] for one in (point, longer)] == [S, S]
    tokens = point["tokens"]
    assert 0 < tokens <= 2 * S
    told = cells(text, f"4 × {S // 2}")
    assert told[:2] == ["distiljax, micro-batches of 2, float32", "1"]
    assert told[3] == f"{tokens / point['seconds']:,.0f}"
    assert told[6] == f"{100 * point['share']:.0f} %"

    points = [
        point
        | {"length": length, "tokens": rows * length, "seconds": rows * length / 8 / devices}
        | {"settings": point["settings"] | {"devices": devices}}
        for devices in (1, 2)
        for length in (12, 24)
        for rows in (4, 2)
    ]
    slower = [one | {"seconds": 99.0, "settings": one["settings"] | {"remat": True}} for one in points]
    left, right = tables.figure([*points, *slower]).axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in left.get_lines()}
    assert drawn == {
        "rows of 12, 1 device": [[24, 3], [48, 6]],
        "rows of 24, 1 device": [[48, 6], [96, 12]],
        "rows of 12, 2 devices": [[24, 1.5], [48, 3]],
        "rows of 24, 2 devices": [[48, 3], [96, 6]],
    }
    drawn = {line.get_label(): line.get_xydata().tolist() for line in right.get_lines()}
    assert drawn["measured, 2 devices"] == [[12, 62500], [24, 62500]]
    # The work on a token of the longer rows is said to be half as much here.
    assert drawn["as the counted work grows, 2 devices"] == [[12, 62500], [24, 31250]]


def test_the_share_is_that_of_the_fastest_product_in_the_precision(tables):
    def point(seconds, product, dtype, devices=1, platform="gpu"):
        settings = {"dtype": dtype, "devices": devices}
        facts = {"seconds": seconds, "product": product, "flops": 80.0}
        return facts | {"settings": settings, "where": {"platform": platform}}

    found = {
        "points": [
            point(1.0, 100.0, "float32"),
            point(1.0, 160.0, "float32"),
            point(0.5, 160.0, "float32", devices=4),
            point(0.5, 320.0, "bfloat16"),
        ]
    }
    tables.complete(argparse.Namespace(), found)
    # An accelerator's product is measured on one device.
    assert [one["share"] for one in found["points"]] == [0.5, 0.5, 0.25, 0.5]
    found = {"points": [point(1.0, 160.0, "float32", devices=8, platform="cpu")]}
    tables.complete(argparse.Namespace(), found)
    assert found["points"][0]["share"] == 0.5


def test_the_opponent_takes_steps_on_masks_of_its_own(benchmark, torch_distillation, prepared):
    args, directory = prepared
    settings = benchmark.settings_of(args, "torch", rows="grouped", dropout=0.1, dtype="bfloat16")
    side = torch_distillation.TorchSide(directory, settings)
    before = [parameter.detach().clone() for parameter in side.parameters]
    assert side.build()["optimizer"] in ("fused", "foreach")
    assert all((parameter == old).all() for parameter, old in zip(side.parameters, before, strict=True))
    assert side.run(0, 2)["seconds"] > 0
    assert math.isfinite(float(side.last["loss"])) and float(side.last["grad_norm"]) > 0
    assert not any((parameter == old).all() for parameter, old in zip(side.parameters, before, strict=True))


def test_each_token_is_in_one_micro_batch(torch_distillation):
    segments = packed_rows()["segment_ids"]
    tokens = np.flatnonzero(segments)
    for rows in torch_distillation.ROWS:
        parts = torch_distillation.split_rows(segments, rows, 2)
        found = np.concatenate([part[part >= 0] for part in parts])
        assert sorted(found) == list(tokens)
        assert all(part.size <= 2 * S for part in parts)
    # One example a row, the longest first, and no more padding than to a multiple of 8.
    assert [part.shape for part in parts] == [(2, 24), (3, 16), (2, 16)]
    for part in parts:
        for row in part:
            (segment,) = set(segments.ravel()[row[row >= 0]])
            assert len(set(row[row >= 0] // S)) == 1 and segment


def test_cut_rows_hold_the_same_tokens_at_positions_of_their_own(benchmark):
    rows = packed_rows()
    found = benchmark.cut(rows, 8)
    assert found["input_ids"].shape == (3 * B, 8)
    np.testing.assert_array_equal(found["input_ids"].reshape(B, S), rows["input_ids"])
    assert found["segment_ids"][0].tolist() == [1, 1, 1, 1, 1, 1, 2, 2]
    assert found["positions"][0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert found["positions"][1].tolist() == list(range(8))
    assert found["positions"][2].tolist() == [0, 1, 2, 3, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch=0"], "batch is 0"),
        (["--batch=8", "--micro_batch=3"], "micro_batch is 3"),
        (["--sweep", "--batches=6", "--device_counts=4"], "6 rows does not divide by 4 devices"),
        (["--sweep", "--lengths=100,512"], "lengths has 100; expected divisors of the longest, 512"),
        (["--remat=both"], "remat is both, which is for --sweep"),
    ],
)
def test_bad_arguments_are_refused_with_their_value(benchmark, arguments, message):
    with pytest.raises(UserError, match=message):
        benchmark.parse(arguments)


@pytest.mark.parametrize("remat", [False, True])
def test_remat_is_passed_on(benchmark, sides, remat):
    args = benchmark.parse([f"--remat={'yes' if remat else 'no'}"])
    assert sides.settings_of(args, "jax")["remat"] is remat


def test_a_side_that_fails_says_why(benchmark, sides, prepared):
    args, directory = prepared
    settings = sides.settings_of(args, "jax", dtype="float13")
    with sides.Side("jax", directory, settings) as side:
        with pytest.raises(sides.SideFailed, match="float13") as caught:
            side.call("describe")
        assert not caught.value.no_room
        side._process.send_signal(signal.SIGABRT)  # as where a check in C++ fails
        with pytest.raises(sides.SideFailed, match="ended with status -6") as caught:
            side.call("describe")
        assert not caught.value.no_room
    with sides.Side("jax", directory, settings) as side:
        side._process.kill()  # as the system does where memory is short
        with pytest.raises(sides.SideFailed) as caught:
            side.call("describe")
        assert caught.value.no_room
