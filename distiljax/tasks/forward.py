"""A task model over all rows of some features, on all devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from distiljax.nn import TaskModel
from distiljax.nn.heads import SEQUENCES
from distiljax.nn.linear import compute_params
from distiljax.tasks.chunks import over_rows
from distiljax.tasks.features import Features
from distiljax.tasks.loader import all_batches
from distiljax.tasks.objective import run
from distiljax.train.parallel import AXIS, Parallel


class Forward:
    """The logits of a model for every row; programs are compiled once a shape and kept.

    Calling it with parameters on the devices (`Parallel.replicate` or `place_teacher`) and features gives one float32
    array a row, without padding: [L], of tokens [S_i, L], of answers [S_i, 2]; in every process of the run.
    """

    def __init__(
        self, module: TaskModel, parallel: Parallel, batch_size: int, lengths: Sequence[int]
    ) -> None:
        self._parallel, self._lengths = parallel, lengths
        ways = parallel.devices
        self._batch_size = -(-batch_size // ways) * ways
        self._whole = module.head.kind == SEQUENCES

        def step(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
            params = compute_params(params, module.dtype)  # once, not for each portion
            logits = over_rows(
                lambda rows: run(module, params, rows, None), batch, batch["input_ids"].shape[1]
            )
            return lax.all_gather(logits, AXIS, tiled=True)

        self._step = parallel.wrap(step)

    def __call__(self, params: Any, features: Features) -> list[np.ndarray]:
        found: list[np.ndarray] = [np.zeros(0, np.float32)] * len(features)
        waiting: list[tuple[np.ndarray, jax.Array]] = []
        index, count = jax.process_index(), jax.process_count()
        for rows, batch in all_batches(features, self._batch_size, self._lengths, index, count):
            waiting.append((rows, self._step(params, self._parallel.shard(batch))))
            # One batch runs while the one before it is fetched.
            if len(waiting) > 1:
                self._keep(found, features, *waiting.pop(0))
        for rows, logits in waiting:
            self._keep(found, features, rows, logits)
        return found

    def _keep(self, found: list[np.ndarray], features: Features, rows: np.ndarray, logits: jax.Array) -> None:
        values, lengths = self._parallel.fetch(logits), features.lengths
        for at, row in enumerate(rows):
            if row >= 0:
                found[row] = values[at] if self._whole else values[at, : lengths[row]]
