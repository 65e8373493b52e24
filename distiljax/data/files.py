"""Files that are there whole or not at all, and what a full disk is called."""

from __future__ import annotations

import errno
import json
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from distiljax.errors import UserError


def temporary_name(path: str | os.PathLike[str]) -> str:
    """Where a file is written before it is renamed to `path`; no two processes share it, wherever they run."""
    return f"{os.fspath(path)}.{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """The temporary name to write a file to; it is renamed to `path` at the end, and removed on errors."""
    temporary = temporary_name(path)
    try:
        with disk_errors(path):
            yield temporary
            os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes JSON on one line."""
    with replacing(path) as temporary:
        Path(temporary).write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")


def save_arrays(path: Path, **arrays: Any) -> None:
    """Writes a compressed .npz."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


@contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what a full disk makes libraries raise into one line; ArrayRecord has RuntimeError for everything."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        full = any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
        if isinstance(error, OSError) and not full:
            raise
        reason = "the disk is full" if full else " ".join(str(error).split())[:200]
        raise UserError(
            f"{os.fspath(path)} cannot be written: {reason}; mend that, and the same command goes on after the "
            "finished shards"
        ) from error
