"""AdamW with linear warm-up and decay (the optimiser of the original script)."""

from __future__ import annotations

from typing import Any

import optax
from flax import traverse_util
from ml_collections import ConfigDict

from distiljax.errors import UserError


def linear_schedule(peak: float, total_steps: int, warmup_fraction: float) -> optax.Schedule:
    """Learning rate from 0 up to `peak` over the first `warmup_fraction` of the steps, then down to 0 at the last."""
    warmup = int(-(-total_steps * warmup_fraction // 1))  # rounded up, as the original does
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, max(warmup, 1)),
            optax.linear_schedule(peak, 0.0, max(total_steps - warmup, 1)),
        ],
        [warmup],
    )


def decayed(params: Any) -> Any:
    """Which parameters weight decay applies to: all but biases, LayerNorm and fixed tables (True = decayed)."""
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({path: path[-1] not in ("bias", "scale") for path in flat})


def make_optimizer(
    config: ConfigDict, total_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimiser and its learning-rate schedule.

    Args:
      config: `peak_lr`, `warmup_fraction`, `b1`, `b2`, `eps`, `weight_decay`, `clip_norm` (0 = no clipping).
      total_steps: optimiser steps of the whole run.

    Raises:
      UserError: a value outside its range.
    """
    if not 0.0 <= config.warmup_fraction <= 1.0:
        raise UserError(f"optimizer.warmup_fraction is {config.warmup_fraction}; expected 0 to 1")
    if config.peak_lr <= 0:
        raise UserError(f"optimizer.peak_lr is {config.peak_lr}; expected more than 0")
    schedule = linear_schedule(config.peak_lr, total_steps, config.warmup_fraction)
    adamw = optax.adamw(
        schedule, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decayed
    )
    if config.clip_norm:
        return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw), schedule
    return adamw, schedule
