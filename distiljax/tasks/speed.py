"""How fast models are, measured side by side on this machine."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from distiljax.hub import Model
from distiljax.nn import MaskedLM
from distiljax.nn.linear import place_compute_params
from distiljax.tasks.chunks import over_rows

BATCH_ROWS = 32
SECONDS = 1.0
_FEWEST_ROUNDS, _MOST_ROUNDS = 3, 50


def in_turn(
    calls: Sequence[Callable[[], Any]], seconds: float = SECONDS, pause: float = 0.0
) -> list[list[float]]:
    """Seconds that each call takes, in each of several rounds.

    The calls take turns, so that what else the machine does meets all of them alike; before the first round each is
    made once, which loads what is loaded late. JAX arrays that a call returns are waited for.

    Args:
      calls: what to measure.
      seconds: rounds go on until each call has had so many seconds on average; at least 3 rounds, at most 50.
      pause: seconds of rest before each call. Where the calls are of several libraries, the threads of one wait for
        more work for some milliseconds and keep the next one from the cores.
    """
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        jax.block_until_ready(call())
    began = time.monotonic()
    while (rounds := len(times[0])) < _FEWEST_ROUNDS or (
        rounds < _MOST_ROUNDS and time.monotonic() - began < seconds * len(calls)
    ):
        for call, taken in zip(calls, times, strict=True):
            time.sleep(pause)
            start = time.perf_counter()
            jax.block_until_ready(call())
            taken.append(time.perf_counter() - start)
    return times


def compile_forward(module: Model, params: Any, rows: int, seq_len: int) -> tuple[Callable[[], Any], Any]:
    """A compiled forward pass over full rows of random tokens, and the compiled program.

    A masked language model is run without its head, as every downstream task and `fill_mask` run it (which decodes
    masked positions only); any other model whole. On a CPU the rows are run a few at a time, as there.

    Args:
      module: the model.
      params: its parameters, as `place_compute_params` gives them.
      rows: B.
      seq_len: S, tokens in a row.
    """
    method = "encode" if isinstance(module, MaskedLM) else None

    def forward(params: Any, *inputs: jax.Array) -> Any:
        def some_rows(inputs: Any) -> Any:
            out: Any = module.apply({"params": params}, *inputs, method=method)
            # Of a bare encoder what a task would use; the compiler drops what nobody asks for.
            return getattr(out, "last_hidden_state", out)

        return over_rows(some_rows, inputs, seq_len)

    ids = random_tokens(module.config.vocab_size, rows, seq_len)
    inputs = jax.device_put((ids, np.ones_like(ids)))
    program = jax.jit(forward).lower(params, *inputs).compile()
    return functools.partial(program, params, *inputs), program


def random_tokens(vocab_size: int, rows: int, seq_len: int) -> np.ndarray:
    """Token ids int32 [B, S], the same in every call."""
    return np.random.default_rng(0).integers(vocab_size, size=(rows, seq_len), dtype=np.int32)


def model_speed(models: Sequence[tuple[Model, Any]], seq_len: int) -> list[dict[str, float]]:
    """Latency (ms, one row) and throughput (tokens/s, 32 rows) of each model, measured in turn; medians.

    Args:
      models: (module, params) of each; see `compile_forward` for what of them is run.
      seq_len: tokens in a row.

    Returns:
      `{"latency_ms", "tokens_per_second"}` of each, in their order.
    """
    placed = [(module, place_compute_params(params, module.dtype)) for module, params in models]
    calls = [compile_forward(*model, rows, seq_len)[0] for model in placed for rows in (1, BATCH_ROWS)]
    medians = [statistics.median(times) for times in in_turn(calls, SECONDS / 2)]
    return [
        {"latency_ms": 1000 * one, "tokens_per_second": BATCH_ROWS * seq_len / many}
        for one, many in zip(medians[::2], medians[1::2], strict=True)
    ]
