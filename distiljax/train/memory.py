"""What this process has held in memory, on the host and on accelerators."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path


def peak_memory() -> int:
    """Most bytes that this process has held so far: its highest resident memory."""
    try:
        # Not getrusage: on Linux that begins with what the parent process held when it started this one.
        return 1024 * int(re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[0])
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def device_peak_memory() -> int | None:
    """Most bytes that were in use on a device so far, of the fullest one; None where it does not say, as on a CPU."""
    import jax

    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((one.get("peak_bytes_in_use", 0) for one in stats), default=0) or None
