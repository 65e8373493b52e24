"""Held-out rows: the same terms as in training, without dropout and on fixed masks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distiljax.data import eval_batches
from distiljax.distill.step import Distillation, Params, make_eval_step, term_means
from distiljax.train.parallel import Parallel

# Seed of the masks, the same in every run and evaluation so that figures compare.
EVAL_SEED = 20191002


class Evaluator:
    """Loss terms and metrics on the rows of a prepared corpus.

    Calling it with replicated parameters, the replicated frozen tree of `make_eval_step`, the corpus and a number of
    rows (0 = all) gives the means by name; `terms` gives the sums and counts behind them.
    """

    def __init__(self, objective: Distillation, parallel: Parallel, batch_size: int):
        self._objective, self._parallel = objective, parallel
        self._batch_size = math.ceil(batch_size / parallel.devices) * parallel.devices
        self._step = parallel.wrap(make_eval_step(objective, seed=EVAL_SEED))

    def terms(self, params: Params, frozen: Params, corpus: Path, rows: int = 0) -> dict[str, Any]:
        """The summed terms (sum, count) over the rows, as numpy float64."""
        on_device = []
        for i, batch in enumerate(self._batches(corpus, rows)):
            first = self._parallel.replicate(np.int32(i * self._batch_size))
            on_device.append(self._step(params, frozen, first, self._parallel.shard(batch)))
        fetched = self._parallel.fetch(on_device)
        return jax.tree.map(lambda *terms: np.sum(terms, dtype=np.float64), *fetched)

    def __call__(self, params: Params, frozen: Params, corpus: Path, rows: int = 0) -> dict[str, float]:
        terms = self.terms(params, frozen, corpus, rows)
        return {name: float(value) for name, value in term_means(self._objective, terms).items()}

    def _batches(self, corpus: Path, rows: int) -> Iterator[dict[str, np.ndarray]]:
        size = self._batch_size
        index, count = jax.process_index(), jax.process_count()
        batches = eval_batches(corpus, size, process_index=index, process_count=count)
        if not rows:
            yield from batches
            return
        mine = np.arange(index * size // count, (index + 1) * size // count)[:, None]
        for i, batch in enumerate(islice(batches, math.ceil(rows / size))):
            # The shape stays: rows past the limit become padding.
            wanted = mine < rows - i * size
            yield {name: np.where(wanted, x, 0) for name, x in batch.items()}


def full_counts(counts: np.ndarray, vocab_size: int) -> np.ndarray:
    """Token counts padded with zeros where the model has more rows than the tokenizer has tokens: int64 [V]."""
    return np.pad(counts, (0, vocab_size - len(counts)))
