"""Steps whose loss or gradient is not finite: skipped by the step, counted and reported here."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from distiljax.errors import Failed
from distiljax.train import distributed, storage

log = logging.getLogger(__name__)

ADVICE = (
    "lower optimizer.peak_lr or raise optimizer.warmup_fraction, or look for infinities in the teacher; "
    "the checkpoints of before are kept"
)
ROWS_SHOWN = 8


class NonFinite:
    """Reports skipped steps, and ends the run when too many come in a row.

    Args:
      workdir: the batch that ends the run is left there.
      limit: so many in a row.
      whole_batch: see `train.loop.run_loop`.
      main: whether this process is the one that reports.
    """

    def __init__(
        self, workdir: Path, limit: int, whole_batch: Callable[[int], dict[str, np.ndarray]], main: bool
    ) -> None:
        self._workdir, self._limit, self._whole_batch, self._main = workdir, limit, whole_batch, main
        self._in_a_row = 0

    def look(self, steps: Iterable[tuple[int, dict[str, float]]]) -> int:
        """How many of the steps (numbers from 1, with `skipped`, `loss` and `grad_norm`) were skipped.

        Raises:
          Failed: the last `limit` ones all were; the batch is in a file.
        """
        skipped = 0
        for step, said in steps:
            if not said["skipped"]:
                self._in_a_row = 0
                continue
            skipped += 1
            self._in_a_row += 1
            # The batch of the first step is number 0.
            batch = self._whole_batch(step - 1) if self._main else {}
            what = f"loss {said['loss']:g}, gradient norm {said['grad_norm']:g}"
            if self._main:
                log.warning(
                    "step %d: %s: its update is skipped (%d of at most %d in a row); rows %s",
                    step,
                    what,
                    self._in_a_row,
                    self._limit,
                    _some(batch["rows"]),
                )
            if self._in_a_row >= self._limit:
                # The others wait: they would end process 0 while it writes.
                kept = distributed.from_first(functools.partial(self._keep, step, batch))
                raise Failed(
                    f"{what} at step {step}, as at {self._limit - 1} steps before it (max_nonfinite_steps); its batch "
                    f"{kept}; {ADVICE}"
                )
        return skipped

    def _keep(self, step: int, batch: dict[str, np.ndarray]) -> str:
        name = f"nonfinite_step_{step}.npz"
        try:
            with storage.writing(self._workdir) as directory:
                temporary = directory / f".{name}"
                with open(temporary, "wb") as file:
                    np.savez_compressed(file, step=np.asarray(step), **batch)  # type: ignore[arg-type]
                os.replace(temporary, directory / name)
        except Exception as error:  # what ends the run is worth more than this
            return f"could not be kept ({error})"
        return f"is in {self._workdir / name}"


def _some(rows: np.ndarray) -> str:
    shown = ", ".join(map(str, rows[:ROWS_SHOWN]))
    return f"{shown}, … ({len(rows)})" if len(rows) > ROWS_SHOWN else shown
