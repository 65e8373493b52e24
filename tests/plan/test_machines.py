"""The spellings of machines, and their rates."""

import pytest

from distiljax.errors import UserError
from distiljax.plan.machines import CHIPS, TPUS, parse_topology


@pytest.mark.parametrize(
    ("text", "name", "chips"),
    [
        ("v5e:16x16", "v5e:16x16", 256),
        ("v5e-16", "v5e:4x4", 16),
        ("v5litepod-8", "v5e:2x4", 8),
        ("V5E:4x4", "v5e:4x4", 16),
        ("v6e-256", "v6e:16x16", 256),
        ("v4-32", "v4:2x2x4", 16),
        ("v4:2x2x4", "v4:2x2x4", 16),
        ("v5p-8", "v5p:2x2x1", 4),
        ("v3-32", "v3:4x4", 16),
        ("v2-8", "v2:2x2", 4),
        ("v5e:4", "v5e:2x2", 4),
        ("h100:8", "h100:8", 8),
        ("h100", "h100:1", 1),
        ("a100-80gb:16", "a100-80gb:16", 16),
        ("v100:8", "v100-16gb:8", 8),
        ("v100-32gb:8", "v100-32gb:8", 8),
    ],
)
def test_machines_by_shape_by_accelerator_type_and_by_number(text, name, chips):
    topology = parse_topology(text)
    assert (topology.name, topology.chips) == (name, chips)
    assert parse_topology(topology.name) == topology


@pytest.mark.parametrize(
    "text",
    [
        "",
        "v5e:",
        "v5e:4x",
        "v5e:0x4",
        "v5e:4x4x4",
        "v4:4x4",
        "v5e-5",
        "v4-3",
        "v9:2x2",
        "h100:0",
        "h100:2x2",
        "h100-8",
    ]
    + ["v5e:4×4", "16", "v5e:-4", "v5e 4x4", "a100:99999999"],
)
def test_other_spellings_are_refused_in_one_line_that_shows_an_example(text):
    with pytest.raises(UserError, match="expected") as caught:
        parse_topology(text)
    assert "\n" not in str(caught.value) and repr(text) in str(caught.value)


def test_names_count_cores_where_google_counts_cores():
    for kind, chip in TPUS.items():
        assert parse_topology(f"{kind}-{16 * chip.cores}").chips == 16
    assert [kind for kind, chip in TPUS.items() if not chip.megacore] == ["v2", "v3"]


def test_the_clock_of_a_tpu_times_its_matrix_units_is_its_rate():
    # Matrix units × 128 × 128 (v6e: 256 × 256) multiply-adds a cycle.
    units = {"v2": 2, "v3": 4, "v4": 8, "v5e": 4, "v5p": 8, "v6e": 4 * 4}
    for kind, number in units.items():
        rate = number * 128 * 128 * 2 * TPUS[kind].clock
        assert rate == pytest.approx(TPUS[kind].flops, rel=0.01)


def test_rates_are_in_base_units():
    for chip in CHIPS.values():
        assert 4e13 < chip.flops < 1e15 and 1e10 < chip.memory < 2e11
        assert 1e11 < chip.bandwidth < 1e13 and 1e10 < chip.link < 1e12
        assert chip.is_tpu == (chip.clock > 0)
