"""Whether a distillation in bfloat16 follows the one in float32.

    python scripts/benchmark_precision.py --teacher=DIR --data=DIR --steps=200 --out=precision

Distils the same student three times on the same rows, masks and dropout: in float32, in bfloat16, and in float32 with
another seed, whose distance from the first run says how much a run differs from its like by chance. DATA is what
`distiljax prepare` made, or a text source, which is prepared to OUT/rows. The runs are in OUT, as is the plot of their
losses, precision.png. The same command goes on where it was stopped. Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distiljax.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RUNS = {
    "float32": ("float32", 0),
    "bfloat16": ("bfloat16", 0),
    "float32, another seed": ("float32", 1),
}
TERMS = ("loss", "loss_ce", "loss_mlm", "loss_cos", "grad_norm")


def run(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Distils a student; returns the values of each step, and those of the held-out rows at the end."""
    import distiljax
    from distiljax.train.metrics import read_metrics

    config = distiljax.distill_config()
    config.teacher, config.steps = args.teacher, args.steps
    config.dtype, config.seed = RUNS[name]
    if (Path(args.data) / "train" / "metadata.json").is_file():
        config.data_dir = args.data
    else:
        config.data.source, config.data_dir = args.data, str(Path(args.out) / "rows")
    config.data.seq_len = args.seq_len
    config.batch_size, config.micro_batch_size = args.batch_size, args.micro_batch_size
    config.optimizer.peak_lr = args.peak_lr
    config.log_every, config.eval.every, config.eval.rows = 1, args.steps, args.eval_rows
    workdir = Path(args.out) / name.replace(", ", "-").replace(" ", "-")
    distiljax.distill(config, workdir)
    if not (workdir / "result.json").is_file():
        raise UserError(f"the run in {name} was stopped; the same command goes on")
    records = read_metrics(workdir)
    found = {term: np.array([value for _, value in records["train"][term]]) for term in TERMS}
    return found | {"validation": {term: values[-1][1] for term, values in records["validation"].items()}}


def apart(run: dict[str, Any], reference: dict[str, Any], term: str) -> np.ndarray:
    """How far a run's term is from the reference's in each step, relative."""
    return np.abs(run[term] / reference[term] - 1)


def markdown(args: argparse.Namespace, runs: dict[str, dict[str, Any]]) -> str:
    """The held-out losses, and the largest and the mean distance of each term from float32's."""
    reference = runs["float32"]
    held_out = [term for term in reference["validation"] if term.startswith(("loss", "mlm"))]
    lines = [
        f"| {args.steps} steps of {args.batch_size} × {args.seq_len} | {' | '.join(runs)} |",
        "|---|" + "---:|" * len(runs),
    ]
    for term in TERMS:
        cells = []
        for one in runs.values():
            distance = 100 * apart(one, reference, term)
            cells.append("–" if one is reference else f"{distance.mean():.2f} % ({distance.max():.2f} %)")
        lines.append(f"| `{term}` of a step from float32's, mean (largest) | {' | '.join(cells)} |")
    for term in held_out:
        cells = [f"{one['validation'][term]:.4f}" for one in runs.values()]
        lines.append(f"| held-out `{term}` at the end | {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(runs: dict[str, dict[str, Any]]) -> Figure:
    """The losses of the runs, and how far each is from float32's."""
    from matplotlib.figure import Figure

    from distiljax import plots

    result = Figure(figsize=(9.0, 4.2), layout="constrained")
    left, right = result.subplots(1, 2)
    styles = ("-", "--", ":")
    for (name, found), colour, style in zip(runs.items(), plots.COLOURS, styles, strict=False):
        steps = np.arange(1, len(found["loss"]) + 1)
        left.plot(steps, found["loss"], color=colour, linestyle=style, linewidth=1.5, label=name)
        if name != "float32":
            distance = 100 * apart(found, runs["float32"], "loss")
            right.plot(steps, distance, color=colour, linestyle=style, linewidth=1.5, label=name)
    left.set_title("Loss")
    right.set_title("Distance from float32's (%)")
    right.set_yscale("log")
    for ax in (left, right):
        ax.set_xlabel("Step")
        ax.legend(loc="best")
    return result


def main(argv: list[str]) -> int:
    """Trains, prints and draws."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--teacher", required=True, help="a run or a model directory with a masked-LM head")
    add("--data", default="docstrings", help="prepared rows or a text source; docstrings by default")
    add("--out", default="precision", help="directory of the runs and the plot; precision by default")
    numbers = {"steps": 200, "batch_size": 32, "micro_batch_size": 16, "seq_len": 128, "eval_rows": 256}
    for name, default in numbers.items():
        add(f"--{name}", type=int, default=default, help=f"{default} by default")
    add("--peak_lr", type=float, default=5e-4, help="5e-4 by default")
    args = parser.parse_args(argv)
    from distiljax import plots
    from distiljax.programs import keep_programs

    keep_programs()
    runs = {name: run(args, name) for name in RUNS}

    with plots.style():
        plots.save(figure(runs), Path(args.out) / "precision.png")
    print(markdown(args, runs))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"benchmark_precision: error: {error}", file=sys.stderr)
        sys.exit(2)
