"""Compiled programs, kept on the disk: a command that is run again, or with another seed, compiles nothing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_BYTES = 8 << 30  # what was not used for longest goes first


def keep_programs() -> None:
    """Let JAX keep what it compiles in $DISTILJAX_CACHE or ~/.cache/distiljax; to be called before anything is.

    JAX_COMPILATION_CACHE_DIR names another place, and JAX_ENABLE_COMPILATION_CACHE=0 turns it off.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    cache = os.environ.get("DISTILJAX_CACHE") or os.path.expanduser("~/.cache/distiljax")
    # Programs for CPUs use what this very CPU can do, and home directories are shared.
    kind = hashlib.sha256(f"{platform.machine()} {_features()}".encode()).hexdigest()[:12]
    place = os.path.join(os.path.abspath(cache), "programs", kind)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = place  # JAX looks when it is imported
    limit = int(os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(MAX_BYTES)))
    if "jax" in sys.modules:
        config = sys.modules["jax"].config
        config.update("jax_compilation_cache_dir", place)
        config.update("jax_compilation_cache_max_size", limit)


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """What is compiled inside is neither kept nor looked for: a program for a machine that is not here.

    JAX cannot load such a program from its cache, and fails where it finds one.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    config: Any = jax.config

    def enable(value: bool) -> None:
        config.update("jax_enable_compilation_cache", value)
        compilation_cache.reset_cache()  # whether it is used is looked up but once

    before = config.jax_enable_compilation_cache
    enable(False)
    try:
        yield
    finally:
        enable(before)


def _features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
