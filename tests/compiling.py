"""Programs compiled in haste, for tests that would compile for most of their time."""

import contextlib

import jax
import pytest

OPTION = "jax_disable_most_optimizations"


@contextlib.contextmanager
def in_haste():
    """While it lasts, programs are compiled with few optimisations, in processes that are started, too."""
    before = jax.config.read(OPTION)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(OPTION.upper(), "1")
        jax.config.update(OPTION, True)
        try:
            yield
        finally:
            jax.config.update(OPTION, before)
