"""The benchmark of what is held at once: what it switches off is switched off, and bad input is one line."""

import importlib
from pathlib import Path

import pytest

from tests import compiling


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch, compiling.in_haste():
        patch.syspath_prepend(Path(__file__).parents[2] / "scripts")
        yield importlib.import_module("benchmark_choices")


def test_each_choice_is_compared_with_the_program_without_it(benchmark, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(benchmark, "in_turn", lambda calls, _: compiled.append(calls) or [[0.002], [0.003]])
    assert benchmark.main(["--quick"]) == 0
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[0] for line in lines] == [
        "heads",
        "heads",
        "portions",
        "gelu",
        "gelu",
        "activation",
        *2 * ["draws"],
    ]
    for (*_, ours, without), line in zip(map(programs, compiled), lines, strict=True):
        # The results are alike; most of the choices need less memory for them.
        assert ours.out_info == without.out_info and ours.as_text() != without.as_text()
        sizes = [one.memory_analysis().temp_size_in_bytes for one in (ours, without)]
        assert sizes[0] < sizes[1] or line[0] in ("gelu", "draws"), line
        assert line[2:5] == ["2.0 ms", "3.0 ms", "1.50 × (1.50 to 1.50)"]


def programs(calls):
    return [call.func for call in calls]


@pytest.mark.parametrize("choices", ["tails", "heads,", ""])
def test_unknown_choices_are_refused(benchmark, choices):
    with pytest.raises(
        benchmark.UserError, match="expected some of heads, portions, gelu, activation, draws"
    ):
        benchmark.main([f"--choices={choices}"])
