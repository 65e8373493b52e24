"""What a command is, and what several of them share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags

from distiljax.errors import UserError

Flags = flags.FlagValues

# The functions whose docstrings explain the rest of a config, and the lines that stand above each.
SHARED_KEYS: Mapping[str, tuple[str, ...]] = {"distill.config.shared_config": ()}
DATA_KEYS: Mapping[str, tuple[str, ...]] = {"data.config.default_data_config": ("", "keys of data:", "")}


@dataclasses.dataclass(frozen=True)
class Command:
    """One command: what it is for, an example, its flags, what it runs, the function that gives its config."""

    summary: str
    example: str
    define: Callable[[Flags], None]
    run: Callable[[Flags, list[str]], int]
    config: str | None = None  # as "module.function" of the package
    config_part: str | None = None  # the function that takes the command's config out of that of a run
    config_help: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # as `SHARED_KEYS`
    processes: bool = False  # whether the same command may run on every host of a cluster, as one run
    arguments: str = ""  # what stands on the command line beside flags, for the help


def define_workdir(values: Flags) -> None:
    """The one flag of most commands that have a config."""
    flags.DEFINE_string("workdir", None, "the run directory; made if it is not there", flag_values=values)


def needed(values: Flags, *names: str) -> list[Any]:
    """The values of flags that must be given.

    Raises:
      UserError: one that is not, with what it is for.
    """
    for name in names:
        if values[name].value in (None, "", []):
            text = values[name].help.partition(";\n")[0]  # the rest is absl's own words on repeated flags
            raise UserError(f"--{name} is missing: {' '.join(text.split())}")
    return [values[name].value for name in names]
