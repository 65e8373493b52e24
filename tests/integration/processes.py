"""Commands in several processes on this machine, as a scheduler would start them on several."""

import contextlib
import socket
import subprocess
import sys

from tests import commands


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_processes(arguments, count, devices=1, lost_after=20, each=None):
    """`distiljax …` as `count` processes of one run, each with so many simulated devices.

    Flags of its own, such as another run directory, each has from `each(index)`.
    """
    environment = commands.environment(XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}")
    address = f"--coordinator_address=127.0.0.1:{free_port()}"
    together = [address, f"--num_processes={count}", f"--lost_after={lost_after}"] if count > 1 else []
    return [
        subprocess.Popen(
            [sys.executable, "-m", "distiljax", *map(str, arguments), *together]
            + ([f"--process_id={index}"] if count > 1 else [])
            + (each(index) if each else []),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def finish_processes(processes, seconds=400):
    """Exit status and standard error of each."""
    try:
        errors = [process.communicate(timeout=seconds)[1] for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]
