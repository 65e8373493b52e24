from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distiljax import plots


def logged(split, **values):
    return {split: {name: list(enumerate(series, 1)) for name, series in values.items()}}


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=300))
def test_smoothing_stays_between_the_extremes(values):
    smoothed = plots._smooth(list(enumerate(values)))
    assert [step for step, _ in smoothed] == list(range(len(values)))
    assert min(values) - 1e-6 <= min(v for _, v in smoothed)
    assert max(v for _, v in smoothed) <= max(values) + 1e-6


def test_smoothing_keeps_a_line():
    values = [3.0 * step for step in range(400)]
    smoothed = [value for _, value in plots._smooth(list(enumerate(values)))]
    whole_windows = slice(0, 400 - 400 // 80)
    assert smoothed[whole_windows] == pytest.approx(values[whole_windows])


@pytest.mark.parametrize(
    "plot", [plots.losses, plots.accuracy, plots.agreement, plots.optimisation, plots.throughput]
)
def test_without_data_there_is_no_figure(plot):
    assert plot({}) is None
    assert plot(logged("train", seconds=[1.0, 2.0])) is None


def test_a_total_of_one_term_is_not_drawn_twice():
    assert len(plots.losses(logged("train", loss=[2.0], loss_mlm=[2.0])).axes) == 1
    titles = [
        ax.get_title(loc="left") or ax.get_title()
        for ax in plots.losses(logged("train", loss=[2.0], loss_mlm=[1.0], loss_cos=[1.0])).axes
        if ax.get_visible()
    ]
    assert titles == [plots.LOSSES[name] for name in ("loss", "loss_mlm", "loss_cos")]


@pytest.mark.parametrize(("last", "scale"), [(0.5, "linear"), (0.05, "log"), (0.0, "linear")])
def test_a_loss_that_falls_more_than_tenfold_is_on_a_logarithmic_scale(last, scale):
    assert plots.losses(logged("validation", loss=[1.0, last])).axes[0].get_yscale() == scale


def test_shares_are_drawn_in_per_cent_and_the_teacher_as_a_line():
    ax = plots.accuracy(logged("validation", mlm_accuracy=[0.1, 0.4]), teacher=0.5).axes[0]
    curve, teacher = ax.get_lines()
    assert list(curve.get_ydata()) == pytest.approx([10, 40])
    assert list(teacher.get_ydata()) == [50, 50] and teacher.get_label() == "teacher (50.0 %)"


def test_quality_needs_two_models_with_the_same_figures():
    accuracies = {"teacher": 0.6, "student": 0.5}
    parameters, speed = {"teacher": 2e6, "student": 1e6}, {"teacher": 1e3}
    figure = plots.quality(accuracies, {"Parameters": parameters, "Speed": speed})
    assert [ax.get_xlabel() for ax in figure.axes] == ["Parameters"]
    assert plots.quality(accuracies, {"Speed": speed}) is None


def test_a_comparison_has_a_curve_a_run():
    runs = [(label, logged("validation", mlm_accuracy=[0.1, 0.2], loss_mlm=[3.0, 2.0])) for label in "ab"]
    accuracy, loss = plots.comparison(runs).axes
    assert [line.get_label() for line in accuracy.get_lines()] == ["a", "b"]
    assert len(loss.get_lines()) == 2
    assert plots.comparison([("a", {})]) is None
