"""Orbax checkpoints of a run: the last few whole states, and the best parameters."""

from __future__ import annotations

import logging
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from distiljax.errors import UserError

log = logging.getLogger(__name__)

LAST = "checkpoints"
BEST = "best"


def _manager(directory: str, keep: int) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        os.path.abspath(directory),
        options=ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,  # what a kill in the middle of a save has left
            enable_async_checkpointing=True,
        ),
    )


class Checkpointer:
    """Saves and restores a run's state under `workdir/checkpoints` and its best parameters under `workdir/best`.

    Saving is asynchronous and atomic: a checkpoint stands under its final name only when it is whole.
    """

    def __init__(self, workdir: str | os.PathLike[str], keep: int = 2):
        self._last = _manager(os.path.join(workdir, LAST), keep)
        self._best = _manager(os.path.join(workdir, BEST), 1)

    def restore(self, template: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest state, as host arrays in the shape of `template`, and the facts saved with it; None if none."""
        args = ocp.args.Composite(state=_restore_args(template), facts=ocp.args.JsonRestore())
        steps = sorted(self._last.all_steps(), reverse=True)
        for step in steps:
            try:
                restored = self._last.restore(step, args=args)
                return restored["state"], restored["facts"]
            except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
                log.warning(
                    "checkpoint %d of %s is damaged (%s); %s",
                    step,
                    self._last.directory,
                    _first_line(error),
                    "trying the one before" if step != steps[-1] else "there is none before it",
                )
                self._last.delete(step)
        if steps:
            raise UserError(
                f"no checkpoint in {self._last.directory} can be read; delete the run directory to start again"
            )
        return None

    def save(self, step: int, state: Any, facts: dict[str, Any]) -> None:
        """Start to save `state` and the JSON `facts` as checkpoint `step`; an existing one of that step is kept."""
        if step in self._last.all_steps():
            return
        # The facts say which parameters are the best: these must be on the disk first, whatever happens now.
        self._best.wait_until_finished()
        args = ocp.args.Composite(state=ocp.args.StandardSave(_copy(state)), facts=ocp.args.JsonSave(facts))
        self._last.save(step, args=args, force=True)

    def save_best(self, step: int, params: Any, facts: dict[str, Any]) -> None:
        """Start to save `params` in the place of the best so far."""
        if step in self._best.all_steps():
            return
        args = ocp.args.Composite(params=ocp.args.StandardSave(_copy(params)), facts=ocp.args.JsonSave(facts))
        self._best.save(step, args=args, force=True)

    def close(self) -> None:
        """Wait for what is being saved."""
        for manager in (self._last, self._best):
            manager.wait_until_finished()
            manager.close()


def restore_params(workdir: str | os.PathLike[str], template: Any, which: str = BEST) -> tuple[Any, int]:
    """The parameters of a run and the step they are from; what the template does not name is left out.

    Args:
      workdir: the run directory.
      template: a pytree of the parameters' shapes (arrays or `jax.ShapeDtypeStruct`).
      which: "best" or "last".

    Raises:
      FileNotFoundError: the run has no such checkpoint.
      UserError: it is damaged.
    """
    step = checkpoint_step(workdir, which)
    if step is None:
        raise FileNotFoundError(_directory(workdir, which))
    item = "params" if which == BEST else "state"
    wanted = template if which == BEST else {"params": template}
    on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    args = ocp.args.PyTreeRestore(wanted, restore_args=on_host, partial_restore=True)
    options = ocp.CheckpointManagerOptions(create=False, enable_async_checkpointing=False)
    try:
        with ocp.CheckpointManager(_directory(workdir, which), options=options) as manager:
            restored = manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
    except Exception as error:  # as above
        raise UserError(
            f"checkpoint {step} of {_directory(workdir, which)} is damaged ({_first_line(error)}); "
            "choose the other of best and last, or run the training again"
        ) from error
    return (restored if which == BEST else restored["params"]), step


def checkpoint_step(workdir: str | os.PathLike[str], which: str = BEST) -> int | None:
    """The step of a run's "best" or "last" checkpoint; None if there is none."""
    try:
        names = os.listdir(_directory(workdir, which))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return max((int(name) for name in names if name.isdigit()), default=None)


def _directory(workdir: str | os.PathLike[str], which: str) -> str:
    return os.path.abspath(os.path.join(workdir, BEST if which == BEST else LAST))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _restore_args(template: Any) -> ocp.args.StandardRestore:
    return ocp.args.StandardRestore(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), template))


def _copy(tree: Any) -> Any:
    # The next step reuses the state's buffers while they are still being written.
    return jax.tree.map(jnp.copy, tree)
