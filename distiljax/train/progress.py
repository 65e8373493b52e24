"""What a person sees while a command works: a bar on a terminal, now and then a plain line anywhere else."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from distiljax.train.format import human_count, human_number, human_percent, human_seconds

if TYPE_CHECKING:
    from rich.console import Group

PLAIN_INTERVAL = 30.0
"""Seconds between two plain lines where standard error is not a terminal."""

_SHARES = {"mlm_accuracy": "accuracy", "teacher_agreement": "agreement"}


class _Display:
    """The bar or the plain lines; the subclasses say what they show.

    While the bar is up rich stands in for sys.stderr and sys.stdout, so that what is written there, log lines
    too, goes above it.
    """

    def __init__(
        self,
        description: str,
        total: int | None,
        completed: int,
        enabled: bool,
        clock: Callable[[], float],
    ) -> None:
        self._description, self._total, self._completed = description, total, completed
        self._enabled, self._clock = enabled, clock
        self._stream = sys.stderr
        self._detail, self._left_text = "", ""
        self._began = clock()
        self._anchor: tuple[float, int] | None = None
        self._printed_at: float | None = None
        self._unprinted = ""
        self._live: Any = None
        self._spinner: Any = None

    def __enter__(self) -> Self:
        self._began = self._clock()
        if self._enabled and _is_terminal(self._stream):
            from rich.console import Console
            from rich.live import Live
            from rich.spinner import Spinner

            self._spinner = Spinner("dots")
            console = Console(file=self._stream, highlight=False)
            self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._unprinted:
            self._print(self._unprinted)

    def _show(self, completed: int, counts: str, facts: list[str]) -> None:
        """Takes note of the state for the bar, or prints it as a plain line if one is due."""
        self._completed, self._detail, self._left_text = completed, " · ".join(facts), self._left(completed)
        if self._live is not None or not self._enabled:
            return
        elapsed = f"{human_seconds(int(self._elapsed()))} elapsed"
        parts = [counts, *facts, elapsed, self._left_text]
        line = f"{self._description}: {', '.join(filter(None, parts))}"
        if self._printed_at is None or self._clock() - self._printed_at >= PLAIN_INTERVAL:
            self._print(line)
        else:
            self._unprinted = line

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)
        self._printed_at, self._unprinted = self._clock(), ""

    def _elapsed(self) -> float:
        return self._clock() - self._began

    def _left(self, completed: int) -> str:
        """The time left at the mean rate since the first update; before that lies compilation."""
        if self._anchor is None:
            self._anchor = (self._clock(), completed)
        since, first = self._anchor
        if self._total is None or not first < completed < self._total:
            return ""
        rate = (completed - first) / max(self._clock() - since, 1e-9)
        return f"{human_seconds((self._total - completed) / rate)} left"

    def _counter(self) -> str:
        raise NotImplementedError

    def _render(self) -> Group:
        from rich.console import Group
        from rich.padding import Padding
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        times = ", ".join(filter(None, [human_seconds(int(self._elapsed())), self._left_text]))
        row = Table.grid(padding=(0, 1))
        # One spinner for the whole display: a new one at each refresh would stand still.
        bar = self._spinner
        if self._total is not None:
            bar = ProgressBar(total=self._total, completed=self._completed, width=24)
        row.add_row(
            Text(self._description, style="bold"),
            bar,
            Text(self._counter(), no_wrap=True),
            Text(times, style="cyan", no_wrap=True),
        )
        if not self._detail:
            return Group(row)
        return Group(row, Padding(Text(self._detail, style="dim"), (0, 0, 0, 2)))


class Progress(_Display):
    """Progress through a known number of optimiser steps, as a context manager.

    On a terminal: a bar, step and total, the time since the start and the time left, and under them the
    losses, accuracy and tokens/s. Where standard error is not a terminal: one plain line at most every 30 s,
    the first and the last included. `start_step` is the step that a resumed run begins at. `enabled=False`
    shows nothing (every process but the first).
    """

    def __init__(
        self,
        description: str,
        total_steps: int,
        start_step: int = 0,
        *,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(description, total_steps, start_step, enabled, clock)

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Shows that `step` steps are done; `values` has the metric names of metrics.jsonl."""
        self._show(step, f"step {step:,} of {self._total:,}", _compact(values))

    def _counter(self) -> str:
        return f"{self._completed:,}/{self._total:,}"


class StageProgress(_Display):
    """Progress through the parts of one stage of work after the other, as a context manager.

    Shows the stage's parts done and their total, documents, tokens, tokens/s and the time left in the stage; quiet in
    the same way as Progress.
    """

    def __init__(
        self, description: str, *, enabled: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(description, None, 0, enabled, clock)
        self._what, self._stage, self._since = description, "", clock()

    def update(self, stage: str, done: int, total: int, documents: int, tokens: int) -> None:
        """Shows that `done` of `total` parts of `stage` are done, and the running totals."""
        if stage != self._stage:
            self._stage, self._anchor, self._since = stage, None, self._clock()
            self._description = f"{self._what}: {stage}"
        self._total = total
        facts = [f"{documents:,} documents"] if documents else []
        if tokens:
            facts.append(f"{human_count(tokens)} tokens")
            if (elapsed := self._clock() - self._since) >= 1:  # before that it says nothing
                facts.append(f"{human_count(tokens / elapsed)} tokens/s")
        self._completed = done
        self._show(done, self._counter(), facts)

    def _counter(self) -> str:
        return "" if self._total is None else f"{self._completed:,}/{self._total:,} parts"


def stage(title: str, index: int, total: int) -> None:
    """Prints the heading of one stage of a program on standard error: `[2/6] Adapting the teacher`."""
    heading = f"[{index}/{total}] {title}"
    if not _is_terminal(sys.stderr):
        print(heading, file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, highlight=False).print(Text(f"\n{heading}", style="bold"))


def _compact(values: Mapping[str, float]) -> list[str]:
    """The values worth a glance: "loss 3.21 (ce 2.10, cos 0.051)", "accuracy 41.2 %", "412 k tokens/s"."""
    parts = []
    terms = [
        f"{name.removeprefix('loss_')} {human_number(value)}"
        for name, value in values.items()
        if name.startswith("loss_")
    ]
    if "loss" in values:
        parts.append(f"loss {human_number(values['loss'])}" + (f" ({', '.join(terms)})" if terms else ""))
    elif terms:
        parts.append(", ".join(terms))
    parts += [f"{label} {human_percent(values[name])}" for name, label in _SHARES.items() if name in values]
    if "tokens_per_second" in values:
        parts.append(f"{human_count(values['tokens_per_second'])} tokens/s")
    return parts


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")
