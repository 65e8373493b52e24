"""Where the time of a step goes: what overlaps is divided, nothing is lost, and a real trace is read."""

import importlib
import random
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def profile():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "scripts")
        yield importlib.import_module("step_profile")


def seconds(found):
    return {part: (x["products"] * 1e9, x["rest"] * 1e9) for part, x in found.items()}


def test_a_moment_goes_to_products_then_to_all_that_runs_then_to_nothing(profile):
    spans = [
        profile.Span(0, 10, "a", True),
        profile.Span(4, 12, "b", False),  # alone from 10 to 12
        profile.Span(20, 26, "b", True),
        profile.Span(22, 30, "a", False),
        profile.Span(24, 28, "c", False),
    ]
    found = seconds(profile.by_part(spans))
    # 26 to 28 is shared by a and c; 12 to 20 is nobody's.
    assert found == {
        "a": pytest.approx((10, 1 + 2)),
        "b": pytest.approx((6, 2)),
        "c": pytest.approx((0, 1)),
        profile.IDLE: pytest.approx((0, 8)),
    }


@pytest.mark.parametrize("seed", range(5))
def test_the_parts_add_up_to_the_time_from_first_to_last(profile, seed):
    rng = random.Random(seed)
    spans = [
        profile.Span(begin, begin + rng.randrange(50), rng.choice("abcd"), rng.random() < 0.3)
        for begin in (rng.randrange(1000) for _ in range(80))
    ]
    whole = max(span.end for span in spans) - min(span.begin for span in spans)
    found = profile.by_part(spans)
    assert sum(map(sum, seconds(found).values())) == pytest.approx(whole)
    # By hand, a moment at a time.
    moments = [[s for s in spans if s.begin <= t < s.end] for t in range(1100)]
    products = sum(any(s.product for s in running) for running in moments)
    assert sum(x["products"] for x in found.values()) * 1e9 == pytest.approx(products)
    busy = sum(bool(running) for running in moments)
    assert whole - found.get(profile.IDLE, {"rest": 0})["rest"] * 1e9 == pytest.approx(busy)
