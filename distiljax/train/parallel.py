"""One step over many devices: `jit` of `shard_map` over a mesh, or `pmap`.

A step is written with explicit collectives over the axis name `data` (`jax.lax.psum` and the like). It takes
replicated pytrees and one pytree of rows split over the devices along their first axis, and returns replicated
pytrees; `Parallel` wraps it either way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distiljax.errors import UserError

AXIS = "data"


class Parallel:
    """The devices of a run and how work is laid over them.

    Attributes:
      mode: "jit" or "pmap".
      mesh: axes `data` (every device) and `model` (1).
      devices: how many devices share a batch.

    Raises:
      UserError: an unknown mode.
    """

    def __init__(self, mode: str = "jit", devices: list[jax.Device] | None = None):
        if mode not in ("jit", "pmap"):
            raise UserError(f"parallel.mode is {mode!r}; expected jit or pmap")
        self.mode = mode
        # Ordered by process, so that each process holds one contiguous part of the global batch.
        devices = sorted(devices or jax.devices(), key=lambda d: (d.process_index, d.id))
        self.devices = len(devices)
        self.mesh = Mesh(np.array(devices).reshape(-1, 1), (AXIS, "model"), axis_types=(AxisType.Auto,) * 2)
        self._local = [d for d in devices if d.process_index == jax.process_index()]
        self._local_mesh = Mesh(np.array(self._local), (AXIS,), axis_types=(AxisType.Auto,))

    def wrap(self, step: Callable[..., Any], *, donate: bool = False) -> Callable[..., Any]:
        """`step(*replicated, rows)` for all devices; with `donate` the first argument's buffers are reused."""
        donated = (0,) if donate else ()
        if self.mode == "pmap":
            return jax.pmap(step, axis_name=AXIS, donate_argnums=donated)

        def sharded(*args: Any) -> Any:
            in_specs = (P(),) * (len(args) - 1) + (P(AXIS),)
            # check_vma=False: gradients stay local to a device until the step reduces them itself, once.
            return jax.shard_map(
                step, mesh=self.mesh, in_specs=in_specs, out_specs=P(), axis_names={AXIS}, check_vma=False
            )(*args)

        return jax.jit(sharded, donate_argnums=donated)

    def replicate(self, tree: Any) -> Any:
        """Put a copy of `tree` on every device."""
        if self.mode == "pmap":
            sharding = NamedSharding(self._local_mesh, P(AXIS))
            copies = len(self._local)

            def put(x: Any) -> jax.Array:
                x = np.asarray(x)
                return jax.make_array_from_callback((copies, *x.shape), sharding, lambda _: x[None])

            return jax.tree.map(put, tree)
        # jnp.copy: the state is donated step by step, and must not share buffers with the caller's arrays.
        return jax.tree.map(jnp.copy, jax.device_put(tree, NamedSharding(self.mesh, P())))

    def unreplicate(self, tree: Any) -> Any:
        """One copy of a replicated `tree`, still on the device."""
        if self.mode == "pmap":
            return jax.tree.map(lambda x: x.addressable_shards[0].data.reshape(x.shape[1:]), tree)
        return tree

    def shard(self, rows: Any) -> Any:
        """Split this process's rows (arrays [b, …]) over its devices.

        Raises:
          UserError: rows that do not divide by the devices.
        """
        copies = len(self._local)

        def put(x: np.ndarray) -> jax.Array:
            if len(x) % copies:
                raise UserError(f"{len(x)} rows do not divide by {copies} devices; choose a multiple")
            if self.mode == "pmap":
                x = x.reshape(copies, -1, *x.shape[1:])
                return jax.device_put(x, NamedSharding(self._local_mesh, P(AXIS)))
            return jax.make_array_from_process_local_data(NamedSharding(self.mesh, P(AXIS)), x)

        return jax.tree.map(put, rows)
