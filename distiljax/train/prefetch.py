"""Work on the next items while the present one is used."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """An iterator over `put(item)` of the items, made in a thread of its own before they are asked for.

    Grain has one too, which does not tell whether the next item is there: what a loop has to know that measures
    how long it waits for one.

    What the items or `put` raise, the iterator raises, and ends. A context manager: at its end the thread has
    ended too, and the iterator over the items is closed where it can be.

    Args:
      items: what to work on; iterated over in the thread.
      put: the work.
      ahead: how many results are held at most.
    """

    def __init__(self, items: Iterable[Any], put: Callable[[Any], T], ahead: int = 2) -> None:
        self._items, self._put = items, put
        self._slots = threading.Semaphore(ahead)
        self._results: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether the next item, or an error, is there without waiting."""
        return self._closed or not self._results.empty()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        if self._closed:
            raise StopIteration
        result, error = self._results.get()
        if error is not None:
            self.close()
            raise error
        self._slots.release()
        return result  # type: ignore[return-value]

    def close(self) -> None:
        """Ends the thread, after what it is just working on; a second call does nothing."""
        self._closed = True
        self._slots.release()
        self._thread.join()
        self._results = SimpleQueue()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        items: Iterator[Any] = iter(())
        try:
            items = iter(self._items)
            while self._slots.acquire() and not self._closed:
                self._results.put((self._put(next(items)), None))
        except BaseException as error:  # the end of the items too: StopIteration
            self._results.put((None, error))
        finally:
            if hasattr(items, "close"):
                items.close()
