"""Rows of a prepared corpus by their numbers, many at a time."""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from distiljax.data.metadata import Metadata
from distiljax.data.rows import BadRow, Batch, Rows, decode_rows, empty_batch, make_batch, token_dtype
from distiljax.errors import UserError

# Neither reads ahead nor starts threads: rows are asked for in no order.
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
READER_BUFFER = 32_768  # bytes
MAX_OPEN_SHARDS = 1 << 14  # an open shard holds a descriptor, and some 11 bytes a row
OTHER_FILES = 512  # descriptors left for the rest of the process
ROWS_AT_ONCE = 1024  # by `verify`


class _Descriptors:
    """The open files that the process may have, shared out to its readers."""

    def __init__(self) -> None:
        self._shared_out = 0
        self._lock = threading.RLock()  # readers may be collected, and give back, while a share is computed

    def share(self, wanted: int) -> int:
        """How many shards another reader may have open at once, after raising the limit for them if need be."""
        with self._lock:
            limit = _raised_limit(self._shared_out + wanted + OTHER_FILES)
            left = limit - self._shared_out - min(OTHER_FILES, limit // 2)
            # A reader that comes late gets some too: it takes from what is left for others.
            given = max(1, min(wanted, max(left, limit // 8)))
            self._shared_out += given
            return given

    def give_back(self, given: int) -> None:
        with self._lock:
            self._shared_out -= given


def _raised_limit(wanted: int) -> int:
    """How many open files the process may have: `wanted`, or as many as the system allows if those are fewer."""
    try:
        import resource
    except ImportError:  # no such limits on this system
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    new = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if new > soft:
        with contextlib.suppress(ValueError, OSError):  # some systems allow less than the hard limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (new, hard))
            return new
    return soft


_descriptors = _Descriptors()


class RowReader:
    """Random access to a corpus's rows, which are numbered from 0 through all shards; threads may share it.

    A shard is opened when one of its rows is first asked for, and stays open. For a corpus of many shards the limit
    on the process's open files (`ulimit -n`) is raised, but never above its hard limit (`ulimit -Hn`). Where that is
    too low too, the shards not used for longest are closed. Rows drawn in random order are then read several times
    slower, since opening a shard takes longer than reading its rows of a batch: set the hard limit to some 1,000 more
    than the corpus has shards.
    """

    def __init__(self, directory: str | os.PathLike[str], metadata: Metadata) -> None:
        self._paths = [os.path.join(directory, shard.name) for shard in metadata.shards]
        self._shards = metadata.shards
        self._ends = list(itertools.accumulate(shard.rows for shard in metadata.shards))
        self._vocab_size, self._pad_token_id = metadata.vocab_size, metadata.pad_token_id
        self._dtype = token_dtype(metadata.vocab_size)
        self._open: dict[int, Any] = {}  # in the order of their last use
        self._lock = threading.Lock()
        self._max_open = _descriptors.share(min(len(self._shards), MAX_OPEN_SHARDS))
        weakref.finalize(self, _descriptors.give_back, self._max_open)

    def __len__(self) -> int:
        return self._ends[-1]

    def batch(self, numbers: Sequence[int], seq_len: int, batch_size: int = 0) -> Batch:
        """Rows as a batch: int32 `input_ids`, `segment_ids` and `positions`, each [B, S].

        Args:
          numbers: of the rows.
          seq_len: S; no row may be longer.
          batch_size: B; when there are fewer rows the rest is padding. By default as many as there are rows.

        Raises:
          UserError: a shard is damaged, naming it, its index and the row in it.
        """
        if not numbers:
            return empty_batch(batch_size, seq_len, self._pad_token_id)
        return make_batch(self.rows(numbers, seq_len), seq_len, self._pad_token_id, batch_size)

    def rows(self, numbers: Sequence[int], seq_len: int) -> Rows:
        """The rows of these numbers, of which there is at least one, decoded and checked.

        Raises:
          UserError: as for `batch`.
        """
        records = self._records(numbers)
        try:
            return decode_rows(records, self._dtype, seq_len, self._vocab_size)
        except BadRow as error:
            raise self._damaged(*self._locate(numbers[error.index]), error) from error

    def _records(self, numbers: Sequence[int]) -> list[bytes]:
        """The bytes of rows, by one call for each shard."""
        places: dict[int, tuple[list[int], list[int]]] = {}
        for place, number in enumerate(numbers):
            shard, row = self._locate(number)
            wanted = places.setdefault(shard, ([], []))
            wanted[0].append(place)
            wanted[1].append(row)
        records = [b""] * len(numbers)
        for shard, (where, rows) in places.items():
            for place, record in zip(where, self._read(shard, rows), strict=True):
                records[place] = record
        return records

    def _read(self, shard: int, rows: list[int]) -> list[bytes]:
        # ArrayRecord raises one of these, by the kind of damage, and does not say for which row.
        damage = (RuntimeError, IndexError, ValueError)
        try:
            reader = self._reader(shard)
        except damage as error:
            raise self._damaged(shard, min(rows), error) from error
        try:
            return reader.read(rows)
        except damage:
            return [self._read_one(reader, shard, row, damage) for row in rows]

    def _read_one(self, reader: Any, shard: int, row: int, damage: tuple[type[Exception], ...]) -> bytes:
        try:
            return reader.read([row])[0]
        except damage as error:
            raise self._damaged(shard, row, error) from error

    def _reader(self, shard: int) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        with self._lock:
            if (reader := self._open.pop(shard, None)) is not None:
                self._open[shard] = reader
                return reader
        reader = ArrayRecordReader(self._paths[shard], READER_OPTIONS, file_reader_buffer_size=READER_BUFFER)
        with self._lock:
            self._open[shard] = reader
            while len(self._open) > self._max_open:
                # It closes its file when the last thread that reads from it lets go.
                del self._open[next(iter(self._open))]
        return reader

    def _locate(self, number: int) -> tuple[int, int]:
        """The shard of a row, and its number there."""
        shard = bisect.bisect_right(self._ends, number)
        return shard, number - (self._ends[shard] - self._shards[shard].rows)

    def _damaged(self, shard: int, row: int, error: Exception) -> UserError:
        reason = str(error).partition("\n")[0]
        return UserError(
            f"{self._paths[shard]} (shard {shard} of {len(self._paths)}) is damaged at row {row}: {reason}; "
            "prepare the corpus again, or copy the file again"
        )


def verify(directory: str | os.PathLike[str]) -> None:
    """Reads all of a corpus: every row must be one, and every shard what its metadata says.

    Args:
      directory: what `prepare` made.

    Raises:
      UserError: there is no corpus, or it is damaged, naming the shard, its index and, where it is known, the row.
    """
    metadata = Metadata.load(directory)
    reader = RowReader(directory, metadata)
    first = 0
    for index, shard in enumerate(metadata.shards):
        tokens = 0
        for start in range(first, first + shard.rows, ROWS_AT_ONCE):
            numbers = range(start, min(start + ROWS_AT_ONCE, first + shard.rows))
            tokens += len(reader.rows(numbers, shard.seq_len).tokens)
        first += shard.rows
        path = os.path.join(directory, shard.name)
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        for what, found, expected in (
            ("sha256", sha256[:16], shard.sha256[:16]),
            ("tokens", tokens, shard.tokens),
        ):
            if found != expected:
                raise UserError(
                    f"{path} (shard {index} of {len(metadata.shards)}) is damaged: {what} {found}, expected "
                    f"{expected}; prepare the corpus again, or copy the file again"
                )
