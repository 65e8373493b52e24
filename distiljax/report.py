"""What a run came to, for a person: the table of models, and `report.md` with facts, tables and plots."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distiljax import plots
from distiljax.errors import UserError
from distiljax.train import storage
from distiljax.train.format import (
    MISSING,
    human_bytes,
    human_count,
    human_number,
    human_percent,
    human_seconds,
)
from distiljax.train.metrics import read_metrics
from distiljax.train.run import CONFIG, EVALUATION, RESULT, read_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console


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


def retention_table(evaluation: Mapping[str, Any]) -> list[RetentionRow]:
    """One row a model of `evaluation`, what `distiljax.evaluate_models` returns, in its order.

    The first model is the reference: `share_kept` is a model's masked-LM accuracy as a share of the
    reference's, `speed_ratio` its tokens/s as a multiple of the reference's.
    """
    models = evaluation["models"]
    reference = models[0]
    return [
        RetentionRow(
            name=model["name"],
            parameters=_finite(model, "parameters"),
            bytes=_finite(model, "bytes"),
            tokens_per_second=_finite(model, "tokens_per_second"),
            speed_ratio=_ratio(model, reference, "tokens_per_second"),
            mlm_accuracy=_finite(model, "mlm_accuracy"),
            share_kept=_ratio(model, reference, "mlm_accuracy"),
            mlm_loss=_finite(model, "mlm_loss"),
            perplexity=_finite(model, "perplexity"),
            latency_ms=_finite(model, "latency_ms"),
        )
        for model in models
    ]


def print_retention_table(evaluation: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the table of models with rich, on standard output unless `console` is given."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns, cells = _retention_cells(evaluation)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        # Headings break where they may, so that the table fits 80 columns with the names whole.
        heading = column.replace("Parameters", "Params").replace("Masked-LM ", "Masked-LM\n")
        heading = heading.replace(" (", "\n(").replace("Share ", "Share\n")
        first = column == columns[0]
        table.add_column(heading, justify="left" if first else "right", vertical="bottom", no_wrap=True)
    for row in cells:
        table.add_row(*map(Text, row))
    (console or Console()).print(table)


def retention_markdown(evaluation: Mapping[str, Any]) -> str:
    """The table of models as a Markdown table."""
    return markdown_table(*_retention_cells(evaluation))


def _retention_cells(evaluation: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = retention_table(evaluation)
    speed = f"Speed (× {rows[0].name})"
    columns = ["Model", "Parameters", "Size", speed, "Masked-LM accuracy", "Share kept"]
    cells = [
        [
            row.name,
            human_count(row.parameters),
            human_bytes(row.bytes),
            human_times(row.speed_ratio),
            human_percent(row.mlm_accuracy),
            human_percent(row.share_kept),
        ]
        for row in rows
    ]
    return columns, cells


# --- a run, as read ---


@dataclass(frozen=True)
class Run:
    """A run directory as read.

    `result` is empty until the run is finished, `evaluation` until it is evaluated. `metrics` has only finite
    values.
    """

    label: str
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    metrics: plots.Metrics

    @property
    def is_distillation(self) -> bool:
        """Whether there is a teacher; else the run is masked-LM training."""
        return self.config["kind"] == "distill"

    @property
    def is_fine_tuning(self) -> bool:
        """Whether the run was on a task."""
        return self.config["kind"] == "finetune"

    @property
    def source(self) -> str:
        """The teacher, or the model that the training began with."""
        return self.config["teacher" if self.is_distillation else "model"]

    @property
    def last_step(self) -> int:
        """The last step logged, 0 before the first."""
        return max((points[-1][0] for split in self.metrics.values() for points in split.values()), default=0)

    @cached_property
    def best(self) -> Mapping[str, float]:
        """The best validation, and its step: that of the exported model. {} if none."""
        if self.result:
            return self.result["best"] or self.result["validation"]
        split = {name: dict(points) for name, points in self.metrics.get("validation", {}).items()}
        # As in training, the very start is no candidate.
        losses = {step: loss for step, loss in split.get("loss", {}).items() if step}
        if not losses:
            return {}
        step = min(losses, key=losses.__getitem__)
        return {"step": step} | {name: values[step] for name, values in split.items() if step in values}


def read_run(path: str | os.PathLike[str], label: str = "") -> Run:
    """Reads a run directory, local or remote; `label` is what the report calls it, by default the directory's name.

    Raises UserError where it is no run's or has a file that cannot be read.
    """
    path = storage.as_path(path)
    config, result, evaluation = (read_json(path / name) for name in (CONFIG, RESULT, EVALUATION))
    if not config or config.get("kind") not in ("distill", "pretrain", "finetune"):
        raise UserError(
            f"{path} is no run directory (no {CONFIG} of one); give the --workdir of a run of pretrain, distill or "
            "finetune"
        )
    metrics: dict[str, dict[str, plots.Points]] = {}
    for split, names in read_metrics(path).items():
        for name, points in names.items():
            if finite := [(step, value) for step, value in points if math.isfinite(value)]:
                metrics.setdefault(split, {})[name] = finite
    return Run(label or _name(path), config, result or {}, evaluation or {}, metrics)


def _name(path: str | os.PathLike[str]) -> str:
    return storage.absolute(path).rpartition("/")[2] if storage.is_remote(path) else Path(path).resolve().name


# --- the report ---


def write_report(run_dirs: Sequence[str | os.PathLike[str]], out_dir: str | os.PathLike[str]) -> Path:
    """Writes `out_dir/report.md` with its plots in `out_dir/plots` and returns the path of report.md.

    `run_dirs`: at least one run directory, in the order to be told (a teacher's adaptation, then the
    distillation); runs of one kind are also compared. Runs that `distiljax evaluate` has evaluated get the
    table of models, and only what there is data for is shown. All of these directories may be remote. Raises
    UserError for input that is missing or cannot be read.
    """
    if not run_dirs:
        raise UserError("no run to report on; give at least one run directory")
    names = [_name(path) for path in run_dirs]
    labels = names if len(set(names)) == len(names) else [str(path) for path in run_dirs]
    runs = [read_run(path, label) for path, label in zip(run_dirs, labels, strict=True)]
    try:
        with storage.writing(out_dir) as directory:
            (directory / "plots").mkdir(exist_ok=True)
            _write(runs, directory)
    except OSError as error:
        raise UserError(
            f"cannot write to {out_dir}: {error.strerror or error}; give another folder"
        ) from error
    return storage.as_path(out_dir) / "report.md"


def _write(runs: Sequence[Run], out_dir: Path) -> None:
    """Makes report.md in `out_dir`, and the plots in its `plots`."""
    directory = out_dir / "plots"
    distillations = [run for run in runs if run.is_distillation]
    title = "Distillation report" if distillations else "Training report"
    sections = [f"# {title}", _headline((distillations or runs)[-1])]
    with plots.style():
        prefixes = [f"{number}-" if len(runs) > 1 else "" for number in range(1, len(runs) + 1)]
        for run, prefix in zip(runs, prefixes, strict=True):
            if run.evaluation:
                sections += _evaluation_section(run, directory, prefix)
        for run, prefix in zip(runs, prefixes, strict=True):
            sections += _run_section(run, directory, prefix)
        if len(distillations) > 1:
            sections += _comparison_section(distillations, directory, "Distillation runs compared")
        trainings = [run for run in runs if not (run.is_distillation or run.is_fine_tuning)]
        if len(trainings) > 1:
            sections += _comparison_section(trainings, directory, "Masked-LM training runs compared")
    storage.write_text(out_dir / "report.md", "\n\n".join(sections) + "\n")


def _headline(run: Run) -> str:
    """The sentence to take away: from what, how much smaller, how much faster, how much kept."""
    if run.is_distillation and run.evaluation:
        teacher, student = retention_table(run.evaluation)[:2]
        facts = []
        if student.parameters and teacher.parameters:
            facts.append(f"has {smaller(student.parameters, teacher.parameters)}")
        if student.speed_ratio is not None:
            facts.append(f"runs at {human_times(student.speed_ratio)} the {teacher.name}'s speed")
        facts.append(
            f"keeps **{human_percent(student.share_kept)}** of the {teacher.name}'s masked-LM accuracy "
            f"({human_percent(student.mlm_accuracy)} against {human_percent(teacher.mlm_accuracy)})"
        )
        text = ", ".join(facts[:-1]) + " and " * (len(facts) > 1) + facts[-1]
        return f"The student distilled from `{run.source}` {text}."
    if run.is_fine_tuning:
        scores = f" and reached {_held_out(run.best)} on held-out examples" if run.best else ""
        return f"`{run.source}` was fine-tuned on {run.config['task']} for {_steps(run)} steps{scores}."
    accuracy = run.best.get("mlm_accuracy")
    reached = (
        f" and reached {human_percent(accuracy)} masked-LM accuracy on held-out text" if accuracy else ""
    )
    if not run.is_distillation:
        return f"`{run.source}` was trained by masked language modelling for {_steps(run)} steps{reached}."
    size = ""
    if run.result:
        size = f", {smaller(run.result['parameters'], run.result['teacher_parameters'])},"
    return (
        f"A student{size} was distilled from `{run.source}` for {_steps(run)} steps{reached}. "
        "How much of the teacher it keeps is not known yet: `distiljax evaluate` measures it."
    )


def _evaluation_section(run: Run, directory: Path, prefix: str) -> list[str]:
    rows = retention_table(run.evaluation)
    columns = ("Model", "Masked-LM loss (nats)", "Perplexity", "Tokens/s", "Latency")
    details = [
        [
            row.name,
            human_number(row.mlm_loss),
            human_number(row.perplexity),
            human_count(row.tokens_per_second),
            human_seconds(None if row.latency_ms is None else row.latency_ms / 1000),
        ]
        for row in rows
    ]
    figure = plots.quality(
        _column(rows, "mlm_accuracy"),
        {"Tokens a second": _column(rows, "tokens_per_second"), "Parameters": _column(rows, "parameters")},
    )
    caption = "Masked-LM accuracy against speed and against size: up is better, right is faster or bigger."
    return [
        f"## Evaluation: {run.label}",
        retention_markdown(run.evaluation),
        _evaluation_note(run.evaluation, rows),
        markdown_table(columns, details),
        *plot_section(
            figure, directory / f"{prefix}quality.png", "### Quality against speed and size", caption
        ),
    ]


def _evaluation_note(evaluation: Mapping[str, Any], rows: Sequence[RetentionRow]) -> str:
    """On what and where the figures were measured, and how far chance may have moved them."""
    data, count = evaluation["data"], evaluation["data"]["masked_tokens"]
    # A proportion's 95 % interval by the normal approximation, for the accuracy where it is widest.
    widest = max(1.96 * math.sqrt(p * (1 - p) / count) for p in _column(rows, "mlm_accuracy").values())
    return (
        f"Accuracy: on {count:,} masked tokens of held-out text from `{data['source']}`; that many fix it to "
        f"± {100 * widest:.1f} points (95 % confidence). Share kept: accuracy as a share of the "
        f"{rows[0].name}'s. Speed: of the encoder, in {evaluation['dtype']}, on rows of {data['seq_len']:,} "
        f"tokens; latency: of one such row. Machine: {evaluation['machine']}."
    )


LOSSES_CAPTION = (
    "Each loss term against the optimiser step: training as logged (faint) and smoothed, and held-out text; "
    "a scale is logarithmic where the loss falls more than tenfold."
)
ACCURACY_CAPTION = "Share of masked tokens that the model names, in training and on held-out text."
TASK_ACCURACY_CAPTION = (
    "Share of examples (words, spans) that are right, in training and on held-out examples."
)
AGREEMENT_CAPTION = "How often the student's first choice (of a word, of a label) is also the teacher's."
OPTIMISATION_CAPTION = "The learning-rate schedule and the norm of the gradient before clipping."
THROUGHPUT_CAPTION = "Tokens a second over the run and the share of each step spent waiting for data."


def _run_section(run: Run, directory: Path, prefix: str) -> list[str]:
    kind = {"distill": "Distillation", "pretrain": "Masked-LM training", "finetune": "Fine-tuning"}[
        run.config["kind"]
    ]
    sections = [f"## {kind}: {run.label}"]
    if not run.result:
        sections.append(f"This run has not finished; what follows is as of step {run.last_step:,}.")
    sections.append(markdown_table(("", ""), _facts(run)))
    if not run.metrics:
        return [*sections, "Nothing has been logged yet."]
    metrics, accuracy_caption, teacher = run.metrics, ACCURACY_CAPTION, None
    if run.is_distillation and run.evaluation:
        teacher = retention_table(run.evaluation)[0].mlm_accuracy
        accuracy_caption += " The dashed line is the teacher's in the evaluation."
    for name, title, caption, figure in (
        ("losses", "Losses", LOSSES_CAPTION, plots.losses(metrics)),
        ("accuracy", "Masked-LM accuracy", accuracy_caption, plots.accuracy(metrics, teacher)),
        ("task-accuracy", "Accuracy", TASK_ACCURACY_CAPTION, plots.task_accuracy(metrics)),
        ("agreement", "Agreement with the teacher", AGREEMENT_CAPTION, plots.agreement(metrics)),
        ("optimisation", "Optimisation", OPTIMISATION_CAPTION, plots.optimisation(metrics)),
        ("throughput", "Throughput", THROUGHPUT_CAPTION, plots.throughput(metrics)),
    ):
        sections += plot_section(figure, directory / f"{prefix}{name}.png", f"### {title}", caption)
    return sections


def _facts(run: Run) -> list[tuple[str, str]]:
    """What the run was, from its config and its result, as far as there is one."""
    config, result = run.config, run.result
    data = config["data"]
    source = data["source"]
    facts = [("Teacher" if run.is_distillation else "Started from", f"`{run.source}`")]
    if run.is_fine_tuning:
        facts += [("Task", config["task"]), ("Data", f"`{source}`" if source else "the preset's")]
        facts += [("Teacher", f"`{config['teacher']}`")] if config["teacher"] else []
        facts += [("Longest row", f"{data['max_length']:,} tokens")]
    else:
        facts += [("Text", f"`{source if isinstance(source, str) else ', '.join(source)}`")]
        facts += [("Sequence length", f"{data['seq_len']:,}")]
    facts += [("Rows a step", f"{config['batch_size']:,}"), ("Optimiser steps", _steps(run))]
    if run.best:
        facts.append((f"On held-out text, best step ({run.best['step']:,})", _held_out(run.best)))
    if result:
        parameters = human_count(result["parameters"])
        if run.is_distillation:
            parameters += f" (teacher {human_count(result['teacher_parameters'])})"
        speed = [value for _, value in run.metrics.get("train", {}).get("tokens_per_second", ())]
        if result["start"]:
            facts.append(("On held-out text, before the first step", _held_out(result["start"])))
        facts += [
            ("Parameters", parameters),
            ("Tokens", human_count(result["tokens"])),
            ("Wall time", human_seconds(result["seconds"])),
            ("Of this, compilation", human_seconds(result.get("compile_seconds"))),
            (
                "Training speed (median)",
                f"{human_count(statistics.median(speed) if speed else None)} tokens/s",
            ),
            ("Machine", result["machine"]),
        ]
    return facts


def _held_out(metrics: Mapping[str, float]) -> str:
    shown = (
        ("mlm_accuracy", "masked-LM accuracy", human_percent),
        ("teacher_agreement", "agreement with the teacher", human_percent),
        ("loss", "loss", human_number),
    )
    told = {key: f"{name} {show(metrics[key])}" for key, name, show in shown if key in metrics}
    # What else there is are the metrics of a task.
    scores = [
        f"{name.replace('_', ' ')} {human_percent(value)}"
        for name, value in metrics.items()
        if name not in told and name != "step" and not name.startswith("loss")
    ]
    return ", ".join([*scores, *told.values()])


def _comparison_section(runs: Sequence[Run], directory: Path, title: str) -> list[str]:
    figure = plots.comparison([(run.label, run.metrics) for run in runs])
    caption = "The runs on held-out text, step by step; the same batch size is needed for a fair reading."
    name = "compare-distillation" if runs[0].is_distillation else "compare-training"
    return plot_section(figure, directory / f"{name}.png", f"## {title}", caption)


# --- small things ---


def _finite(model: Mapping[str, Any], key: str) -> Any:
    value = model.get(key)
    return value if value is not None and math.isfinite(value) else None


def _ratio(model: Mapping[str, Any], reference: Mapping[str, Any], key: str) -> float | None:
    value, base = _finite(model, key), _finite(reference, key)
    return value / base if value is not None and base else None


def _column(rows: Sequence[RetentionRow], key: str) -> dict[str, float]:
    """The models of which a figure is known, and the figure."""
    return {row.name: value for row in rows if (value := getattr(row, key)) is not None}


def human_times(ratio: float | None) -> str:
    """A ratio as a multiple: 1.871 → "1.87 ×"."""
    return MISSING if ratio is None else f"{ratio:.2f} ×"


def smaller(parameters: int, reference: int) -> str:
    """A model's size beside the reference's, in words."""
    change = 100 * (1 - parameters / reference)
    difference = f"{abs(change):.0f} % {'smaller' if change >= 0 else 'larger'}"
    return f"{human_count(parameters)} parameters against {human_count(reference)} ({difference})"


def _steps(run: Run) -> str:
    """The steps done; of an unfinished run also those planned, where the config says so in steps."""
    if run.result:
        return f"{run.result['steps']:,}"
    return f"{run.last_step:,} of {run.config['steps']:,}" if run.config["steps"] else f"{run.last_step:,}"


def plot_section(figure: Figure | None, path: Path, heading: str, caption: str) -> list[str]:
    """Saves a figure, and gives the paragraphs that show it in a document one directory above; [] without one."""
    if figure is None:
        return []
    plots.save(figure, path)
    return [heading, f"![{heading.lstrip('# ')}]({path.parent.name}/{path.name})", f"*{caption}*"]


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column left-aligned, the others right-aligned unless the table has two."""
    align = ["---", *("---:" if len(columns) > 2 else "---" for _ in columns[1:])]
    lines = [columns, align, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
