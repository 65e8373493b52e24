"""Exact duplicates across a corpus of any size, found in bounded memory: an external sort by hash.

Every unit leaves a file of its documents' hashes in ascending order. One range of hashes after the other is read from
all of these files, sorted, and of equal hashes all but the first in the corpus are noted, unit by unit.
"""

from __future__ import annotations

import bisect
import hashlib
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from distiljax.data.files import disk_errors, replacing, temporary_name

DOCUMENTS_AT_ONCE = 1 << 22  # some 100 MB while they are sorted

RECORD = np.dtype([("digest", "<u8"), ("ordinal", "<u4")])


def digest(text: str) -> int:
    """A 64-bit hash. Among a billion documents one is lost to a collision in one corpus out of forty."""
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big"
    )


def write_digests(path: str | os.PathLike[str], digests: Sequence[int]) -> None:
    """Writes a unit's hashes, in the order of its documents, to the sorted file that `find` reads."""
    records = np.empty(len(digests), RECORD)
    values = np.array(digests, np.uint64)
    order = np.argsort(values, kind="stable")
    records["digest"], records["ordinal"] = values[order], order
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, records, allow_pickle=False)


def count(path: str | os.PathLike[str]) -> int:
    """How many documents a unit's file is of."""
    return len(np.load(path, mmap_mode="r"))


def find(files: Mapping[int, Path], directory: Path, at_once: int = DOCUMENTS_AT_ONCE) -> dict[int, int]:
    """Makes the directory that `dropped` reads, unless it is there.

    Args:
      files: unit number → its file, in the order of the corpus.
      directory: where the ordinals go.
      at_once: documents sorted at once, roughly.

    Returns:
      Unit number → how many of its documents repeat an earlier one.
    """
    if not directory.exists():
        building = Path(temporary_name(directory))
        with disk_errors(directory):
            building.mkdir()
            ranges = max(1, math.ceil(sum(map(count, files.values())) / at_once))
            for number in range(ranges):
                parts = {unit: read_range(path, number, ranges) for unit, path in files.items()}
                for unit, ordinals in repeated(parts):
                    with open(_ordinals_file(building, unit), "ab") as file:
                        file.write(ordinals.tobytes())
        publish(building, directory)
    return {unit: len(dropped(directory, unit)) for unit in files}


def publish(building: Path, directory: Path) -> None:
    """Gives a directory its name; where another process was faster, its equal one stays."""
    try:
        building.rename(directory)
    except OSError:
        if not directory.is_dir():
            raise
        shutil.rmtree(building)


def read_range(path: str | os.PathLike[str], number: int, ranges: int) -> np.ndarray:
    """A unit's records, as `write_digests` has left them, whose hash is in range `number` of `ranges` equal ones.

    The file is open only meanwhile: a corpus may have more units than a process may have open files.
    """
    records = np.load(path, mmap_mode="r")
    # Not np.searchsorted, which would copy the column.
    start, end = (
        bisect.bisect_left(records["digest"], bound * 2**64 // ranges, key=int)
        for bound in (number, number + 1)
    )
    return np.array(records[start:end])


def repeated(parts: Mapping[int, np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """(unit, ordinals) of the records whose hash an earlier record has.

    Args:
      parts: unit → its records of one range, in the order of the corpus.
    """
    records = np.concatenate([*parts.values()])
    owners = np.repeat(np.array([*parts], np.int32), [len(part) for part in parts.values()])
    order = np.argsort(records["digest"], kind="stable")
    digests = records["digest"][order]
    repeats = np.sort(order[1:][digests[1:] == digests[:-1]])  # and so unit by unit
    ordinals = records["ordinal"][repeats].astype("<u4")
    units, starts = np.unique(owners[repeats], return_index=True)
    for unit, part in zip(units, np.split(ordinals, starts)[1:], strict=True):
        yield int(unit), part


def write_dropped(directory: Path, unit: int, ordinals: np.ndarray) -> None:
    """Notes a unit's repeated documents by hand, for pipelines that group the hashes themselves."""
    directory.mkdir(exist_ok=True)
    with replacing(_ordinals_file(directory, unit)) as temporary:
        ordinals.astype("<u4").tofile(temporary)


def dropped(directory: Path, unit: int) -> np.ndarray:
    """The ordinals, ascending, of a unit's documents that repeat an earlier one.

    Raises:
      FileNotFoundError: no such directory; in one that is there, a unit without a file has none.
    """
    path = _ordinals_file(directory, unit)
    if not path.exists():
        os.stat(directory)
        return np.zeros(0, np.uint32)
    return np.sort(np.fromfile(path, "<u4"))


def _ordinals_file(directory: Path, unit: int) -> Path:
    return directory / f"{unit:05d}.u4"
