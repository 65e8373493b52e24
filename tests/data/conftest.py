from __future__ import annotations

import pytest

from distiljax.data import units


@pytest.fixture
def small_units(monkeypatch):
    """Cuts even a small text into many units."""
    monkeypatch.setattr(units, "MIN_UNIT_BYTES", 2000)
