"""The DistilBERT recipe with each of its parts removed, beside Table 4 of the paper (Sanh et al. 2019).

    python scripts/ablation.py --teacher=runs/quickstart/teacher --tasks=sst2 --task_data=DIR --out=runs/ablation

Distils one student for each part that is left out, and one by the whole recipe, from one teacher on the same rows in
the same order; then fine-tunes each on the tasks with the same seeds. DIR has a folder a task (DIR/sst2); without it
the data are the hub's. Writes ablation.md, ablation.json and plots/ablation.png to --out; the runs are there, too. The
same command goes on where it was stopped, and one with more seeds or tasks adds to it.

The defaults are what a laptop carries, which is far less than the paper's: the losses of parts are then those of the
beginning of a distillation, and the range over seeds says how much of them is chance.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distiljax.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from ml_collections import ConfigDict

RECIPE = "the recipe"
# What is left out → the settings that leave it out.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    RECIPE: {},
    "no L_ce": {"loss.ce": 0.0},
    "no L_cos": {"loss.cos": 0.0},
    "no L_mlm": {"loss.mlm": 0.0},
    "random initialisation": {"student.initialise": "random"},
    "no frequency weighting": {"masking.smoothing": 0.0},
}
# Sanh et al. 2019, table 4: change of the GLUE score, in points.
PAPER = {"no L_ce": -2.96, "no L_cos": -1.46, "no L_mlm": -0.31, "random initialisation": -3.69}


def folder(variant: str) -> str:
    """The directory of a variant's run."""
    return variant.replace(" ", "-").replace("_", "")


def distillation(args: argparse.Namespace, variant: str) -> ConfigDict:
    """The config of one student."""
    import distiljax

    config = distiljax.distill_config()
    config.teacher = args.teacher
    data = Path(args.data)
    if (data / "train" / "metadata.json").is_file():
        config.data_dir = str(data)
    else:
        config.data.source = args.data
        config.data_dir = str(Path(args.out) / "rows")  # prepared once for all
    config.data.seq_len = args.seq_len
    config.batch_size, config.micro_batch_size = args.batch_size, args.micro_batch_size
    config.steps, config.optimizer.peak_lr, config.seed = args.steps, args.peak_lr, args.seed
    config.loss.ce_positions, config.dtype = args.ce_positions, args.dtype
    config.eval.every, config.eval.rows = 0, 512
    config.checkpoint.every, config.checkpoint.keep = min(500, max(20, args.steps // 4)), 1
    config.log_every = max(1, min(50, args.steps // 20))
    for key, value in VARIANTS[variant].items():
        part, name = key.split(".")
        config[part][name] = value
    return config


def comparison(args: argparse.Namespace, variants: Sequence[str]) -> ConfigDict:
    """The config of the fine-tunings."""
    from distiljax.tasks.config import compare_config

    config = compare_config()
    config.models = {
        folder(variant): str(Path(args.out) / "students" / folder(variant)) for variant in variants
    }
    config.tasks, config.seeds, config.data_root = args.tasks, args.seeds, args.task_data
    config.finetune.epochs, config.finetune.batch_size = args.task_epochs, args.task_batch_size
    config.finetune.optimizer.peak_lr, config.finetune.dtype = args.task_lr, args.dtype
    config.finetune.data.max_train_examples = args.task_examples
    config.finetune.data.max_length = args.seq_len
    return config


def changes(compared: Mapping[str, Any], variants: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What leaving out each part changes, in points: of each task, and of their mean.

    Differences are taken seed by seed, as a seed gives all students the same order of examples.

    Returns:
      variant → {"median", "min", "max" over the seeds of the mean over tasks, "tasks": {task: median}}.
    """
    models = dict(zip(variants, compared["models"], strict=True))
    found = {}
    for variant in variants[1:]:
        by_task = {}
        for task in compared["tasks"]:
            values, whole = (
                models[name]["scores"][task["name"]][task["metrics"][0]]["values"]
                for name in (variant, variants[0])
            )
            by_task[task["name"]] = [100 * (a - b) for a, b in zip(values, whole, strict=True)]
        means = [statistics.fmean(of_seed) for of_seed in zip(*by_task.values(), strict=True)]
        found[variant] = {
            "median": statistics.median(means),
            "min": min(means),
            "max": max(means),
            "tasks": {task: statistics.median(values) for task, values in by_task.items()},
        }
    return found


def document(
    compared: Mapping[str, Any], found: Mapping[str, Any], students: Mapping[str, Mapping[str, Any]]
) -> str:
    """ablation.md."""
    from distiljax.comparison import task_title
    from distiljax.report import markdown_table
    from distiljax.train.format import MISSING, human_percent

    tasks = [task["name"] for task in compared["tasks"]]
    seeds = len(compared["seeds"])
    columns = ["Left out", "Change", "Range", "Paper (GLUE)", *map(task_title, tasks), "Masked-LM accuracy"]
    rows = []
    for variant, student in students.items():
        change = found.get(variant)
        rows.append(
            [
                "nothing" if change is None else variant,
                MISSING if change is None else f"{change['median']:+.2f}",
                MISSING if change is None else f"{change['min']:+.2f} to {change['max']:+.2f}",
                f"{PAPER[variant]:+.2f}" if variant in PAPER else MISSING,
                *(MISSING if change is None else f"{change['tasks'][task]:+.2f}" for task in tasks),
                human_percent(student["mlm_accuracy"]),
            ]
        )
    whole = compared["models"][0]
    scores = ", ".join(
        f"{task_title(task['name'])} {100 * whole['scores'][task['name']][task['metrics'][0]]['median']:.1f}"
        for task in compared["tasks"]
    )
    first = next(iter(students.values()))
    note = (
        f"Points of 100; the whole recipe (first row) reaches {scores}. Change: of the mean over the tasks, median of "
        f"{seeds} fine-tuning seed{'s' if seeds > 1 else ''}, and their range; one distillation each, of "
        f"{first['steps']:,} steps and {first['tokens'] / 1e6:.1f} M tokens. Masked-LM accuracy: of the student on "
        "held-out text, before fine-tuning. Paper: Sanh et al. 2019, Table 4."
    )
    return "\n\n".join(
        [
            "# The recipe without each of its parts",
            markdown_table(columns, rows),
            f"{note} Machine: {compared['machine']}.",
            "![Change for each part](plots/ablation.png)",
        ]
    )


def figure(found: Mapping[str, Mapping[str, float]]) -> Figure:
    """The change for each part, measured (with the range over seeds) and the paper's."""
    from matplotlib.figure import Figure

    from distiljax import plots

    result = Figure(figsize=(9.0, 1.2 + 0.75 * len(found)), layout="constrained")
    ax = result.subplots()
    for row, (variant, change) in enumerate(found.items()):
        ax.barh(row - 0.2, change["median"], 0.36, color=plots.BLUE, label="measured")
        ends = [[change["median"] - change["min"]], [change["max"] - change["median"]]]
        ax.errorbar(
            change["median"], row - 0.2, xerr=ends, color="#222222", capsize=4, elinewidth=1.5, fmt="none"
        )
        if variant in PAPER:
            ax.barh(row + 0.2, PAPER[variant], 0.36, color=plots.VERMILION, label="paper, GLUE")
    ax.axvline(0, color="#222222", linewidth=1)
    ax.set_yticks(
        range(len(found)), [variant.replace("L_", "$L_{") + "}$" * ("L_" in variant) for variant in found]
    )
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("Change of the mean score (points of 100)")
    entries = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    result.legend(list(entries.values()), list(entries), loc="outside upper center", ncols=2)
    return result


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--teacher", default="runs/quickstart/teacher", help="run directory, Hugging Face directory or hub name; "
        "by default the teacher of `make quickstart`"
    )  # fmt: skip
    parser.add_argument(
        "--data", default="docstrings", help="text to distil on, as config.data.source of distill, or a directory that "
        "`distiljax prepare` made (default: %(default)s)"
    )  # fmt: skip
    parser.add_argument("--tasks", default="sst2", help="presets, with commas (default: %(default)s)")
    parser.add_argument("--task_data", default="", help="directory with a folder a task; the hub by default")
    parser.add_argument("--seeds", default="0,1,2", help="of the fine-tunings (default: %(default)s)")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="the first is what is compared with")
    parser.add_argument("--out", required=True, help="a directory; made if it is not there")
    numbers: tuple[tuple[str, Any, str], ...] = (
        ("steps", 300, "optimiser steps of each distillation"),
        ("batch_size", 32, "rows a step"),
        ("micro_batch_size", 0, "rows a device computes at once; 0 = all of its share"),
        ("seq_len", 128, "tokens in a row, also of the fine-tunings"),
        ("peak_lr", 1e-3, "learning rate of the distillations"),
        ("seed", 0, "of the distillations: order of rows, masks, dropout, fresh weights"),
        ("task_examples", 0, "training examples of each task; 0 = all"),
        ("task_epochs", 3.0, "epochs of the fine-tunings"),
        ("task_batch_size", 32, "examples a step"),
        ("task_lr", 5e-5, "learning rate of the fine-tunings"),
    )
    for name, default, text in numbers:
        parser.add_argument(
            f"--{name}", type=type(default), default=default, help=f"{text} (default: %(default)s)"
        )
    parser.add_argument(
        "--ce_positions", choices=("all", "masked"), default="all", help="where L_ce is taken"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="compute dtype")
    args = parser.parse_args(argv)
    try:
        args.seeds = tuple(int(seed) for seed in args.seeds.split(","))
    except ValueError:
        parser.error(f"--seeds={args.seeds}; expected whole numbers with commas")
    args.tasks = tuple(args.tasks.split(","))
    args.variants = tuple(args.variants.split(","))
    if unknown := set(args.variants) - set(VARIANTS):
        parser.error(f"--variants has {', '.join(sorted(unknown))}; expected some of {', '.join(VARIANTS)}")
    if len(args.variants) < 2:
        parser.error("--variants has one; expected what to compare with, and what is left out")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import distiljax
    from distiljax import plots
    from distiljax.cli import set_up_logging
    from distiljax.programs import keep_programs
    from distiljax.tasks.compare import compare, model_paths, plan_fits
    from distiljax.train import storage
    from distiljax.train.progress import stage
    from distiljax.train.run import write_json

    set_up_logging()
    keep_programs()
    out = Path(args.out)
    fine_tunings = comparison(args, args.variants)
    plan_fits(
        fine_tunings, model_paths(fine_tunings.models), out
    )  # bad input shows before the first distillation
    students = {}
    for number, variant in enumerate(args.variants, 1):
        stage(f"Distilling: {variant}", number, len(args.variants) + 1)
        result = distiljax.distill(distillation(args, variant), out / "students" / folder(variant))
        if not result.finished:
            return stopped()
        best = result.facts["best"] or result.facts["validation"]
        students[variant] = {
            "mlm_accuracy": best["mlm_accuracy"],
            "steps": result.facts["steps"],
            "tokens": result.facts["tokens"],
        }
    stage(f"Fine-tuning them on {', '.join(args.tasks)}", len(args.variants) + 1, len(args.variants) + 1)
    result = compare(fine_tunings, out / "tasks")
    if not result.finished:
        return stopped()
    found = changes(result.facts, args.variants)
    write_json(
        out / "ablation.json", {"changes": found, "paper": PAPER, "students": students, **result.facts}
    )
    (out / "plots").mkdir(exist_ok=True)
    with plots.style():
        plots.save(figure(found), out / "plots" / "ablation.png")
    text = document(result.facts, found, students)
    storage.write_text(out / "ablation.md", text + "\n")
    print(text)
    return 0


def stopped() -> int:
    print("stopped; the same command goes on from here", file=sys.stderr)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"ablation: error: {error}", file=sys.stderr)
        sys.exit(2)
