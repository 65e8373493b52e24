"""The log of a run, `metrics.jsonl` and TensorBoard events: each step once, however often it is resumed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from distiljax.errors import UserError

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"
SPLITS = ("train", "validation")


class MetricWriter:
    """Appends to `workdir/metrics.jsonl` and to TensorBoard event files under `workdir/tensorboard`.

    For one process of a run only (process 0). `start_step` is the step of the checkpoint that the run goes on
    from: records after it are removed and TensorBoard is told to drop them, as the steps are about to be run
    again. 0 means that there is no checkpoint, and an earlier log in `workdir` is emptied.

    A record is one line, flushed: `{"step": 100, "split": "train", "loss": 3.2, …}`. The file is strict JSON,
    which has no NaN and no infinity: a value that is not finite is stored as null (TensorBoard gets the value
    itself).
    """

    def __init__(self, workdir: str | os.PathLike[str], start_step: int = 0) -> None:
        from tensorboardX import SummaryWriter

        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / METRICS_FILE
        # A run with no checkpoint writes step 0 again too (the validation before training).
        first_step = start_step + 1 if start_step > 0 else 0
        if path.exists():
            _drop_from(path, first_step)
        self._file: TextIO = path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(
            str(workdir / TENSORBOARD_DIR),
            purge_step=first_step,
            flush_secs=10,
            # File names carry the time in whole seconds: a second writer within one would overwrite the
            # first's file.
            filename_suffix=f".{os.getpid()}.{start_step}",
        )

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Logs `values` (scalars by name) of `split` ("train" or "validation") at optimiser step `step`."""
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not one of {SPLITS}")
        if reserved := {"step", "split"} & values.keys():
            raise ValueError(f"metric names {sorted(reserved)} are reserved for the record itself")
        scalars = {name: value if isinstance(value, int) else float(value) for name, value in values.items()}
        record: dict[str, Any] = {"step": int(step), "split": split}
        record |= {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._tensorboard.add_scalar(f"{split}/{name}", value, int(step))

    def close(self) -> None:
        """Flushes and closes both logs; a second call does nothing."""
        if not self._file.closed:
            self._file.close()
            self._tensorboard.close()

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
    path = Path(workdir) / METRICS_FILE
    if not path.exists():
        return {}
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
    """The (line, record) pairs of a log, without the last line where it is torn."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
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
    """Rewrites the log without the records of `first_step` and later."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(line for line, record in _records(path) if record["step"] < first_step)
    os.replace(temporary, path)
