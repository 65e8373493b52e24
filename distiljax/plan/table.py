"""A plan as a table: one column a machine."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distiljax.train.format import (
    MISSING,
    human_bytes,
    human_count,
    human_number,
    human_percent,
    human_seconds,
)

if TYPE_CHECKING:
    from rich.console import Console

Plan = Mapping[str, Any]
Row = tuple[str, list[str]]
"""A label and a cell for each machine; a row without cells is a heading."""


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Prints a plan with rich, on standard output unless `console` is given."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console(highlight=False, markup=False, emoji=False)
    for line in _introduction(plan["run"]):
        console.print(line)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for name in (machine["topology"] for machine in plan["machines"]):
        table.add_column(name, justify="right", no_wrap=True)
    for number, (label, cells) in enumerate(plan_rows(plan)):
        if not cells:
            if number:
                table.add_section()
            table.add_row(Text(label, "bold"))
        else:
            bad = label == "Fits"
            table.add_row(f"  {label}", *(Text(c, "bold red" if bad and c == "no" else "") for c in cells))
    width = console.width
    # Better cut by a narrow terminal than folded.
    console.width = max(width, console.measure(table, options=console.options.update(width=500)).maximum)
    console.print(table)
    console.width = width
    for remark in _remarks(plan):
        console.print(f"- {remark}")


def plan_markdown(plan: Plan) -> str:
    """The table as Markdown, with the lines above and below it."""
    names = [machine["topology"] for machine in plan["machines"]]
    lines = [*_introduction(plan["run"]), "", f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for label, cells in plan_rows(plan):
        lines.append(
            f"| {label} | {' | '.join(cells)} |" if cells else f"| **{label}** |" + " |" * len(names)
        )
    return "\n".join([*lines, "", *(f"- {remark}" for remark in _remarks(plan))]) + "\n"


def plan_rows(plan: Plan) -> list[Row]:
    """What the table holds."""
    run, machines = plan["run"], plan["machines"]
    rows: list[Row] = []

    def add(label: str, cell: Callable[[Plan], str], *, always: bool = True) -> None:
        cells = [cell(machine) for machine in machines]
        if always or any(c != MISSING for c in cells):
            rows.append((label, cells))

    def size(machine: Plan, name: str) -> str:
        return human_bytes((machine["memory"] or {}).get(name))

    rows.append(("Memory of a device", []))
    add("Fits", lambda m: "yes" if m["fits"] else "no")
    add(
        "Needed, where it does not fit",
        lambda m: MISSING if m["fits"] else human_bytes(m["needed"]),
        always=False,
    )
    add("Largest micro-batch that fits, rows", lambda m: _whole(m["largest_micro_batch_size"]), always=False)
    add("Planned micro-batches × rows", lambda m: f"{m['micro_batches']} × {m['planned_micro_batch_size']}")
    add("Arguments: state, teacher, rows", lambda m: size(m, "arguments"))
    add("Temporaries", lambda m: size(m, "temporaries"))
    add("Program", lambda m: size(m, "program"), always=False)
    add("All together", lambda m: size(m, "total"))
    add("Published memory", lambda m: human_bytes(m["chip_memory"]))
    rows.append(("Work of a step", []))
    add("Floating-point work, counted", lambda m: human_flops(m["flops"]["analytic"]))
    add("… as compiled", lambda m: human_flops(m["flops"]["compiled"]), always=False)
    add("… difference", lambda m: _signed(m["flops"]["difference"]), always=False)
    add("Memory traffic of a chip", lambda m: human_bytes(m["moved_bytes"]), always=False)
    add("Gradient reductions", _reductions)
    add("All collectives", _collectives, always=False)
    add("… in the micro-batch loop", lambda m: _whole(m["collectives_in_loop"]), always=False)
    add("Reduced bytes", lambda m: human_bytes(m["collective_bytes"]))
    rows.append(("Time of a step", []))
    add("Matrix units at their peak", lambda m: human_seconds(m["times"]["compute"]))
    add("Memory at its peak", lambda m: human_seconds(m["times"]["memory"]), always=False)
    add("Interconnect at its peak", lambda m: human_seconds(m["times"]["interconnect"]))
    add("Bound by", lambda m: m["times"]["bound_by"])
    names = {
        "roofline": "Roofline",
        "compiler": "Compiler's estimate",
        "expected": f"At {100 * run['mfu']:g} % of the peak",
    }
    for name, label in names.items():
        add(label, functools.partial(_seconds, name), always=False)
    if parts := _parts(machines):
        rows.append(("Of the compiler's estimate (in matrix products)", []))
        for part in parts:
            add(part[0].upper() + part[1:], functools.partial(_share_of_part, part))
    rows.append(("Tokens a second", []))
    for name, label in names.items():
        add(label, functools.partial(_rate, name), always=False)
    steps = run["steps"]
    title = f"The run of {steps:,} steps" if steps else "1,000 steps"
    rows.append((f"{title}: hours (chip-hours)", []))
    for name, label in names.items():
        add(label, functools.partial(_hours, name, bool(steps)), always=False)
    return rows


def human_flops(value: float | None) -> str:
    """Floating-point operations: 1.45e15 → "1.45 PFLOP"."""
    if value is None:
        return MISSING
    for scale, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if value >= scale:
            return f"{human_number(value / scale)} {unit}FLOP"
    return f"{human_number(value / 1e6)} MFLOP"


def _introduction(run: Plan) -> list[str]:
    trained = f"{run['layers']} layers, {human_count(run['parameters'])} parameters"
    if run["teacher"]:
        teacher = f"{run['teacher_layers']} layers, {human_count(run['teacher_parameters'])} parameters"
        what = f"Teacher {run['teacher']} ({teacher}), student of {trained}"
    else:
        what = f"Masked LM {run['model']} of {trained}"
    batch = (
        f"{run['batch_size']:,} rows × {run['seq_len']} = {human_count(run['tokens_per_step'])} tokens a step"
    )
    return [f"{what}; {run['dtype']}; {batch}.", f"Its shape is from {run['shape_from']}."]


def _remarks(plan: Plan) -> list[str]:
    run, machines = plan["run"], plan["machines"]
    remarks = []
    for machine in machines:
        name = machine["topology"]
        if not machine["fits"]:
            largest = machine["largest_micro_batch_size"]
            room = f" and there are {human_bytes(machine['available'])}" if machine["available"] else ""
            need = f" needs {human_bytes(machine['needed'])}{room}" if machine["needed"] else " has no room"
            fix = (
                f"set --config.micro_batch_size={largest}"
                if largest
                else "take larger or more chips, shorter rows"
            )
            remarks.append(f"{name}: a micro-batch of {machine['micro_batch_size']}{need}; {fix}.")
    if any(machine["compiled"] for machine in machines):
        remarks.append(
            "As compiled: XLA's count of every operation, the loop over micro-batches multiplied out; counted: the "
            "matrix products of the models' shapes. A compiler short of memory computes parts twice."
        )
    remarks.append(
        "Roofline: the longer of matrix units and memory, which work at once at their published peaks, and then the "
        "reduction of the gradients, which nothing hides: every device sends 2(N − 1)/N of them over all its links."
    )
    if any(machine["times"]["compiler"] for machine in machines):
        remarks.append(
            "Compiler's estimate: the cycles of its own cost model, added up; not measured on a device. What is fused "
            "to a matrix product counts as one; of kernels such as splash attention it knows no cycles."
        )
    remarks.append(
        f"At {100 * run['mfu']:g} % of the peak: the counted work at that share of the matrix units' peak (--mfu)."
    )
    if not run["steps"]:
        remarks.append(
            "For the hours of the whole run give --config.steps, --config.data_dir of prepared rows, or --tokens."
        )
    elif run["steps_from"] != "config.steps":
        remarks.append(f"{run['steps']:,} steps: {run['steps_from']}.")
    notes = [f"{m['topology']}: {note}." for m in machines for note in m["notes"]]
    return [*remarks, *notes, *(f"{note}." for note in run["notes"])]


def _of(machine: Plan, name: str, field: str) -> float | None:
    return machine["run"].get(name, {}).get(field)


def _seconds(name: str, machine: Plan) -> str:
    return human_seconds(_of(machine, name, "step_seconds"))


def _parts(machines: Sequence[Plan]) -> list[str]:
    """The parts of a step that the compiler's cycles go to, the largest first."""
    shares: dict[str, float] = collections.defaultdict(float)
    for machine in machines:
        for part, seconds in machine["compiler_parts"].items():
            shares[part] += sum(seconds.values()) / _all_parts(machine)
    return sorted(shares, key=lambda part: -shares[part])


def _all_parts(machine: Plan) -> float:
    return sum(sum(seconds.values()) for seconds in machine["compiler_parts"].values())


def _share_of_part(part: str, machine: Plan) -> str:
    if not machine["compiler_parts"]:
        return MISSING
    seconds, whole = machine["compiler_parts"].get(part, {"products": 0.0, "rest": 0.0}), _all_parts(machine)
    share = human_percent(sum(seconds.values()) / whole)
    return f"{share} ({human_percent(seconds['products'] / whole)})"


def _rate(name: str, machine: Plan) -> str:
    return human_count(_of(machine, name, "tokens_per_second"))


def _hours(name: str, whole: bool, machine: Plan) -> str:
    hours = _of(machine, name, "hours" if whole else "hours_per_1000_steps")
    if hours is None:
        return MISSING
    return f"{human_number(hours)} ({human_number(hours * machine['chips'])})"


def _reductions(machine: Plan) -> str:
    count = machine["gradient_reductions"]
    return MISSING if count is None else human_number(count) if count % 1 > 0.01 else str(int(count))


def _collectives(machine: Plan) -> str:
    if machine["collectives"] is None:
        return MISSING
    counts: dict[str, int] = {}
    for collective in machine["collectives"]:
        counts[collective["kind"]] = counts.get(collective["kind"], 0) + collective["times"]
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "0"


def _whole(value: int | None) -> str:
    return MISSING if value is None else f"{value:,}"


def _signed(share: float | None) -> str:
    if share is None:
        return MISSING
    return ("+" if share >= 0 else "−") + human_percent(abs(share))
