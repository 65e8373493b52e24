"""A preparation under way: what was asked for, what is finished, and the files that say so.

A job is a directory that all who work on it can reach, OUT/.prepare, with what they need to know (job.json,
tokenizer.json) and what they leave for each other:

    digests-NNNNN.npy       the hashes of a unit's documents
    spool-NNNNN.zst, .json  its documents, where reading them again would cost much, and the records skipped
    duplicates-N/NNNNN.u4   which of them to drop, once N units have been looked at
    taken.json              which directory of these counts; and how many of a unit's documents to take
    unit-NNNNN.json         the unit is finished; its statistics and shards, the latter in OUT/SPLIT
    counts-NNNNN-SPLIT.npz  how often each token occurs in what it contributes to a corpus
    held_out-NNNNN.npz      the examples of its held-out documents

Every file is renamed into place when it is complete, and says the same whoever writes it. So a unit that is there is
finished, and two who work on one by accident do no harm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distiljax.data.files import disk_errors, replacing, temporary_name, write_json
from distiljax.data.metadata import Shard, Statistics, vocabulary_sha256
from distiljax.data.units import Unit, fingerprint
from distiljax.errors import UserError

log = logging.getLogger(__name__)

WORK_DIRECTORY = ".prepare"
JOB_FILE = "job.json"
TAKEN_FILE = "taken.json"


@dataclasses.dataclass(frozen=True)
class Job:
    """What every worker has to know.

    Attributes:
      settings: a checked data config.
      splits: the corpora to make.
      sources_sha256: the input's identity.
      units: how many there are.
      tokenizer: the tokenizer's name, vocabulary_sha256, vocab_size, and ids of its special tokens.
    """

    settings: dict[str, Any]
    splits: tuple[str, ...]
    sources_sha256: str
    units: int
    tokenizer: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As it stands in job.json."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


@dataclasses.dataclass
class Contribution:
    """What a unit adds to one corpus."""

    statistics: Statistics = dataclasses.field(default_factory=Statistics)
    shards: list[Shard] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class UnitResult:
    """What came of a unit: by corpus, and the records that were skipped, the first few in words."""

    contributions: dict[str, Contribution]
    problems: list[str]

    @classmethod
    def load(cls, out: Path, unit: Unit) -> UnitResult | None:
        """The result of a finished unit, None if it is not finished or its shards have been lost since."""
        try:
            values = json.loads((out / WORK_DIRECTORY / f"unit-{unit.number:05d}.json").read_text("utf-8"))
            contributions = {
                name: Contribution(
                    Statistics(**value["statistics"]), [Shard(**shard) for shard in value["shards"]]
                )
                for name, value in values["contributions"].items()
            }
            problems = list(values["problems"])
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None
        aside = [counts_file(out, unit, split) for split in unit.outputs]
        aside += [held_out_file(out, unit)] if unit.held_out else []
        if not all(path.is_file() for path in aside):
            return None
        for name, contribution in contributions.items():
            for shard in contribution.shards:
                path = out / name / shard.name
                if not path.is_file() or path.stat().st_size != shard.bytes:
                    return None
        return cls(contributions, problems)

    def save(self, out: Path, unit: Unit) -> None:
        """Marks a unit as finished."""
        write_json(out / WORK_DIRECTORY / f"unit-{unit.number:05d}.json", dataclasses.asdict(self))


def load_job(out: Path) -> Job:
    """The job that is under way in a corpora's directory."""
    values = json.loads((out / WORK_DIRECTORY / JOB_FILE).read_text("utf-8"))
    return Job(**{**values, "splits": tuple(values["splits"])})


def start_job(
    out: Path, settings: dict[str, Any], splits: Sequence[str], tokenizer: Any, units: Sequence[Unit]
) -> Job:
    """Makes the job's directory, or finds that of the same job; one of another job is refused."""
    job = Job(
        settings=settings,
        splits=tuple(splits),
        sources_sha256=fingerprint(units),
        units=len(units),
        tokenizer={
            "name": str(tokenizer.name_or_path),
            "vocabulary_sha256": vocabulary_sha256(tokenizer),
            # Not len(tokenizer): ids may have gaps.
            "vocab_size": max(tokenizer.get_vocab().values()) + 1,
            "pad_id": tokenizer.pad_token_id,
            "cls_id": tokenizer.cls_token_id,
            "sep_id": tokenizer.sep_token_id,
            "unknown_id": tokenizer.unk_token_id,
        },
    )
    directory = out / WORK_DIRECTORY
    path = directory / JOB_FILE
    if path.exists():
        try:
            other = json.loads(path.read_text("utf-8"))
        except ValueError:
            other = {}
        other = other if isinstance(other, dict) else {}
        if other == job.to_json():
            return job
        difference = _difference(other, job.to_json())
        if any(directory.glob("unit-*.json")):
            raise UserError(
                f"{out} holds the unfinished work of another preparation ({difference}); go on with that one, delete "
                f"{directory} to start again, or choose another directory"
            )
        log.info("%s: nothing was finished of another preparation (%s); starting again", out, difference)
        remove_work(out)
    try:
        with disk_errors(out):
            directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; choose another directory") from error
    with replacing(directory / "tokenizer.json") as temporary:
        Path(temporary).write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
    write_json(path, job.to_json())
    return job


def remove_work(out: Path) -> None:
    """Removes the job's directory; who looks for it meanwhile finds it whole or not at all."""
    leaving = Path(temporary_name(out / WORK_DIRECTORY))
    with contextlib.suppress(FileNotFoundError):
        (out / WORK_DIRECTORY).rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    for key, value in new.get("settings", {}).items():
        before = old.get("settings", {}).get(key)
        if before != value:
            return f"data.{key} was {before!r} and is now {value!r}"
    for key, words in {
        "splits": "other splits",
        "tokenizer": "another tokenizer",
        "sources_sha256": "other text",
    }.items():
        if old.get(key) != new[key]:
            return words
    return f"{JOB_FILE} is damaged"


# Files.


def digests_file(out: Path, unit: int) -> Path:
    """The hashes of a scanned unit's documents."""
    return out / WORK_DIRECTORY / f"digests-{unit:05d}.npy"


def counts_file(out: Path, unit: Unit, split: str) -> Path:
    """How often each token occurs in what a unit contributes to a corpus."""
    return out / WORK_DIRECTORY / f"counts-{unit.number:05d}-{split}.npz"


def held_out_file(out: Path, unit: Unit) -> Path:
    """The examples of a unit's held-out documents."""
    return out / WORK_DIRECTORY / f"held_out-{unit.number:05d}.npz"
