"""Batches of a task's examples: of like length, in a few shapes, the same for any number of processes."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from distiljax.errors import UserError
from distiljax.tasks.features import Features

READ_THREADS = 2
BATCHES_AHEAD = 4
# Batches whose rows are sorted among themselves by padded length: more would save padding, and mix less.
WINDOW = 64
# Batches until a loader ends.
MAX_BATCHES = 2**40

Batch = dict[str, np.ndarray]


class TaskLoader:
    """Batches of a task's rows, over and over; each epoch has every row once.

    An epoch is a seeded permutation, of which every `WINDOW` batches are sorted by padded length, cut into batches and
    shuffled batch by batch. A batch is as long as the next of a few lengths, so that short rows cost little and few
    programs are compiled. The last batch of an epoch is filled up with empty rows. Batch t is a function of (seed, t)
    alone; a process reads its contiguous part of it.
    """

    def __init__(
        self,
        features: Features,
        batch_size: int,
        seed: int,
        lengths: Sequence[int],
        *,
        teacher_logits: Logits | None = None,
        process_index: int = 0,
        process_count: int = 1,
        start: int = 0,
    ) -> None:
        """Sets up the order; nothing is read.

        Args:
          features: the rows.
          batch_size: rows in a global batch, B.
          seed: of the permutations.
          lengths: that rows may be padded to, ascending; the last holds the longest row.
          teacher_logits: of each row; put into the batches as `teacher_logits`.
          process_index: this process's number.
          process_count: processes that share the global batch.
          start: number of the first batch to yield.

        Raises:
          UserError: no rows, or a batch that does not divide by the processes.
        """
        import grain  # noqa: F401, here and not in the thread that reads, as in RowLoader

        if not len(features):
            raise UserError("no training example is left; check data.train and data.max_train_examples")
        if batch_size < 1 or batch_size % process_count:
            raise UserError(
                f"batch of {batch_size} rows does not divide by {process_count} processes; change one of them"
            )
        self._features, self._lengths, self._teacher_logits = features, lengths, teacher_logits
        self.batch_size, self.seed, self.start = batch_size, seed, start
        self.process_index, self.process_count = process_index, process_count
        self._row_lengths = features.lengths
        # Threads that read ahead may be an epoch apart.
        self._order = functools.lru_cache(maxsize=2)(self._epoch)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        return math.ceil(len(self._features) / self.batch_size)

    def steps(self, epochs: float) -> int:
        """Batches of so many epochs."""
        return math.ceil(epochs * self.steps_per_epoch)

    def __iter__(self) -> Iterator[Batch]:
        """This process's part of every batch from `start` on, endless; `close` stops the threads that read ahead."""
        import grain

        size = self.batch_size // self.process_count
        mine = slice(self.process_index * size, (self.process_index + 1) * size)
        batches = grain.MapDataset.range(self.start, MAX_BATCHES).map(lambda t: self._batch(t, mine))
        return iter(batches.to_iter_dataset(grain.ReadOptions(READ_THREADS, BATCHES_AHEAD)))

    def whole_batch(self, step: int) -> Batch:
        """All processes' rows of a batch, and under `rows` their numbers."""
        batch = self._batch(step, slice(None))
        return batch | {"rows": batch["row"]}

    def _batch(self, step: int, mine: slice) -> Batch:
        epoch, place = divmod(step, self.steps_per_epoch)
        rows = self._order(epoch)[place]
        length = fit_length(self._row_lengths, rows, self._lengths)
        batch = self._features.batch(rows[mine], length)
        if self._teacher_logits is not None:
            batch["teacher_logits"] = self._teacher_logits.batch(rows[mine], length)
        return batch

    def _epoch(self, epoch: int) -> np.ndarray:
        """The rows of each batch of an epoch, int64 [batches, B]; -1 where there is none."""
        draw = np.random.default_rng((self.seed, epoch))
        order = draw.permutation(len(self._features))
        window = WINDOW * self.batch_size
        for first in range(0, len(order), window):
            part = order[first : first + window]
            # Rows that need the same length stay in their drawn order, so that neighbours change every epoch.
            padded = np.searchsorted(self._lengths, self._row_lengths[part])
            order[first : first + window] = part[np.argsort(padded, kind="stable")]
        batches = np.full((self.steps_per_epoch, self.batch_size), -1)
        batches.flat[: len(order)] = order
        return draw.permutation(batches)


class Logits:
    """The logits of every row of some features, one after the other: float32 [total, L]."""

    def __init__(self, values: np.ndarray, starts: np.ndarray) -> None:
        self.values, self.starts = values, starts

    @classmethod
    def of(cls, rows: Sequence[np.ndarray]) -> Logits:
        """Of rows [L] or [S, L]."""
        flat = [np.atleast_2d(row) for row in rows]
        return cls(np.concatenate(flat), np.cumsum([0, *map(len, flat)]))

    def batch(self, rows: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
        """Those of some rows (-1 = filler), padded with zeros: [B, L] where a row has one vector, else [B, S, L]."""
        single = len(self.values) == len(self.starts) - 1
        out = np.zeros((len(rows), 1 if single else length, self.values.shape[1]), np.float32)
        for at, row in enumerate(rows):
            if row >= 0:
                values = self.values[self.starts[row] : self.starts[row + 1]]
                out[at, : len(values)] = values
        return out[:, 0] if single else out


def all_batches(
    features: Features,
    batch_size: int,
    lengths: Sequence[int],
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Every row once, longest first: the rows of each global batch (-1 = filler), and this process's part of it."""
    order = np.argsort(-features.lengths, kind="stable")
    size = batch_size // process_count
    for first in range(0, len(order), batch_size):
        rows = np.full(batch_size, -1)
        part = order[first : first + batch_size]
        rows[: len(part)] = part
        mine = rows[process_index * size : (process_index + 1) * size]
        yield rows, features.batch(mine, fit_length(features.lengths, rows, lengths))


def fit_length(row_lengths: np.ndarray, rows: np.ndarray, lengths: Sequence[int]) -> int:
    """The first of `lengths` that holds the longest of some rows."""
    longest = row_lengths[rows[rows >= 0]].max()
    return next(length for length in lengths if length >= longest)
