"""AdamW with linear warm-up and decay (the optimiser of the original script)."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection
from typing import Any

import optax
from flax import traverse_util
from ml_collections import ConfigDict

Path = tuple[str, ...]


def linear_schedule(peak: float, total_steps: int, warmup_fraction: float) -> optax.Schedule:
    """Learning rate up from 0 to `peak` over the first share of the steps, then down towards 0 after the last."""
    warmup = math.ceil(total_steps * warmup_fraction)  # rounded up, as the original does
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, max(warmup, 1)),
            optax.linear_schedule(peak, 0.0, max(total_steps - warmup, 1)),
        ],
        [warmup],
    )


def decayed(params: Any, fixed: Collection[Path] = ()) -> Any:
    """Which parameters weight decay applies to: all but biases, LayerNorm and `fixed` ones (True = decayed)."""
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict(
        {path: path[-1] not in ("bias", "scale") and path not in fixed for path in flat}
    )


def make_optimizer(
    config: ConfigDict, total_steps: int, fixed: Collection[Path] = ()
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimiser and its learning-rate schedule.

    Args:
      config: `peak_lr`, `warmup_fraction`, `b1`, `b2`, `eps`, `weight_decay`, `clip_norm` (0 = no clipping).
      total_steps: optimiser steps of the whole run.
      fixed: paths of parameters that have no gradient and must not decay either.
    """
    schedule = linear_schedule(config.peak_lr, total_steps, config.warmup_fraction)
    adamw = optax.adamw(
        schedule,
        config.b1,
        config.b2,
        config.eps,
        weight_decay=config.weight_decay,
        mask=functools.partial(decayed, fixed=fixed),
    )
    if config.clip_norm:
        return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw), schedule
    return adamw, schedule
