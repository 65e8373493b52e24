"""Programs compiled in haste, for tests that would compile for most of their time."""

import contextlib

import jax


@contextlib.contextmanager
def in_haste():
    """While it lasts, programs are compiled with few optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
