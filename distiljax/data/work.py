"""The steps that every way of preparing a corpus is made of: on one machine, on several, on Apache Beam.

What they leave for each other is in distiljax.data.job.
"""

from __future__ import annotations

import array
import bisect
import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from distiljax.data import duplicates, packing
from distiljax.data.config import row_lengths
from distiljax.data.document import Document
from distiljax.data.examples import Tokeniser, examples
from distiljax.data.files import replacing, save_arrays, temporary_name, write_json
from distiljax.data.job import (
    TAKEN_FILE,
    WORK_DIRECTORY,
    Contribution,
    Job,
    UnitResult,
    counts_file,
    digests_file,
    held_out_file,
    load_job,
)
from distiljax.data.metadata import PROBLEMS_KEPT, Shard, Statistics
from distiljax.data.rows import token_dtype
from distiljax.data.shards import ShardWriter
from distiljax.data.sources import ReadOptions, open_source
from distiljax.data.units import Unit
from distiljax.errors import UserError

_TOKENS_COUNTED_AT_ONCE = 1 << 20
_REPORT_EVERY = 256  # documents

Report = Callable[[int, int], None]  # takes the documents and tokens prepared since its last call
Taken = dict[tuple[int, str | None], int]  # (source, split) → documents


def _load_tokeniser(out: Path, job: Job) -> Tokeniser:
    backend = (out / WORK_DIRECTORY / "tokenizer.json").read_text("utf-8")
    return _tokeniser(backend, *(job.tokenizer[f"{name}_id"] for name in ("cls", "sep", "unknown")))


# Once a process: a large vocabulary takes a second.
_tokeniser = functools.lru_cache(maxsize=1)(Tokeniser)


# Reading.


class _Problems:
    """Takes note of records that cannot be used, or refuses them."""

    def __init__(self, on_error: str) -> None:
        self._skip = on_error == "skip"
        self.count = 0
        self.messages: list[str] = []

    def __call__(self, message: str, repeated: bool = False) -> None:
        """Takes note; not again of what another piece of the same file says, too."""
        if not self._skip:
            raise UserError(f"{message}; mend it, or leave such records out (data.on_error, --on_error=skip)")
        if repeated:
            return
        self.count += 1
        if len(self.messages) < PROBLEMS_KEPT:
            self.messages.append(message)


def _documents(job: Job, out: Path, unit: Unit, problems: _Problems) -> Iterator[Document]:
    """A unit's documents, from the spool if the scan has left one."""
    spool = _spool_file(out, unit)
    if spool.exists():
        yield from _unspooled(spool, problems)
        return
    source = open_source(job.settings["source"][unit.source])
    options = ReadOptions(
        field=source.spec.field or job.settings["text_field"],
        unit=job.settings["unit"],
        language=job.settings["language"],
    )
    for piece in unit.pieces:
        yield from source.read(unit.split, piece, options, problems)


def _spool_file(out: Path, unit: Unit) -> Path:
    return out / WORK_DIRECTORY / f"spool-{unit.number:05d}.zst"


def _unspooled(spool: Path, problems: _Problems) -> Iterator[Document]:
    import io

    import pyarrow

    noted = json.loads(spool.with_suffix(".json").read_text("utf-8"))
    problems.count, problems.messages = noted["count"], noted["messages"]
    with pyarrow.CompressedInputStream(str(spool), "zstd") as stream:
        for line in io.BufferedReader(stream):
            yield Document(*json.loads(line))


@contextlib.contextmanager
def _spooling(spool: Path, problems: _Problems) -> Iterator[Callable[[Document], None]]:
    import pyarrow

    with replacing(spool) as temporary:
        with pyarrow.CompressedOutputStream(temporary, "zstd") as stream:
            yield lambda document: stream.write(json.dumps(document).encode() + b"\n")
        # First: a spool that is there is complete.
        write_json(spool.with_suffix(".json"), {"count": problems.count, "messages": problems.messages})


# The steps.


def scan_unit(out: Path, unit: Unit, report: Report) -> int:
    """Hashes a unit's documents; with a limit on the documents, at most so many different ones.

    Returns:
      How many documents it has.
    """
    path = digests_file(out, unit.number)
    if path.exists():
        return duplicates.count(path)
    job = load_job(out)
    problems = _Problems(job.settings["on_error"])
    limit = job.settings["max_documents"]
    found = array.array("Q")
    different: set[int] = set()
    with contextlib.ExitStack() as stack:
        spool = None
        if open_source(job.settings["source"][unit.source]).expensive:
            spool = stack.enter_context(_spooling(_spool_file(out, unit), problems))
        for document in _documents(job, out, unit, problems):
            found.append(duplicates.digest(document.text))
            if spool:
                spool(document)
            if len(found) % _REPORT_EVERY == 0:
                report(0, 0)
            if limit:
                different.add(found[-1])
                if len(different) == limit:
                    break
    duplicates.write_digests(path, found)
    return len(found)


def find_duplicates(
    out: Path, scanned: dict[int, int], units: Iterable[Unit]
) -> tuple[Taken, dict[str, Any]]:
    """Decides which documents of the scanned units are taken.

    Args:
      out: the corpora's directory.
      scanned: unit number → its documents.
      units: all units.

    Returns:
      How many documents of each (source, split) are taken; and what taken.json is to say.
    """
    job = load_job(out)
    files = {number: digests_file(out, number) for number in sorted(scanned)}
    repeated: dict[int, int] = {}
    decision: dict[str, Any] = {"duplicates": None, "limits": None}
    if job.settings["deduplicate"]:
        decision["duplicates"] = f"duplicates-{len(scanned)}"
        repeated = duplicates.find(files, out / WORK_DIRECTORY / decision["duplicates"])
    taken: Taken = {}
    limits: dict[int, int] = {}
    for unit in units:
        key = unit.source, unit.split
        new = scanned.get(unit.number, 0) - repeated.get(unit.number, 0)
        if most := job.settings["max_documents"]:
            new = limits[unit.number] = min(new, most - taken.get(key, 0))
            decision["limits"] = limits
        taken[key] = taken.get(key, 0) + new
    return taken, decision


def _taken(job: Job, out: Path, unit: Unit) -> tuple[list[int], int | None]:
    """The ordinals of a unit's documents to drop, ascending, and how many of the others to take (None: all)."""
    if not (job.settings["deduplicate"] or job.settings["max_documents"]):
        return [], None
    work = out / WORK_DIRECTORY
    decision = json.loads((work / TAKEN_FILE).read_text("utf-8"))
    dropped: Any = (
        duplicates.dropped(work / decision["duplicates"], unit.number) if decision["duplicates"] else []
    )
    limits = decision["limits"]
    return [int(ordinal) for ordinal in dropped], None if limits is None else limits.get(str(unit.number), 0)


def _selected(
    job: Job, out: Path, unit: Unit, problems: _Problems, kept: Statistics, held_out: Statistics
) -> Iterator[tuple[str, Statistics]]:
    """The documents that a unit contributes, each with the counters of the corpus it goes to."""
    ordinals, limit = _taken(job, out, unit)
    dropped = iter([*ordinals, -1])
    next_dropped = next(dropped)
    threshold = int(job.settings["holdout"] * 2**64) if unit.divided else 0
    for ordinal, document in enumerate(_documents(job, out, unit, problems) if limit != 0 else ()):
        kept.documents_read += 1
        if ordinal == next_dropped:
            next_dropped = next(dropped)
            kept.dropped_duplicate += 1
            continue
        side = held_out if threshold and duplicates.digest(document.group) < threshold else kept
        side.documents += 1
        if (unit.held_out if side is held_out else unit.kept) is not None:
            yield document.text, side
        if kept.documents + held_out.documents == limit:
            break
    kept.unreadable = problems.count
    # Both sides of the holdout read the same text.
    for name in ("documents_read", "unreadable", "dropped_duplicate"):
        setattr(held_out, name, getattr(kept, name))
    kept.dropped_held_out, held_out.dropped_held_out = held_out.documents, kept.documents


def write_unit(out: Path, unit: Unit, report: Report) -> UnitResult:
    """Makes a unit's shards, unless they are there."""
    if finished := UnitResult.load(out, unit):
        return finished
    job = load_job(out)
    tokeniser = _load_tokeniser(out, job)
    settings = job.settings
    dtype = token_dtype(job.tokenizer["vocab_size"])
    problems = _Problems(settings["on_error"])
    kept, held_out = Statistics(), Statistics()
    counts = {id(side): _TokenCounts(job.tokenizer["vocab_size"]) for side in (kept, held_out)}
    aside: list[np.ndarray] = []
    meter = _Meter(report, kept, held_out)

    def kept_examples() -> Iterator[np.ndarray]:
        documents = meter.watched(_selected(job, out, unit, problems, kept, held_out))
        filters = {key: settings[key] for key in ("seq_len", "min_tokens", "max_unknown")}
        for example, side in examples(documents, tokeniser, **filters):
            counts[id(side)].add(example)
            if side is kept:
                yield example
            else:
                aside.append(example.astype(dtype))

    shards = write_rows(
        out, unit.kept or "", f"rows-{unit.number:05d}", kept_examples(), settings, dtype, unit.source
    )
    kept.rows = sum(shard.rows for shard in shards)
    result = UnitResult({}, problems.messages)
    if unit.kept:
        result.contributions[unit.kept] = Contribution(kept, shards)
        counts[id(kept)].save(counts_file(out, unit, unit.kept))
    if unit.held_out:
        result.contributions[unit.held_out] = Contribution(held_out)
        counts[id(held_out)].save(counts_file(out, unit, unit.held_out))
        lengths = np.array([len(example) for example in aside], np.uint32)
        tokens = np.concatenate(aside) if aside else np.zeros(0, dtype)
        save_arrays(held_out_file(out, unit), lengths=lengths, tokens=tokens)
    result.save(out, unit)
    meter.tell()
    return result


def write_rows(
    out: Path,
    split: str,
    name: str,
    pieces: Iterable[np.ndarray],
    settings: dict[str, Any],
    dtype: np.dtype,
    source: int,
) -> list[Shard]:
    """Lays examples out in rows and writes them to one shard for each length that rows come in.

    Args:
      out: the corpora's directory.
      split: the corpus's directory in it.
      name: of the shard, without the extension.
      pieces: the examples.
      settings: a checked data config.
      dtype: of the stored tokens.
      source: index of the source, for the loader.
    """
    lengths = row_lengths(settings)
    packed = (
        packing.pack(pieces, settings["seq_len"])
        if settings["layout"] == "packed"
        else packing.one_a_row(pieces)
    )
    writers: dict[int, ShardWriter] = {}
    if split:
        (out / split).mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        for row in packed:
            length = lengths[bisect.bisect_left(lengths, sum(map(len, row)))]
            if length not in writers:
                suffix = f"-{length:05d}" if len(lengths) > 1 else ""
                path = out / split / f"{name}{suffix}.array_record"
                temporary = temporary_name(out / WORK_DIRECTORY / path.name)
                writer = ShardWriter(temporary, str(path), dtype, source, length)
                writers[length] = stack.enter_context(writer)
            writers[length].write(row)
        return [writers[length].close() for length in sorted(writers)]


class _Meter:
    """Tells how far the work on a unit has got."""

    def __init__(self, report: Report, *sides: Statistics) -> None:
        self._report, self._sides = report, sides
        self._told = [0, 0]

    def tell(self) -> None:
        """Reports what has come since the last time."""
        now = [sum(s.documents for s in self._sides), sum(s.tokens for s in self._sides)]
        self._report(now[0] - self._told[0], now[1] - self._told[1])
        self._told = now

    def watched(self, documents: Iterable[tuple[str, Statistics]]) -> Iterator[tuple[str, Statistics]]:
        """The documents as they come."""
        for number, document in enumerate(documents):
            yield document
            if number % _REPORT_EVERY == 0:
                self.tell()


class _TokenCounts:
    """Counts tokens, many examples at once."""

    def __init__(self, vocab_size: int) -> None:
        self._counts = np.zeros(vocab_size, np.int64)
        self._pending: list[np.ndarray] = []
        self._tokens = 0

    def add(self, example: np.ndarray) -> None:
        self._pending.append(example)
        self._tokens += len(example)
        if self._tokens >= _TOKENS_COUNTED_AT_ONCE:
            self._count()

    def save(self, path: Path) -> None:
        self._count()
        save_arrays(path, counts=self._counts)

    def _count(self) -> None:
        if self._pending:
            self._counts += np.bincount(np.concatenate(self._pending), minlength=len(self._counts))
        self._pending, self._tokens = [], 0
