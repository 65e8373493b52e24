"""The benchmark of the losses over the vocabulary: its candidates compute the same, and cost a TPU what they must."""

import importlib
import sys
from pathlib import Path

import pytest

from distiljax.plan.machines import parse_topology


@pytest.fixture
def run(monkeypatch, capsys):
    """The program; the lines of its table by name, each a list of cells."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "scripts")
        benchmark = importlib.import_module("benchmark_vocab_loss")

    def main(*flags):
        monkeypatch.setattr(sys, "argv", ["benchmark_vocab_loss", *flags])
        assert benchmark.main() == 0
        lines = capsys.readouterr().out.splitlines()[2:]
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        return {name: rest for name, *rest in cells}

    main.error = benchmark.UserError
    return main


def test_all_candidates_compute_the_same(run):
    small = ("--positions=64", "--vocabulary=500", "--hidden=32", "--rounds=1")
    found = run(*small, "--chunks=16,64", "--widths=128")
    assert list(found) == ["plain", "16 positions at once", "64 positions at once", "128 words at once"]
    for name, cells in found.items():
        assert float(cells[-1]) < 1e-5, name


def test_on_a_tpu_words_at_once_cost_six_products_and_positions_four(run):
    positions, vocabulary, hidden = 512, 8192, 768
    sizes = (f"--positions={positions}", f"--vocabulary={vocabulary}", f"--hidden={hidden}")
    found = run(*sizes, "--topology=v5e:1", "--dtype=bfloat16", "--chunks=256", "--widths=1024")
    product = 1e9 * 2 * vocabulary * hidden / parse_topology("v5e:1").chip.flops
    for name, products in {"plain": 4, "256 positions at once": 4, "1,024 words at once": 6}.items():
        in_products, in_memory, estimated = (
            float(cell.removesuffix(" ns").replace(",", "")) for cell in found[name][:3]
        )
        assert in_products == pytest.approx(products * product, abs=1), name
        assert in_memory > 0 and estimated > in_products, name


@pytest.mark.parametrize("topology", ["v5e:2x2", "h100:8"])
def test_one_chip_only(run, topology):
    with pytest.raises(run.error, match="expected one TPU chip"):
        run(f"--topology={topology}")
