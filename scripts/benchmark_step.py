"""The distillation step: against PyTorch's in turn, or alone over batch, length and number of devices.

    python scripts/benchmark_step.py --quick                                     # 2 minutes on 2 cores
    python scripts/benchmark_step.py --data=DIR --batch=32 --dtype=bfloat16      # against PyTorch
    python scripts/benchmark_step.py --data=DIR --dtype=bfloat16 --largest       # the largest micro-batch of both
    python scripts/benchmark_step.py --data=DIR --batch=8 --profile              # where distiljax's time goes
    python scripts/benchmark_step.py --data=DIR --sweep --batches=4,8,16 --lengths=128,256,512 --plot=step.png

DATA is what `distiljax prepare` made, or a text source (a file, a directory, docstrings). Teacher and student have
random weights, which changes no time. The opponent is scripts/torch_distillation.py: transformers' models with SDPA
attention, on the same text. What is not said of it is tried, and the fastest kept: packed rows as ours or, as in the
original, one example a row and examples of like length together (--torch_rows); torch.compile (--torch_compile); the
micro-batch (--torch_micro_batch; ours: --micro_batch); AdamW fused or foreach. Before anything is timed both sides
compute loss and gradient of the same masked rows in float32 without dropout: they must be the same.

Each side has a process that lives through all rounds and waits while the other one computes; times are medians over
the rounds, the ratio is that of the rounds. Tokens are those that are not padding. Work is counted from the shapes
(distiljax/plan/analytic.py), the same for both sides; its share is taken of the product of two large square matrices in
the same precision: of the faster side's, the median of the rounds, or with --largest and --sweep the fastest of all
points. --sweep takes its rows (--batches, --micro_batch) from the longest length, and of shorter ones as many more, so
that a step has the same tokens at every length. --profile traces steps of ours by JAX's profiler and divides the time
of the fastest among the parts of the step; a moment in which matrices are multiplied is the product's. Prints Markdown
for BENCHMARKS.md; --json keeps everything.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import step_profile
from step_sides import (
    SIDES,
    SIZES,
    Side,
    SideFailed,
    alone,
    cut,
    host_limit,
    how,
    memory,
    outcome,
    product_size,
    read_rows,
    real_tokens,
    settings_of,
    steps_in_round,
    warm_up,
    work,
    write_models,
)
from step_tables import comparison_text, complete, figure, points_text

from distiljax.errors import UserError

Rows = dict[str, np.ndarray]
Found = dict[str, Any]

QUICK = {"size": "minilm", "documents": 300, "seq_len": 128, "batch": 16, "micro_batch": 8, "rounds": 3}
QUICK |= {"torch_micro_batch": 8, "torch_rows": "packed", "torch_compile": "no"}
REMAT = {"no": (False,), "yes": (True,), "both": (False, True)}
AGREE = 1e-4  # how far the two sides' losses and gradient norms may be apart, relative
WORTH = 0.97  # larger micro-batches are tried as long as one takes no more than this of the time of the one before


# --- what is measured ---


def check(args: argparse.Namespace, directory: Path) -> tuple[list[Found], dict[str, dict[str, str]]]:
    """Losses and gradient norm of both sides on the same masked rows, and where the sides run.

    Raises:
      UserError: they are not the same, or one side runs on an accelerator and the other does not.
    """
    batch, masks = math.gcd(4, args.batch), str(directory / "masks.npz")
    same: Found = {"batch": batch, "micro_batch": math.ceil(batch / 2), "dtype": "float32", "compile": False}
    same |= {"dropout": 0.0, "attention_dropout": 0.0, "attention": "auto", "masks": masks}
    where = {}
    with Side("jax", directory, settings_of(args, "jax", **same)) as side:
        where["jax"] = side.call("describe")
        side.call("write_masks", path=masks)
        ours = side.call("losses")
    found = [{"name": SIDES["jax"], "losses": ours, "apart": 0.0}]
    for rows in ("packed", "grouped") if args.torch_rows == "auto" else (args.torch_rows,):
        with Side("torch", directory, settings_of(args, "torch", **same | {"rows": rows})) as side:
            where["torch"], losses = side.call("describe"), side.call("losses")
        apart = max(abs(losses[name] / ours[name] - 1) for name in ours)
        if not apart < AGREE:
            raise UserError(
                f"the sides compute {ours} and {losses}, {apart:.1e} apart; expected less than {AGREE:g}, as times of "
                "two different computations say nothing"
            )
        found.append({"name": f"{SIDES['torch']}, {rows} rows", "losses": losses, "apart": apart})
    platforms = [facts["platform"] for facts in where.values()]
    if len(set(platforms)) > 1:
        raise UserError(f"the sides run on {' and '.join(platforms)}; install both for the accelerator")
    return found, where


def tune(
    args: argparse.Namespace, side: str, directory: Path, rows: Rows, limit: int
) -> tuple[Found, list[Found]]:
    """The fastest of the settings that are left open for a side, and what was tried.

    Raises:
      UserError: none works.
    """
    fixed = args.torch_micro_batch if side == "torch" else args.micro_batch
    sizes = [2**i for i in range(args.batch.bit_length()) if args.batch % 2**i == 0]
    sizes = [fixed] if fixed else [n for n in sizes if n * args.seq_len >= 1024] or sizes[-1:]
    layouts, compiled = [args.torch_rows], [args.torch_compile == "yes"]
    if side == "torch":
        layouts = ["packed", "grouped"] if args.torch_rows == "auto" else layouts
        compiled = [False, True] if args.torch_compile == "auto" else compiled
    best = settings_of(args, side, rows=layouts[0], compile=compiled[0], micro_batch=sizes[0])
    tried: list[Found] = []
    if max(map(len, (sizes, layouts, compiled))) == 1:
        return best, tried
    fastest = math.inf

    def attempt(**changes: Any) -> float:
        """Seconds of a step with a change of the best settings, which is kept if it is faster."""
        nonlocal best, fastest
        settings, seconds = best | changes, math.inf
        try:
            found = alone(side, directory, settings | {"memory_limit": limit}, rows, 2, args.steps)
            seconds = found["seconds"]
        except SideFailed as error:
            found = {"problem": str(error)}
        tried.append(found | {"settings": settings})
        print(f"tried {SIDES[side]}, {outcome(side, tried[-1])}", file=sys.stderr)
        if seconds < fastest:
            best, fastest = settings, seconds
        return seconds

    attempt()
    for layout in layouts[1:]:
        attempt(rows=layout)
    for size in sizes[1:]:
        before = fastest
        if attempt(micro_batch=size) > WORTH * before:
            break
    if len(compiled) > 1:
        uncompiled = best
        for layout in layouts:
            attempt(compile=True, rows=layout, micro_batch=uncompiled["micro_batch"])
        larger = 2 * best["micro_batch"]
        if best["compile"] and larger in sizes:  # a compiled step needs less memory
            attempt(micro_batch=larger)
    if fastest == math.inf:
        raise UserError(f"{tried[0]['problem']}; no setting of it works, try a smaller --batch")
    return best, tried


def compare(args: argparse.Namespace, directory: Path, rows: Rows) -> Found:
    """Both sides in turn."""
    agreement, where = check(args, directory)
    platform = where["jax"]["platform"]
    args.steps = args.steps or steps_in_round(platform)
    sides: dict[str, Found] = {}
    for side in SIDES:
        settings, tried = tune(args, side, directory, rows, host_limit(platform))
        sides[side] = {"settings": settings, "tried": tried}
    rounds: list[dict[str, dict[str, float]]] = []
    with (
        Side("jax", directory, sides["jax"]["settings"]) as ours,
        Side("torch", directory, sides["torch"]["settings"]) as theirs,
    ):
        processes = {"jax": ours, "torch": theirs}
        for side, process in processes.items():
            sides[side] |= process.call("build")
            warm_up(process, platform)
            sides[side]["programs"] = process.call("programs")
        for number in range(args.rounds):
            first, measured = 1 + number * args.steps, {}
            tokens = real_tokens(rows, args.batch, first, args.steps)
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                seconds = processes[side].call("run", first=first, count=args.steps)["seconds"]
                product = processes[side].call("product", **product_size(platform))["flops"]
                measured[side] = {"seconds": seconds / args.steps, "tokens_per_second": tokens / seconds}
                measured[side]["product"] = product
            rounds.append(measured)
            rates = ", ".join(f"{SIDES[side]} {measured[side]['tokens_per_second']:,.0f}" for side in SIDES)
            print(f"round {number + 1}, tokens/s: {rates}", file=sys.stderr)
        for side, process in processes.items():
            sides[side]["compiled_meanwhile"] = process.call("programs") - sides[side]["programs"]
            sides[side] |= memory(process)
    return {"agreement": agreement, "where": where, "sides": sides, "rounds": rounds}


def largest(args: argparse.Namespace, directory: Path, rows: Rows) -> Found:
    """Micro-batches of both sides, doubled until there is no room; the work on a point is that of its rows.

    PyTorch's step is compiled, and where that fails and it is left open it is not from there on.
    """
    _, where = check(args, directory)
    points: list[Found] = []
    ends = []
    for side in SIDES:
        settings = settings_of(args, side, memory_limit=host_limit(where["jax"]["platform"]))
        settings["compile"] = side == "torch" and args.torch_compile != "no"
        size = (args.torch_micro_batch if side == "torch" else args.micro_batch) or 1
        while True:
            settings |= {"batch": size, "micro_batch": size}
            try:
                points.append(alone(side, directory, dict(settings), rows, 1, args.steps))
            except SideFailed as error:
                # Where smaller ones went through, it is the size that a library cannot take, whatever it says.
                if error.no_room or any(point["side"] == side for point in points):
                    ends.append(f"{SIDES[side]}, {how(side, settings)}: no room ({error})")
                    break
                if not (settings["compile"] and args.torch_compile == "auto"):
                    raise
                ends.append(f"{SIDES[side]}, {how(side, settings)}: {error}; not compiled from there on")
                settings["compile"] = False
                continue
            points[-1]["flops"] = work(args, directory, size, args.seq_len)
            print(f"{SIDES[side]}, {size} rows: {points[-1]['seconds']:.3f} s", file=sys.stderr)
            size *= 2
    return {"where": where, "points": points, "ends": ends}


def sweep(args: argparse.Namespace, directory: Path, rows: Rows) -> Found:
    """Our step alone over batches, lengths and numbers of devices, with and without remat if both are asked for."""
    points: list[Found] = []
    choices = list(itertools.product(args.batches, args.device_counts, REMAT[args.remat]))
    for length in args.lengths:
        shorter = cut(rows, length)
        np.savez(directory / "rows.npz", **shorter)
        times = max(args.lengths) // length
        for longest, devices, remat in choices:
            batch, most = longest * times, (args.micro_batch or longest) * times
            settings = settings_of(args, "jax", batch=batch, devices=devices, remat=remat)
            settings["micro_batch"] = min(most, batch // devices)
            points.append(alone("jax", directory, settings, shorter, args.rounds, args.steps))
            points[-1] |= {"length": length, "flops": work(args, directory, batch, length)}
            told = how("jax", settings)
            print(f"{batch} × {length} on {devices}, {told}: {points[-1]['seconds']:.3f} s", file=sys.stderr)
    return {"where": {"jax": points[0]["where"]}, "points": points, "ends": []}


def profile(args: argparse.Namespace, directory: Path, rows: Rows) -> Found:
    """Our step alone, and where its time goes: of the fastest of `--rounds` steps, each traced."""
    point = alone("jax", directory, settings_of(args, "jax"), rows, args.rounds, traces=args.rounds)
    point["flops"] = work(args, directory, args.batch, args.seq_len)
    return {"where": {"jax": point["where"]}, "points": [point], "ends": [], "parts": point.pop("parts")}


# --- the command line ---


def numbers(text: str) -> list[int]:
    """Whole numbers with commas between them."""
    return [int(part) for part in text.split(",")]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments.

    Raises:
      UserError: some do not fit together.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a small comparison, to try the program")
    add("--sweep", action="store_true", help="distiljax alone, over --batches, --lengths and --device_counts")
    add(
        "--largest",
        action="store_true",
        help="the largest micro-batch of both sides, from --micro_batch or 1",
    )
    add("--profile", action="store_true", help="distiljax alone: where the time of a step goes")
    add("--data", default="docstrings", help="a prepared corpus, or a text source; docstrings by default")
    add("--unit", default="document", help="of a text source: document, line, paragraph or sentence")
    add("--documents", type=int, default=4000, help="of a text source, at most; 4000 by default, 0 for all")
    add("--tokenizer", default="", help="for a text source; by default that of configs/quickstart.py")
    add(
        "--rows",
        default="",
        help="an .npz file that keeps the rows, and is used instead of DATA once it is there",
    )
    add("--size", choices=SIZES, default="base", help="of the teacher; base by default")
    add(
        "--teacher_layers", type=int, default=0, help="another number of layers; the student has half of them"
    )
    add(
        "--seq_len",
        type=int,
        default=0,
        help="tokens a row, longer rows are cut; those of DATA by default, or 512",
    )
    add("--batch", type=int, default=32, help="rows of a step; 32 by default")
    add("--micro_batch", type=int, default=0, help="rows at once; 0 tries powers of two (--sweep: takes all)")
    add("--torch_micro_batch", type=int, default=0, help="the same for PyTorch")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="float32 by default")
    add("--torch_dtype", choices=("float32", "bfloat16"), default="", help="that of --dtype by default")
    add("--torch_rows", choices=("auto", "packed", "grouped"), default="auto", help="auto, which tries both")
    add("--torch_compile", choices=("auto", "yes", "no"), default="auto", help="auto, which tries both")
    add(
        "--attention",
        default="auto",
        help="config.attention of distiljax: auto, plain or fused; auto by default",
    )
    add("--remat", choices=REMAT, default="no", help="config.remat of distiljax; --sweep also does both")
    add("--ce_positions", choices=("all", "masked"), default="all", help="where L_ce runs; all by default")
    add("--dropout", type=float, default=0.1, help="of the student; 0.1 by default")
    add("--attention_dropout", type=float, default=None, help="that of --dropout by default")
    add("--rounds", type=int, default=5, help="5 by default")
    add("--steps", type=int, default=0, help="in each round; by default 1 on a CPU, 20 elsewhere")
    add("--batches", type=numbers, default=[8, 16, 32], help="rows of the longest length; 8,16,32 by default")
    add("--lengths", type=numbers, default=[128, 256, 512], help="of --sweep; 128,256,512 by default")
    add("--device_counts", type=numbers, default=[1], help="of --sweep; 1 by default, CPUs are simulated")
    add("--plot", default="", help="a PNG file for the plots of --sweep")
    add("--epochs", type=float, default=3.0, help="of the run whose hours are told; 3 by default")
    add("--words", type=float, default=3.3e9, help="of that run's corpus; 3.3e9 by default")
    add("--tokens_per_word", type=float, default=1.3, help="in that corpus, an assumption; 1.3 by default")
    add("--json", default="", help="a file for everything that was measured")
    if "--quick" in argv:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    if args.sweep:
        args.seq_len = max(args.lengths)
        if odd := [length for length in args.lengths if length < 1 or args.seq_len % length]:
            raise UserError(f"lengths has {odd[0]}; expected divisors of the longest, {args.seq_len}")
    elif args.remat == "both":
        raise UserError("remat is both, which is for --sweep; expected no or yes")
    for name, least in {"batch": 1, "rounds": 1, "steps": 0}.items():
        if getattr(args, name) < least:
            raise UserError(f"{name} is {getattr(args, name)}; expected {least} or more")
    for name in ("micro_batch", "torch_micro_batch"):
        size = getattr(args, name)
        if size < 0 or (size and args.batch % size and not (args.sweep or args.largest)):
            raise UserError(f"{name} is {size}; expected a divisor of --batch={args.batch}, or 0")
    for batch, devices in ((b, d) for b in args.batches for d in args.device_counts if args.sweep):
        if (
            min(batch, devices) < 1
            or batch % devices
            or (args.micro_batch and batch // devices % args.micro_batch)
        ):
            raise UserError(
                f"a batch of {batch} rows does not divide by {devices} devices × micro_batch "
                f"{args.micro_batch or batch}; change --batches"
            )
    return args


def title(args: argparse.Namespace, models: str) -> str:
    """What was measured, in words."""
    dropout = f"dropout {args.dropout:g}"
    if args.attention_dropout is not None:
        dropout += f" (attention {args.attention_dropout:g})"
    text = args.rows or args.data
    return f"Teacher → student: {models}, random weights; {text}; L_ce at {args.ce_positions} positions, {dropout}."


def main(argv: Sequence[str]) -> int:
    """Measures and prints."""
    args = parse(argv)
    os.environ["JAX_PLATFORMS"] = "cpu"  # this process leaves the accelerator to the sides
    modes = [(args.sweep, sweep), (args.largest, largest), (args.profile, profile)]
    measure = next((mode for chosen, mode in modes if chosen), compare)
    with tempfile.TemporaryDirectory(prefix="benchmark_step-") as temporary:
        directory = Path(temporary)
        rows = read_rows(args, directory)
        np.savez(directory / "rows.npz", **rows)
        models = write_models(args, int(rows["vocab_size"]), directory)
        flops = work(args, directory, args.batch, args.seq_len)
        try:
            result = measure(args, directory, rows)
        except SideFailed as error:
            hint = "; a smaller --batch or --micro_batch needs less memory" if error.no_room else ""
            raise UserError(f"{error}{hint}") from error
    steps = args.rounds * (args.steps or 1)
    result |= {"flops": flops, "tokens_per_step": real_tokens(rows, args.batch, 1, steps) / steps}
    complete(args, result)
    text = comparison_text if measure is compare else points_text
    where = [
        f"{SIDES[side]}: {facts['machine']}, {facts['versions']}" for side, facts in result["where"].items()
    ]
    parts = [step_profile.table(result["parts"])] if "parts" in result else []
    print("\n\n".join([title(args, models), text(args, result), *parts, "; ".join(where) + "."]))
    if args.sweep and args.plot:
        from distiljax import plots

        with plots.style():
            plots.save(figure(result["points"]), Path(args.plot))
    if args.json:
        partial = Path(f"{args.json}.partial")
        partial.write_text(json.dumps({"arguments": vars(args), **result}, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, args.json)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"benchmark_step: error: {error}", file=sys.stderr)
        sys.exit(2)
