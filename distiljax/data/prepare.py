"""Text to prepared corpora: plan ▶ scan ▶ find duplicates ▶ write ▶ finish. The steps are in distiljax.data.work."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distiljax.data import work
from distiljax.data.config import default_data_config
from distiljax.data.config import settings as checked_settings
from distiljax.data.examples import check_tokenizer
from distiljax.data.files import write_json
from distiljax.data.finish import discard, finish
from distiljax.data.job import JOB_FILE, TAKEN_FILE, WORK_DIRECTORY, Job, remove_work, start_job
from distiljax.data.metadata import (
    METADATA_FILE,
    TIMING_FILE,
    TOKEN_COUNTS_FILE,
    TOKENIZER_DIRECTORY,
    Metadata,
)
from distiljax.data.sources import SourceSpec, parse
from distiljax.data.units import Unit, fingerprint, plan, weights
from distiljax.data.workers import Workers
from distiljax.errors import UserError

log = logging.getLogger(__name__)

SPLITS = ("train", "validation")


@dataclasses.dataclass
class Progress:
    """How far a preparation has got.

    Attributes:
      stage: "reading", to find duplicates, or "tokenising".
      units: in this stage.
      done: units done.
      documents: tokenised so far.
      tokens: of these.
    """

    stage: str
    units: int = 0
    done: int = 0
    documents: int = 0
    tokens: int = 0


def prepare(
    config: Any,
    tokenizer: Any,
    out_dir: str | os.PathLike[str],
    *,
    splits: Sequence[str] = SPLITS,
    workers: int = 1,
    shard_index: int = 0,
    shard_count: int = 1,
    adopt: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, Metadata]:
    """Makes the corpora of some splits in `out_dir`/SPLIT, or finds that they are there already.

    The same text, config and tokenizer always give the same bytes (but for timing.json), however many workers and
    machines there are, and however often the work was cut short: the same call goes on after the finished units.
    A corpus is complete when it has its metadata.json.

    Args:
      config: a data config, see `default_data_config`.
      tokenizer: a fast transformers tokenizer with [CLS], [SEP] and [PAD].
      out_dir: a local directory, made if it is not there; several machines share it.
      splits: "train" (the sources' split `config.split`), "validation" or other splits of the sources.
      workers: processes. With more than one, a script that calls this needs `if __name__ == "__main__":`.
      shard_index: which part of the units this call makes.
      shard_count: parts; whoever finds all units made completes the corpora.
      adopt: take complete corpora as they are where `config` differs from them in keys left at their defaults.
      progress: called now and then; what it raises ends the work.

    Returns:
      Split → metadata; empty as long as units of other parts are missing.

    Raises:
      UserError: a value of the config, the source, the tokenizer or the directory is not as it must be, a record
        cannot be used (see data.on_error), the disk is full, or no example is left after the filters.
    """
    if shard_count < 1:
        raise UserError(f"shard_count is {shard_count}; expected the number of parts, at least 1")
    if not 0 <= shard_index < shard_count:
        raise UserError(
            f"shard_index is {shard_index}; expected 0 to {shard_count - 1}, as shard_count is {shard_count}"
        )
    if workers < 1:
        raise UserError(f"workers is {workers}; expected at least 1")
    state = Progress("reading")

    def tick(documents: int, tokens: int) -> None:
        state.documents, state.tokens = documents, tokens
        if progress:
            progress(state)

    def make(out: Path, job: Job, units: Sequence[Unit]) -> int:
        mine = [unit for unit in units[shard_index::shard_count] if unit.outputs]
        try:
            with Workers(min(workers, len(mine) or 1), tick) as pool:
                if job.settings["deduplicate"] or job.settings["max_documents"]:
                    _scan(pool, out, job, units, shard_index, shard_count, state)
                state.stage, state.units, state.done = "tokenising", len(mine), 0
                for _ in pool.run(work.write_unit, out, mine):
                    state.done += 1
                    tick(state.documents, state.tokens)
        except UserError:
            if shard_count == 1 and not any((out / WORK_DIRECTORY).glob("unit-*.json")):
                discard(out, job.splits)  # nothing is finished, so nothing is lost
            raise
        return state.tokens

    how = {"workers": workers, "cores": os.cpu_count()}
    return prepare_by(make, how, config, tokenizer, out_dir, splits, adopt)


def prepare_by(
    make: Callable[[Path, Job, Sequence[Unit]], int],
    how: dict[str, Any],
    config: Any,
    tokenizer: Any,
    out_dir: str | os.PathLike[str],
    splits: Sequence[str],
    adopt: bool,
) -> dict[str, Metadata]:
    """What every way of preparing begins and ends with.

    Args:
      make: makes the units, all or some, in the given directory, and returns how many tokens that were.
      how: what timing.json says about the way, beside the time.
      config: and what follows: as in `prepare`, which says what this returns and raises, too.
    """
    began = time.monotonic()
    settings = checked_settings(config)
    check_tokenizer(tokenizer)
    out = _local(out_dir)
    if (out / METADATA_FILE).exists():
        raise UserError(f"{out} is the corpus of one split; give the directory that it is in, {out.parent}")
    if os.path.lexists(out) and not out.is_dir():
        raise UserError(f"{out} is not a directory; choose another")
    found = {split: _existing(out, split, settings, tokenizer, adopt) for split in splits}
    complete = {split: metadata for split, metadata in found.items() if metadata}
    if len(complete) == len(splits):
        _tidy(out)
        _warn_if_changed(out, complete)
        return complete
    if not (out / WORK_DIRECTORY / JOB_FILE).exists():
        splits = [split for split in splits if split not in complete]

    units = plan(settings, splits)
    job = start_job(out, settings, splits, tokenizer, units)
    tokens = make(out, job, units)
    try:
        corpora = finish(out, job, units, tokenizer)
    except (UserError, OSError):
        # Another machine may have finished the same work at the same time, and tidied up.
        if not all((out / split / METADATA_FILE).is_file() for split in splits):
            raise
        corpora = {}
    for split in corpora:
        _write_timing(out / split, time.monotonic() - began, tokens, how)
    if not corpora and all((out / split / METADATA_FILE).is_file() for split in splits):
        corpora = {split: Metadata.load(out / split) for split in splits}
    return complete | corpora if corpora else {}


def _scan(
    pool: Workers,
    out: Path,
    job: Job,
    units: Sequence[Unit],
    shard_index: int,
    shard_count: int,
    state: Progress,
) -> None:
    """Decides which documents are taken. Without a limit on them every unit is scanned, else as few as will do."""
    if (out / WORK_DIRECTORY / TAKEN_FILE).exists():
        return
    limit = job.settings["max_documents"]
    scanned: dict[int, int] = {}
    taken: work.Taken = {}
    decision: dict[str, Any] = {}
    share = 1
    while True:
        wanted: list[Unit] = []
        for key in dict.fromkeys((unit.source, unit.split) for unit in units):
            left = [u for u in units if (u.source, u.split) == key and u.number not in scanned]
            if not limit:
                wanted += left
            elif taken.get(key, 0) < limit:
                wanted += left[:share]  # twice as many in each round, whoever scans them
        if not wanted:
            write_json(out / WORK_DIRECTORY / TAKEN_FILE, decision)
            return
        share *= 2
        # Of several machines each begins with its own units and goes on with the next machine's, so that what one
        # has scanned the others find.
        wanted.sort(key=lambda unit: ((unit.number - shard_index) % shard_count, unit.number))
        state.stage, state.units, state.done = "reading", len(wanted), 0
        for unit, documents in pool.run(work.scan_unit, out, wanted):
            scanned[unit.number] = documents
            state.done += 1
        taken, decision = work.find_duplicates(out, scanned, units)


# The directory.


def _local(directory: str | os.PathLike[str]) -> Path:
    path = os.fspath(directory)
    if "://" in path:
        raise UserError(
            f"directory {path} is remote; expected a local directory (mount it, or copy the corpus)"
        )
    return Path(os.path.abspath(os.path.expanduser(path)))


def _existing(
    out: Path, split: str, settings: dict[str, Any], tokenizer: Any, adopt: bool
) -> Metadata | None:
    """The corpus that is there if it is the one asked for, None if it is not complete."""
    directory = out / split
    if not os.path.lexists(directory) or (directory.is_dir() and not any(directory.iterdir())):
        return None
    if not (directory / METADATA_FILE).is_file():
        under_way = (out / WORK_DIRECTORY / JOB_FILE).exists()
        # It may have been completed between the two looks.
        if under_way and not (directory / METADATA_FILE).is_file():
            return None
    if not (directory / METADATA_FILE).is_file():
        if directory.is_dir() and all(_is_ours(path.name) for path in directory.iterdir()):
            return None  # what is left of a preparation whose work was deleted
        raise UserError(
            f"{directory} exists and is not a prepared corpus (no {METADATA_FILE}); choose another directory"
        )
    metadata = Metadata.load(directory)
    metadata.check_tokenizer(tokenizer)
    if _unweighted(metadata.settings["source"]) == _unweighted(settings["source"]):
        # Weights do not change what is prepared: those that are asked for now are the loader's.
        metadata = dataclasses.replace(
            metadata, settings=metadata.settings | {"source": settings["source"]}, weights=weights(settings)
        )
    defaults = checked_settings(default_data_config())
    for key, asked in settings.items():
        made = metadata.settings.get(key)
        if made != asked and not (adopt and asked == defaults[key]):
            raise UserError(
                f"{directory} was prepared with data.{key} = {made!r}, now it is {asked!r}; "
                "delete that directory or choose another"
            )
    return metadata


def _is_ours(name: str) -> bool:
    shard = name.endswith(".array_record") and name.startswith(("rows-", "held_out-"))
    return shard or name in (TOKEN_COUNTS_FILE, TOKENIZER_DIRECTORY, TIMING_FILE)


def _unweighted(sources: Sequence[str]) -> list[SourceSpec]:
    return [dataclasses.replace(parse(source), text="", weight=None) for source in sources]


def _tidy(out: Path) -> None:
    """Removes what a process has left that was killed between completing its corpora and removing its work."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        job = json.loads((out / WORK_DIRECTORY / JOB_FILE).read_text("utf-8"))
        if all((out / split / METADATA_FILE).is_file() for split in job["splits"]):
            remove_work(out)


def _warn_if_changed(out: Path, corpora: dict[str, Metadata]) -> None:
    """Says so if the files that corpora were made of are others now; sources that cannot be listed at once are not."""
    settings = next(iter(corpora.values())).settings
    slow = ("docstrings", "hf:", "tfds:")
    if any(source.startswith(slow) or "://" in source for source in settings["source"]):
        return
    try:
        units = plan(settings, list(corpora))
    except UserError:
        return  # a corpus needs its text no more
    if any(fingerprint(units, split) != metadata.sources_sha256 for split, metadata in corpora.items()):
        log.warning(
            "%s was prepared from other text than there is now in %s; to use that, delete the directory",
            out,
            ", ".join(settings["source"]),
        )


def _write_timing(directory: Path, seconds: float, tokens: int, how: dict[str, Any]) -> None:
    """Notes how long the call took that completed a corpus, and what it prepared meanwhile."""
    values = {
        "seconds": round(seconds, 3),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds),
        **how,
    }
    write_json(directory / TIMING_FILE, values)
