"""Rows in ArrayRecord files, one file a unit of work and row length."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from distiljax.data.files import disk_errors
from distiljax.data.metadata import Shard
from distiljax.data.rows import encode_row


class ShardWriter:
    """Writes one shard under a temporary name, which `close` renames; a context manager, on errors nothing is kept."""

    def __init__(self, temporary: str, path: str, dtype: np.dtype, source: int, seq_len: int) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        self._temporary, self._path, self._dtype = temporary, path, dtype
        self._source, self._seq_len = source, seq_len
        self._rows = self._tokens = 0
        # A group of one record is what makes reading a single row cheap.
        with disk_errors(path):
            self._writer: Any = ArrayRecordWriter(temporary, "group_size:1")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            try:
                self._writer.close()
            except RuntimeError:
                if kind is None:
                    raise
            self._writer = None
            if os.path.exists(self._temporary):
                os.remove(self._temporary)

    def write(self, row: Sequence[np.ndarray]) -> None:
        """Adds a row: the examples that share it."""
        with disk_errors(self._path):
            self._writer.write(encode_row(row, self._dtype))
        self._rows += 1
        self._tokens += sum(map(len, row))

    def close(self) -> Shard:
        """Finishes the file and gives it its name."""
        with disk_errors(self._path):
            self._writer.close()
            self._writer = None
            with open(self._temporary, "rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                size = file.tell()
            os.replace(self._temporary, self._path)
        name = os.path.basename(self._path)
        return Shard(name, self._rows, self._tokens, size, sha256, self._source, self._seq_len)
