"""The log of a run, `metrics.jsonl` and TensorBoard events: each step once, however often it is resumed."""

from __future__ import annotations

import collections
import contextlib
import io
import json
import logging
import math
import os
import shutil
import socket
import struct
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from distiljax.errors import UserError
from distiljax.train import storage

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"
SPLITS = ("train", "validation")
HELD = 10_000  # records that are kept for a disk that takes no more; the oldest go first


class MetricWriter:
    """Appends to `workdir/metrics.jsonl` and to TensorBoard event files under `workdir/tensorboard`.

    For one process of a run only (process 0). `start_step` is the step of the checkpoint that the run goes on
    from: records after it are removed and TensorBoard is told to drop them, as the steps are about to be run
    again. 0 means that there is no checkpoint, and an earlier log in `workdir` is emptied.

    A record is one line, there at once and whole: `{"step": 100, "split": "train", "loss": 3.2, …}`. The file is
    strict JSON, which has no NaN and no infinity: a value that is not finite is stored as null (TensorBoard gets the
    value itself).

    A log never ends a run. Where a file cannot be written (a full disk), a warning says so once, the records are
    held, and they are written when the file takes them again. Where `workdir` is remote, the files are written in a
    temporary directory and copied up every half minute and at the end: a run that is killed loses what it has logged
    since.

    Raises:
      UserError: there is a log in `workdir` that is none, or a remote one that cannot be read.
    """

    def __init__(self, workdir: str | os.PathLike[str], start_step: int = 0) -> None:
        # A run with no checkpoint writes step 0 again too (the validation before training).
        first_step = start_step + 1 if start_step > 0 else 0
        self._closed = False
        self._workdir = workdir
        self._directory = _scratch(workdir, first_step) if storage.is_remote(workdir) else Path(workdir)
        self._records = _Log(self._directory / METRICS_FILE)
        # File names carry the time in whole seconds: a second writer within one would overwrite the first's file.
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{start_step}"
        self._events = _Log(self._directory / TENSORBOARD_DIR / name, _events_header(first_step))
        try:
            _drop_from(self._records.path, first_step)
        except OSError as error:
            # Its steps are logged again, and of two records of a step the later counts.
            log.warning("records of step %d on stay in %s (%s)", first_step, self._records.path, error)
        self._records.write()
        self._events.write()
        self._mirror = storage.Mirror(self._directory, workdir) if storage.is_remote(workdir) else None

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Logs `values` (scalars by name) of `split` ("train" or "validation") at optimiser step `step`."""
        if self._closed:
            raise ValueError("the log is closed")
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not one of {SPLITS}")
        if reserved := {"step", "split"} & values.keys():
            raise ValueError(f"metric names {sorted(reserved)} are reserved for the record itself")
        scalars = {name: value if isinstance(value, int) else float(value) for name, value in values.items()}
        record: dict[str, Any] = {"step": int(step), "split": split}
        record |= {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._records.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._events.write(_scalars_event(int(step), split, scalars))

    def close(self) -> None:
        """Closes both logs; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        for file in (self._records, self._events):
            file.close()
        if self._mirror:
            if self._mirror.close():
                shutil.rmtree(self._directory, ignore_errors=True)
            else:
                log.warning("the log of %s is left in %s", self._workdir, self._directory)

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(workdir: str | os.PathLike[str]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Reads a run's `metrics.jsonl` as split → metric name → (step, value) in the order of the steps.

    null becomes NaN; of two records of one step the later counts; a last line cut short by a kill is left
    out. A run that has logged nothing gives {}. Raises UserError for a file that is not a metrics log.
    """
    path = storage.as_path(workdir) / METRICS_FILE
    by_step: dict[str, dict[str, dict[int, float]]] = {}
    for _, record in _records(path):
        names = by_step.setdefault(record["split"], {})
        for name, value in record.items():
            if name not in ("step", "split"):
                names.setdefault(name, {})[record["step"]] = math.nan if value is None else float(value)
    return {
        split: {name: sorted(values.items()) for name, values in names.items()}
        for split, names in by_step.items()
    }


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The (line, record) pairs of a log, without the last line where it is torn; none if there is no such file."""
    with storage.errors(path):
        try:
            text = path.read_bytes().decode(errors="replace")
        except FileNotFoundError:
            return
    for number, line in enumerate(io.StringIO(text), 1):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int) or not isinstance(record["split"], str):
                raise TypeError("step or split")
        except (ValueError, TypeError, KeyError) as error:
            if not line.endswith("\n"):
                return
            raise UserError(
                f"{path} line {number}: {line.strip()[:60]!r} is not a record with step and split; "
                "remove the line"
            ) from error
        yield line.rstrip("\n") + "\n", record


def _drop_from(path: Path, first_step: int) -> None:
    """Takes the records of `first_step` and later out of a log, if it is there."""
    if not path.exists():
        return
    kept = "".join(line for line, record in _records(path) if record["step"] < first_step).encode()
    if path.read_bytes().startswith(kept):  # nearly always, and it needs no room on the disk
        os.truncate(path, len(kept))
        return
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(kept)
    os.replace(temporary, path)


def _scratch(workdir: str | os.PathLike[str], first_step: int) -> Path:
    """A temporary directory to write the log of a remote run in; it begins with what the run has logged already."""
    storage.as_path(workdir)
    with storage.room(tempfile.gettempdir()):
        directory = Path(tempfile.mkdtemp(prefix="distiljax-log-"))
        try:
            if first_step and METRICS_FILE in storage.names(workdir):
                storage.download(workdir, directory, [METRICS_FILE])
        except BaseException:
            shutil.rmtree(directory)
            raise
    return directory


class _Log:
    """A file that grows by whole records. Those that the disk does not take are held, and written when it does.

    Args:
      path: the file; it and its directory are made if they are not there.
      header: what a new file begins with.
    """

    def __init__(self, path: Path, header: bytes = b"") -> None:
        self.path = path
        self._header = header
        self._file: io.FileIO | None = None
        self._end = 0  # of the last whole record
        self._torn = False  # whether there may be more than that in the file
        self._held: collections.deque[bytes] = collections.deque(maxlen=HELD)
        self._failing = False

    def write(self, *records: bytes) -> None:
        """Writes the records that are held, and these."""
        self._held.extend(records)
        try:
            self._append()
        except OSError as error:
            if not self._failing:
                log.warning(
                    "%s cannot be written (%s); the run goes on, and what it logs is held until the file can be "
                    "written again",
                    self.path,
                    error.strerror or error,
                )
            self._failing = True
        else:
            if self._failing:
                log.warning("%s is written again", self.path)
            self._failing = False

    def _append(self) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = io.FileIO(self.path, "ab")
            self._end = self._file.seek(0, os.SEEK_END)
        if self._torn:
            self._file.truncate(self._end)
            self._torn = False
        data = b"".join([b"" if self._end else self._header, *self._held])
        self._torn = True
        written = 0
        try:
            while written < len(data):  # a disk that is nearly full takes a part
                written += self._file.write(data[written:]) or 0
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
                self._torn = False
            raise
        self._torn = False
        self._end += len(data)
        self._held.clear()

    def close(self) -> None:
        """Writes what is held, if it can be."""
        self.write()
        if self._held:
            log.warning(
                "%s: the last %d records could not be written and are lost", self.path, len(self._held)
            )
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()


def _events_header(first_step: int) -> bytes:
    """The first events of a file; the second makes TensorBoard drop what earlier files have from a step on."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    now = time.time()
    version = Event(wall_time=now, step=first_step, file_version="brain.Event:2")
    start = Event(wall_time=now, step=first_step, session_log=SessionLog(status=SessionLog.START))
    return _framed(version) + _framed(start)


def _scalars_event(step: int, split: str, scalars: Mapping[str, float]) -> bytes:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.summary import scalar

    values = [value for name, number in scalars.items() for value in scalar(f"{split}/{name}", number).value]
    return _framed(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))


def _framed(event: Any) -> bytes:
    """An event as a TFRecord: length, its masked CRC, content, its masked CRC.

    tensorboardX's own writers do this in a thread, or through a buffer, and neither outlives a full disk.
    """
    from tensorboardX.record_writer import masked_crc32c

    content = event.SerializeToString()
    length = struct.pack("<Q", len(content))
    crcs = (struct.pack("<I", masked_crc32c(part)) for part in (length, content))
    return length + next(crcs) + content + next(crcs)
