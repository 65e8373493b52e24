"""Units of work on several processes, results in order."""

from __future__ import annotations

import collections
import concurrent.futures
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

from distiljax.data.units import Unit
from distiljax.data.work import Report
from distiljax.errors import UserError

Result = TypeVar("Result")
Task = Callable[[Any, Unit, Report], Result]

_SECONDS_BETWEEN_TICKS = 0.5
_QUEUED_FOR_EACH = 4  # units handed out ahead of the results

_counters: Any = None  # in a worker process: the documents and tokens of each worker so far
_place = 0  # of its own two among them


class Workers:
    """A pool of processes; with one worker, this process itself. A context manager.

    Args:
      count: processes. Each uses one core; a single one lets the tokenizer spread over all of them.
      tick: called now and then with the documents and tokens so far, in this process; what it raises ends the work.
    """

    def __init__(self, count: int, tick: Callable[[int, int], None]) -> None:
        self._count, self._tick = count, tick
        self._done = [0, 0]
        self._ticked = time.monotonic()
        self._others: set[int | None] = set()
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        if self._count > 1:
            # Not fork: JAX and the tokenizers have threads that a forked process would lack.
            context = multiprocessing.get_context("spawn")
            # A pair of counters for each process, and no lock: one that dies with it would stop the others.
            self._counters = context.RawArray("q", 2 * self._count)
            self._others = {process.pid for process in multiprocessing.active_children()}
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self._count, context, initializer=_start, initargs=(self._counters, context.Value("i", 0))
            )
        else:
            # Unset, tokenizers turns its threads off, with a warning, in a process that has forked.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is None:
            return
        if kind is not None:
            # Nobody waits for what is half done: the units are not finished before they are renamed.
            self._pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                if process.pid not in self._others:
                    process.terminate()
        self._pool.shutdown()

    def run(self, task: Task[Result], out: Any, units: Iterable[Unit]) -> Iterator[tuple[Unit, Result]]:
        """Runs `task(out, unit, report)` for every unit; results come in the order of the units.

        Raises:
          UserError: what a task raised, that of the earliest unit; or a process died.
        """
        if self._pool is None:
            for each in units:
                result = task(out, each, self._report)
                self._tick(*self._done)
                yield each, result
            return
        waiting: collections.deque[tuple[Unit, concurrent.futures.Future[Result]]] = collections.deque()
        remaining = iter(units)
        try:
            while True:
                while len(waiting) < _QUEUED_FOR_EACH * self._count and (unit := next(remaining, None)):
                    waiting.append((unit, self._pool.submit(_run, task, out, unit)))
                if not waiting:
                    return
                unit, future = waiting[0]
                done, _ = concurrent.futures.wait([future], timeout=_SECONDS_BETWEEN_TICKS)
                self._tick(sum(self._counters[0::2]), sum(self._counters[1::2]))
                if done:
                    waiting.popleft()
                    yield unit, future.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError(
                f"one of {self._count} worker processes was ended from outside, perhaps for want of memory; "
                "use fewer --workers; the same command goes on after the finished shards"
            ) from None

    def _report(self, documents: int, tokens: int) -> None:
        self._done[0] += documents
        self._done[1] += tokens
        if time.monotonic() - self._ticked > _SECONDS_BETWEEN_TICKS:
            self._tick(*self._done)
            self._ticked = time.monotonic()


def _start(counters: Any, started: Any) -> None:
    """Makes a process a worker."""
    global _counters, _place
    _counters = counters
    with started.get_lock():
        _place, started.value = 2 * started.value, started.value + 1
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # The parent decides what a signal from the terminal means; SIGTERM, which it sends, ends the worker at once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _run(task: Task[Result], out: Any, unit: Unit) -> Result:
    def report(documents: int, tokens: int) -> None:
        _counters[_place] += documents
        _counters[_place + 1] += tokens

    return task(out, unit, report)
