"""Being told to stop."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from typing import Any

log = logging.getLogger(__name__)


@contextlib.contextmanager
def stop_signals(reaction: str) -> Iterator[list[int]]:
    """SIGTERM and SIGINT are noted in the list instead of ending the process at any instant; a second SIGINT does.

    Args:
      reaction: what is about to happen, for the log.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # signal handlers can only be set by the main thread
        return

    def note(number: int, frame: Any) -> None:
        del frame
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        log.warning("%s: %s", signal.Signals(number).name, reaction)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
