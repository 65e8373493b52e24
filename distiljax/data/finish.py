"""The last step of a preparation: finished units become corpora."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distiljax.data.files import disk_errors, replacing
from distiljax.data.job import WORK_DIRECTORY, Job, UnitResult, counts_file, held_out_file, remove_work
from distiljax.data.metadata import (
    FORMAT_VERSION,
    PROBLEMS_KEPT,
    TOKEN_COUNTS_FILE,
    TOKENIZER_DIRECTORY,
    Metadata,
    Shard,
    Statistics,
)
from distiljax.data.rows import token_dtype
from distiljax.data.units import Unit, fingerprint, weights
from distiljax.data.work import write_rows
from distiljax.errors import UserError

HELD_OUT_TOKENS_PER_SHARD = 1 << 25
SHARDS = ("rows-*.array_record", "held_out-*.array_record")

Results = Sequence[tuple[Unit, UnitResult]]


def finish(out: Path, job: Job, units: Sequence[Unit], tokenizer: Any) -> dict[str, Metadata]:
    """Completes the corpora of a job: packs the held-out examples, writes the metadata, removes the job's files.

    Args:
      out: the corpora's directory.
      job: what was asked for.
      units: all of its units.
      tokenizer: the transformers tokenizer; its files are kept with each corpus.

    Returns:
      Split → metadata; empty if a unit is not finished.

    Raises:
      UserError: no example is left for one of the corpora.
    """
    made = [(unit, UnitResult.load(out, unit)) for unit in units if unit.outputs]
    results = [(unit, result) for unit, result in made if result is not None]
    if len(results) < len(made):
        return {}
    # Before anything is written that is not one of the job's own files.
    statistics = {split: _statistics(job, split, results) for split in job.splits}
    for split, counts in statistics.items():
        if not counts.examples:
            _refuse_empty(out, job, split, counts, all(not other.examples for other in statistics.values()))
    corpora = {split: _corpus(out, job, split, statistics[split], results, tokenizer) for split in job.splits}
    for split, metadata in corpora.items():
        metadata.save(out / split)
    remove_work(out)
    return corpora


def _statistics(job: Job, split: str, results: Results) -> Statistics:
    statistics = Statistics()
    for _, result in results:
        if split in result.contributions:
            statistics.add(result.contributions[split].statistics)
    return statistics


def _refuse_empty(out: Path, job: Job, split: str, counts: Statistics, everything: bool) -> None:
    settings = job.settings
    hint = "check data.source, data.holdout, data.min_tokens and data.deduplicate"
    if everything:
        discard(out, job.splits)
    else:
        hint += f"; the other splits stay in {out / WORK_DIRECTORY}: delete it to start with other settings"
    raise UserError(
        f"no example of {split} is left of {', '.join(settings['source'])}: {counts.documents_read} documents read, "
        f"{counts.dropped_duplicate} of them duplicates, {counts.dropped_held_out} of another split, "
        f"{counts.documents} kept, {counts.dropped_short} examples under {settings['min_tokens']} tokens, "
        f"{counts.dropped_unknown} mostly unknown, {counts.unreadable} unreadable; {hint}"
    )


def _corpus(
    out: Path, job: Job, split: str, statistics: Statistics, results: Results, tokenizer: Any
) -> Metadata:
    """Everything of a corpus but its metadata.json, which it returns."""
    from distiljax.hub.tokenizer import save_tokenizer  # brings JAX, which worker processes do without

    shards: list[Shard] = []
    counts = np.zeros(job.tokenizer["vocab_size"], np.int64)
    directory = out / split
    for unit, result in results:
        if split in result.contributions:
            shards += result.contributions[split].shards
            with np.load(counts_file(out, unit, split), allow_pickle=False) as arrays:
                counts += arrays["counts"]
    shards += _held_out_shards(out, job, split, results)
    statistics.rows = sum(shard.rows for shard in shards)
    _remove_others(directory, {shard.name for shard in shards})
    with disk_errors(directory):
        # metadata.json, which makes the corpus complete, comes after these.
        save_tokenizer(
            tokenizer, directory / TOKENIZER_DIRECTORY, int(min(tokenizer.model_max_length, 2**31))
        )
    with replacing(directory / TOKEN_COUNTS_FILE) as temporary, open(temporary, "wb") as file:
        np.save(file, counts, allow_pickle=False)
    return Metadata(
        format_version=FORMAT_VERSION,
        tokenizer_name=job.tokenizer["name"],
        vocabulary_sha256=job.tokenizer["vocabulary_sha256"],
        vocab_size=job.tokenizer["vocab_size"],
        pad_token_id=job.tokenizer["pad_id"],
        split=split,
        settings=job.settings,
        sources_sha256=fingerprint([unit for unit, _ in results], split),
        weights=weights(job.settings),
        statistics=vars(statistics).copy(),
        problems=tuple(p for unit, r in results if split in unit.outputs for p in r.problems)[:PROBLEMS_KEPT],
        shards=tuple(shards),
    )


def _held_out_shards(out: Path, job: Job, split: str, results: Results) -> list[Shard]:
    """The shards of what the holdout took, packed over unit borders: a unit's own share would fill few rows."""
    shards: list[Shard] = []
    dtype = token_dtype(job.tokenizer["vocab_size"])
    for source in range(len(job.settings["source"])):
        held = [(u, r) for u, r in results if u.source == source and u.held_out == split]
        for number, group in enumerate(_groups(held, split)):
            name = f"held_out-{source:02d}-{number:05d}"
            shards += write_rows(out, split, name, _examples(out, group), job.settings, dtype, source)
    return shards


def _groups(results: Results, split: str) -> Iterator[list[Unit]]:
    """Consecutive units with about a shard's worth of held-out tokens."""
    group: list[Unit] = []
    tokens = 0
    for unit, result in results:
        tokens += result.contributions[split].statistics.tokens
        group.append(unit)
        if tokens >= HELD_OUT_TOKENS_PER_SHARD:
            yield group
            group, tokens = [], 0
    if group:
        yield group


def _examples(out: Path, units: Iterable[Unit]) -> Iterator[np.ndarray]:
    for unit in units:
        with np.load(held_out_file(out, unit), allow_pickle=False) as arrays:
            yield from (
                np.split(arrays["tokens"], np.cumsum(arrays["lengths"])[:-1])
                if len(arrays["lengths"])
                else ()
            )


def discard(out: Path, splits: Sequence[str]) -> None:
    """Removes what a job has made, and the directories if nothing else is in them."""
    remove_work(out)
    for directory in (out / split for split in splits):
        for pattern in SHARDS:
            for path in directory.glob(pattern):
                path.unlink()
    for directory in (*(out / split for split in splits), out):
        with contextlib.suppress(OSError):
            directory.rmdir()


def _remove_others(directory: Path, names: set[str]) -> None:
    """Removes shards that are not of this corpus: of a unit that was redone, or of a killed process."""
    os.makedirs(directory, exist_ok=True)
    for pattern in SHARDS:
        for path in directory.glob(pattern):
            if path.name not in names:
                path.unlink()
