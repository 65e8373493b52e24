"""The loop that every training command shares."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distiljax.errors import UserError
from distiljax.train.checkpoint import Checkpointer
from distiljax.train.metrics import MetricWriter
from distiljax.train.parallel import Parallel
from distiljax.train.prefetch import Prefetch
from distiljax.train.progress import Progress
from distiljax.train.signals import stop_signals
from distiljax.train.state import TrainState

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When the loop does what, in optimiser steps; 0 = never but at the end."""

    total_steps: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    keep: int


@dataclasses.dataclass
class Outcome:
    """How the loop ended.

    Attributes:
      finished: False if SIGTERM or SIGINT ended it early; the state is saved then.
      step: optimiser steps done.
      tokens: non-padding tokens seen.
      seconds: wall time of the run, validations and compilation included, over all resumed parts.
      best: the best validation, its step and its metrics.
      last: the last validation.
      start: the validation before the first step.
    """

    finished: bool
    step: int = 0
    tokens: float = 0.0
    seconds: float = 0.0
    best: dict[str, Any] = dataclasses.field(default_factory=dict)
    last: dict[str, Any] = dataclasses.field(default_factory=dict)
    start: dict[str, Any] = dataclasses.field(default_factory=dict)


def run_loop(
    *,
    description: str,
    workdir: Path,
    schedule: Schedule,
    parallel: Parallel,
    state: TrainState,
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    batches: Callable[[int], Iterable[dict[str, np.ndarray]]],
    evaluate: Callable[[Any], dict[str, float]],
) -> Outcome:
    """Train to the end of the schedule, or go on from the newest checkpoint of `workdir`.

    Args:
      description: for the progress bar.
      workdir: checkpoints and logs go there.
      schedule: when to log, evaluate and save.
      parallel: how state and rows lie on the devices.
      state: the state before the first step, on the host.
      step: the wrapped step, `(state, rows) -> (state, metrics)`; it may reuse the state's buffers.
      batches: this process's batches from the given step on, endless; read and put on the devices in a thread.
      evaluate: metrics of (replicated) parameters on held-out rows; `loss` decides which are best.

    Raises:
      UserError: the loss is not finite, and nothing is saved then; or what `batches` raises.
    """
    checkpointer = Checkpointer(workdir, schedule.keep)
    main = jax.process_index() == 0
    outcome = Outcome(finished=False)
    with contextlib.ExitStack() as stack:
        stack.callback(checkpointer.close)
        # Where a run begins, by priority: 1. the newest checkpoint of its own workdir; 2. the initial state, which
        # is a function of the config (teacher, seed).
        restored = checkpointer.restore(state)
        if restored is not None:
            state, facts = restored
            outcome = Outcome(**facts)
            log.info("going on from step %d of %s", outcome.step, workdir)
        state = parallel.replicate(state)
        writer = stack.enter_context(MetricWriter(workdir, outcome.step)) if main else None
        stopping = stack.enter_context(stop_signals("saving after this step, then leaving"))
        progress = stack.enter_context(
            Progress(description, schedule.total_steps, outcome.step, enabled=main)
        )

        def validate() -> None:
            metrics = evaluate(state.params)
            _check_finite(metrics["loss"], "held-out loss", outcome.step, workdir)
            record = {"step": outcome.step, **metrics}
            outcome.last = record
            if writer:
                writer.write(outcome.step, "validation", metrics)
            # The very start is no candidate: a run hands over what it trained.
            if outcome.step and metrics["loss"] < outcome.best.get("loss", math.inf):
                outcome.best = record
                checkpointer.save_best(outcome.step, parallel.unreplicate(state.params), record)
            if not outcome.step:
                outcome.start = record

        def save() -> None:
            values = window.values() if window.steps else {"loss": 0.0, "tokens": 0.0}
            _check_finite(values["loss"], "training loss", outcome.step, workdir)
            facts = dataclasses.replace(
                outcome, tokens=outcome.tokens + values["tokens"], seconds=time.monotonic() - began
            )
            checkpointer.save(outcome.step, parallel.unreplicate(state), dataclasses.asdict(facts))

        began = time.monotonic() - outcome.seconds
        left = outcome.step < schedule.total_steps
        source = stack.enter_context(Prefetch(batches(outcome.step) if left else (), parallel.shard))
        if outcome.step == 0:
            validate()
        window = _Window(parallel)
        while outcome.step < schedule.total_steps and not stopping:
            rows = window.next(source)
            # Nothing but what is asked for crosses between host and device while the devices work.
            with jax.transfer_guard("disallow"):
                state, metrics = step(state, rows)
            outcome.step += 1
            window.add(metrics)
            last = outcome.step == schedule.total_steps
            if last or _due(outcome.step, schedule.log_every):
                values = window.values()
                _check_finite(values["loss"], "training loss", outcome.step, workdir)
                outcome.tokens += values.pop("tokens")
                outcome.seconds = time.monotonic() - began
                if writer:
                    writer.write(outcome.step, "train", values | {"seconds": outcome.seconds})
                progress.update(outcome.step, values)
                window = _Window(parallel)
            if last or _due(outcome.step, schedule.eval_every):
                with window.paused():
                    validate()
            if last or stopping or _due(outcome.step, schedule.checkpoint_every):
                save()
        if outcome.step < schedule.total_steps:
            return outcome
    outcome.finished = True
    return outcome


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _check_finite(loss: float, what: str, step: int, workdir: Path) -> None:
    if not math.isfinite(loss):
        raise UserError(
            f"the {what} is {loss} at step {step}; lower optimizer.peak_lr or raise optimizer.warmup_fraction and "
            f"start again ({workdir} keeps the checkpoints of before)"
        )


class _Window:
    """The steps since the last record: their metrics stay on the device until they are asked for."""

    def __init__(self, parallel: Parallel) -> None:
        self._parallel = parallel
        self._metrics: list[dict[str, jax.Array]] = []
        self._began = time.monotonic()
        self._waited = 0.0

    @property
    def steps(self) -> int:
        return len(self._metrics)

    def next(self, source: Prefetch[Any]) -> Any:
        """The next batch; what counts as waiting is the time for which the devices have nothing to do."""
        # One step runs, one is queued. More would only hold the memory of more batches.
        jax.block_until_ready(self._metrics[-2:-1])
        if not source.ready:
            jax.block_until_ready(self._metrics[-1:])
        began = time.monotonic()
        rows = next(source)
        self._waited += time.monotonic() - began
        return rows

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in here is no training."""
        jax.block_until_ready(self._metrics)
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Take in the metrics of one step."""
        self._metrics.append(metrics)

    def values(self) -> dict[str, float]:
        """Means over the steps so far; `tokens` is a sum; tokens/s, and the share of time without data to work on."""
        fetched = jax.device_get(self._parallel.unreplicate(self._metrics))
        seconds = time.monotonic() - self._began
        values = {name: float(np.mean([m[name] for m in fetched])) for name in fetched[0]}
        values["tokens"] = float(np.sum([m["tokens"] for m in fetched]))
        values["tokens_per_second"] = values["tokens"] / seconds
        values["data_wait"] = self._waited / seconds
        return values
