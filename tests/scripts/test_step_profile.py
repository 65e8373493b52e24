"""Where the time of a step goes: what overlaps is divided, nothing is lost, and a real trace is read."""

import importlib
import random
from pathlib import Path
from types import SimpleNamespace as Made

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


PROGRAM = """
ENTRY %main (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %dot.1 = f32[8,8]{1,0} dot(%a, %a), lhs_contracting_dims={1}, metadata={op_name="jit(f)/jvp(student)/ffn/dot"}
  ROOT %add.1 = f32[8,8]{1,0} add(%dot.1, %a), metadata={op_name="jit(f)/optimizer/add"}
}
"""


def traced(**planes):
    """A trace: by plane, events of name, start, duration and the instruction that they name."""

    def event(name, start, duration, op=""):
        return Made(name=name, start_ns=start, duration_ns=duration, stats=[("hlo_op", op)] if op else [])

    names = {"host": "/host:CPU", "device": "/device:GPU:0"}
    return Made(
        planes=[
            Made(name=names[plane], lines=[Made(name="Stream #1", events=[event(*one) for one in events])])
            for plane, events in planes.items()
        ]
    )


def test_an_accelerators_kernels_count_and_the_host_where_there_are_none(profile):
    host = [("dot.1", 0, 5), ("add.1", 5, 1), ("python call", 0, 50)]
    product, update = ("student, feed-forward", True), ("optimiser", False)
    on_host = [profile.Span(0, 5, *product), profile.Span(5, 6, *update)]
    assert profile.spans(traced(host=host), PROGRAM) == on_host
    assert profile.spans(traced(device=[], host=host), PROGRAM) == on_host
    kernels = [("gemm_kernel", 2, 3, "dot.1"), ("memcpy", 5, 3)]
    of_device = [profile.Span(2, 5, *product), profile.Span(5, 8, profile.UNKNOWN, False)]
    assert profile.spans(traced(device=kernels, host=host), PROGRAM) == of_device
    with pytest.raises(RuntimeError, match="no instruction"):
        profile.spans(traced(device=[], host=[("python call", 0, 50)]), PROGRAM)
