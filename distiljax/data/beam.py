"""Preparing on Apache Beam: the steps of distiljax.data.work as a pipeline, for any of Beam's runners.

    units ▶ scan ▶ group the hashes by range ▶ group the repeated documents by unit ▶ note them
    units ▶ (when all are noted) write

All workers reach the corpora's directory; through the pipeline go the units and the hashes, no text and no rows. The
launching process plans before and finishes after it, as for any other way of preparing.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import socket
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distiljax.data import duplicates, work
from distiljax.data.config import settings as checked_settings
from distiljax.data.files import write_json
from distiljax.data.job import JOB_FILE, TAKEN_FILE, WORK_DIRECTORY, Job, digests_file
from distiljax.data.metadata import Metadata
from distiljax.data.prepare import SPLITS, prepare_by
from distiljax.data.units import Unit
from distiljax.errors import UserError

DUPLICATES = "duplicates-beam"
TEXT_AT_ONCE = 512 << 20  # bytes of text whose documents' hashes are compared by one worker at once


def prepare_on_beam(
    config: Any,
    tokenizer: Any,
    out_dir: str | os.PathLike[str],
    *,
    splits: Sequence[str] = SPLITS,
    pipeline_options: Sequence[str] = (),
) -> dict[str, Metadata]:
    """`distiljax.data.prepare.prepare` as an Apache Beam pipeline: the same bytes, on the workers of a Beam runner.

    Args:
      config: a data config, without a limit on the documents.
      tokenizer: a fast transformers tokenizer.
      out_dir: a directory that this process and all workers reach under the same name.
      splits: as `prepare`.
      pipeline_options: Beam's, such as ["--runner=FlinkRunner", "--flink_master=host:8081"].

    Returns:
      Split → metadata.

    Raises:
      UserError: as `prepare`; or apache-beam is not installed, its options are not as they must be, or the directory
        is not shared.
    """
    if most := checked_settings(config)["max_documents"]:
        raise UserError(
            f"data.max_documents is {most}, which is not for Beam; set it to 0, or prepare samples without Beam"
        )
    pipeline = _pipeline(pipeline_options)

    def make(out: Path, job: Job, units: Sequence[Unit]) -> int:
        _build(pipeline, out, job, units)
        return _run(pipeline)

    how = {"runner": type(pipeline.runner).__name__}
    corpora = prepare_by(make, how, config, tokenizer, out_dir, splits, adopt=False)
    if not corpora:
        raise UserError(
            f"the pipeline is done but not all it has made is in {os.fspath(out_dir)}; "
            "expected a directory that all workers share"
        )
    return corpora


# In the launching process.


def _pipeline(arguments: Sequence[str]) -> Any:
    said = io.StringIO()
    before = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)  # Beam misses Google's libraries, which only some runners need
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ModuleNotFoundError as error:
        raise UserError(
            f"Apache Beam is not installed ({error}); run: pip install 'distiljax[beam]'"
        ) from error
    finally:
        logging.disable(before)
    try:
        with contextlib.redirect_stderr(said):
            options = PipelineOptions(list(arguments))
            options.get_all_options()
        return apache_beam.Pipeline(options=options)
    except SystemExit as error:
        reason = said.getvalue().strip().splitlines()[-1:] or ["--help"]
        raise UserError(
            f"pipeline options {' '.join(arguments)!r}: {reason[0].rpartition('error: ')[2]}"
        ) from error
    except (ValueError, ImportError) as error:
        raise UserError(
            f"pipeline options {' '.join(arguments)!r}: {' '.join(str(error).split())}"
        ) from error


def _build(pipeline: Any, out: Path, job: Job, units: Sequence[Unit]) -> None:
    import apache_beam as beam

    todo = pipeline | "units" >> beam.Create(units)
    noted: Any = 0
    if job.settings["deduplicate"] and not (out / WORK_DIRECTORY / TAKEN_FILE).exists():
        ranges = -(-sum(unit.size for unit in units) // TEXT_AT_ONCE) or 1
        counted = (
            todo
            | "scan" >> beam.FlatMap(_scan, out, ranges)
            | "hashes by range" >> beam.GroupByKey()
            | "find duplicates" >> beam.FlatMap(_repeated)
            | "duplicates by unit" >> beam.GroupByKey()
            | "note duplicates" >> beam.Map(_note, out)
            | "all noted" >> beam.combiners.Count.Globally()
            | "end of search" >> beam.Map(_noted, out)
        )
        # A side input is complete before the step that takes it begins.
        noted = beam.pvalue.AsSingleton(counted)
    _ = todo | "write" >> beam.Map(_write, out, noted)


def _run(pipeline: Any) -> int:
    """Runs the pipeline; how many tokens it has prepared, as far as its runner can tell."""
    from apache_beam.metrics.metric import MetricsFilter
    from apache_beam.runners.runner import PipelineState

    try:
        result = pipeline.run()
        state = result.wait_until_finish() or result.state
    except Exception as error:
        raise _user_error(error) or error from error
    if state != PipelineState.DONE:
        raise UserError(
            f"the pipeline has ended as {state}; its runner says why, and the same command goes on after the finished "
            "shards"
        )
    try:
        counters = result.metrics().query(MetricsFilter().with_name("tokens"))["counters"]
    except NotImplementedError:
        return 0
    return sum(counter.result for counter in counters)


def _user_error(error: BaseException | None) -> UserError | None:
    """What a worker found wrong with the input: runners pass the text of its traceback on, at best."""
    while error is not None:
        text = f"UserError: {error}" if isinstance(error, UserError) else str(error)
        if found := re.search(r"UserError: (.+?)(?: \[while running '|\n|$)", text):
            return UserError(found[1])
        error = error.__cause__ or error.__context__
    return None


# On the workers. What is computed is in distiljax.data.work and distiljax.data.duplicates.


def _report(documents: int, tokens: int) -> None:
    from apache_beam.metrics import Metrics

    Metrics.counter("distiljax", "documents").inc(documents)
    Metrics.counter("distiljax", "tokens").inc(tokens)


def _check_shared(out: Path) -> None:
    if not (out / WORK_DIRECTORY / JOB_FILE).exists():
        raise UserError(
            f"{out} is empty on {socket.gethostname()}; expected a directory that all workers share"
        )


def _scan(unit: Unit, out: Path, ranges: int) -> Iterator[tuple[int, tuple[int, bytes]]]:
    """Hashes a unit's documents: range of hashes → the unit's number and records."""
    _check_shared(out)
    work.scan_unit(out, unit, _report)
    for number in range(ranges):
        part = duplicates.read_range(digests_file(out, unit.number), number, ranges)
        if len(part):
            yield number, (unit.number, part.tobytes())


def _repeated(element: tuple[int, Iterable[tuple[int, bytes]]]) -> Iterator[tuple[int, bytes]]:
    """The documents that repeat an earlier one, of one range of hashes: unit's number → ordinals."""
    records = {unit: np.frombuffer(part, duplicates.RECORD) for unit, part in sorted(element[1])}
    for unit, ordinals in duplicates.repeated(records):
        yield unit, ordinals.tobytes()


def _note(element: tuple[int, Iterable[bytes]], out: Path) -> int:
    unit, ordinals = element
    every = np.sort(np.frombuffer(b"".join(ordinals), "<u4"))
    duplicates.write_dropped(out / WORK_DIRECTORY / DUPLICATES, unit, every)
    return unit


def _noted(units: int, out: Path) -> int:
    """Marks the search as done: it need not be repeated if the rest is cut short."""
    (out / WORK_DIRECTORY / DUPLICATES).mkdir(exist_ok=True)
    write_json(out / WORK_DIRECTORY / TAKEN_FILE, {"duplicates": DUPLICATES, "limits": None})
    return units


def _write(unit: Unit, out: Path, noted: int) -> None:
    del noted
    _check_shared(out)
    # The runner has a process for each core.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    work.write_unit(out, unit, _report)
