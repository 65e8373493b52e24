"""What scripts/benchmark_step.py says of its measurements: figures that follow from them, tables and a plot."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from step_sides import SIDES, how, outcome

from distiljax.train.format import human_bytes, human_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Found = dict[str, Any]


def complete(args: argparse.Namespace, result: Found) -> None:
    """Adds what follows from the measurements: shares; of a comparison also medians, hours and the ratio."""
    if "points" in result:
        points = result["points"]
        for point in points:
            # A CPU's product is that of all its cores, an accelerator's that of one device.
            devices = 1 if point["where"]["platform"] == "cpu" else point["settings"]["devices"]
            rate = point["flops"] / point["seconds"] / devices
            point["share"] = rate / fastest_product(points, point["settings"]["dtype"])
        return
    sides, rounds = result["sides"], result["rounds"]
    for side, found in sides.items():
        found |= {name: statistics.median(one[side][name] for one in rounds) for name in rounds[0][side]}
    for found in sides.values():
        rate = result["flops"] / found["seconds"]
        found["share"] = rate / fastest_product(sides.values(), found["settings"]["dtype"])
        tokens = args.epochs * args.words * args.tokens_per_word
        found["hours"] = tokens / found["tokens_per_second"] / 3600
    result["ratio"] = statistics.median(ratios(rounds))


def fastest_product(found: Iterable[Found], dtype: str) -> float:
    """FLOP/s of the fastest product of matrices that was measured in a precision."""
    return max(one["product"] for one in found if one["settings"]["dtype"] == dtype)


def ratios(rounds: Sequence[Found]) -> list[float]:
    """Our speed over PyTorch's in each round."""
    return [one["jax"]["tokens_per_second"] / one["torch"]["tokens_per_second"] for one in rounds]


def spread(values: Sequence[float], form: str = ",.0f") -> str:
    """Median and range."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def side_column(args: argparse.Namespace, result: Found, side: str) -> dict[str, str]:
    """A side's figures by name."""
    found = result["sides"][side]
    reserved = [human_bytes(found.get(name)) for name in ("arguments", "temporaries")]
    return {
        "settings": how(side, found["settings"])
        + (f", {found['optimizer']} AdamW" if side == "torch" else ""),
        "attention": found.get("attention", "SDPA"),
        "tokens/s, median (range)": spread(
            [measured[side]["tokens_per_second"] for measured in result["rounds"]]
        ),
        "s a step": f"{found['seconds']:,.3f}",
        "product of two matrices": f"{found['product'] / 1e9:,.0f} GFLOP/s",
        "share of the faster product in this precision": f"{100 * found['share']:.0f} %",
        "peak memory of the process": human_bytes(found["process_memory"]),
        "peak memory on the device": human_bytes(found["device_memory"]),
        "XLA's arguments + temporaries": " + ".join(reserved),
        "compilation (PyTorch: excess of the first steps)": human_seconds(found["compile_seconds"]),
        "programs compiled within the rounds": str(found["compiled_meanwhile"]),
        f"{args.epochs:g} × {args.words:.3g} words of {args.tokens_per_word:g} tokens": f"{found['hours']:,.1f} h",
    }


def comparison_text(args: argparse.Namespace, result: Found) -> str:
    """The tables of a comparison: that both sides compute the same, and how fast."""
    from distiljax.report import markdown_table

    agreement = result["agreement"]
    names = list(agreement[0]["losses"])
    same = markdown_table(
        ["same masked rows, float32, no dropout", *names, "largest difference"],
        [
            [one["name"], *(f"{one['losses'][name]:.6f}" for name in names), f"{one['apart']:.1e}"]
            for one in agreement
        ],
    )
    columns = {side: side_column(args, result, side) for side in SIDES}
    filled = result["tokens_per_step"] / args.batch / args.seq_len
    measured = markdown_table(
        [f"step of {args.batch} × {args.seq_len}, {100 * filled:.1f} % filled", *SIDES.values()],
        [[name, *(columns[side][name] for side in SIDES)] for name in columns["jax"]],
    )
    tried = [
        f"Tried {SIDES[side]}, {outcome(side, one)}."
        for side in SIDES
        for one in result["sides"][side]["tried"]
    ]
    work_per_token = f"{result['flops'] / result['tokens_per_step'] / 1e6:,.0f} MFLOP a token by count"
    rounds = result["rounds"]
    ratio = f"{spread(ratios(rounds), '.2f')} ×, {len(rounds)} rounds of {args.steps} steps, in turn"
    return "\n\n".join([work_per_token, same, measured, f"distiljax over PyTorch: {ratio}.", *tried])


def points_text(args: argparse.Namespace, result: Found) -> str:
    """The table of --largest and of --sweep."""
    from distiljax.report import markdown_table

    head = ["rows × length", "side", "devices", "s a step", "tokens/s", "µs a token", "MFLOP a token"]
    head += [
        "share of the fastest product in this precision",
        "peak memory",
        "XLA's temporaries",
        "compilation",
    ]
    lines = []
    for point in result["points"]:
        seconds, tokens, settings = point["seconds"], point["tokens"], point["settings"]
        lines.append(
            [
                f"{settings['batch']} × {point.get('length', args.seq_len)}",
                f"{SIDES[point['side']]}, {how(point['side'], settings)}",
                str(settings["devices"]),
                f"{seconds:,.3f}",
                f"{tokens / seconds:,.0f}",
                f"{1e6 * seconds / tokens:,.1f}",
                f"{point['flops'] / tokens / 1e6:,.0f}",
                f"{100 * point['share']:.0f} %",
                human_bytes(point["device_memory"] or point["process_memory"]),
                human_bytes(point.get("temporaries")),
                human_seconds(point["compile_seconds"]),
            ]
        )
    return "\n\n".join([markdown_table(head, lines), *result["ends"]])


def figure(points: Sequence[Found]) -> Figure:
    """Step time against tokens, and time of a token against the length of the rows; without remat if both are there."""
    from matplotlib.figure import Figure

    from distiljax import plots

    points = [p for p in points if not p["settings"]["remat"]] or points
    result = Figure(figsize=(9.0, 4.2), layout="constrained")
    left, right = result.subplots(1, 2)
    counts = sorted({point["settings"]["devices"] for point in points})
    lengths = sorted({point["length"] for point in points})
    for i, devices in enumerate(counts):
        of_devices = f", {devices} device{'s' if devices > 1 else ''}" if len(counts) > 1 else ""
        look = {"marker": plots.MARKERS[i % 6]}
        fastest = []
        for colour, length in zip(plots.COLOURS * len(lengths), lengths, strict=False):
            line = [p for p in points if (p["length"], p["settings"]["devices"]) == (length, devices)]
            line.sort(key=lambda p: p["tokens"])
            label = f"rows of {length}{of_devices}"
            left.plot(
                [p["tokens"] for p in line], [p["seconds"] for p in line], color=colour, label=label, **look
            )
            fastest.append(min(line, key=lambda p: p["seconds"] / p["tokens"]))
        times = [1e6 * p["seconds"] / p["tokens"] for p in fastest]
        right.plot(lengths, times, color=plots.COLOURS[i % 6], label=f"measured{of_devices}", **look)
        counted = [p["flops"] / p["tokens"] for p in fastest]
        as_counted = [times[0] * flops / counted[0] for flops in counted]
        label = f"as the counted work grows{of_devices}"
        right.plot(lengths, as_counted, color="#888888", linestyle="--", linewidth=1.5, label=label)
    left.set_title("Time of a step (s)")
    left.set_xlabel("Tokens in the step")
    left.set_xlim(left=0)
    right.set_title("Time of a token, the fastest batch (µs)")
    right.set_xlabel("Tokens in a row")
    right.set_xscale("log", base=2)
    right.set_xticks(lengths, [f"{length:,}" for length in lengths])
    right.minorticks_off()
    for ax in (left, right):
        ax.set_ylim(bottom=0)
        ax.legend(loc="best")
    return result
