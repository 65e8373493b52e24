"""Predictions on standard output, and how far they are on a terminal."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from distiljax.errors import UserError
from distiljax.tasks.inputs import count_inputs

log = logging.getLogger(__name__)

_LONGEST = 400  # characters of a text that is shown to a person


def print_results(
    results: Iterable[Mapping[str, Any]], *, as_json: bool, file: str | None, bar: bool
) -> None:
    """Print what `predict` gives, one result after the other.

    Args:
      results: of `predict`.
      as_json: one JSON object a line; else lines for a person.
      file: that the inputs are from, None where it is not known how many there are.
      bar: whether to show on standard error how far it is, where that is a terminal and standard output is none.
    """
    out = sys.stdout
    if out is None:
        raise UserError("standard output is closed; send it to a file or to another program")
    # What a stream cannot encode is escaped: half a character as JSON has it, too, and other ones by `json` itself.
    if isinstance(out, io.TextIOWrapper):
        out.reconfigure(errors="backslashreplace")
    is_utf8 = (out.encoding or "utf-8").lower().replace("-", "") == "utf8"
    is_empty = True
    with _progress(
        file, bar and sys.stderr is not None and sys.stderr.isatty() and not out.isatty()
    ) as advance:
        for result in results:
            lines = [json.dumps(result, ensure_ascii=not is_utf8)] if as_json else _lines(result)
            # At once, for whoever reads, and to see when nobody does any more.
            print(*lines, sep="\n", file=out, flush=True)
            advance()
            is_empty = False
    if is_empty:
        log.warning("%s has no text; there is nothing to predict", file or "standard input")


@contextlib.contextmanager
def _progress(file: str | None, enabled: bool) -> Iterator[Callable[[], None]]:
    if not enabled:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    columns = (
        TextColumn("predict"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", style="dim"),
        TimeElapsedColumn(),
        TimeLeft(),
    )
    # Standard output stays what it is: rich would send it where the bar goes.
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as progress:
        task = progress.add_task("predict", total=count_inputs(file) if file else None, rate="")

        def advance() -> None:
            speed = progress.tasks[0].finished_speed or progress.tasks[0].speed
            progress.update(task, advance=1, rate=f"{speed:,.0f} texts/s" if speed else "")

        yield advance


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
    name = f"{_shown(str(result['id']))}: " if "id" in result else ""
    yield name + _shown(result["question"] if "question" in result else result["text"])
    if "text_pair" in result:
        yield _shown(result["text_pair"])
    if "score" in result:
        yield f"  {result['score']:.4f}"
    for label in result["labels"] if "entities" not in result and "labels" in result else ():
        yield f"  {label['score']:7.4f}  {label['label']}"
    for entity in result.get("entities", ()):
        place = f"{entity['start']}–{entity['end']}"
        yield f"  {entity['score']:7.4f}  {entity['label']:<12} {place:>11}  {_shown(entity['text'])}"
    for answer in result.get("answers", ()):
        place = f"{answer['start']}–{answer['end']}" if answer["text"] else ""
        yield f"  {answer['score']:7.4f}  {place:>11}  {_shown(answer['text']) or '(no answer)'}"
    for number, choices in enumerate(result.get("masks", ()), 1):
        if len(result["masks"]) > 1:
            yield f"  [MASK] {number}"
        for choice in choices:
            yield f"  {choice['score']:7.4f}  {choice['token']:<16} {_shown(choice['filled'])}"


def _shown(text: str) -> str:
    """On one line, and no longer than a person reads."""
    line = " ".join(text.splitlines())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"
