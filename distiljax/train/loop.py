"""The loop that every training command shares."""

from __future__ import annotations

import collections
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

from distiljax.errors import Failed
from distiljax.train import distributed
from distiljax.train.checkpoint import Checkpointer
from distiljax.train.compilation import compilations
from distiljax.train.metrics import MetricWriter
from distiljax.train.nonfinite import ADVICE, NonFinite
from distiljax.train.parallel import Parallel
from distiljax.train.prefetch import Prefetch
from distiljax.train.progress import Progress
from distiljax.train.signals import stop_signals
from distiljax.train.state import TrainState

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When the loop does what, in optimiser steps; 0 = never but at the end.

    Attributes:
      total_steps, log_every, eval_every, checkpoint_every: as their names say.
      keep: how many of the last checkpoints to keep.
      max_nonfinite: steps in a row whose loss or gradient is not finite, after which the run fails.
    """

    total_steps: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    keep: int
    max_nonfinite: int


@dataclasses.dataclass
class Outcome:
    """How the loop ended.

    Attributes:
      finished: False if SIGTERM or SIGINT ended it early; the state is saved then.
      step: optimiser steps done.
      skipped: how many of them changed nothing, because their loss or gradient was not finite.
      tokens: non-padding tokens seen.
      seconds: wall time of the run, validations and compilation included, over all resumed parts.
      programs, compile_seconds: how many programs the steps were compiled to, and how long that took.
      best: the best validation, its step and its metrics.
      last: the last validation.
      start: the validation before the first step.
    """

    finished: bool
    step: int = 0
    skipped: int = 0
    tokens: float = 0.0
    seconds: float = 0.0
    programs: int = 0
    compile_seconds: float = 0.0
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
    whole_batch: Callable[[int], dict[str, np.ndarray]],
    evaluate: Callable[[Any], dict[str, float]],
    rank: Callable[[dict[str, Any]], float] = lambda metrics: metrics["loss"],
    validate_start: bool = True,
) -> Outcome:
    """Train to the end of the schedule, or go on from the newest checkpoint of `workdir`.

    Every process of a run calls it; they save at the same steps, and stop at the same step when one is told to.

    Args:
      description: for the progress bar.
      workdir: checkpoints and logs go there.
      schedule: when to log, evaluate and save.
      parallel: how state and rows lie on the devices.
      state: the state before the first step, on the host.
      step: the wrapped step, `(state, rows) -> (state, metrics)`; it may reuse the state's buffers. The metric
        `skipped` is 1 if the loss or the gradient was not finite and the state stayed as it was.
      batches: this process's batches from the given step on, endless; read and put on the devices in a thread.
      whole_batch: all processes' rows of the batch of a step, and their numbers under `rows`, to report a bad one.
      evaluate: metrics of (replicated) parameters on held-out rows, `loss` among them.
      rank: of such metrics, a number that is lowest for the best parameters.
      validate_start: also before the first step.

    Raises:
      Failed: the loss stays not finite, or the end cannot be saved; the checkpoints of before are kept.
      UserError: what `batches` raises.
    """
    agree = _consent(parallel)
    checkpointer = Checkpointer(workdir, schedule.keep, agree)
    main = distributed.first()
    outcome = Outcome(finished=False)
    with contextlib.ExitStack() as stack:
        # After an error Orbax would wait for processes that may never come.
        stack.push(lambda kind, *_: None if kind and jax.process_count() > 1 else checkpointer.close())
        # Where a run begins, by priority: 1. the newest checkpoint of its own workdir that can be read; 2. the initial
        # state, which is a function of the config (teacher, seed).
        restored = checkpointer.restore(state)
        if restored is not None:
            state, facts = restored
            outcome = Outcome(**facts)
            log.info("going on from step %d of %s", outcome.step, workdir)
        state = parallel.replicate(state)
        writer = stack.enter_context(MetricWriter(workdir, outcome.step)) if main else None
        stopping = stack.enter_context(stop_signals("saving after this step, then leaving"))
        told_to_stop = _Poll(parallel)
        compiled = stack.enter_context(compilations())
        progress = stack.enter_context(
            Progress(description, schedule.total_steps, outcome.step, enabled=main)
        )

        def validate() -> None:
            # What counts is the best that is on the disk.
            outcome.best = checkpointer.settle_best()
            metrics = evaluate(state.params)
            if not math.isfinite(metrics["loss"]):
                raise Failed(f"the held-out loss is {metrics['loss']} at step {outcome.step}; {ADVICE}")
            record = {"step": outcome.step, **metrics}
            outcome.last = record
            if writer:
                writer.write(outcome.step, "validation", metrics)
            # The very start is no candidate: a run hands over what it trained.
            if outcome.step and (not outcome.best or rank(metrics) < rank(outcome.best)):
                outcome.best = record
                checkpointer.save_best(outcome.step, parallel.everywhere(state.params), record)
            if not outcome.step:
                outcome.start = record

        def save() -> None:
            # The facts name the best parameters: these must be on the disk first, whatever happens now.
            outcome.best = checkpointer.settle_best()
            tokens = window.values()["tokens"] if window.steps else 0.0
            outcome.seconds = time.monotonic() - began
            facts = dataclasses.replace(outcome, tokens=outcome.tokens + tokens)
            checkpointer.save(outcome.step, parallel.everywhere(state), dataclasses.asdict(facts))

        began = time.monotonic() - outcome.seconds
        left = outcome.step < schedule.total_steps
        source = stack.enter_context(Prefetch(batches(outcome.step) if left else (), parallel.shard))
        # The second is a run that could not save its best parameters at the end.
        if (outcome.step == 0 and validate_start) or not (left or outcome.best):
            validate()
        window = _Window(parallel)
        nonfinite = NonFinite(workdir, schedule.max_nonfinite, whole_batch, main)
        shapes_seen: set[Any] = set()
        stop = False
        while outcome.step < schedule.total_steps and not stop:
            rows = window.next(source)
            shapes = tuple(x.shape for x in jax.tree.leaves(rows))
            if shapes not in shapes_seen:
                # The step is compiled for them. That is left out of the window, so no step may run meanwhile.
                window.wait()
                shapes_seen.add(shapes)
            compiled.take()  # of others than the step
            # Nothing but what is asked for crosses between host and device while the devices work.
            with jax.transfer_guard("disallow"):
                state, metrics = step(state, rows)
            outcome.step += 1
            programs, seconds = compiled.take()
            if programs:
                log.info("step %d was compiled first, in %.1f s", outcome.step, seconds)
                outcome.programs += programs
                outcome.compile_seconds += seconds
                window.leave_out(seconds)
            window.add(metrics)
            outcome.skipped += nonfinite.look(window.done(outcome.step))
            stop = told_to_stop(bool(stopping))
            last = outcome.step == schedule.total_steps
            recording = last or stop or _due(outcome.step, schedule.log_every)
            saving = last or stop or _due(outcome.step, schedule.checkpoint_every)
            if recording or saving:
                outcome.skipped += nonfinite.look(window.done(outcome.step, wait=True))
            if recording:
                values = window.values()
                outcome.tokens += values.pop("tokens")
                outcome.seconds = time.monotonic() - began
                if writer:
                    writer.write(outcome.step, "train", values | {"seconds": outcome.seconds})
                progress.update(outcome.step, values)
                checkpointer.check()
                window = _Window(parallel)
            if last or _due(outcome.step, schedule.eval_every):
                with window.paused():
                    validate()
            if saving:
                save()
        saved, outcome.best = checkpointer.settle(), checkpointer.settle_best()
        if not saved or not (outcome.best or stop):
            what = "best parameters" if saved else f"state of step {outcome.step}"
            raise Failed(
                f"the {what} could not be saved in {workdir}; make room there, and the same command goes on from the "
                "newest checkpoint"
            )
        if outcome.step < schedule.total_steps:
            return outcome
    outcome.finished = True
    return outcome


def _consent(parallel: Parallel) -> Callable[[bool], bool]:
    """Whether a flag is set in any process; waits for all of them."""
    if jax.process_count() == 1:
        return bool
    return lambda flag: bool(parallel.any(flag))


class _Poll:
    """Whether any process has said yes: known to all of them in the same call, two calls later, without waiting."""

    def __init__(self, parallel: Parallel) -> None:
        self._parallel = parallel
        self._asked: collections.deque[jax.Array] = collections.deque()

    def __call__(self, flag: bool) -> bool:
        if jax.process_count() == 1:
            return flag
        self._asked.append(self._parallel.any(flag))
        return len(self._asked) > 2 and bool(self._asked.popleft())


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


class _Window:
    """The steps since the last record: their metrics stay on the device until they are asked for."""

    def __init__(self, parallel: Parallel) -> None:
        self._parallel = parallel
        self._metrics: list[dict[str, jax.Array]] = []
        self._began = time.monotonic()
        self._waited = 0.0
        self._looked = 0

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

    def wait(self) -> None:
        """Until all steps have ended."""
        jax.block_until_ready(self._metrics)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in here is no training."""
        self.wait()
        began = time.monotonic()
        yield
        self.leave_out(time.monotonic() - began)

    def leave_out(self, seconds: float) -> None:
        """Time that was no training."""
        self._began += seconds

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Take in the metrics of one step."""
        self._metrics.append(metrics)

    def done(self, step: int, *, wait: bool = False) -> Iterator[tuple[int, dict[str, float]]]:
        """The steps, by their numbers, that have ended since the last call, and what they say of themselves.

        Args:
          step: the number of the newest step; the two newest may be running still.
          wait: for these, too.
        """
        while self._looked < len(self._metrics) - (0 if wait else 2):
            metrics = self._metrics[self._looked]
            said = {name: metrics[name] for name in ("skipped", "loss", "grad_norm")}
            self._looked += 1
            yield (
                step - len(self._metrics) + self._looked,
                {name: float(value) for name, value in self._parallel.fetch(said).items()},
            )

    def values(self) -> dict[str, float]:
        """Means over the steps that were not skipped; `tokens` and `skipped` are sums; tokens/s, and the share of time
        without data to work on."""
        fetched = self._parallel.fetch(self._metrics)
        seconds = time.monotonic() - self._began
        counted = [m for m in fetched if not m["skipped"]] or fetched
        values = {name: float(np.mean([m[name] for m in counted])) for name in fetched[0]}
        for name in ("tokens", "skipped"):
            values[name] = float(np.sum([m[name] for m in fetched]))
        values["tokens_per_second"] = values["tokens"] / seconds
        values["data_wait"] = self._waited / seconds
        return values
