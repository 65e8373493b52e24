"""What machine the program under trace is for, which may be one that is not here."""

from __future__ import annotations

from typing import Any

import jax


def target() -> Any:
    """A device that the program under trace is for: its mesh's, which may be of devices that are not here."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def target_platform() -> str:
    """The platform that the program under trace is for."""
    return target().platform
