"""How the cost of a step falls with the number of chips at a fixed effective batch, from `distiljax plan`.

    python scripts/plot_scaling.py --config=configs/distilbert_base.py \\
        --topologies=v5e:2x2,v5e:4x4,v5e:8x8,v5e:16x16 --out=DIR

Compiles the step for each slice with the TPU compiler of the libtpu package, which needs no TPU, and writes
scaling.png, scaling.md and plans.json to DIR. Plans that DIR/plans.json holds are not made again. The ideal line is
the first slice's step time divided by how many times as many chips there are.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distiljax.errors import UserError
from distiljax.train.format import human_bytes, human_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What a plan calls the step time, and what the plot calls it.
ESTIMATES = {"compiler": "compiler's estimate", "roofline": "roofline"}


def figure(machines: list[dict[str, Any]]) -> Figure:
    """Step time and reduced bytes against chips, both axes logarithmic."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    from distiljax import plots

    chips = [machine["chips"] for machine in machines]
    result = Figure(figsize=(9.0, 4.2), layout="constrained")
    left, right = result.subplots(1, 2)
    colours = dict(zip(ESTIMATES, (plots.BLUE, plots.VERMILION), strict=True))
    for name, label in ESTIMATES.items():
        seconds = [machine["times"][name] for machine in machines]
        if None in seconds:
            continue
        ideal = [seconds[0] * chips[0] / n for n in chips]
        left.plot(chips, ideal, color="#888888", linestyle="--", linewidth=1.5, label="ideal: time ÷ chips")
        left.plot(chips, seconds, color=colours[name], marker="o", markersize=6, label=label)
    left.set_title("Step time")
    left.set_yscale("log")
    left.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    left.yaxis.set_major_formatter(FuncFormatter(lambda s, _: f"{s:g} s" if s >= 1 else f"{1000 * s:g} ms"))
    left.yaxis.set_minor_formatter(NullFormatter())

    given = [machine["collective_bytes"] / 1e6 for machine in machines]
    sent = [2 * (n - 1) / n * size for n, size in zip(chips, given, strict=True)]
    right.plot(chips, sent, color=plots.GREEN, marker="s", markersize=6, label="sent by a chip")
    right.plot(chips, given, color=plots.COLOURS[3], marker="D", markersize=6, label="gradients, once a step")
    right.set_title("Reduced in a step (MB)")
    right.set_ylim(bottom=0, top=1.15 * max(sent))
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_locator(FixedLocator(chips))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        ax.set_xlabel("Chips")
        ax.margins(x=0.06)
        entries = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        ax.legend(list(entries.values()), list(entries), loc="lower left")
    return result


def table(machines: list[dict[str, Any]]) -> str:
    """The same as Markdown."""
    first = machines[0]
    lines = [
        "| | chips | micro-batches × rows | roofline | compiler's estimate | share of the ideal | reduced | "
        "sent by a chip | gradient reductions | compiled in |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for machine in machines:
        times, chips = machine["times"], machine["chips"]
        name = "compiler" if times["compiler"] else "roofline"
        ideal = first["times"][name] * first["chips"] / chips
        sent = 2 * (chips - 1) / chips * machine["collective_bytes"]
        reductions = machine["gradient_reductions"]
        cells = [
            machine["topology"],
            str(chips),
            f"{machine['micro_batches']} × {machine['planned_micro_batch_size']}",
            human_seconds(times["roofline"]),
            human_seconds(times["compiler"]),
            f"{100 * ideal / times[name]:.1f} %",
            human_bytes(machine["collective_bytes"]),
            human_bytes(sent),
            "–" if reductions is None else f"{reductions:.0f}",
            human_seconds(sum(tried["seconds"] for tried in machine["tried"])),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plans(config: Any, topologies: list[str], cache: Path) -> list[dict[str, Any]]:
    """A plan of each topology, fewest chips first; kept in the file `cache` as they are made."""
    from distiljax.plan import make_plan
    from distiljax.train.run import read_json, write_json

    wanted = json.loads(config.to_json())
    held = read_json(cache) or {}
    made = held.get("machines", {}) if held.get("config") == wanted else {}
    for topology in topologies:
        if topology not in made:
            (made[topology],) = make_plan(config, topology, search=False)["machines"]
            write_json(cache, {"config": wanted, "machines": made})
    return sorted((made[topology] for topology in topologies), key=lambda machine: machine["chips"])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a config file of a run")
    parser.add_argument(
        "--topologies", default="v5e:2x2,v5e:4x4,v5e:8x8,v5e:16x16", help="with commas between them"
    )
    parser.add_argument("--out", required=True, help="a directory; made if it is not there")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    from distiljax import plots
    from distiljax.cli import set_up_logging

    if not os.path.isfile(args.config):
        raise UserError(f"config file {args.config!r} does not exist; give a Python file with get_config()")
    set_up_logging()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    config = runpy.run_path(args.config)["get_config"]()
    machines = plans(config, args.topologies.split(","), out / "plans.json")
    (out / "scaling.md").write_text(table(machines), encoding="utf-8")
    with plots.style():
        plots.save(figure(machines), out / "scaling.png")
    print(table(machines), end="")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"plot_scaling: error: {error}", file=sys.stderr)
        sys.exit(2)
