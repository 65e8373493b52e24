"""A model over any number of inputs: read ahead, sorted by length, in few shapes, given back in their order."""

from __future__ import annotations

import collections
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from distiljax.errors import UserError
from distiljax.tasks.chunks import most_rows
from distiljax.tasks.features import Features
from distiljax.train.prefetch import Prefetch

MAX_BATCH = 4096
# Tokens in a row; padding costs an eighth on average, a program about a second of compilation.
LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
# Inputs read ahead, at most, and the characters after which no more are.
WINDOW = 4096
WINDOW_CHARACTERS = 1 << 19
# Inputs that a thread has read for the next window.
_READ_AHEAD = 64
# Seconds between the looks for another input, after which a window is closed: someone may wait for it to be answered.
# Looks are counted and not the time, so that a machine that stands still for a moment makes no other windows.
_PAUSES = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128)
# Batches under way: one that runs and one that waits for it.
_UNDER_WAY = 2

Item = dict[str, Any]
Output = tuple[np.ndarray, ...]


class Job(Protocol):
    """What a head does with a window of inputs."""

    def size(self, item: Item) -> int:
        """Characters of an input."""

    def prepare(self, items: Sequence[Item]) -> Features:
        """The inputs' rows, in their order; at least one each.

        Raises:
          UserError: an input that cannot be used.
        """

    def run(self, batch: dict[str, np.ndarray]) -> tuple[jax.Array, ...]:
        """Starts the model on a batch of `Features.batch`; arrays [B, …], without waiting for them."""

    def result(self, item: Item, features: Features, rows: Sequence[int], outputs: Sequence[Output]) -> Item:
        """The answer to one input from its rows' numbers and outputs."""


def stream(items: Iterable[Item], job: Job, *, batch_size: int, limit: int) -> Iterator[Item]:
    """The job's results in the order of the inputs, in constant memory.

    Windows of inputs, growing from a few batches to `WINDOW`, are tokenised in a thread while the device works on the
    one before; inputs that come slowly, as a person types them, are answered without waiting for a whole window. The
    rows of a window are sorted by length and cut into batches of a few lengths and sizes, which the device is given
    without waiting for their results.

    Args:
      items: the inputs; iterated over in another thread.
      job: what is to be done.
      batch_size: rows in a batch at most.
      limit: tokens in a row at most.

    Raises:
      UserError: a bad `batch_size`, or what reading or preparing an input raises, after the results of those before.
    """
    if not 1 <= batch_size <= MAX_BATCH:
        raise UserError(f"batch_size is {batch_size}; expected 1 to {MAX_BATCH}")
    with Prefetch(
        _windows(items, job, 4 * batch_size), lambda window: _Window(window, job), ahead=1
    ) as windows:
        for window in windows:
            if window.features is not None:
                yield from _results(window.items, window.features, job, batch_size, limit)
            if window.error is not None:
                raise window.error


class _Window:
    """Inputs and their rows, up to the first input that cannot be used, and the error that this one gives."""

    def __init__(self, items: list[Item], job: Job) -> None:
        self.items = items
        self.features: Features | None = None
        self.error: UserError | None = None
        try:
            self.features = job.prepare(items)
        except UserError as error:
            good, self.error = _usable(items, job, error)
            self.items = items[:good]
            self.features = job.prepare(self.items) if good else None


def _usable(items: list[Item], job: Job, error: UserError) -> tuple[int, UserError]:
    """How many inputs there are before the first one that cannot be used, and its error."""
    good, bad = 0, len(items)  # those before `good` are usable, and not all of those before `bad`
    while bad - good > 1:
        middle = (good + bad) // 2
        try:
            job.prepare(items[good:middle])
            good = middle
        except UserError as earlier:
            bad, error = middle, earlier
    return good, error


def _windows(items: Iterable[Item], job: Job, size: int) -> Iterator[list[Item]]:
    window: list[Item] = []
    characters = 0
    with Prefetch(items, lambda item: item, ahead=_READ_AHEAD) as reader:
        try:
            for item in reader:
                window.append(item)
                characters += job.size(item)
                full = len(window) >= size or characters >= WINDOW_CHARACTERS
                if full or not _follows(reader):
                    yield window
                    window, characters = [], 0
                    size = min(2 * size, WINDOW) if full else size
        except UserError:
            # Those before it are answered first.
            if window:
                yield window
            raise
    if window:
        yield window


def _follows(reader: Prefetch[Item]) -> bool:
    """Whether another input, or the end, comes within a quarter of a second."""
    for pause in _PAUSES:
        if reader.ready:
            return True
        time.sleep(pause)
    return reader.ready


def _results(
    items: Sequence[Item], features: Features, job: Job, batch_size: int, limit: int
) -> Iterator[Item]:
    outputs = _run(features, job, batch_size, limit)
    ends = np.searchsorted(features.examples, np.arange(len(items)), side="right").tolist()
    begin = 0
    for item, end in zip(items, ends, strict=True):
        yield job.result(item, features, range(begin, end), outputs[begin:end])
        begin = end


def _run(features: Features, job: Job, batch_size: int, limit: int) -> list[Output]:
    """Each row's part of what the model gives for it; padding is still there."""
    found: list[Output] = [()] * len(features)
    under_way: collections.deque[tuple[np.ndarray, tuple[jax.Array, ...]]] = collections.deque()

    def fetch() -> None:
        rows, arrays = under_way.popleft()
        values = jax.device_get(arrays)
        for at, row in enumerate(rows.tolist()):
            found[row] = tuple(value[at] for value in values)

    lengths = features.lengths
    order = np.argsort(-lengths, kind="stable")
    at = 0
    while at < len(order):
        length = min(next((n for n in LENGTHS if n >= lengths[order[at]]), limit), limit)
        size = most_rows(batch_size, length)
        rows = order[at : at + size]
        if len(rows) < size:  # the window's last one
            size = min(size, 1 << (len(rows) - 1).bit_length())
        padded = np.full(size, -1)
        padded[: len(rows)] = rows
        under_way.append((rows, job.run(features.batch(padded, length))))
        at += len(rows)
        if len(under_way) > _UNDER_WAY:
            fetch()
    while under_way:
        fetch()
    return found
