"""One step over many devices: `jit` of `shard_map` over a mesh, or `pmap`.

A step is written with explicit collectives over the axis name `data` (`jax.lax.psum` and the like). It takes
replicated pytrees and one pytree of rows split over the devices along their first axis, and returns replicated
pytrees; `Parallel` wraps it either way. A teacher too large for one device can be spread over a second mesh axis,
`model`, over which the compiler splits its work.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distiljax.errors import UserError

AXIS = "data"
MODEL_AXIS = "model"

# Which axis of a layer's parameter is split over the `model` axis: first what a head or an intermediate unit owns, and
# the products that bring these together again (Shoeybi et al. 2019, section 3). Biases after the latter are whole.
_SPLIT = (
    (r"attention/(query|key|value)/(kernel|bias)|ffn/up/(kernel|bias)", -1),
    (r"attention/output/kernel|ffn/down/kernel", 0),
    (r"embeddings/word/embedding|head/bias", 0),
)


class Parallel:
    """The devices of a run and how work is laid over them.

    Attributes:
      mode: "jit" or "pmap".
      mesh: axes `data` and `model`.
      devices: in how many parts the devices share a batch: the length of axis `data`.
      model: over how many devices each part's teacher is spread: the length of axis `model`.

    Raises:
      UserError: an unknown mode, or a `model` axis that the devices of a process do not make.
    """

    def __init__(self, mode: str = "jit", devices: list[jax.Device] | None = None, model: int = 1):
        if mode not in ("jit", "pmap"):
            raise UserError(f"parallel.mode is {mode!r}; expected jit or pmap")
        # Ordered by process, so that each process holds one contiguous part of the global batch.
        ordered = sorted(devices or jax.devices(), key=lambda d: (d.process_index, d.id))
        local = [d for d in ordered if d.process_index == jax.process_index()]
        held = len(local or ordered)
        if model < 1 or held % model:
            raise UserError(
                f"parallel.model is {model}; expected a number that divides the {held} devices of a process"
            )
        if mode == "pmap" and model > 1:
            raise UserError(f"parallel.model is {model} with parallel.mode pmap; use jit")
        self.mode, self.model, self.devices = mode, model, len(ordered) // model
        shape = np.array(ordered).reshape(-1, model)
        self.mesh = Mesh(shape, (AXIS, MODEL_AXIS), axis_types=(AxisType.Auto,) * 2)
        self._ordered, self._local = ordered, local
        self._local_mesh = Mesh(np.array(local), (AXIS,), axis_types=(AxisType.Auto,))
        self._any: Callable[[Any], jax.Array] | None = None

    def wrap(self, step: Callable[..., Any], *, donate: bool = False) -> Callable[..., Any]:
        """`step(*replicated, rows)` for all devices; with `donate` the first argument's buffers are reused."""
        donated = (0,) if donate else ()
        if self.mode == "pmap":
            return jax.pmap(step, axis_name=AXIS, devices=self._ordered, donate_argnums=donated)

        # Left to itself the compiler would spread some of the results over the `model` axis, too.
        replicated = NamedSharding(self.mesh, P())
        if self.devices == 1 and self.model > 1:
            # XLA's partitioner does not take a manual axis of one device beside an automatic one.
            def whole(*args: Any) -> Any:
                *others, rows = args
                in_axes = (None,) * len(others) + (0,)
                mapped = jax.vmap(step, in_axes, axis_name=AXIS, axis_size=1)
                # The models choose their kernels by the mesh, which nothing else tells them of here.
                with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                    out = mapped(*others, jax.tree.map(lambda x: x[None], rows))
                return jax.tree.map(lambda x: x[0], out)

            return jax.jit(whole, donate_argnums=donated, out_shardings=replicated)

        def sharded(*args: Any) -> Any:
            in_specs = (P(),) * (len(args) - 1) + (P(AXIS),)
            # check_vma=False: gradients stay local to a device until the step reduces them itself, once.
            return jax.shard_map(
                step, mesh=self.mesh, in_specs=in_specs, out_specs=P(), axis_names={AXIS}, check_vma=False
            )(*args)

        return jax.jit(sharded, donate_argnums=donated, out_shardings=replicated)

    def replicate(self, tree: Any) -> Any:
        """Put a copy of `tree` on every device."""
        if self.mode == "pmap":
            sharding = NamedSharding(self._local_mesh, P(AXIS))
            copies = len(self._local)

            def put(x: Any) -> jax.Array:
                x = np.asarray(x)
                return jax.make_array_from_callback((copies, *x.shape), sharding, lambda _: x[None])

            return jax.tree.map(put, tree)
        return self._put(tree, jax.tree.map(lambda _: NamedSharding(self.mesh, P()), tree))

    def place_teacher(self, tree: Any) -> Any:
        """Put a teacher's parameters on the devices: a copy on each, or spread over the `model` axis."""
        if self.model == 1:
            return self.replicate(tree)
        return self._put(tree, self.model_sharding(tree))

    def model_sharding(self, tree: Any) -> Any:
        """How a model's parameters lie on the mesh with a `model` axis; what cannot be split evenly is whole."""

        def sharding(path: Any, x: Any) -> NamedSharding:
            name = "/".join(str(key.key) for key in path)
            for pattern, axis in _SPLIT:
                if self.model > 1 and re.search(f"({pattern})$", name):
                    for split in (axis % len(x.shape), len(x.shape) - 1):
                        if x.shape[split] % self.model == 0:
                            return NamedSharding(self.mesh, P(*(None,) * split, MODEL_AXIS))
            return NamedSharding(self.mesh, P())

        return jax.tree_util.tree_map_with_path(sharding, tree)

    def _put(self, tree: Any, shardings: Any) -> Any:
        def put(x: Any, sharding: NamedSharding) -> jax.Array:
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

        # jnp.copy: the state is donated step by step, and must not share buffers with the caller's arrays.
        return jax.tree.map(jnp.copy, jax.tree.map(put, tree, shardings))

    def any(self, flag: bool) -> jax.Array:
        """Whether any process says so, as a number above 0 that every process gets; not waited for.

        All processes must call it at the same place of their work.
        """
        if self._any is None:
            summed = self.wrap(lambda rows: jax.lax.psum(rows.sum(), AXIS))
            self._any = lambda rows: self.unreplicate(summed(rows))
        ways = len(self._local) // self.model
        return self._any(self.shard(np.full((ways,), flag, np.int32)))

    def everywhere(self, tree: Any) -> Any:
        """A replicated `tree` as arrays that all processes hold together, as Orbax wants them; still on the devices."""
        if self.mode == "jit":
            return tree
        sharding = NamedSharding(self.mesh, P())

        def join(x: jax.Array) -> jax.Array:
            shape = x.shape[1:]
            copies = [shard.data.reshape(shape) for shard in x.addressable_shards]
            return jax.make_array_from_single_device_arrays(shape, sharding, copies)

        return jax.tree.map(join, tree)

    def unreplicate(self, tree: Any) -> Any:
        """One copy of a replicated `tree`, still on the device."""
        if self.mode == "pmap":
            return jax.tree.map(lambda x: x.addressable_shards[0].data.reshape(x.shape[1:]), tree)
        return tree

    def fetch(self, tree: Any) -> Any:
        """One copy of a replicated `tree` on the host."""
        return jax.device_get(self.unreplicate(tree))

    def shard(self, rows: Any) -> Any:
        """Split this process's rows (arrays [b, …]) over its devices.

        Raises:
          UserError: rows that do not divide by the devices.
        """
        copies = len(self._local) // self.model

        def put(x: np.ndarray) -> jax.Array:
            if len(x) % copies:
                raise UserError(f"{len(x)} rows do not divide by {copies} devices; choose a multiple")
            if self.mode == "pmap":
                x = x.reshape(copies, -1, *x.shape[1:])
                return jax.device_put(x, NamedSharding(self._local_mesh, P(AXIS)))
            return jax.make_array_from_process_local_data(NamedSharding(self.mesh, P(AXIS)), x)

        return jax.tree.map(put, rows)
