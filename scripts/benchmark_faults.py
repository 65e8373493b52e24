"""What a run of several processes survives: kills and signals at random moments, and another number of processes.

    python scripts/benchmark_faults.py --teacher=DIR --source=FILE [--kills=20] [--terms=5] [--steps=2000]

A small distillation of the teacher on the CPU, its processes talking over gloo. First unbroken; then again with SIGKILL
to one process at a random moment, so many times, and SIGTERM to one, so many times, and to its end: it must end with
the same parameters, bit for bit. Last with a change from several processes to one and back: the same to 1e-5. Prints
Markdown for BENCHMARKS.md; exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

LOST_AFTER = 5.0
JOIN_WITHIN = 30.0
EVERY = 20  # steps between checkpoints


class Runs:
    """Starts the same distillation in as many processes as asked for."""

    def __init__(self, base: Path, arguments: argparse.Namespace) -> None:
        self.base = base
        settings = {
            "teacher": arguments.teacher,
            "data.source": arguments.source,
            "data.seq_len": 64,
            "data.holdout": 0.02,
            "data.max_documents": 300,
            "data_dir": base / "rows",
            "batch_size": 8,
            "steps": arguments.steps,
            "log_every": 10,
            "eval.every": 500,
            "eval.rows": 16,
            "checkpoint.every": EVERY,
            "dtype": "float32",
        }
        self._flags = [f"--config.{key}={value}" for key, value in settings.items()]

    def start(self, name: str, processes: int) -> list[subprocess.Popen[str]]:
        """`distiljax distill` in so many processes; standard error of all goes to one file."""
        command = [
            sys.executable,
            "-m",
            "distiljax",
            "distill",
            *self._flags,
            f"--workdir={self.base / name}",
        ]
        together = [
            f"--coordinator_address=127.0.0.1:{free_port()}",
            f"--num_processes={processes}",
            f"--lost_after={LOST_AFTER}",
            f"--join_within={JOIN_WITHIN}",
        ]
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "",
            "JAX_COMPILATION_CACHE_DIR": str(self.base / "cache"),
            "JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        with open(self.base / f"{name}.log", "a") as log:
            return [
                subprocess.Popen(
                    [*command, *(together + [f"--process_id={i}"] if processes > 1 else [])],
                    env=environment,
                    stdout=log,
                    stderr=log,
                    text=True,
                )
                for i in range(processes)
            ]

    def finish(self, name: str, processes: int) -> float:
        """Run to the end; seconds."""
        began = time.monotonic()
        ends = [process.wait() for process in self.start(name, processes)]
        if any(ends):
            raise SystemExit(f"{name} ended with {ends}:\n{self.said(name)}")
        return time.monotonic() - began

    def interrupt(self, name: str, number: int, after: float, processes: int) -> dict[str, Any] | None:
        """Start it and send a signal to one process; how all ended, or None if the run was finished before."""
        running = self.start(name, processes)
        victim = random.randrange(processes)
        deadline = time.monotonic() + after
        while time.monotonic() < deadline and any(p.poll() is None for p in running):
            time.sleep(0.01)
        if all(p.poll() is not None for p in running):
            return None
        running[victim].send_signal(number)
        sent = time.monotonic()
        statuses = [process.wait(timeout=300) for process in running]
        return {"victim": victim, "statuses": statuses, "seconds": time.monotonic() - sent}

    def said(self, name: str) -> str:
        """The end of what a run has said."""
        return (self.base / f"{name}.log").read_text()[-3000:]

    def step(self, name: str) -> int:
        """The newest checkpoint."""
        from distiljax.train.checkpoint import checkpoint_step

        return checkpoint_step(self.base / name, "last") or 0

    def params(self, name: str) -> dict[Any, Any]:
        """The last parameters."""
        from flax import traverse_util

        import distiljax

        return traverse_util.flatten_dict(distiljax.from_pretrained(self.base / name, checkpoint="last")[1])


def free_port() -> int:
    """A port for process 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def largest_difference(a: dict[Any, Any], b: dict[Any, Any]) -> float:
    """Over all parameters."""
    import numpy as np

    assert a.keys() == b.keys()
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


def signalled(
    runs: Runs, names: list[str], number: signal.Signals, wanted: int, spread: float, processes: int
) -> list[dict[str, Any]]:
    """So many signals, each at a random moment within `spread` seconds of a start; after a run the next."""
    ends: list[dict[str, Any]] = []
    while len(ends) < wanted:
        name = names[-1]
        before = runs.step(name)
        end = runs.interrupt(name, number, random.uniform(0, spread), processes)
        if end is None:
            names.append(f"broken-{len(names)}")
            continue
        end |= {"from": before, "to": runs.step(name)}
        ends.append(end)
        print(f"{number.name} {len(ends)}/{wanted}: {end}", file=sys.stderr, flush=True)
    return ends


def main() -> int:
    """Run all three parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", required=True, help="a masked language model, small")
    parser.add_argument("--source", required=True, help="text")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--terms", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    with tempfile.TemporaryDirectory() as directory:
        runs, count = Runs(Path(directory), arguments), arguments.processes
        runs.finish("unbroken", count)  # fills the compilation cache, and prepares the text
        unbroken = runs.params("unbroken")
        start = time_to_start(runs, count)
        spread = 1.6 * start
        names = ["broken-0"]
        killed = signalled(runs, names, signal.SIGKILL, arguments.kills, spread, count)
        told = signalled(runs, names, signal.SIGTERM, arguments.terms, spread, count)
        runs.finish(names[-1], count)
        broken = max(largest_difference(runs.params(name), unbroken) for name in names)

        for processes in (count, 1):
            runs.interrupt("elastic", signal.SIGTERM, 1.3 * start, processes)
        runs.finish("elastic", count)
        elastic = largest_difference(runs.params("elastic"), unbroken)

        others = [end["seconds"] for end in killed if any(s == 1 for s in end["statuses"])]
        saved = [end for end in told if set(end["statuses"]) == {0}]
        print(
            f"{count} processes, {arguments.steps} steps, checkpoints every {EVERY}.\n\n"
            f"| | |\n|---|---|\n"
            f"| SIGKILLs to one process, 0 to {spread:.0f} s after a start | {len(killed)} |\n"
            f"| of these after a new checkpoint since the start | {sum(e['to'] > e['from'] for e in killed)} |\n"
            f"| until the other process ended by itself, seconds, median and most | "
            f"{statistics.median(others or [0]):.1f}, {max(others or [0]):.1f} (lost after {LOST_AFTER:g} s) |\n"
            f"| SIGTERMs to one process | {len(told)}; all ended with 0 in {len(saved)} |\n"
            f"| how the processes ended | {endings(killed + told)} |\n"
            f"| largest difference of a parameter from the unbroken run | {broken:g} |\n"
            f"| the same after {count} processes, then 1, then {count} | {elastic:.1e} |"
        )
        return int(broken != 0 or elastic > 1e-5)


def time_to_start(runs: Runs, processes: int) -> float:
    """Seconds from the start of the processes to their first logged step, with everything compiled."""
    began = time.monotonic()
    running = runs.start("start", processes)
    while not (runs.base / "start" / "checkpoints" / str(EVERY)).exists():
        if all(p.poll() is not None for p in running):
            raise SystemExit(f"it ended at once:\n{runs.said('start')}")
        time.sleep(0.05)
    seconds = time.monotonic() - began
    for process in running:
        process.kill()
        process.wait()
    return seconds


def endings(ends: list[dict[str, Any]]) -> str:
    """How often each pair of statuses occurred."""
    counts = Counter(tuple(sorted(end["statuses"])) for end in ends)
    return ", ".join(f"{statuses} × {count}" for statuses, count in counts.most_common())


if __name__ == "__main__":
    sys.exit(main())
