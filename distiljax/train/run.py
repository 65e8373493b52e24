"""The run directory: what it holds, who may continue it, and when it is finished.

config.json    the config of the run
model.json     what is trained, for whoever loads the checkpoints
tokenizer/     tokenizer files
data/          prepared rows
checkpoints/   the last states        best/   the best parameters
metrics.jsonl  tensorboard/           the log
result.json    written when the run is finished
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from distiljax.errors import UserError
from distiljax.train.checkpoint import checkpoint_step

CONFIG, MODEL, RESULT, EVALUATION = "config.json", "model.json", "result.json", "evaluation.json"
TOKENIZER = "tokenizer"

# Settings that do not change what a run computes: it may go on with others.
FREE = ("data_dir", "parallel", "micro_batch_size", "checkpoint", "log_every", "eval.batch_size")


def open_run(workdir: str | os.PathLike[str], config: ConfigDict, kind: str) -> Path:
    """Make or re-enter a run directory.

    Args:
      workdir: the directory; made if it is not there.
      config: the run's config; kept in config.json.
      kind: "distill" or "pretrain".

    Raises:
      UserError: a directory that cannot be written, or that holds a run of another config.
    """
    path = Path(workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "no permission to write")
    except OSError as error:
        raise UserError(
            f"cannot write to workdir {path}: {error.strerror}; give another --workdir"
        ) from error
    wanted = {"kind": kind, **json.loads(config.to_json())}
    existing = read_json(path / CONFIG)
    started = (path / RESULT).exists() or checkpoint_step(path, "last") is not None
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
    return path


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, or None if there is no such file.

    Raises:
      UserError: a file that is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({error}); restore it, or give another directory"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    text = json.dumps(value, indent=2, sort_keys=True, default=str, allow_nan=False)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


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
