"""What a run came to, for a person: the table of models, the plots, and `report.md` that has both."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distiljax.errors import UserError
from distiljax.train.format import (
    MISSING,
    human_bytes,
    human_count,
    human_number,
    human_percent,
    human_seconds,
)
from distiljax.train.metrics import METRICS_FILE, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from rich.console import Console

EVALUATION_FILE = "evaluation.json"
INITIAL_STUDENT = "student before distillation"

# Okabe and Ito's palette: told apart with any of the common colour-vision deficiencies.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
STYLE: dict[Any, Any] = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
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

Points = Sequence[tuple[int, float]]


# --- the table of models ---


@dataclass(frozen=True)
class RetentionRow:
    """One evaluated model; the ratios are against the evaluation's first model. None: not known."""

    name: str
    parameters: int | None
    bytes: int | None
    tokens_per_second: float | None
    speed_ratio: float | None
    mlm_accuracy: float | None
    share_kept: float | None
    mlm_loss: float | None
    perplexity: float | None
    latency_ms: float | None


RETENTION_COLUMNS = ("Model", "Parameters", "Size", "Speed (× teacher)", "Masked-LM accuracy", "Share kept")


def retention_table(evaluation: Mapping[str, Any]) -> list[RetentionRow]:
    """One row a model of `evaluation` (the content of evaluation.json), in its order.

    The first model is the reference: `share_kept` is a model's masked-LM accuracy as a share of the
    reference's, `speed_ratio` its tokens/s as a multiple of the reference's. Raises UserError where there is
    no list of models with names.
    """
    models = evaluation.get("models")
    if (
        not isinstance(models, list)
        or not all(isinstance(m, Mapping) and "name" in m for m in models)
        or not models
    ):
        raise UserError(
            'evaluation has no "models", a list of objects with "name"; make it with `distiljax evaluate`'
        )
    reference = models[0]
    return [
        RetentionRow(
            name=str(model["name"]),
            parameters=_number(model, "parameters"),
            bytes=_number(model, "bytes"),
            tokens_per_second=_number(model, "tokens_per_second"),
            speed_ratio=_ratio(_number(model, "tokens_per_second"), _number(reference, "tokens_per_second")),
            mlm_accuracy=_number(model, "mlm_accuracy"),
            share_kept=_ratio(_number(model, "mlm_accuracy"), _number(reference, "mlm_accuracy")),
            mlm_loss=_number(model, "mlm_loss"),
            perplexity=_number(model, "perplexity"),
            latency_ms=_number(model, "latency_ms"),
        )
        for model in models
    ]


def print_retention_table(evaluation: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the table of models with rich, on standard output unless `console` is given."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in RETENTION_COLUMNS:
        table.add_column(column, justify="left" if column == "Model" else "right", vertical="middle")
    for row in retention_table(evaluation):
        table.add_row(*(Text(cell) for cell in _cells(row)))
    (console or Console()).print(table)


def retention_markdown(evaluation: Mapping[str, Any]) -> str:
    """The table of models as a Markdown table."""
    return _markdown_table(RETENTION_COLUMNS, [_cells(row) for row in retention_table(evaluation)])


def _cells(row: RetentionRow) -> list[str]:
    return [
        row.name,
        human_count(row.parameters),
        human_bytes(row.bytes),
        _times(row.speed_ratio),
        human_percent(row.mlm_accuracy),
        human_percent(row.share_kept),
    ]


# --- reading ---


@dataclass(frozen=True)
class Run:
    """A run directory as read: what is missing is empty."""

    path: Path
    label: str
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, list[tuple[int, float]]]]

    @property
    def kind(self) -> str:
        """The command, "distill" or "pretrain": by result.json, else what is logged, else the config."""
        if "kind" in self.result:
            return str(self.result["kind"])
        if train := self.metrics.get("train"):
            return "distill" if {"loss_ce", "teacher_agreement"} & train.keys() else "pretrain"
        return "distill" if _lookup(self.config, "teacher") else "pretrain"

    def points(self, split: str, name: str) -> Points:
        """The finite values of a metric as (step, value)."""
        return [(s, v) for s, v in self.metrics.get(split, {}).get(name, []) if math.isfinite(v)]

    @property
    def last_step(self) -> int:
        """The last step logged, 0 before the first."""
        return max((points[-1][0] for names in self.metrics.values() for points in names.values()), default=0)


def read_run(path: str | os.PathLike[str], label: str = "") -> Run:
    """Reads a run directory.

    Raises UserError where it is missing, is no run's, or has a file that cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"run directory {str(path)!r} does not exist; give the --workdir of a training run")
    if not any((path / name).is_file() for name in ("config.json", METRICS_FILE, "result.json")):
        raise UserError(
            f"{str(path)!r} is not a run directory: no config.json, {METRICS_FILE} or result.json; "
            "give the --workdir of a training run"
        )
    config, result = (
        _read_json(path / name) if (path / name).is_file() else {} for name in ("config.json", "result.json")
    )
    try:
        metrics = read_metrics(path)
    except OSError as error:
        raise UserError(f"cannot read {str(path / METRICS_FILE)!r}: {error.strerror}") from error
    return Run(path, label or path.resolve().name, config, result, metrics)


def read_evaluation(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads an evaluation.json. Raises UserError where it is missing or not one."""
    evaluation = _read_json(Path(path))
    retention_table(evaluation)
    return evaluation


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{str(path)!r} is not JSON ({error}); write it again or remove it") from error
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} is a JSON {type(content).__name__}, expected an object")
    return content


# --- the report ---


def write_report(
    run_dirs: Sequence[str | os.PathLike[str]],
    out_dir: str | os.PathLike[str],
    evaluation: Mapping[str, Any] | str | os.PathLike[str] | None = None,
) -> Path:
    """Writes `out_dir/report.md` with its plots in `out_dir/plots` and returns the path of report.md.

    `run_dirs`: run directories in the order to be told (a teacher's adaptation, then the distillation); runs
    of one kind are also compared. `evaluation`: the content or the path of an evaluation.json; None takes the
    one in the last run directory that has one. Only what there is data for is shown. Raises UserError for
    input that is missing or cannot be read.
    """
    import matplotlib

    if not run_dirs and evaluation is None:
        raise UserError("nothing to report on; give at least one run directory")
    runs = [read_run(path, label) for path, label in zip(run_dirs, _labels(run_dirs), strict=True)]
    if evaluation is None:
        found = [run.path / EVALUATION_FILE for run in runs if (run.path / EVALUATION_FILE).is_file()]
        evaluation = read_evaluation(found[-1]) if found else None
    elif not isinstance(evaluation, Mapping):
        evaluation = read_evaluation(evaluation)

    plots = Path(out_dir) / "plots"
    try:
        plots.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {str(out_dir)!r}: {error.strerror}; give another folder") from error
    with matplotlib.rc_context(STYLE):
        sections = [f"# {_title(runs)}", _headline(runs, evaluation)]
        if evaluation is not None:
            sections += _evaluation_section(evaluation, plots)
        for number, run in enumerate(runs, 1):
            prefix = f"{number}-{_slug(run.label)}-" if len(runs) > 1 else ""
            sections += _run_section(run, evaluation, plots, prefix)
        for kind in dict.fromkeys(run.kind for run in runs):
            if len(same := [run for run in runs if run.kind == kind]) > 1:
                sections += _comparison_section(same, plots)
    report = Path(out_dir) / "report.md"
    temporary = report.with_name("report.md.tmp")
    temporary.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    os.replace(temporary, report)
    return report


def _title(runs: Sequence[Run]) -> str:
    if any(run.kind == "distill" for run in runs):
        return "Distillation report"
    return "Training report" if runs else "Evaluation report"


def _headline(runs: Sequence[Run], evaluation: Mapping[str, Any] | None) -> str:
    """The one sentence to take away: from what, how much smaller, how much faster, how much kept."""
    run = next((r for r in reversed(runs) if r.kind == "distill"), runs[-1] if runs else None)
    source = _name(_lookup(run.config, "teacher")) if run and run.kind == "distill" else None
    if evaluation is not None and len(rows := retention_table(evaluation)) > 1:
        teacher = rows[0]
        student = next((r for r in rows if r.name == "student"), rows[-1])
        facts = []
        if student.parameters and teacher.parameters:
            facts.append(_smaller(student.parameters, teacher.parameters))
        if student.speed_ratio is not None:
            facts.append(f"runs at {_times(student.speed_ratio)} the {teacher.name}'s speed")
        if student.share_kept is not None:
            facts.append(
                f"keeps **{human_percent(student.share_kept)}** of the {teacher.name}'s masked-LM accuracy "
                f"({human_percent(student.mlm_accuracy)} against {human_percent(teacher.mlm_accuracy)})"
            )
        subject = f"The student distilled from {_code(source)}" if source else f"The {student.name}"
        return f"{subject} {_and(facts)}." if facts else f"{subject} was evaluated."
    if run is None:
        return "One model was evaluated."
    accuracy = _last(run.points("validation", "mlm_accuracy"))
    accuracy = _number(_mapping(run.result.get("validation")), "mlm_accuracy") or accuracy
    reached = (
        f" and reached {human_percent(accuracy)} masked-LM accuracy on held-out text" if accuracy else ""
    )
    if run.kind != "distill":
        start = _name(_lookup(run.config, "model"))
        subject = f"{_code(start)} was trained" if start else "A model was trained"
        return f"{subject} by masked language modelling for {_steps(run)}{reached}."
    size = ""
    if (small := _number(run.result, "parameters")) and (big := _number(run.result, "teacher_parameters")):
        size = f", {_smaller(small, big).removeprefix('has ')},"
    return (
        f"A student{size} was distilled from {_code(source) or 'its teacher'} for {_steps(run)}{reached}. "
        "How much of the teacher it keeps is not known yet: `distiljax evaluate` measures it."
    )


def _evaluation_section(evaluation: Mapping[str, Any], plots: Path) -> list[str]:
    rows = retention_table(evaluation)
    sections = [retention_markdown(evaluation)]
    sections.append(_evaluation_note(evaluation, rows))
    if any(v is not None for row in rows for v in (row.mlm_loss, row.perplexity, row.latency_ms)):
        columns = ("Model", "Masked-LM loss (nats)", "Perplexity", "Tokens/s", "Latency")
        sections.append(_markdown_table(columns, [_detail_cells(row) for row in rows]))
    if (figure := _plot_quality(rows)) is not None:
        caption = (
            "Masked-LM accuracy against speed and against size: up is better, right is faster or bigger."
        )
        sections += _image(figure, plots, "quality", "Quality against speed and size", caption)
    return sections


def _evaluation_note(evaluation: Mapping[str, Any], rows: Sequence[RetentionRow]) -> str:
    """On what and where the figures were measured, and how far chance may have moved them."""
    data = _mapping(evaluation.get("data"))
    count = _number(data, "masked_tokens")
    parts = ["Measured", f"on {count:,} masked tokens of" if count else "on"]
    parts.append(_code(_name(data.get("source"))) or "held-out text")
    if evaluation.get("machine"):
        parts.append(f"({evaluation['machine']})")
    note = " ".join(parts) + "."
    accuracies = [row.mlm_accuracy for row in rows if row.mlm_accuracy is not None]
    if count and accuracies:
        # A proportion's 95 % interval by the normal approximation, for the accuracy where it is widest.
        widest = max(1.96 * math.sqrt(max(p * (1 - p), 0.0) / count) for p in accuracies)
        note += f" That many tokens fix an accuracy to ± {100 * widest:.1f} points (95 % confidence)."
    return f"{note} Share kept: accuracy as a share of the {rows[0].name}'s."


def _detail_cells(row: RetentionRow) -> list[str]:
    latency = None if row.latency_ms is None else row.latency_ms / 1000
    return [
        row.name,
        human_number(row.mlm_loss),
        human_number(row.perplexity),
        human_count(row.tokens_per_second),
        human_seconds(latency),
    ]


def _run_section(run: Run, evaluation: Mapping[str, Any] | None, plots: Path, prefix: str) -> list[str]:
    kind = {"distill": "Distillation", "pretrain": "Masked-LM training"}.get(run.kind, run.kind)
    sections = [f"## {kind}: {_escape(run.label)}"]
    if not run.result:
        sections.append(f"This run has not finished; what follows is as of step {run.last_step:,}.")
    sections.append(_markdown_table(("", ""), [list(fact) for fact in _facts(run)]))
    baselines = retention_table(evaluation) if evaluation is not None and run.kind == "distill" else []
    if not run.metrics:
        return [*sections, "Nothing has been logged yet."]
    drawings = (
        ("losses", "Losses", _LOSS_CAPTION, _plot_losses(run)),
        ("accuracy", "Masked-LM accuracy", _accuracy_caption(baselines), _plot_accuracy(run, baselines)),
        ("agreement", "Agreement with the teacher", _AGREEMENT_CAPTION, _plot_agreement(run)),
        (
            "optimisation",
            "Learning rate and gradient norm",
            _OPTIMISATION_CAPTION,
            _plot_panels(run, OPTIMISATION),
        ),
        ("throughput", "Throughput", _THROUGHPUT_CAPTION, _plot_panels(run, THROUGHPUT)),
    )
    for name, title, caption, figure in drawings:
        if figure is not None:
            sections += [
                f"### {title}",
                *_image(figure, plots, prefix + name, f"{title}, {run.label}", caption),
            ]
    return sections


def _facts(run: Run) -> list[tuple[str, str]]:
    """What the run was, from config.json and result.json, as far as they say."""
    config, result = run.config, run.result
    seconds = _number(result, "seconds") or _last(run.points("train", "seconds"))
    tokens = _number(result, "tokens")
    machine = _lookup(result, "machine")
    batch = _lookup(config, "batch_size", "global_batch_size", "train.batch_size", "data.batch_size")
    validation = _mapping(result.get("validation"))
    held_out = [
        f"{name} {show(value)}"
        for key, name, show in (
            ("mlm_accuracy", "masked-LM accuracy", human_percent),
            ("teacher_agreement", "agreement with the teacher", human_percent),
            ("loss", "loss", human_number),
        )
        if (value := _number(validation, key)) is not None
    ]
    parameters, teacher_parameters = _number(result, "parameters"), _number(result, "teacher_parameters")
    of_teacher = f" (teacher {human_count(teacher_parameters)})" if teacher_parameters else ""
    best = _number(result, "best_step")
    facts = [
        (
            "Teacher" if run.kind == "distill" else "Started from",
            _code(_name(_lookup(config, "teacher" if run.kind == "distill" else "model"))),
        ),
        ("Parameters", human_count(parameters) + of_teacher if parameters else ""),
        ("Training text", _code(_name(_lookup(config, "data.train.source")))),
        ("Held-out text", _code(_name(_lookup(config, "data.validation.source")))),
        ("Sequence length", _text(_lookup(config, "data.seq_len"))),
        ("Optimiser steps", _steps(run).removesuffix(" steps")),
        ("Examples a step", _text(batch)),
        ("Tokens", human_count(tokens) if tokens else ""),
        ("Wall time", human_seconds(seconds) if seconds else ""),
        ("Mean speed", f"{human_count(tokens / seconds)} tokens/s" if tokens and seconds else ""),
        ("Best step", f"{int(best):,}" if best is not None else ""),
        ("On held-out text", ", ".join(held_out)),
        ("Machine", _text(machine)),
    ]
    return [(name, value) for name, value in facts if value]


def _comparison_section(runs: Sequence[Run], plots: Path) -> list[str]:
    figure = _plot_comparison(runs)
    if figure is None:
        return []
    kind = runs[0].kind
    title = "Distillation runs compared" if kind == "distill" else "Masked-LM training runs compared"
    caption = "The runs on held-out text, step by step; the same batch size is needed for a fair reading."
    return [f"## {title}", *_image(figure, plots, f"compare-{_slug(kind)}", title, caption)]


# --- plots ---

LOSS_TITLES = {
    "loss": "Total loss",
    "loss_ce": "Soft targets, $L_{ce}$",
    "loss_mlm": "Masked LM, $L_{mlm}$ (nats)",
    "loss_cos": "Cosine, $L_{cos}$",
    "loss_mse": "Logits, $L_{mse}$",
}
OPTIMISATION = (("learning_rate", "Learning rate", 1.0), ("grad_norm", "Gradient norm", 1.0))
THROUGHPUT = (
    ("tokens_per_second", "Tokens a second", 1.0),
    ("data_wait", "Waiting for data (% of the step)", 100.0),
)

_LOSS_CAPTION = (
    "Each loss term against the optimiser step: training as logged (faint) and smoothed, and held-out text; "
    "a scale is logarithmic where the loss falls more than tenfold."
)
_AGREEMENT_CAPTION = "How often the student's most likely word at a masked position is also the teacher's."
_OPTIMISATION_CAPTION = "The learning-rate schedule and the norm of the gradient before clipping."
_THROUGHPUT_CAPTION = "Tokens a second over the run and the share of each step spent waiting for data."


def _accuracy_caption(baselines: Sequence[RetentionRow]) -> str:
    caption = "Share of masked tokens that the model names, in training and on held-out text"
    return caption + ("; dashed lines are the evaluation's figures for other models." if baselines else ".")


def _figure(
    rows: int, columns: int, width: float = 9.0, height: float = 3.2, **axes: Any
) -> tuple[Figure, list[Axes]]:
    # Figure without pyplot: always the Agg canvas, and no global state in the caller's process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **axes)
    return figure, list(grid.flat)


def _plot_losses(run: Run) -> Figure | None:
    names = [name for name in LOSS_TITLES if run.points("train", name) or run.points("validation", name)]
    if len(names) == 2 and "loss" in names:
        names.remove("loss")  # the only term is the total
    if not names:
        return None
    columns = min(2, len(names))
    figure, axes = _figure(math.ceil(len(names) / columns), columns)
    for name, ax in zip(names, axes, strict=False):
        _draw_splits(ax, run.points("train", name), run.points("validation", name))
        ax.set_title(LOSS_TITLES[name])
        values = [v for _, v in (*_smooth(run.points("train", name)), *run.points("validation", name))]
        if min(values) > 0 and max(values) > 10 * min(values):
            _log_axis(ax)
        _step_axis(ax, run.last_step)
    for ax in axes[len(names) :]:
        ax.set_visible(False)
    _legend(figure, axes[: len(names)])
    return figure


def _plot_accuracy(run: Run, baselines: Sequence[RetentionRow]) -> Figure | None:
    figure = _plot_share(run, "mlm_accuracy", "Masked tokens named correctly (%)")
    if figure is None:
        return None
    ax = figure.axes[0]
    lines = [(row, GREEN, "--") for row in baselines[:1]]
    lines += [(row, PURPLE, ":") for row in baselines[1:] if row.name == INITIAL_STUDENT]
    for row, colour, dashes in lines:
        if row.mlm_accuracy is not None:
            label = f"{row.name} ({human_percent(row.mlm_accuracy)})"
            ax.axhline(100 * row.mlm_accuracy, color=colour, linestyle=dashes, label=label)
    _legend(figure, [ax])
    return figure


def _plot_agreement(run: Run) -> Figure | None:
    figure = _plot_share(run, "teacher_agreement", "Same word as the teacher (%)")
    if figure is not None:
        _legend(figure, figure.axes)
    return figure


def _plot_share(run: Run, name: str, title: str) -> Figure | None:
    train, validation = (
        [(s, 100 * v) for s, v in run.points(split, name)] for split in ("train", "validation")
    )
    if not train and not validation:
        return None
    figure, (ax,) = _figure(1, 1, height=4.0)
    _draw_splits(ax, train, validation)
    ax.set_title(title)
    _step_axis(ax, run.last_step)
    _from_zero(ax)
    return figure


def _plot_panels(run: Run, panels: Sequence[tuple[str, str, float]]) -> Figure | None:
    """One panel a training metric: (name, title, factor that the values are multiplied with)."""
    present = [(name, title, factor) for name, title, factor in panels if run.points("train", name)]
    if not present:
        return None
    figure, axes = _figure(1, len(present))
    for (name, title, factor), ax in zip(present, axes, strict=True):
        points = [(s, factor * v) for s, v in run.points("train", name)]
        if name == "learning_rate":
            ax.plot(*_xy(points), color=BLUE)
        else:
            _draw_splits(ax, points, [])
        ax.set_title(title)
        smoothed = [v for _, v in _smooth(points)]
        if name == "grad_norm" and min(smoothed) > 0 and max(smoothed) > 10 * min(smoothed):
            _log_axis(ax)
        else:
            ax.set_ylim(bottom=0)
        if name == "tokens_per_second":
            _count_axis(ax.yaxis, max(v for _, v in points))
        _step_axis(ax, run.last_step)
    return figure


def _plot_comparison(runs: Sequence[Run]) -> Figure | None:
    panels = [
        (name, title, factor)
        for name, title, factor in (
            ("mlm_accuracy", "Masked tokens named correctly (%)", 100.0),
            ("loss_mlm", LOSS_TITLES["loss_mlm"], 1.0),
        )
        if any(run.points("validation", name) for run in runs)
    ]
    if not panels:
        return None
    figure, axes = _figure(1, len(panels), height=3.6)
    for (name, title, factor), ax in zip(panels, axes, strict=True):
        for index, run in enumerate(runs):
            points = [(s, factor * v) for s, v in run.points("validation", name)]
            ax.plot(*_xy(points), color=_colour(index), marker="o", markersize=4, label=run.label)
        ax.set_title(title)
        _step_axis(ax, max(run.last_step for run in runs))
    _legend(figure, axes[:1])
    return figure


def _plot_quality(rows: Sequence[RetentionRow]) -> Figure | None:
    panels = [
        (name, title)
        for name, title in (("tokens_per_second", "Tokens a second"), ("parameters", "Parameters"))
        if any(getattr(row, name) is not None and row.mlm_accuracy is not None for row in rows)
    ]
    if not panels:
        return None
    figure, axes = _figure(1, len(panels), height=3.6, sharey=True)
    markers = "osD^vP"
    for (name, title), ax in zip(panels, axes, strict=True):
        for index, row in enumerate(rows):
            x, accuracy = getattr(row, name), row.mlm_accuracy
            if x is not None and accuracy is not None:
                look: dict[str, Any] = {
                    "color": _colour(index),
                    "marker": markers[index % len(markers)],
                    "label": row.name,
                }
                ax.scatter(x, 100 * accuracy, s=110, clip_on=False, zorder=3, **look)
        ax.set_xlabel(title)
        _count_axis(ax.xaxis, max(getattr(row, name) or 0 for row in rows))
        ax.margins(0.12)
        ax.set_xlim(left=0)
        _from_zero(ax)
    axes[0].set_ylabel("Masked-LM accuracy (%)")
    _legend(figure, axes)
    return figure


def _draw_splits(ax: Axes, train: Points, validation: Points) -> None:
    if train:
        if len(train) < 20:
            ax.plot(*_xy(train), color=BLUE, label="training")
        else:
            ax.plot(*_xy(train), color=BLUE, alpha=0.25, linewidth=1.0)
            ax.plot(*_xy(_smooth(train)), color=BLUE, label="training, smoothed")
    if validation:
        look: dict[str, Any] = {"color": VERMILION, "linewidth": 1.5, "marker": "o", "markersize": 4.5}
        ax.plot(*_xy(validation), label="held-out text", clip_on=False, **look)


def _smooth(points: Points) -> Points:
    """A centred mean over a fortieth of the run.

    At the start, where curves are steep, the window is narrowed on both sides so that the mean does not bend
    away from them; at the end, where they are flat, it is only cut off.
    """
    half = len(points) // 80
    sums = [0.0, *itertools.accumulate(v for _, v in points)]
    smoothed = []
    for i, (step, _) in enumerate(points):
        first, last = i - min(half, i), min(i + min(half, i), len(points) - 1)
        smoothed.append((step, (sums[last + 1] - sums[first]) / (last + 1 - first)))
    return smoothed


def _xy(points: Points) -> tuple[list[int], list[float]]:
    return [s for s, _ in points], [v for _, v in points]


def _colour(index: int) -> str:
    return (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)[index % 6]


def _log_axis(ax: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _step_axis(ax: Axes, last: int) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.set_xlabel("Optimiser step")
    ax.set_xlim(-0.015 * max(last, 1), 1.015 * max(last, 1))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{int(value):,}"))


def _count_axis(axis: Axis, largest: float) -> None:
    """Ticks in one unit for the whole axis: 0.5 M, 1 M, not 500 k, 1.00 M."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    scale, unit = next(
        ((s, u) for s, u in ((1e9, " G"), (1e6, " M"), (1e3, " k")) if largest >= s), (1.0, "")
    )
    axis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / scale:g}{unit if value else ''}"))


def _from_zero(ax: Axes) -> None:
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


def _image(figure: Figure, plots: Path, name: str, alt: str, caption: str) -> list[str]:
    temporary = plots / f".{name}.png.tmp"
    figure.savefig(temporary, format="png", dpi=STYLE["savefig.dpi"])
    os.replace(temporary, plots / f"{name}.png")
    return [f"![{_escape(alt)}](plots/{name}.png)", f"*{caption}*"]


# --- small things ---


def _number(values: Mapping[str, Any], key: str) -> Any:
    """A finite number, else None."""
    value = values.get(key)
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else None


def _ratio(value: float | None, reference: float | None) -> float | None:
    return None if value is None or not reference else value / reference


def _lookup(tree: Mapping[str, Any], *paths: str) -> Any:
    """The value at the first dotted path that has one, else None."""
    for path in paths:
        value: Any = tree
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value not in (None, "", {}, []):
            return value
    return None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _name(value: Any) -> str:
    """What a config calls a model or a corpus: itself, or the name or path in it."""
    if isinstance(value, Mapping):
        return _text(_lookup(value, "path", "name", "source"))
    return _text(value)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _last(points: Points) -> float | None:
    return points[-1][1] if points else None


def _times(ratio: float | None) -> str:
    return MISSING if ratio is None else f"{ratio:.2f} ×"


def _smaller(parameters: float, reference: float) -> str:
    change = 100 * (1 - parameters / reference)
    direction = f"{abs(change):.0f} % {'smaller' if change >= 0 else 'larger'}"
    return f"has {human_count(parameters)} parameters against {human_count(reference)} ({direction})"


def _steps(run: Run) -> str:
    if (done := _number(run.result, "steps")) is not None:
        return f"{done:,} steps"
    planned = _lookup(run.config, "steps", "total_steps", "train.steps", "num_steps")
    return (
        f"{run.last_step:,} of {planned:,} steps" if isinstance(planned, int) else f"{run.last_step:,} steps"
    )


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _code(text: str | None) -> str:
    return f"`{text}`" if text else ""


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("[", "\\[").replace("]", "\\]")


def _slug(text: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in text)


def _labels(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Each run's directory name; where two share it, with as many of its parents as tell them apart."""
    resolved = [Path(path).resolve() for path in paths]
    labels = [path.name for path in resolved]
    depth = 1
    while len(set(labels)) < len(set(resolved)):
        depth += 1
        labels = ["/".join(path.parts[-depth:]) for path in resolved]
    return labels


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column left-aligned, the others right-aligned unless the table has two."""
    align = ["---", *("---:" if len(columns) > 2 else "---" for _ in columns[1:])]
    lines = [columns, align, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
