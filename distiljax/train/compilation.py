"""How many programs were compiled, and how long that took."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from typing import Any

import jax

# Tracing, lowering and compiling, each told when it ends; the last one is told of a program from the cache, too.
_EVENTS = "/jax/core/compile/"
_COMPILED = _EVENTS + "backend_compile_duration"


class Compilations:
    """What was compiled lately."""

    def __init__(self) -> None:
        self._programs = 0
        # When something was traced, lowered or compiled: (began, ended) in seconds; one may lie in another.
        self._spans: list[tuple[float, float]] = []

    def add(self, event: str, began: float, ended: float) -> None:
        """Take in what JAX tells of."""
        if event.startswith(_EVENTS):
            self._spans.append((began, ended))
            self._programs += event == _COMPILED

    def take(self) -> tuple[int, float]:
        """How many programs were compiled since the last call, and how many seconds all of it took."""
        programs, spans = self._programs, sorted(self._spans)
        self._programs, self._spans = 0, []
        seconds, until = 0.0, -math.inf
        for began, ended in spans:
            seconds, until = seconds + max(0.0, ended - max(began, until)), max(until, ended)
        return programs, seconds


@contextlib.contextmanager
def compilations() -> Iterator[Compilations]:
    """Watches what this thread compiles inside."""
    found, thread = Compilations(), threading.get_ident()

    def listen(event: str, start_time: float, end_time: float, **_: Any) -> None:
        if threading.get_ident() == thread:  # JAX tells in the thread that compiles
            found.add(event, start_time, end_time)

    jax.monitoring.register_event_time_span_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_time_span_listener(listen)
