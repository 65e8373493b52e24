"""Prepared rows to batches: the same order for any number of processes and from any step on."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from distiljax.data.metadata import Metadata
from distiljax.data.rows import Batch, Row, decode_row, make_batch, token_dtype
from distiljax.errors import UserError

READ_THREADS = 4
BATCHES_AHEAD = 8
# Rows until a loader ends. Grain's own endless repeat has a length that batches of one row overflow.
MAX_ROWS = 2**52


@dataclasses.dataclass(frozen=True)
class _Shard:
    """The instruction that saves ArrayRecordDataSource from opening every shard to count its rows."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class Rows:
    """Random access to a corpus's rows by number; the data source that Grain reads from."""

    def __init__(self, directory: str | os.PathLike[str], metadata: Metadata) -> None:
        from grain.sources import ArrayRecordDataSource

        self._shards = [_Shard(os.path.join(directory, name), 0, n, n) for name, n in metadata.shards]
        self._ends = list(itertools.accumulate(shard.take for shard in self._shards))
        self._records = ArrayRecordDataSource(self._shards)
        self._dtype = token_dtype(metadata.vocab_size)
        self._metadata = metadata

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Row:
        """The lengths and tokens of row `index`.

        Raises:
          UserError: the shard is damaged, naming it and the row in it.
        """
        try:
            record = self._records[index]
            return decode_row(record, self._dtype, self._metadata.seq_len, self._metadata.vocab_size)
        except (RuntimeError, IndexError, ValueError) as error:  # ArrayRecord's, by the kind of damage
            shard = bisect.bisect_right(self._ends, index)
            row = index - (self._ends[shard] - self._shards[shard].take)
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"{self._shards[shard].filename} is damaged at row {row}: {reason}; "
                "delete the corpus's directory and prepare it again"
            ) from error

    def __repr__(self) -> str:
        return f"Rows({len(self)} rows in {len(self._shards)} shards)"


class RowLoader:
    """Batches of prepared rows, over and over.

    Global batch t is rows [t·B, (t+1)·B) of the epochs' permutations one after the other; each epoch has its
    own permutation, and a batch may straddle the end of an epoch. A process reads its contiguous part of the
    batch's rows. The order depends on `seed` only; not on the processes, nor on where reading began: the only
    position there is is the number of the next batch. Permutations are computed row by row (a Feistel
    network), so no index is held.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        batch_size: int,
        seed: int,
        *,
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
          process_index: this process's number.
          process_count: processes that share the global batch.
          shuffle: False keeps the order of the corpus.
          start: number of the first batch to yield.

        Raises:
          UserError: there is no corpus, it has fewer rows than a batch, or the batch does not divide by the
            processes.
        """
        if batch_size < 1 or batch_size % process_count:
            raise UserError(
                f"batch of {batch_size} rows does not divide by {process_count} processes; change one of them"
            )
        self.metadata = Metadata.load(directory)
        if self.metadata.num_rows < batch_size:
            raise UserError(
                f"{os.fspath(directory)} has {self.metadata.num_rows} rows, fewer than one batch of "
                f"{batch_size}; use a smaller batch, a shorter data.seq_len or more text"
            )
        self.directory = directory
        self.batch_size = batch_size
        self.seed = seed
        self.process_index = process_index
        self.process_count = process_count
        self.shuffle = shuffle
        self.start = start

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
        """Whole batches in an epoch, at least 1; the rows left over begin the next epoch's first batch."""
        return self.num_rows // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        """This process's part of every global batch from `start` on.

        Yields:
          int32 `input_ids`, `segment_ids` and `positions`, each [B / process_count, S].
        """
        import grain

        part = self.batch_size // self.process_count
        rows = grain.MapDataset.source(Rows(self.directory, self.metadata))
        if self.shuffle:
            # Grain's epoch e is shuffled with seed + e; spreading the seeds keeps those of run 0 and run 1
            # apart.
            rows = rows.shuffle(seed=int(np.random.SeedSequence(self.seed).generate_state(1)[0]))
        parts = rows.repeat(max(1, MAX_ROWS // self.num_rows)).batch(part, batch_fn=self._make_batch)
        # Parts are numbered batch by batch and, in a batch, process by process.
        first = self.start * self.process_count + self.process_index
        batches = parts[first :: self.process_count]
        return iter(batches.to_iter_dataset(grain.ReadOptions(READ_THREADS, BATCHES_AHEAD)))

    def _make_batch(self, rows: Any) -> Batch:
        return make_batch(rows, self.metadata.seq_len, self.metadata.pad_token_id)


def eval_batches(
    directory: str | os.PathLike[str], batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """All rows once, in order; the last batch is filled up with empty rows (`segment_ids` 0).

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
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch of {batch_size} rows does not divide by {process_count} processes; change one of them"
        )
    metadata = Metadata.load(directory)
    rows = Rows(directory, metadata)
    part = batch_size // process_count
    for batch_start in range(0, len(rows), batch_size):
        start = batch_start + process_index * part
        wanted = range(start, min(start + part, len(rows)))
        yield make_batch([rows[index] for index in wanted], metadata.seq_len, metadata.pad_token_id, part)
