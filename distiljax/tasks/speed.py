"""How fast models are, measured side by side on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distiljax.nn import MaskedLM

BATCH_ROWS = 32
SPEED_SECONDS = 1.0
_MOST_ROUNDS = 50


def model_speed(models: Sequence[tuple[Any, Any]], seq_len: int) -> list[dict[str, float]]:
    """Latency (ms, one row) and throughput (tokens/s, 32 rows) of each model, measured in turn; medians.

    A masked language model is measured without its head, which no downstream task runs; the model of a task whole. The
    models take turns, so that what else the machine does meets all of them alike.

    Args:
      models: (module, params) of each.
      seq_len: tokens in a row.

    Returns:
      `{"latency_ms", "tokens_per_second"}` of each, in their order.
    """
    timings: list[tuple[list[float], list[float]]] = [([], []) for _ in models]
    inputs = [jnp.ones((rows, seq_len), jnp.int32) for rows in (1, BATCH_ROWS)]
    runs = [(_forward(module), jax.device_put(params)) for module, params in models]
    for run, params in runs:
        for x in inputs:
            jax.block_until_ready(run(params, x))  # compiles
    began = time.monotonic()
    rounds = 0
    while rounds < 3 or (time.monotonic() - began < SPEED_SECONDS * len(models) and rounds < _MOST_ROUNDS):
        for (run, params), times in zip(runs, timings, strict=True):
            for x, measured in zip(inputs, times, strict=True):
                start = time.perf_counter()
                jax.block_until_ready(run(params, x))
                measured.append(time.perf_counter() - start)
        rounds += 1
    return [
        {
            "latency_ms": 1000 * statistics.median(one),
            "tokens_per_second": BATCH_ROWS * seq_len / statistics.median(many),
        }
        for one, many in timings
    ]


def _forward(module: Any) -> Any:
    method = "encode" if isinstance(module, MaskedLM) else None
    return jax.jit(lambda params, x: module.apply({"params": params}, x, method=method))
