"""What a prepared corpus is and what became of the text, for a person."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distiljax.data.config import row_lengths
from distiljax.data.metadata import METADATA_FILE, TIMING_FILE, Metadata
from distiljax.errors import UserError
from distiljax.train.format import human_bytes, human_count, human_number, human_percent, human_seconds

if TYPE_CHECKING:
    from rich.console import Console

LABEL = 20  # columns
LAYOUTS = {
    "packed": "several examples share a row of",
    "padded": "one example a row of",
    "bucketed": "one example a row of",
}


def corpus_facts(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """What a prepared corpus is and what became of the text it was made of; JSON-ready.

    Raises:
      UserError: there is no corpus, or it is damaged.
    """
    metadata = Metadata.load(directory)
    try:
        return _facts(directory, metadata)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(
            f"{os.path.join(directory, METADATA_FILE)} is damaged ({type(error).__name__}: {error}); "
            "delete the directory and prepare it again"
        ) from None


def _facts(directory: str | os.PathLike[str], metadata: Metadata) -> dict[str, Any]:
    settings, shards = metadata.settings, metadata.shards
    sources = []
    for index, source in enumerate(settings["source"]):
        own = [shard for shard in shards if shard.source == index]
        rows = sum(shard.rows for shard in own)
        drawn = metadata.weights[index] if metadata.weights else rows / metadata.num_rows
        tokens = sum(shard.tokens for shard in own)
        sources.append({"source": source, "rows": rows, "tokens": tokens, "drawn": drawn})
    lengths = row_lengths(settings)
    return {
        "directory": os.fspath(directory),
        "split": metadata.split,
        "sources": sources,
        "weighted": bool(metadata.weights),
        "tokenizer": metadata.tokenizer_name,
        "vocab_size": metadata.vocab_size,
        **{key: settings[key] for key in ("layout", "seq_len", "min_tokens", "max_unknown", "max_documents")},
        **metadata.statistics,
        "unknown_rate": metadata.unknown_rate,
        "fill_rate": metadata.fill_rate,
        "tokens_per_row": metadata.tokens_per_row,
        "tokens_per_example": metadata.statistics["tokens"] / metadata.statistics["examples"],
        "rows_by_length": {
            length: sum(shard.rows for shard in shards if shard.seq_len == length) for length in lengths
        },
        "shards": len(shards),
        "bytes": sum(shard.bytes for shard in shards),
        "timing": _timing(directory),
        "problems": list(metadata.problems),
    }


def _timing(directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """How fast the corpus was made; None where nobody knows, as in a copy without that file."""
    try:
        timing = json.loads((Path(directory) / TIMING_FILE).read_text("utf-8"))
        return timing if timing["seconds"] > 0 and timing["tokens"] > 0 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def print_corpus(directory: str | os.PathLike[str], console: Console | None = None) -> None:
    """Prints a blank line, and what a prepared corpus is and what became of the text, on standard output.

    Raises:
      UserError: there is no corpus, or it is damaged.
    """
    facts = corpus_facts(directory)
    console = console or stdout_console()
    console.print()
    print_facts(facts, console)


def print_facts(facts: dict[str, Any], console: Console) -> None:
    """Prints `corpus_facts`: lines of at most 80 columns, but for paths."""
    from rich.text import Text

    def line(label: str, text: str, note: str = "") -> None:
        # Not wrapped by rich: paths stay whole, to be copied.
        parts: list[tuple[str, str] | str] = [
            (f"{label:<{LABEL}}", "" if label.startswith(" ") else "bold"),
            printable(text),
            (note, "dim"),
        ]
        console.print(Text.assemble(*parts), soft_wrap=True)

    line("Corpus", facts["directory"])
    line("Split", facts["split"])
    for number, source in enumerate(facts["sources"]):
        line("" if number else "Text", source["source"])
        if len(facts["sources"]) > 1:
            by = "by weight" if facts["weighted"] else "in proportion to its rows"
            drawn = f"; {human_percent(source['drawn'])} of a batch, {by}"
            line("", f"  {source['rows']:,} row{'' if source['rows'] == 1 else 's'}", drawn)
    line("Tokenizer", facts["tokenizer"], f", {facts['vocab_size']:,} tokens")
    *shorter, longest = [f"{length:,}" for length in facts["rows_by_length"]]
    lengths = f"{', '.join(shorter)} or {longest}" if shorter else longest
    line("Layout", facts["layout"], f": {LAYOUTS[facts['layout']]} {lengths} tokens")
    if timing := facts["timing"]:
        workers = timing.get("workers")
        by = f", {workers} process{'' if workers == 1 else 'es'}" if workers else ""
        speed = human_count(timing["tokens"] / timing["seconds"])
        line("Made in", human_seconds(timing["seconds"]), f", {speed} tokens/s{by}")
    console.print()
    for label, number, note in _figures(facts):
        line(label, f"{number:>15,}", f"   {note}" if note else "")
    if facts["problems"]:
        console.print()
        count, shown = facts["unreadable"], len(facts["problems"])
        first = "" if count <= shown else f", the first {shown} of {count:,}"
        console.print(Text.assemble(("Records that were skipped", "bold"), first))
        for problem in facts["problems"]:
            for text in textwrap.wrap(problem, 78, subsequent_indent="  ", break_long_words=False):
                console.print(Text(f"  {printable(text)}"), soft_wrap=True)


def _figures(facts: dict[str, Any]) -> Iterator[tuple[str, int, str]]:
    """(label, number, note) of each line; what is zero and says nothing is left out."""
    other = {"train": "held out for validation", "validation": "for training"}
    most = facts["max_documents"]
    if facts["unreadable"]:
        yield "Records skipped", facts["unreadable"], "unreadable, see below"
    yield from _account(
        ("Documents", facts["documents_read"], f"read, for {most:,} of each source" if most else "read"),
        ("  duplicates", facts["dropped_duplicate"], ", dropped"),
        ("  of another split", facts["dropped_held_out"], f", {other.get(facts['split'], 'left out')}"),
        ("  kept", facts["documents"], ""),
    )
    seq_len, fewest, unknown = (facts[key] for key in ("seq_len", "min_tokens", "max_unknown"))
    dropped = facts["dropped_short"] + facts["dropped_unknown"]
    yield from _account(
        ("Examples", facts["examples"] + dropped, f"documents, or parts of {seq_len:,} tokens"),
        ("  too short", facts["dropped_short"], f", under {fewest} tokens, dropped"),
        ("  mostly unknown", facts["dropped_unknown"], f", {100 * unknown:g} % [UNK] or more, dropped"),
        ("  kept", facts["examples"], ""),
    )
    yield "Tokens", facts["tokens"], f"{human_number(facts['tokens_per_example'])} an example"
    if facts["unknown_tokens"]:
        yield "  unknown", facts["unknown_tokens"], _share(facts["unknown_tokens"], facts["tokens"])
    yield "Rows", facts["rows"], f"{human_percent(facts['fill_rate'])} full, the rest is padding"
    for length, count in facts["rows_by_length"].items():
        if 0 < count < facts["rows"]:
            yield f"  of {length:,} tokens", count, _share(count, facts["rows"])
    yield "Shards", facts["shards"], human_bytes(facts["bytes"])


def _account(total: tuple[str, int, str], *parts: tuple[str, int, str]) -> Iterator[tuple[str, int, str]]:
    """A number and the parts that it is made of, unless that is one."""
    yield total
    parts = tuple(part for part in parts if part[1])
    for label, count, note in parts if len(parts) > 1 else ():
        yield label, count, _share(count, total[1]) + note


def _share(part: int, whole: int) -> str:
    """In per cent; of a small share, three digits."""
    share = part / whole
    return human_percent(share) if share >= 0.001 else f"{human_number(100 * share)} %"


def stdout_console() -> Console:
    """Standard output as it is now: colours where it is a terminal, any text wherever it goes."""
    from rich.console import Console

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every encoding has every script

    class Pipe(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # which the command line knows what to do about; rich would exit with status 1

    return Pipe(highlight=False, markup=False, emoji=False)


def printable(text: str) -> str:
    """The text without what would move the cursor or cannot be encoded."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
