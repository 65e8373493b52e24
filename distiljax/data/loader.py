"""Prepared rows to batches: the same order for any number of processes and from any step on."""

from __future__ import annotations

import bisect
import copy
import dataclasses
import heapq
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from distiljax.data.metadata import Metadata
from distiljax.data.reader import RowReader
from distiljax.data.rows import Batch
from distiljax.errors import UserError

READ_THREADS = 4
BATCHES_AHEAD = 4
# Rows until a loader ends. Grain's own endless repeat has a length that batches of one row overflow.
MAX_ROWS = 2**52


class Selection(Sequence[int]):
    """Numbers of rows, ascending: ranges, for which no index of the rows is needed.

    Args:
      metadata: of the corpus.
      source: only the rows of this source.
      seq_len: only the rows of the shards with rows of this length.
    """

    def __init__(self, metadata: Metadata, source: int | None = None, seq_len: int | None = None) -> None:
        self._ends: list[int] = []
        self._offsets: list[int] = []  # from the place in the selection to the row's number
        first = length = 0
        for shard in metadata.shards:
            wanted = source in (None, shard.source) and seq_len in (None, shard.seq_len)
            if wanted and shard.rows:
                length += shard.rows
                offset = first + shard.rows - length
                if self._offsets and self._offsets[-1] == offset:
                    self._ends[-1] = length
                else:
                    self._ends.append(length)
                    self._offsets.append(offset)
            first += shard.rows

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(len(self))[place]]
        return place + self._offsets[bisect.bisect_right(self._ends, place)]

    def __repr__(self) -> str:
        return f"Selection({len(self)} rows)"


@dataclasses.dataclass(frozen=True)
class _Bucket:
    """The rows of one length."""

    seq_len: int
    rows: Selection


class RowLoader:
    """Batches of prepared rows, over and over.

    Global batch t is rows [t·B, (t+1)·B) of the epochs' permutations one after the other; each epoch has its
    own permutation, and a batch may straddle the end of an epoch. A process reads its contiguous part of the
    batch's rows. The order depends on `seed` only; not on the processes, nor on where reading began: the only
    position there is is the number of the next batch. Permutations are computed row by row (a Feistel
    network), so no index is held.

    With weights, every source has permutations of its own, and the batches' rows are drawn from the sources in
    turn, so many from each. In a corpus of rows bucketed by length every batch is of one bucket, [B, its
    length], and an epoch is a permutation of all whole batches of all buckets; the rows of a bucket that do not
    fill a batch sit an epoch out, others in the next.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        batch_size: int,
        seed: int,
        *,
        weights: Sequence[float] | None = None,
        process_index: int = 0,
        process_count: int = 1,
        shuffle: bool = True,
        start: int = 0,
    ) -> None:
        """Opens a corpus.

        Args:
          directory: what `prepare` made.
          batch_size: rows in a global batch, B.
          seed: of the permutations.
          weights: share of the rows that is drawn from each source, in any unit; by default what the corpus was
            prepared with. () draws in proportion to their rows.
          process_index: this process's number.
          process_count: processes that share the global batch.
          shuffle: False keeps the order of the corpus.
          start: number of the first batch to yield.

        Raises:
          UserError: there is no corpus, it has fewer rows than a batch, the batch does not divide by the
            processes, or the weights do not fit the sources.
        """
        # While grain is imported, the import statements of all threads are etils' lazy ones. Batches are read in a
        # thread, and what the main thread traces meanwhile must not import through these.
        import grain  # noqa: F401

        _check_divides(batch_size, process_count)
        self.metadata = Metadata.load(directory)
        self.directory = directory
        self.batch_size = batch_size
        self.seed = seed
        self.weights = tuple(self.metadata.weights if weights is None else weights)
        self.process_index = process_index
        self.process_count = process_count
        self.shuffle = shuffle
        self.start = start
        if self.metadata.num_rows < batch_size:
            raise UserError(
                f"{os.fspath(directory)} has {self.num_rows} rows, fewer than one batch of {batch_size}; "
                "use a smaller batch, a shorter data.seq_len or more text"
            )
        if self._bucketed and not self.steps_per_epoch:
            fullest = max(_buckets(self.metadata), key=lambda bucket: len(bucket.rows))
            raise UserError(
                f"{os.fspath(directory)} has at most {len(fullest.rows)} rows of one length ({fullest.seq_len}), "
                f"fewer than one batch of {batch_size}; use a smaller batch, fewer data.buckets or more text"
            )
        if self.weights:
            self._check_weights()

    @property
    def num_rows(self) -> int:
        """Rows in the corpus."""
        return self.metadata.num_rows

    @property
    def tokens_per_row(self) -> float:
        """Tokens that are not padding, mean over the rows."""
        return self.metadata.tokens_per_row

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch, at least 1; the rows left over begin the next epoch's first batch.

        With weights an epoch is as many rows as the corpus has, whichever they are. Those left over of a bucket sit
        the epoch out.
        """
        if self._bucketed:
            return sum(len(bucket.rows) // self.batch_size for bucket in _buckets(self.metadata))
        return self.num_rows // self.batch_size

    def steps(self, epochs: float) -> int:
        """Batches that hold so many epochs; the last may reach into the next epoch."""
        if self._bucketed:
            return math.ceil(epochs * self.steps_per_epoch)
        return math.ceil(epochs * self.num_rows / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """This process's part of every global batch from `start` on.

        The iterator's `close` stops the threads that read ahead.

        Yields:
          int32 `input_ids`, `segment_ids` and `positions`, each [B / process_count, S].

        Raises:
          UserError: a shard is damaged, naming it, its index and the row in it.
        """
        import grain

        reader = RowReader(self.directory, self.metadata)
        parts = self._bucketed_parts() if self._bucketed else self._parts()
        batches = parts.map(lambda part: reader.batch(part[1], seq_len=part[0]))
        return iter(batches.to_iter_dataset(grain.ReadOptions(READ_THREADS, BATCHES_AHEAD)))

    def whole_batch(self, step: int) -> Batch:
        """All processes' rows of global batch `step`, int32 [B, S], and under `rows` their numbers, int64 [B]."""
        whole = copy.copy(self)
        whole.process_index, whole.process_count, whole.start = 0, 1, step
        seq_len, rows = (whole._bucketed_parts() if self._bucketed else whole._parts())[0]
        batch = RowReader(self.directory, self.metadata).batch(rows, seq_len=seq_len)
        return batch | {"rows": np.asarray(rows, np.int64)}

    @property
    def _bucketed(self) -> bool:
        return self.metadata.settings.get("layout") == "bucketed"

    def _parts(self) -> Any:
        """A Grain dataset of (length, row numbers of this process's part), one for each batch from `start` on."""
        import grain

        if self.weights:
            sources = [
                self._endless(len(rows), i).map(rows.__getitem__) for i, rows in enumerate(self._sources())
            ]
            rows = grain.MapDataset.mix(sources, self.weights)
        else:
            rows = self._endless(self.num_rows, 0)
        parts = rows.batch(self.batch_size // self.process_count, batch_fn=list)
        # Parts are numbered batch by batch and, in a batch, process by process.
        first = self.start * self.process_count + self.process_index
        seq_len = self.metadata.seq_len
        return parts[first :: self.process_count].map(lambda numbers: (seq_len, numbers))

    def _bucketed_parts(self) -> Any:
        """As `_parts`, each batch of the rows of one bucket."""
        buckets = _buckets(self.metadata)
        orders = [self._shuffled(len(bucket.rows), 1 + i) for i, bucket in enumerate(buckets)]
        ends = list(itertools.accumulate(len(bucket.rows) // self.batch_size for bucket in buckets))
        part = self.batch_size // self.process_count

        def rows_of(step: int, batch: int) -> tuple[int, list[int]]:
            index = bisect.bisect_right(ends, batch)
            batch -= ends[index - 1] if index else 0
            bucket, order = buckets[index], orders[index]
            epoch = step // ends[-1]
            first = epoch * len(order) + batch * self.batch_size + self.process_index * part
            return bucket.seq_len, [bucket.rows[order[place]] for place in range(first, first + part)]

        return self._endless(ends[-1], 0).map_with_index(rows_of)[self.start :]

    def _endless(self, length: int, stream: int) -> Any:
        return self._shuffled(length, stream).repeat(max(1, MAX_ROWS // length))

    def _shuffled(self, length: int, stream: int) -> Any:
        """A Grain dataset of the numbers below `length`; behind its end comes the next epoch, in another order."""
        import grain

        numbers = grain.MapDataset.range(length)
        if not self.shuffle:
            return numbers
        # Grain's epoch e is shuffled with seed + e; spreading the seeds keeps those of run 0 and run 1, and of
        # two sources or buckets, apart.
        return numbers.shuffle(seed=int(np.random.SeedSequence(self.seed).generate_state(stream + 1)[stream]))

    def _sources(self) -> list[Selection]:
        return [Selection(self.metadata, source=index) for index in range(len(self.weights))]

    def _check_weights(self) -> None:
        where, weights = os.fspath(self.directory), self.weights
        if self._bucketed:
            raise UserError(
                f"{where} has rows bucketed by length and weights {weights}; leave out the weights, or prepare it with "
                "data.layout packed or padded"
            )
        names = self.metadata.settings.get("source", weights)
        count = max(len(names), 1 + max(shard.source for shard in self.metadata.shards))
        if len(weights) != count:
            raise UserError(f"weights {weights} for the {count} sources of {where}; expected {count} weights")
        for name, weight, rows in zip(names, weights, self._sources(), strict=False):
            if not (math.isfinite(weight) and weight > 0):
                raise UserError(
                    f"the weight of source {name} is {weight}; expected more than 0, or leave the source out"
                )
            if not rows:
                raise UserError(
                    f"{where} has no rows of source {name}, whose weight is {weight}; leave the source out, or "
                    "prepare more of its text"
                )


def eval_batches(
    directory: str | os.PathLike[str], batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """All rows once, in order; the last batch is filled up with empty rows (`segment_ids` 0).

    In a corpus of rows bucketed by length every batch is of one bucket, the last of each bucket is filled up, and
    the buckets take turns, so that the first few batches have rows of all lengths in the corpus's proportions.

    Args:
      directory: what `prepare` made.
      batch_size: rows in a global batch, B.
      process_index: this process's number.
      process_count: processes that share the global batch; all get the same number of batches.

    Yields:
      int32 `input_ids`, `segment_ids` and `positions`, each [B / process_count, S].

    Raises:
      UserError: there is no corpus, it is damaged, or the batch does not divide by the processes.
    """
    _check_divides(batch_size, process_count)
    metadata = Metadata.load(directory)
    reader = RowReader(directory, metadata)
    part = batch_size // process_count

    def in_turn(index: int, bucket: _Bucket) -> Iterator[tuple[float, int, int, _Bucket]]:
        starts = range(0, len(bucket.rows), batch_size)
        for batch, start in enumerate(starts):
            yield (batch + 0.5) / len(starts), index, start, bucket

    for _, _, start, bucket in heapq.merge(*itertools.starmap(in_turn, enumerate(_buckets(metadata)))):
        first = start + process_index * part
        yield reader.batch(bucket.rows[first : first + part], bucket.seq_len, part)


def _buckets(metadata: Metadata) -> list[_Bucket]:
    """The rows by their length, ascending; only one bucket unless the corpus is bucketed."""
    if metadata.settings.get("layout") != "bucketed":
        return [_Bucket(metadata.seq_len, Selection(metadata))]
    lengths = sorted({shard.seq_len for shard in metadata.shards if shard.rows})
    return [_Bucket(length, Selection(metadata, seq_len=length)) for length in lengths]


def _check_divides(batch_size: int, process_count: int) -> None:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch of {batch_size} rows does not divide by {process_count} processes; change one of them"
        )
