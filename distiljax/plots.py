"""The plots of a report, from logged points; what has no data gives None instead of a figure."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distiljax.train.format import human_percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Points = Sequence[tuple[int, float]]
"""(step, value) in the order of the steps; the values are finite."""

Metrics = Mapping[str, Mapping[str, Points]]
"""split ("train", "validation") → metric name → points: what `distiljax.train.metrics.read_metrics` gives."""

# Okabe and Ito's palette: told apart with any of the common colour-vision deficiencies.
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
COLOURS = (BLUE, VERMILION, GREEN, "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"
STYLE: dict[Any, Any] = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.xmargin": 0.015,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "lines.linewidth": 2.0,
    "legend.frameon": False,
    "legend.fontsize": 12,
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.08,
    "savefig.dpi": 160,
}

LOSSES = {
    "loss": "Total loss",
    "loss_ce": "Soft targets, $L_{ce}$",
    "loss_mlm": "Masked LM, $L_{mlm}$ (nats)",
    "loss_cos": "Cosine, $L_{cos}$",
    "loss_mse": "Logits, $L_{mse}$",
    "loss_label": "Labels",
    "loss_soft": "Soft targets of the task's teacher",
}
ACCURACY = "Masked tokens named correctly (%)"


def style() -> AbstractContextManager[None]:
    """The context in which to draw and to save, as matplotlib makes some of the text only when it saves."""
    import matplotlib

    return matplotlib.rc_context(STYLE)


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)


def losses(metrics: Metrics) -> Figure | None:
    """A panel for each loss term, of training and held-out text; logarithmic where it falls over tenfold."""
    names = [name for name in LOSSES if any(name in split for split in metrics.values())]
    if len(names) == 2 and "loss" in names:
        names.remove("loss")  # the only term is the total
    if not names:
        return None
    columns = min(2, len(names))
    figure, axes = _figure(math.ceil(len(names) / columns), columns)
    for name, ax in zip(names, axes, strict=False):
        _draw_splits(ax, LOSSES[name], metrics, name)
        _log_if_wide(ax, [*_smooth(_points(metrics, "train", name)), *_points(metrics, "validation", name)])
    for ax in axes[len(names) :]:
        ax.set_visible(False)
    _legend(figure, axes[: len(names)])
    return figure


def accuracy(metrics: Metrics, teacher: float | None = None) -> Figure | None:
    """Masked-LM accuracy in training and on held-out text, with the teacher's (a share) as a line."""
    return _share(metrics, "mlm_accuracy", ACCURACY, teacher)


def task_accuracy(metrics: Metrics) -> Figure | None:
    """How much of a task is right in training and on held-out examples."""
    return _share(metrics, "accuracy", "Accuracy (%)")


def agreement(metrics: Metrics) -> Figure | None:
    """How often student and teacher prefer the same word, or label."""
    return _share(metrics, "teacher_agreement", "Same choice as the teacher (%)")


def optimisation(metrics: Metrics) -> Figure | None:
    """Learning rate and gradient norm."""
    rate, norm = (_points(metrics, "train", name) for name in ("learning_rate", "grad_norm"))
    if not rate or not norm:
        return None
    figure, (left, right) = _figure(1, 2)
    _line(left, rate, color=BLUE)
    _finish(left, "Learning rate")
    left.set_ylim(bottom=0)
    _draw_splits(right, "Gradient norm", metrics, "grad_norm")
    if not _log_if_wide(right, _smooth(norm)):
        right.set_ylim(bottom=0)
    return figure


def throughput(metrics: Metrics) -> Figure | None:
    """Tokens a second and the share of the time spent waiting for data."""
    speed = _points(metrics, "train", "tokens_per_second")
    if not speed:
        return None
    figure, (left, right) = _figure(1, 2)
    _draw_splits(left, "Tokens a second", metrics, "tokens_per_second")
    _count_axis(left.yaxis, max(value for _, value in speed))
    _draw_splits(right, "Waiting for data (% of the step)", metrics, "data_wait", factor=100.0)
    for ax in (left, right):
        ax.set_ylim(bottom=0)
    return figure


def comparison(runs: Sequence[tuple[str, Metrics]]) -> Figure | None:
    """Accuracy and masked-LM loss on held-out text of several runs, given as (label, metrics)."""
    if not any("validation" in metrics for _, metrics in runs):
        return None
    figure, axes = _figure(1, 2, height=3.6)
    panels = (("mlm_accuracy", ACCURACY, 100.0), ("loss_mlm", LOSSES["loss_mlm"], 1.0))
    for (name, title, factor), ax in zip(panels, axes, strict=True):
        for (label, metrics), colour in zip(runs, itertools.cycle(COLOURS), strict=False):
            points = _points(metrics, "validation", name, factor)
            _line(ax, points, color=colour, marker="o", markersize=4, label=label)
        _finish(ax, title)
    _legend(figure, axes[:1])
    return figure


def quality(
    qualities: Mapping[str, float],
    costs: Mapping[str, Mapping[str, float]],
    label: str = "Masked-LM accuracy (%)",
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> Figure | None:
    """What models are worth (shares, by model name) against each of `costs` (axis label → by model name).

    One panel a cost that is known of at least two models; `ranges` (lowest, highest) are drawn as bars.
    """
    panels = {
        label: {name: cost[name] for name in qualities if name in cost} for label, cost in costs.items()
    }
    panels = {label: cost for label, cost in panels.items() if len(cost) > 1}
    if not panels:
        return None
    figure, axes = _figure(1, len(panels), height=3.6, sharey=True)
    for (cost_label, cost), ax in zip(panels.items(), axes, strict=True):
        for index, (name, share) in enumerate(qualities.items()):
            if name in cost:
                _point(ax, cost[name], share, (ranges or {}).get(name), index, name)
        ax.set_xlabel(cost_label)
        _count_axis(ax.xaxis, max(cost.values()))
        ax.margins(0.12)
        ax.set_xlim(left=0)
        _no_negatives(ax)
    axes[0].set_ylabel(label)
    _legend(figure, axes)
    return figure


def tasks(scores: Mapping[str, Mapping[str, tuple[float, float, float]]], label: str) -> Figure | None:
    """The scores of models task by task: model → task → (median, lowest, highest), shares; a column a task."""
    names = list(dict.fromkeys(task for by_task in scores.values() for task in by_task))
    if not names:
        return None
    figure, (ax,) = _figure(1, 1, height=3.6)
    for index, (model, by_task) in enumerate(scores.items()):
        offset = 0.5 * ((index + 0.5) / len(scores) - 0.5)
        for number, task in enumerate(names):
            if task in by_task:
                median, *ends = by_task[task]
                _point(ax, number + offset, median, (ends[0], ends[1]), index, model)
    ax.set_xticks(range(len(names)), names)
    ax.set_xlim(-0.5, len(names) - 0.5)
    ax.grid(axis="x", visible=False)
    ax.set_ylabel(label)
    _legend(figure, [ax])
    return figure


# --- parts ---


def _figure(rows: int, columns: int, height: float = 3.2, **options: Any) -> tuple[Figure, list[Axes]]:
    # Figure without pyplot: always the Agg canvas, and no global state in the caller's process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, height * rows + 0.5), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def _points(metrics: Metrics, split: str, name: str, factor: float = 1.0) -> Points:
    return [(step, factor * value) for step, value in metrics.get(split, {}).get(name, ())]


def _point(
    ax: Axes, x: float, share: float, ends: tuple[float, float] | None, index: int, label: str
) -> None:
    """A model's marker at a share of one, with a bar from the lowest to the highest where there are two ends."""
    look: dict[str, Any] = {"color": COLOURS[index % 6], "marker": MARKERS[index % 6]}
    ax.scatter(x, 100 * share, s=110, clip_on=False, zorder=3, label=label, **look)
    if ends is not None and ends[0] < ends[1]:
        bar = [[100 * (share - ends[0])], [100 * (ends[1] - share)]]
        ax.errorbar(x, 100 * share, bar, color=look["color"], capsize=5, elinewidth=1.8, fmt="none")


def _share(metrics: Metrics, name: str, title: str, teacher: float | None = None) -> Figure | None:
    if not any(name in split for split in metrics.values()):
        return None
    figure, (ax,) = _figure(1, 1, height=4.0)
    _draw_splits(ax, title, metrics, name, factor=100.0)
    if teacher is not None:
        label = f"teacher ({human_percent(teacher)})"
        ax.axhline(100 * teacher, color=GREEN, linestyle="--", label=label)
    _no_negatives(ax)
    _legend(figure, [ax])
    return figure


def _draw_splits(ax: Axes, title: str, metrics: Metrics, name: str, factor: float = 1.0) -> None:
    """A metric in training, faint as logged and smoothed, and on held-out text."""
    train = _points(metrics, "train", name, factor)
    if len(train) < 20:
        _line(ax, train, color=BLUE, label="training")
    else:
        _line(ax, train, color=BLUE, alpha=0.25, linewidth=1.0)
        _line(ax, _smooth(train), color=BLUE, label="training, smoothed")
    validation = _points(metrics, "validation", name, factor)
    look: dict[str, Any] = {"color": VERMILION, "linewidth": 1.5, "marker": "o", "markersize": 4.5}
    _line(ax, validation, label="held-out text", clip_on=False, **look)
    _finish(ax, title)


def _line(ax: Axes, points: Points, **look: Any) -> None:
    if points:
        ax.plot(*zip(*points, strict=True), **look)


def _smooth(points: Points) -> Points:
    """A centred mean over a fortieth of the run.

    At the start, where curves are steep, the window is narrowed on both sides so that the mean does not bend
    away from them; at the end, where they are flat, it is only cut off.
    """
    half = len(points) // 80
    sums = [0.0, *itertools.accumulate(value for _, value in points)]
    smoothed = []
    for i, (step, _) in enumerate(points):
        first, last = i - min(half, i), min(i + min(half, i), len(points) - 1)
        smoothed.append((step, (sums[last + 1] - sums[first]) / (last + 1 - first)))
    return smoothed


def _finish(ax: Axes, title: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.set_title(title)
    ax.set_xlabel("Optimiser step")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _log_if_wide(ax: Axes, points: Points) -> bool:
    """Makes the axis logarithmic, with ticks at 1, 2 and 5, if the points span more than a factor of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = [value for _, value in points]
    if min(values) <= 0 or max(values) <= 10 * min(values):
        return False
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    return True


def _count_axis(axis: Axis, largest: float) -> None:
    """Ticks in one unit for the whole axis: 0.5 M, 1 M, not 500 k, 1.00 M."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    units = ((1e9, " G"), (1e6, " M"), (1e3, " k"), (1.0, ""))
    scale, unit = next((unit for unit in units if largest >= unit[0]), units[-1])
    axis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / scale:g}{unit if value else ''}"))


def _no_negatives(ax: Axes) -> None:
    """Cuts off what lies below zero, where no share can be."""
    ax.set_ylim(bottom=max(0.0, ax.get_ylim()[0]))


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend above all panels, where it can cover no curve."""
    entries: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        columns = len(entries) if sum(map(len, entries)) < 70 else 2
        figure.legend(list(entries.values()), list(entries), loc="outside upper center", ncols=columns)
