"""The run directory, local or in an object store: what it holds, who may continue it, and when it is finished.

config.json    the config of the run
model.json     what is trained, for whoever loads the checkpoints
tokenizer/     tokenizer files
data/          prepared rows
checkpoints/   the last states        best/   the best parameters
metrics.jsonl  tensorboard/           the log
result.json    written when the run is finished
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from distiljax.errors import UserError
from distiljax.train import storage
from distiljax.train.checkpoint import checkpoint_step

CONFIG, MODEL, RESULT, EVALUATION = "config.json", "model.json", "result.json", "evaluation.json"
TOKENIZER = "tokenizer"

# Settings that do not change what a run computes: it may go on with others.
FREE = (
    "data_dir",
    "parallel",
    "micro_batch_size",
    "checkpoint",
    "log_every",
    "eval.batch_size",
    "max_nonfinite_steps",
    "attention",
    "remat",
)


@contextlib.contextmanager
def open_run(workdir: str | os.PathLike[str], config: ConfigDict, kind: str) -> Iterator[Path]:
    """Make or re-enter a run directory, and keep other processes of this machine out of it meanwhile.

    An object store has no locks: that no other run uses a remote directory is the user's care.

    Args:
      workdir: the directory, local or remote (see `storage.as_path`, which is what this gives); made if it is not
        there.
      config: the run's config; kept in config.json.
      kind: "distill", "pretrain" or "finetune".

    Raises:
      UserError: a directory that cannot be written, that another process uses, or that holds a run of another config.
    """
    path = storage.as_path(workdir)
    if storage.is_remote(path):
        _claim(path, config, kind)
        yield path
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "no permission to write")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot write to workdir {path}: {reason}; give another --workdir") from error
    # Nothing in the directory is looked at or changed before it is this process's alone.
    with hold(path):
        _claim(path, config, kind)
        yield path


def _claim(path: Path, config: ConfigDict, kind: str) -> None:
    wanted = {"kind": kind, **json.loads(config.to_json())}
    existing = read_json(path / CONFIG)
    started = read_json(path / RESULT) is not None or checkpoint_step(path, "last") is not None
    if existing is not None and existing.get("kind") != kind:
        raise UserError(
            f"workdir {path} holds a {existing.get('kind')} run, this is a {kind} run; give another --workdir"
        )
    if existing is not None and not started and existing.get("data") != wanted["data"]:
        _remove_rows(path / "data")  # of a start that came to nothing
    if existing is not None and started:
        differing = [
            f"{key} was {old!r} and is now {new!r}"
            for key, old, new in _differences(existing, wanted)
            if not any(key == free or key.startswith(free + ".") for free in FREE)
        ]
        if differing:
            more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise UserError(
                f"workdir {path} holds a run of another config: {'; '.join(differing[:3])}{more}; "
                "give another --workdir, or the config it was started with"
            )
    elif started:
        raise UserError(f"workdir {path} holds checkpoints but no {CONFIG}; give another --workdir")
    write_json(path / CONFIG, wanted)


def _remove_rows(data: Path) -> None:
    """Removes what the preparation of text has made, finished or not, and nothing else that may lie there."""
    under_way = ".prepare" in storage.names(data)
    for split in ("train", "validation"):
        if under_way or (data / split / "metadata.json").is_file():
            storage.remove_tree(data / split)
    storage.remove_tree(data / ".prepare")


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[None]:
    """Keep other processes of this machine out of a run directory; the lock goes with the process.

    Raises:
      UserError: another process holds it.
    """
    with open(workdir / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"workdir {workdir} is in use by another process; wait for it, or give another --workdir"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, or None if there is no such file.

    Raises:
      UserError: a file that is no JSON, or one that cannot be read.
    """
    try:
        with storage.errors(path):
            try:
                text = path.read_text(encoding="utf-8")
            except (FileNotFoundError, NotADirectoryError):
                return None
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__}, not an object")
        return value
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({error}); restore it, or give another directory"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all.

    Raises:
      UserError: it cannot be written.
    """
    text = json.dumps(value, indent=2, sort_keys=True, default=str, allow_nan=False)
    storage.write_text(path, text + "\n")


def write_tokenizer(workdir: Path, tokenizer: Any) -> None:
    """Keep the tokenizer with the run."""
    with storage.writing(workdir / TOKENIZER) as directory:
        tokenizer.save_pretrained(directory)


def write_model(workdir: Path, **facts: Any) -> None:
    """Note what the run trains."""
    write_json(workdir / MODEL, facts)


def machine() -> str:
    """The machine in words: its devices, processes and cores."""
    devices = jax.devices()
    kind = devices[0].device_kind if devices[0].platform != "cpu" else "CPU device"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{len(devices)} {kind}{'s' if len(devices) > 1 else ''}, {cores} cores"
    return text + (f", {jax.process_count()} processes" if jax.process_count() > 1 else "")


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    elif old != new:
        yield prefix, old, new
