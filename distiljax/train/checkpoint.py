"""Orbax checkpoints of a run: the last few whole states, and the best parameters."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from distiljax.errors import Failed, UserError
from distiljax.train import distributed, storage

log = logging.getLogger(__name__)

LAST = "checkpoints"
BEST = "best"


SAVE_SECONDS = 180  # that one process may take longer to write its part than the others


class _Store:
    """One directory of checkpoints, through an Orbax manager, that a failed write does no harm.

    Args:
      directory: of the checkpoints.
      keep: how many of the newest to keep.
      agree: whether a flag is set in any process of the run; called by all of them at the same places.
    """

    def __init__(self, directory: str, keep: int, agree: Callable[[bool], bool]) -> None:
        self.directory, self._keep, self._agree = directory, keep, agree
        self._failed = False
        self._saving: int | None = None
        self.manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=self._keep,
                cleanup_tmp_directories=True,  # what a kill, or a full disk, in the middle of a save has left
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(timeout_secs=SAVE_SECONDS),
            ),
        )

    def save(self, step: int, **items: Any) -> None:
        """Start to save the items as checkpoint `step`; an existing one of that step is kept."""
        self.settle()
        # Process 0 says what is there: a network file system may show the others an older state.
        if distributed.from_first(lambda: step in self.manager.all_steps()):
            return
        self._saving = step
        try:
            self.manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:  # whatever the file system, TensorStore or Orbax call it
            self._warn(error)

    def check(self) -> None:
        """Warn of a save that has failed meanwhile."""
        try:
            self.manager.check_for_errors()
        except Exception as error:
            self._warn(error)

    def settle(self) -> bool:
        """Wait for what is being saved; whether it was saved, in all processes."""
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            self._warn(error)
        failed = self._agree(self._failed)
        if failed:
            # The half of a checkpoint must not fill the disk, and Orbax believes that it is there.
            with contextlib.suppress(Exception):
                self.manager.close()
            if distributed.first():
                self._remove_halves()
            self.manager = self._open()
        self._failed, self._saving = False, None
        return not failed

    def _remove_halves(self) -> None:
        for name in storage.names(self.directory):
            if ocp.utils.TMP_DIR_SUFFIX in name:
                with contextlib.suppress(Exception):
                    storage.remove_tree(os.path.join(self.directory, name))

    def close(self) -> None:
        """Wait for what is being saved, without the other processes' consent."""
        with contextlib.suppress(Exception):
            self.manager.wait_until_finished()
        with contextlib.suppress(Exception):
            self.manager.close()

    def _warn(self, error: Exception) -> None:
        if self._failed:
            return
        self._failed = True
        # Orbax leaves the writes that it had not begun; Python would say so whenever it collects them, even at exit.
        warnings.filterwarnings("ignore", r"coroutine .* was never awaited", RuntimeWarning)
        kept = [step for step in self.manager.all_steps() if step != self._saving]
        log.warning(
            "CHECKPOINT %s COULD NOT BE SAVED to %s: %s; training goes on, and the newest checkpoint is %s",
            self._saving,
            self.directory,
            _reason(error),
            f"still that of step {max(kept)}" if kept else "none yet",
        )


class Checkpointer:
    """Saves and restores a run's state under `workdir/checkpoints` and its best parameters under `workdir/best`.

    Saving is asynchronous and atomic: a checkpoint stands under its final name only when it is whole. A save that
    fails, as on a full disk, is warned of, and the ones before stay.

    Args:
      workdir: the run directory.
      keep: how many of the last states to keep.
      agree: see `_Store`.
    """

    def __init__(
        self, workdir: str | os.PathLike[str], keep: int = 2, agree: Callable[[bool], bool] = bool
    ) -> None:
        self._agree = agree
        self._last = _Store(_directory(workdir, "last"), keep, agree)
        self._best = _Store(_directory(workdir, BEST), 1, agree)
        self._best_saved: dict[str, Any] = {}
        self._best_saving: dict[str, Any] = {}

    def restore(self, template: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest state that can be read, and the facts saved with it; None if there is none.

        Args:
          template: a pytree of the state's shapes; the state comes as host arrays in its shape.

        Raises:
          UserError, Failed: there are checkpoints, but none can be read; Failed where the directory is remote and may
            be out of reach.
        """
        directory = self._last.directory
        # As above: all must try the same ones.
        steps = distributed.from_first(lambda: sorted(self._last.manager.all_steps(), reverse=True))
        damaged: list[int] = []
        reason = ""
        for step, before in itertools.zip_longest(steps, steps[1:]):
            restored: Any = None
            reason = "in another process"
            try:
                restored = _read(
                    directory, step, {"state": _restore_args(template), "facts": ocp.args.JsonRestore()}
                )
            except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
                reason = _reason(error)
            if not self._agree(restored is None):
                for other in damaged:
                    self._last.manager.delete(other)
                self._best_saved = restored["facts"].get("best", {})
                return restored["state"], restored["facts"]
            damaged.append(step)
            log.warning(
                "checkpoint %d of %s is damaged (%s); %s",
                step,
                directory,
                reason,
                "there is none before it" if before is None else f"going on from checkpoint {before}",
            )
        if not steps:
            return None
        line = f"no checkpoint in {directory} can be read ({reason})"
        if storage.is_remote(directory):
            raise Failed(f"{line}; try the same command again")
        raise UserError(f"{line}; delete the run directory to start again")

    def save(self, step: int, state: Any, facts: dict[str, Any]) -> None:
        """Start to save `state` and the JSON `facts` as checkpoint `step`; an existing one of that step is kept.

        The facts say under `best` which parameters are the best: `settle_best` must have been asked.
        """
        self._last.save(step, state=ocp.args.StandardSave(_copy(state)), facts=ocp.args.JsonSave(facts))

    def save_best(self, step: int, params: Any, record: dict[str, Any]) -> None:
        """Start to save `params` in the place of the best so far, with the record of their validation."""
        self.settle_best()
        self._best_saving = record
        self._best.save(step, params=ocp.args.StandardSave(_copy(params)), facts=ocp.args.JsonSave(record))

    def settle_best(self) -> dict[str, Any]:
        """The record of the best parameters that are on the disk; {} if none are."""
        if self._best.settle() and self._best_saving:
            self._best_saved = self._best_saving
        self._best_saving = {}
        return self._best_saved

    def check(self) -> None:
        """Warn of saves that have failed meanwhile."""
        self._last.check()
        self._best.check()

    def settle(self) -> bool:
        """Wait for what is being saved; whether the last state is on the disk."""
        return self._last.settle()

    def close(self) -> None:
        """Wait for what is being saved, and end."""
        self._last.close()
        self._best.close()


def restore_params(workdir: str | os.PathLike[str], template: Any, which: str = BEST) -> tuple[Any, int]:
    """The parameters of a run and the step they are from; what the template does not name is left out.

    Args:
      workdir: the run directory.
      template: a pytree of the parameters' shapes (arrays or `jax.ShapeDtypeStruct`).
      which: "best" or "last".

    Raises:
      FileNotFoundError: the run has no such checkpoint.
      UserError: it is damaged.
      Failed: it is remote, and damaged or out of reach.
    """
    step = checkpoint_step(workdir, which)
    if step is None:
        raise FileNotFoundError(_directory(workdir, which))
    item = "params" if which == BEST else "state"
    wanted = template if which == BEST else {"params": template}
    on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    args = ocp.args.PyTreeRestore(wanted, restore_args=on_host, partial_restore=True)
    directory = _directory(workdir, which)
    try:
        restored = _read(directory, step, {item: args})[item]
        _check_shapes(restored, wanted)
    except Exception as error:  # as above
        line = f"checkpoint {step} of {directory} is damaged ({_reason(error)})"
        if storage.is_remote(directory):
            raise Failed(f"{line}, or cannot be reached; try the same command again") from error
        raise UserError(f"{line}; choose the other of best and last, or run the training again") from error
    return (restored if which == BEST else restored["params"]), step


def _check_shapes(restored: Any, wanted: Any) -> None:
    def check(path: Any, leaf: Any, template: Any) -> None:
        if not isinstance(leaf, np.ndarray) or leaf.shape != template.shape:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            held = list(leaf.shape) if isinstance(leaf, np.ndarray) else "nothing"
            raise ValueError(f"{name} holds {held}, and the run's model.json asks for {list(template.shape)}")

    jax.tree_util.tree_map_with_path(check, restored, wanted)


def _read(directory: str, step: int, items: dict[str, Any]) -> Any:
    """Items of a checkpoint as host arrays. No process waits for another one: what one cannot read would be a hang."""
    alone = jax.process_index()
    options = ocp.CheckpointManagerOptions(
        create=False,
        enable_async_checkpointing=False,
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            primary_host=alone, active_processes={alone}, barrier_sync_key_prefix=f"reader_{alone}"
        )
        if jax.process_count() > 1
        else ocp.options.MultiprocessingOptions(),
    )
    with ocp.CheckpointManager(directory, options=options) as manager:
        return manager.restore(step, args=ocp.args.Composite(**items))


def checkpoint_step(workdir: str | os.PathLike[str], which: str = BEST) -> int | None:
    """The step of a run's "best" or "last" checkpoint; None if there is none."""
    directory = storage.as_path(_directory(workdir, which))
    steps = sorted((int(name) for name in storage.names(directory) if name.isdigit()), reverse=True)
    for step in steps:
        # An object store has no rename: there Orbax marks what is whole by this file.
        if not storage.is_remote(directory) or (directory / str(step) / "commit_success.txt").exists():
            return step
    return None


def _directory(workdir: str | os.PathLike[str], which: str) -> str:
    return os.path.join(storage.absolute(workdir), BEST if which == BEST else LAST)


def _reason(error: BaseException) -> str:
    """Why something could not be read or written: what the operating system calls it, or the first line."""
    text = str(error)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        if os.strerror(number) in text:
            return f"the disk is full ({os.strerror(number)})"
    if "DEADLINE_EXCEEDED" in text:
        return f"another process did not write its part within {SAVE_SECONDS} s, as on a disk of its own that is full"
    return (text.strip().splitlines() or [type(error).__name__])[0][:200]


def _restore_args(template: Any) -> ocp.args.StandardRestore:
    return ocp.args.StandardRestore(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), template))


def _copy(tree: Any) -> Any:
    # The next step reuses the state's buffers while they are still being written.
    return jax.tree.map(jnp.copy, tree)
