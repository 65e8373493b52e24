"""The command line: `distiljax COMMAND [--config=FILE] [--flag=VALUE …]`. Argument parsing only."""

from __future__ import annotations

import difflib
import errno
import functools
import importlib
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from absl import flags

from distiljax.commands import COMMANDS, Command
from distiljax.errors import Failed, Stopped, UserError
from distiljax.programs import keep_programs

if TYPE_CHECKING:
    from ml_collections import ConfigDict

Flags = flags.FlagValues

DOCUMENTATION = """\
Distil a BERT-family teacher into a student of half its depth (DistilBERT, Sanh et al. 2019).

usage: distiljax COMMAND [--config=FILE] [--config.KEY=VALUE …] [--flag=VALUE …]

commands:
{commands}

`distiljax COMMAND --help` explains a command, its flags and its config keys.
Exit status: 0 done (or told to stop, state saved), 1 failed (a lost process, a loss that is not finite), 2 bad input.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _dispatch(argv)
    except (Exception, KeyboardInterrupt) as error:
        ended, line = _explain(error)
        if (processes := _processes()) is not None:
            # A process that was lost shows in the others as whatever the network library calls it.
            if ended is None and processes.may_be_a_loss(error):
                processes.await_verdict()
            if line and not processes.said_by_first(line):
                print(line, file=sys.stderr)
            if ended is None:
                traceback.print_exception(error)
            processes.end(1 if ended is None else ended, line)
        if ended is None:
            raise
        if line:
            print(line, file=sys.stderr)
        return ended
    if (processes := _processes()) is not None:
        processes.end(status, together=True)
    return status


def _explain(error: BaseException) -> tuple[int | None, str]:
    """The exit status and the line that an error ends with; no status for a defect, which is worth a traceback."""
    if isinstance(error, UserError):
        return 2, f"distiljax: error: {_one_line(error)}"
    if isinstance(error, Failed):
        return 1, f"distiljax: failed: {error}"
    if isinstance(error, Stopped):
        return (0 if error.number == signal.SIGTERM else 130), f"distiljax: {error}"
    if isinstance(error, BrokenPipeError):
        # The reader has left (`| head`); nothing more can be said, and Python must not try at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0, ""
    if isinstance(error, KeyboardInterrupt):
        return 130, "distiljax: interrupted"
    # A full disk or a path that cannot be written is no defect, whichever library says so.
    if isinstance(error, OSError) or os.strerror(errno.ENOSPC) in str(error):
        return 2, f"distiljax: error: {_one_line(error)[:300]}; mend that, and the same command goes on"
    return None, f"distiljax: {type(error).__name__}: {_one_line(error)[:300]}"


def _processes() -> Any:
    """The module that knows the other processes of the run, or None where this one is alone."""
    module = sys.modules.get("distiljax.train.distributed")
    return module if module is not None and module.joined() else None


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        lines = (f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
        print(DOCUMENTATION.format(commands="\n".join(lines)), end="")
        return 0
    if argv[0] == "--version":
        from distiljax.version import __version__

        print(__version__)
        return 0
    name, arguments = argv[0], argv[1:]
    if name not in COMMANDS:
        raise UserError(
            f"unknown command {name!r}{_suggestion(name, COMMANDS)}; `distiljax --help` lists the commands"
        )
    command = COMMANDS[name]
    if any(a in ("-h", "--help", "-help", "--helpfull") for a in arguments):
        print(_help(command), end="")
        return 0
    parsed, rest = _parse(name, command, arguments)
    set_up_logging()
    keep_programs()
    if command.processes:
        _join(parsed)
    return command.run(parsed, rest)


def _define_processes(values: Flags) -> None:
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "HOST:PORT of process 0; not needed on Cloud TPU, Slurm, Kubernetes, Open MPI",
        flag_values=values,
    )
    flags.DEFINE_integer("num_processes", None, "processes of the run; 1 = only this one", flag_values=values)
    flags.DEFINE_integer("process_id", None, "this process, from 0", flag_values=values)
    flags.DEFINE_float(
        "lost_after", 60.0, "seconds of silence after which a process counts as lost", flag_values=values
    )
    flags.DEFINE_float(
        "join_within", 300.0, "seconds that all processes have to find one another", flag_values=values
    )


def _join(values: Flags) -> None:
    """Find the other processes of the run, before any device is touched."""
    from distiljax.train import distributed

    distributed.start(
        values.coordinator_address,
        values.num_processes,
        values.process_id,
        values.lost_after,
        values.join_within,
    )
    if distributed.joined() and not distributed.first():
        # One process speaks for all, unless something is wrong.
        logger = logging.getLogger("distiljax")
        logger.setLevel(logging.WARNING)
        for handler in logger.handlers:
            handler.setFormatter(
                logging.Formatter(f"%(asctime)s [{distributed.name()}] %(message)s", "%H:%M:%S")
            )


def _parse(name: str, command: Command, arguments: list[str]) -> tuple[Flags, list[str]]:
    values = Flags()
    command.define(values)
    if command.processes:
        _define_processes(values)
    if command.config is not None:
        part = _config_function(command.config_part) if command.config_part else None
        arguments = _define_config(name, _config_function(command.config), part, values, arguments)
    try:
        rest = values([f"distiljax {name}", *arguments])[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{_one_line(error)}; see `distiljax {name} --help`") from None
    if rest and not command.arguments:
        raise UserError(f"unexpected argument {rest[0]!r}; see `distiljax {name} --help`")
    return values, rest


def _define_config(
    name: str,
    default: Callable[[], ConfigDict],
    part: Callable[[ConfigDict], ConfigDict] | None,
    values: Flags,
    arguments: list[str],
) -> list[str]:
    """Load --config, define --config.KEY for each of its keys, and give the arguments that are left to parse.

    Raises:
      UserError: no such file, or a key that the command does not know or the file lacks.
    """
    from ml_collections import ConfigDict, config_flags

    path, arguments = _take_config(arguments)
    config = default() if path is None else _load_config(path)
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"config {path}: get_config() gave a {type(config).__name__}; expected an ml_collections.ConfigDict"
        )
    if part is not None and path is not None:
        config = part(config)
    known, open_ = set(_keys(default())), tuple(_open_keys(default()))
    for key in _keys(config):
        if key not in known and not key.startswith(open_):
            raise UserError(
                f"config {path} sets {key!r}, which `distiljax {name}` does not know{_suggestion(key, known)}; "
                "remove it, or check the spelling"
            )
    for missing in sorted(known - set(_keys(config))):
        raise UserError(f"config {path} lacks {missing!r}; start it from distiljax.{default.__name__}()")
    for argument in arguments:
        override = re.match(r"--?config\.([^=]+)", argument)
        if (
            override
            and override[1] not in known | set(_keys(config))
            and not any(key.startswith(override[1] + ".") for key in known)
        ):
            raise UserError(
                f"unknown config key {override[1]!r}{_suggestion(override[1], known)}; see `distiljax {name} --help`"
            )
    try:
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, sys_argv=[f"distiljax {name}", *arguments]
        )
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"config {path or ''}: {_one_line(error)}; see `distiljax {name} --help`") from error
    return arguments


def _take_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value of --config (the last one counts), and the other arguments."""
    path, rest = None, []
    remaining = iter(arguments)
    for argument in remaining:
        match = re.fullmatch(r"--?config(?:=(.*))?", argument, re.S)
        if match is None:
            rest.append(argument)
            continue
        path = match[1] if match[1] is not None else next(remaining, "")
    return path, rest


def _load_config(path: str) -> Any:
    import runpy

    file, _, argument = path.partition(":")
    if not os.path.isfile(file):
        raise UserError(
            f"config file {file!r} does not exist; give a Python file with a get_config() function"
        )
    try:
        namespace = runpy.run_path(file)
        if "get_config" not in namespace:
            raise UserError(
                f"config file {file} has no get_config() function; add one that returns a ConfigDict"
            )
        return namespace["get_config"](*([argument] if argument else []))
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"config file {path} fails with {type(error).__name__}: {_one_line(error)}"
        ) from error


def _keys(config: Any, prefix: str = "") -> Iterator[str]:
    from ml_collections import ConfigDict

    for key in config:
        value = config[key]
        if isinstance(value, ConfigDict):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _open_keys(config: Any, prefix: str = "") -> Iterator[str]:
    """The parts that are empty by default, which a config file fills as it likes: `overrides.`."""
    from ml_collections import ConfigDict

    for key in config:
        if isinstance(config[key], ConfigDict):
            yield from _open_keys(config[key], f"{prefix}{key}.") if len(config[key]) else [f"{prefix}{key}."]


def _help(command: Command) -> str:
    import inspect

    values = Flags()
    command.define(values)
    if command.processes:
        _define_processes(values)
    lines = [command.summary, "", "example:", *(f"  {line}" for line in command.example.splitlines())]
    if command.arguments:
        lines += ["", "arguments:", f"  {command.arguments}"]
    defined = [values[flag] for flag in values]
    if defined:
        lines += ["", "flags:"]
        for flag in defined:
            default = "" if flag.default in (None, "", [], False) else f" (default {flag.default})"
            text = flag.help.partition(";\n")[0]  # absl's own words on repeated flags
            lines.append(f"  --{flag.name:<12} {text}{default}")
    if command.config is not None:
        lines += ["", "config: a Python file with get_config(), each key also as --config.KEY=VALUE.", ""]
        function = _config_function(command.config)
        for name, heading in {command.config: (), **command.config_help}.items():
            described = inspect.getdoc(_config_function(name)) or ""
            lines += [*heading, *described.splitlines()[2:]]
        lines += ["", "defaults:", *(f"  {line}" for line in str(function()).strip().splitlines())]
    return "\n".join(lines) + "\n"


def _suggestion(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever sys.stderr is at the time, so that lines stand above a live progress bar."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def _ignore_closed_loops(otherwise: Callable[[Any], Any], unraisable: Any) -> None:
    """After a save that fails, Orbax's writers still report to the event loop that it has given up."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        otherwise(unraisable)


def set_up_logging() -> None:
    """Send the log of the package to standard error, one short line a record."""
    # transformers says at import that it has found no PyTorch; none is needed.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # Orbax logs the traceback of a save that fails, which train/checkpoint.py warns of in one line.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logger = logging.getLogger("distiljax")
    if not logger.handlers:
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
        sys.unraisablehook = functools.partial(_ignore_closed_loops, sys.unraisablehook)
    logger.setLevel(logging.INFO)


def _config_function(name: str) -> Any:
    module, _, function = name.rpartition(".")
    return getattr(importlib.import_module(f"distiljax.{module}"), function)
