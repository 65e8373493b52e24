"""What models are worth on tasks, for a person: tables of models and of tasks, the paper's, and comparison.md."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distiljax import plots
from distiljax.errors import UserError
from distiljax.report import human_times, markdown_table, plot_section, smaller
from distiljax.train import storage
from distiljax.train.format import MISSING, human_bytes, human_count, human_number, human_percent
from distiljax.train.run import write_json

if TYPE_CHECKING:
    from rich.console import Console

Comparison = Mapping[str, Any]
"""What `distiljax.compare` and `distiljax.evaluate_task` give; see `summarise` for the part with the scores."""

JSON, MARKDOWN = "comparison.json", "comparison.md"

TITLES = {
    "cola": "CoLA",
    "mnli": "MNLI",
    "mrpc": "MRPC",
    "qnli": "QNLI",
    "qqp": "QQP",
    "rte": "RTE",
    "sst2": "SST-2",
    "stsb": "STS-B",
    "wnli": "WNLI",
    "imdb": "IMDb",
    "squad": "SQuAD",
    "squad_v2": "SQuAD 2.0",
    "conll2003": "CoNLL-2003",
    "wnut17": "WNUT-17",
}
METRICS = {
    "f1": "F1",
    "macro_f1": "macro F1",
    "matthews": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "pearson_spearman": "Pearson-Spearman mean",
    "entity_f1": "entity F1",
    "squad_f1": "F1",
}

GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
# Sanh et al. 2019, table 1: development sets, medians of 5 runs; "Avg" is the mean of the nine.
PAPER = {
    "BERT-base (paper)": dict(zip(GLUE, (56.3, 84.7, 88.6, 91.8, 89.6, 69.3, 92.7, 89.0, 53.5), strict=True)),
    "DistilBERT (paper)": dict(
        zip(GLUE, (51.3, 82.1, 87.5, 89.2, 88.5, 59.9, 91.3, 86.9, 56.3), strict=True)
    ),
}


# --- the figures ---


def summarise(
    tasks: Sequence[Mapping[str, Any]], runs: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]
) -> dict[str, dict[str, Any]]:
    """What each model reached, and what it keeps of the first one.

    Args:
      tasks: of each `name` and `metrics`, of which the first is the task's score.
      runs: model → task → of each seed the metrics by name, shares of one.

    Returns:
      Model → `scores`: task → metric → {`values` (by seed), `median`, `min`, `max`, `share_kept` (of the first model's
      median; None where that is not above 0)}; `mean`: of the tasks' scores, None where the model lacks a task;
      `mean_min`, `mean_max`: over the seeds, where all tasks have as many; `share_kept`: of the first model's mean.
    """
    models: dict[str, dict[str, Any]] = {}
    for name, by_task in runs.items():
        scores = {
            task["name"]: {
                metric: _spread([run[metric] for run in by_task[task["name"]]])
                for metric in task["metrics"]
                if all(metric in run for run in by_task[task["name"]])
            }
            for task in tasks
            if by_task.get(task["name"])
        }
        models[name] = {"scores": scores, **_mean(tasks, scores)}
    reference = next(iter(models.values()), {})
    for model in models.values():
        for task, metrics in model["scores"].items():
            for metric, score in metrics.items():
                base = reference["scores"].get(task, {}).get(metric, {}).get("median")
                score["share_kept"] = _share(score["median"], base)
        model["share_kept"] = _share(model["mean"], reference["mean"])
    return models


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "values": list(values),
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }


def _mean(tasks: Sequence[Mapping[str, Any]], scores: Mapping[str, Any]) -> dict[str, float | None]:
    firsts = [scores.get(task["name"], {}).get(task["metrics"][0]) for task in tasks]
    if None in firsts:
        return dict.fromkeys(("mean", "mean_min", "mean_max"))
    mean = statistics.fmean(score["median"] for score in firsts)
    seeds = {len(score["values"]) for score in firsts}
    means = [statistics.fmean(values) for values in zip(*(score["values"] for score in firsts), strict=False)]
    same = len(seeds) == 1
    return {
        "mean": mean,
        "mean_min": min(means) if same else None,
        "mean_max": max(means) if same else None,
    }


def _share(value: float | None, reference: float | None) -> float | None:
    return None if value is None or reference is None or reference <= 0 else value / reference


# --- tables ---


def task_title(task: str) -> str:
    """A task's name as papers write it."""
    return TITLES.get(task, task)


def metric_title(metric: str) -> str:
    """A metric's name as papers write it."""
    return METRICS.get(metric, metric.replace("_", " "))


def _points(share: float | None) -> str:
    return MISSING if share is None else f"{100 * share:.1f}"


def _range(score: Mapping[str, Any], prefix: str = "") -> str:
    low, high = score.get(f"{prefix}min"), score.get(f"{prefix}max")
    return MISSING if low is None or high is None else f"{_points(low)}–{_points(high)}"


def _seeds(comparison: Comparison) -> int:
    """The most runs that stand behind a score."""
    return max(
        len(score["values"])
        for model in comparison["models"]
        for metrics in model["scores"].values()
        for score in metrics.values()
    )


def _score_title(comparison: Comparison) -> str:
    tasks = comparison["tasks"]
    if len(tasks) > 1:
        return f"Mean of {len(tasks)} tasks"
    return f"{task_title(tasks[0]['name'])} {metric_title(tasks[0]['metrics'][0])}"


def _model_cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """The table of models: size, speed, and what they are worth."""
    models, seeds = comparison["models"], _seeds(comparison)
    base = models[0].get("tokens_per_second")
    speed = f"Speed (× {models[0]['name']})"
    columns = [
        "Model",
        "Parameters",
        "Size",
        "Latency",
        speed,
        _score_title(comparison),
        "Range",
        "Share kept",
    ]
    rows = []
    for model in models:
        latency, tokens = model.get("latency_ms"), model.get("tokens_per_second")
        rows.append(
            [
                model["name"],
                human_count(model.get("parameters")),
                human_bytes(model.get("bytes")),
                MISSING if latency is None else f"{human_number(latency)} ms",
                human_times(tokens / base if tokens and base else None),
                _points(model["mean"]),
                _range(model, "mean_"),
                human_percent(model["share_kept"]),
            ]
        )
    if seeds == 1:  # no range
        at = columns.index("Range")
        columns, rows = columns[:at] + columns[at + 1 :], [row[:at] + row[at + 1 :] for row in rows]
    return columns, rows


def _task_rows(comparison: Comparison) -> list[tuple[str, str, list[Mapping[str, Any] | None]]]:
    """Of each task and metric the title of both (the task's once), and every model's score."""
    rows = []
    for task in comparison["tasks"]:
        for number, metric in enumerate(task["metrics"]):
            scores = [model["scores"].get(task["name"], {}).get(metric) for model in comparison["models"]]
            if any(scores):
                title = "" if number else task_title(task["name"])
                rows.append((title, metric_title(metric), scores))
    return rows


def paper_cells(comparison: Comparison) -> tuple[list[str], list[list[str]]] | None:
    """The paper's table 1 with the measured models below; None where no task is one of GLUE's.

    A task that was not measured is "–", and so is the average unless all nine were.
    """
    measured = {task["name"]: task["metrics"][0] for task in comparison["tasks"] if task["name"] in GLUE}
    if not measured:
        return None
    rows = [
        [name, f"{statistics.fmean(scores.values()):.1f}", *(f"{scores[task]:.1f}" for task in GLUE)]
        for name, scores in PAPER.items()
    ]
    for model in comparison["models"]:
        scores = [model["scores"].get(task, {}).get(measured.get(task), {}).get("median") for task in GLUE]
        average = None if None in scores else statistics.fmean(scores)
        rows.append([model["name"], _points(average), *map(_points, scores)])
    return ["Model", "Avg", *map(task_title, GLUE)], rows


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Prints the tables with rich, on standard output unless `console` is given."""
    from rich.console import Console

    console = console or Console()
    columns, rows = _model_cells(comparison)
    # Headings break where they may, so that the table fits 80 columns.
    score = _score_title(comparison)
    headings = {
        "Parameters": "Params",
        columns[4]: "Speed",
        score: score.replace("Mean of ", "Mean of\n").replace(" ", "\n", score.count(" ") == 1),
        "Share kept": "Share\nkept",
    }
    _print(console, [headings.get(column, column) for column in columns], rows)
    lines = _task_rows(comparison)
    if len(lines) > 1:
        columns = ["Task", "Metric", "Model", "Score", "Range", "Share kept"]
        cells = [
            [*(("", "") if number else (task, metric)), model["name"], *_score_cells(score)]
            for task, metric, scores in lines
            for number, (model, score) in enumerate(zip(comparison["models"], scores, strict=True))
        ]
        _print(console, columns, cells, texts=3)
    if paper := paper_cells(comparison):
        _print(console, *paper)


def _score_cells(score: Mapping[str, Any] | None) -> list[str]:
    if score is None:
        return [MISSING] * 3
    several = len(score["values"]) > 1
    return [_points(score["median"]), _range(score) if several else "", human_percent(score["share_kept"])]


def _print(console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> None:
    """A table whose first columns, `texts` of them, hold names: these are folded where it would be too wide."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for number, heading in enumerate(headings):
        name = number < texts
        justify: Literal["left", "right"] = "left" if name else "right"
        table.add_column(heading, justify=justify, vertical="bottom", no_wrap=not name, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


# --- comparison.md ---


def write_comparison(comparison: Comparison, out_dir: str | os.PathLike[str]) -> Path:
    """Writes comparison.json, comparison.md and its plots to `out_dir`, also a remote one; gives comparison.md's path.

    Raises:
      UserError: `out_dir` cannot be written.
    """
    try:
        with storage.writing(out_dir) as directory:
            (directory / "plots").mkdir(exist_ok=True)
            write_json(directory / JSON, comparison)
            with plots.style():
                text = comparison_markdown(comparison, directory / "plots")
            storage.write_text(directory / MARKDOWN, text)
    except OSError as error:
        raise UserError(
            f"cannot write to {out_dir}: {error.strerror or error}; give another folder"
        ) from error
    return storage.as_path(out_dir) / MARKDOWN


def comparison_markdown(comparison: Comparison, plots_dir: Path | None = None) -> str:
    """comparison.md; its plots are saved in `plots_dir`, or left out without one."""
    tasks = comparison["tasks"]
    title = (
        "What the models keep" if len(tasks) > 1 else f"{task_title(tasks[0]['name'])}: what the models keep"
    )
    sections = [
        f"# {title}",
        *_headlines(comparison),
        markdown_table(*_model_cells(comparison)),
        _note(comparison),
    ]
    if len(_task_rows(comparison)) > 1:
        sections += ["## Task by task", _task_table(comparison)]
    if paper := paper_cells(comparison):
        sections += ["## Beside the paper's table 1", markdown_table(*paper), _paper_note(comparison)]
    if plots_dir is not None:
        sections += _figures(comparison, plots_dir)
    return "\n\n".join(sections) + "\n"


def _headlines(comparison: Comparison) -> list[str]:
    """The sentence to take away of each model beside the first."""
    reference, *others = comparison["models"]
    lines = []
    for model in others:
        facts = []
        if model.get("parameters") and reference.get("parameters"):
            facts.append(f"has {smaller(model['parameters'], reference['parameters'])}")
        if model.get("tokens_per_second") and reference.get("tokens_per_second"):
            times = human_times(model["tokens_per_second"] / reference["tokens_per_second"])
            facts.append(f"runs at {times} the {reference['name']}'s speed")
        if model["share_kept"] is not None:
            what = _score_title(comparison)
            what = what[0].lower() + what[1:] if len(comparison["tasks"]) > 1 else what
            facts.append(
                f"keeps **{human_percent(model['share_kept'])}** of the {reference['name']}'s {what} "
                f"({_points(model['mean'])} against {_points(reference['mean'])})"
            )
        if facts:
            lines.append(
                f"- {model['name']} " + ", ".join(facts[:-1]) + " and " * (len(facts) > 1) + facts[-1]
            )
    return ["\n".join(lines)] if lines else []


def _note(comparison: Comparison) -> str:
    """On what and where the figures were measured."""
    seeds, speed = _seeds(comparison), comparison.get("speed")
    text = "Scores in points of 100, on the split named "
    splits = sorted({task["split"] for task in comparison["tasks"]})
    text += f"{splits[0]}." if len(splits) == 1 else f"as in comparison.json ({', '.join(splits)})."
    if seeds > 1:
        text += f" Medians of up to {seeds} fine-tunings that differ in their seed; range: the lowest and the highest."
    text += f" Share kept: of the {comparison['models'][0]['name']}'s."
    if speed:
        text += (
            f" Speed: throughput on {speed['batch_size']} rows of {speed['seq_len']} tokens at once; latency: of one "
            f"such row; all models in turn, in {speed['dtype']}."
        )
    return f"{text} Machine: {comparison['machine']}."


def _task_table(comparison: Comparison) -> str:
    names = [model["name"] for model in comparison["models"]]
    columns = ["Task", "Metric", names[0]]
    for name in names[1:]:
        columns += [name, "kept"]
    rows = []
    for task, metric, scores in _task_rows(comparison):
        row = [task, metric]
        for number, score in enumerate(scores):
            row.append(_with_range(score))
            if number:
                row.append(MISSING if score is None else human_percent(score["share_kept"]))
        rows.append(row)
    return markdown_table(columns, rows)


def _with_range(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return MISSING
    return _points(score["median"]) + (f" ({_range(score)})" if len(score["values"]) > 1 else "")


def _paper_note(comparison: Comparison) -> str:
    """What the paper's student keeps on the tasks that were measured."""
    measured = [task["name"] for task in comparison["tasks"] if task["name"] in GLUE]
    teacher, student = (statistics.fmean(scores[task] for task in measured) for scores in PAPER.values())
    return (
        "Paper: Sanh et al. 2019, medians of 5 runs on the development sets; it does not name its metrics of tasks "
        f"that have two. On the {len(measured)} measured task{'s' if len(measured) > 1 else ''} its student keeps "
        f"{human_percent(student / teacher)} of BERT-base's score."
    )


def _figures(comparison: Comparison, directory: Path) -> list[str]:
    models, label = comparison["models"], f"{_score_title(comparison)} (%)"
    means = {model["name"]: model["mean"] for model in models if model["mean"] is not None}
    ranges = {
        model["name"]: (model["mean_min"], model["mean_max"])
        for model in models
        if model["mean_min"] is not None
    }
    costs = {
        title: {model["name"]: model[key] for model in models if model.get(key)}
        for title, key in (("Tokens a second", "tokens_per_second"), ("Parameters", "parameters"))
    }
    sections = plot_section(
        plots.quality(means, costs, label, ranges),
        directory / "quality_speed.png",
        "## Quality against speed and size",
        "Up is better, right is faster or bigger; bars: the range over seeds.",
    )
    if len(comparison["tasks"]) > 1:
        scores = {
            model["name"]: {
                task_title(task["name"]): (score["median"], score["min"], score["max"])
                for task in comparison["tasks"]
                if (score := model["scores"].get(task["name"], {}).get(task["metrics"][0]))
            }
            for model in models
        }
        sections += plot_section(
            plots.tasks(scores, "Score (points of 100)"),
            directory / "tasks.png",
            "## Task by task, as a plot",
            "Medians and the range over seeds.",
        )
    return sections
