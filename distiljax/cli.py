"""The command line: `distiljax COMMAND [--config=FILE] [--flag=VALUE …]`. Argument parsing only."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from absl import flags

from distiljax.errors import Stopped, UserError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

Flags = flags.FlagValues

DOCUMENTATION = """\
Distil a BERT-family teacher into a student of half its depth (DistilBERT, Sanh et al. 2019).

usage: distiljax COMMAND [--config=FILE] [--config.KEY=VALUE …] [--flag=VALUE …]

commands:
{commands}

`distiljax COMMAND --help` explains a command, its flags and its config keys.
Exit status: 0 done (or told to stop, state saved), 2 bad input (one line says what).
"""


@dataclasses.dataclass(frozen=True)
class Command:
    """One command: what it is for, an example, its flags, what it runs, the function that gives its config."""

    summary: str
    example: str
    define: Callable[[Flags], None]
    run: Callable[[Flags, list[str]], int]
    config: str | None = None
    arguments: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(argv)
    except UserError as error:
        print(f"distiljax: error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"distiljax: {stopped}", file=sys.stderr)
        return 0 if stopped.number == signal.SIGTERM else 130
    except BrokenPipeError:
        # The reader has left (`| head`); nothing more can be said, and Python must not try at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("distiljax: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        # A full disk or a path that cannot be written is no defect, whichever library says so.
        if not isinstance(error, OSError) and os.strerror(errno.ENOSPC) not in str(error):
            raise
        line = _one_line(error)[:300]
        print(f"distiljax: error: {line}; mend that, and the same command goes on", file=sys.stderr)
        return 2


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
    return command.run(parsed, rest)


def _parse(name: str, command: Command, arguments: list[str]) -> tuple[Flags, list[str]]:
    values = Flags()
    command.define(values)
    if command.config is not None:
        arguments = _define_config(name, _config_function(command.config), values, arguments)
    try:
        rest = values([f"distiljax {name}", *arguments])[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{_one_line(error)}; see `distiljax {name} --help`") from None
    if rest and not command.arguments:
        raise UserError(f"unexpected argument {rest[0]!r}; see `distiljax {name} --help`")
    return values, rest


def _define_config(
    name: str, default: Callable[[], ConfigDict], values: Flags, arguments: list[str]
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
    known = set(_keys(default()))
    for key in _keys(config):
        if key not in known:
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
            and override[1] not in known
            and not any(key.startswith(override[1] + ".") for key in known)
        ):
            raise UserError(
                f"unknown config key {override[1]!r}{_suggestion(override[1], known)}; see `distiljax {name} --help`"
            )
    try:
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, sys_argv=[f"distiljax {name}", *arguments]
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
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
        value = config.get_ref(key).get() if isinstance(config, ConfigDict) else config[key]
        if isinstance(value, ConfigDict):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _help(command: Command) -> str:
    import inspect

    values = Flags()
    command.define(values)
    lines = [command.summary, "", "example:", *(f"  {line}" for line in command.example.splitlines())]
    defined = [values[flag] for flag in values]
    if defined:
        lines += ["", "flags:"]
        for flag in defined:
            default = "" if flag.default in (None, "", [], False) else f" (default {flag.default})"
            lines.append(f"  --{flag.name:<12} {flag.help}{default}")
    if command.config is not None:
        lines += ["", "config: a Python file with get_config(), each key also as --config.KEY=VALUE.", ""]
        from distiljax.data.config import default_data_config
        from distiljax.distill.config import shared_config

        function = _config_function(command.config)
        for described in (function, shared_config):
            lines += (inspect.getdoc(described) or "").splitlines()[2:]
        lines += ["", "keys of data:", "", *(inspect.getdoc(default_data_config) or "").splitlines()[2:]]
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


def set_up_logging() -> None:
    """Send the log of the package to standard error, one short line a record."""
    # transformers says at import that it has found no PyTorch; none is needed.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logger = logging.getLogger("distiljax")
    if not logger.handlers:
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO)


# The commands. Each imports what it needs only when it runs.


def _workdir(values: Flags) -> None:
    flags.DEFINE_string("workdir", None, "the run directory; made if it is not there", flag_values=values)


def _needed(values: Flags, *names: str) -> list[Any]:
    for name in names:
        if values[name].value in (None, "", []):
            raise UserError(f"--{name} is missing: {_one_line(values[name].help)}")
    return [values[name].value for name in names]


def _config_function(name: str) -> Callable[[], ConfigDict]:
    from distiljax.distill import config

    return getattr(config, name)


def _train(kind: str) -> Callable[[Flags, list[str]], int]:
    def run(values: Flags, rest: list[str]) -> int:
        del rest
        (workdir,) = _needed(values, "workdir")
        import distiljax

        result = (distiljax.distill if kind == "distill" else distiljax.pretrain)(values.config, workdir)
        step = result.facts["steps"]
        if not result.finished:
            print(
                f"stopped at step {step}, saved in {workdir}; the same command goes on from there",
                file=sys.stderr,
            )
            return 0
        best = result.facts["best"] or result.facts["validation"]
        figures = f"loss {best['loss']:.4f}, masked-LM accuracy {100 * best['mlm_accuracy']:.1f} %"
        print(f"finished at step {step}; best on held-out text at step {best['step']}: {figures}; {workdir}")
        return 0

    return run


def _define_evaluate(values: Flags) -> None:
    flags.DEFINE_string(
        "workdir",
        None,
        "a run: its teacher, its student now and before, on its own held-out rows",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "model", [], "NAME=PATH of a model, repeated; the first is the reference", flag_values=values
    )
    flags.DEFINE_string(
        "data",
        None,
        "with --model: a directory of prepared rows, such as WORKDIR/data/validation of a run",
        flag_values=values,
    )
    flags.DEFINE_integer("rows", 0, "how many rows; 0 = all", flag_values=values)
    flags.DEFINE_string("dtype", "float32", "compute dtype: float32 or bfloat16", flag_values=values)
    flags.DEFINE_string("out", None, "also write the result as JSON to this file", flag_values=values)
    flags.DEFINE_bool("json", False, "print JSON in place of the table", flag_values=values)


def _evaluate(values: Flags, rest: list[str]) -> int:
    del rest
    if bool(values.workdir) == bool(values.model):
        raise UserError("give either --workdir=RUN or --model=NAME=PATH … with --data=DIR")
    from pathlib import Path

    import distiljax
    from distiljax.report import print_retention_table
    from distiljax.train.run import write_json

    if values.workdir:
        evaluation = distiljax.evaluate_run(values.workdir, rows=values.rows, dtype=values.dtype)
    else:
        (data,) = _needed(values, "data")
        models = {}
        for spec in values.model:
            name, equals, path = spec.partition("=")
            if name in models or not name or (equals and not path):
                raise UserError(f"--model={spec}; expected NAME=PATH, each name once")
            models[name] = path if equals else spec
        evaluation = distiljax.evaluate_models(models, data, rows=values.rows, dtype=values.dtype)
    if values.out:
        write_json(Path(values.out), evaluation)
    if values.json:
        print(json.dumps(evaluation, indent=2))
    else:
        print_retention_table(evaluation)
    return 0


def _define_predict(values: Flags) -> None:
    flags.DEFINE_string(
        "model", None, "a run directory, a Hugging Face directory or a hub name", flag_values=values
    )
    flags.DEFINE_string("file", None, "read texts from this file, one a line", flag_values=values)
    flags.DEFINE_integer("top_k", 5, "how many words for each [MASK]", flag_values=values)
    flags.DEFINE_integer("batch_size", 16, "texts at once", flag_values=values)
    flags.DEFINE_bool("json", False, "one JSON object a text", flag_values=values)


def _predict(values: Flags, rest: list[str]) -> int:
    (model,) = _needed(values, "model")
    texts = _texts(values.file, rest)
    import distiljax

    module, params = distiljax.from_pretrained(model)
    tokenizer = distiljax.load_tokenizer(model)
    for result in distiljax.fill_mask(
        module, params, tokenizer, texts, top_k=values.top_k, batch_size=values.batch_size
    ):
        if values.json:
            print(json.dumps(result, ensure_ascii=False), flush=True)
            continue
        print(result["text"])
        for number, choices in enumerate(result["masks"], 1):
            if len(result["masks"]) > 1:
                print(f"  [MASK] {number}")
            for choice in choices:
                print(f"  {choice['score']:7.4f}  {choice['token']:<16} {choice['filled']}", flush=True)
    return 0


def _texts(file: str | None, arguments: list[str]) -> Iterator[str]:
    if file and arguments:
        raise UserError("give texts either as arguments or with --file")
    if arguments:
        return iter(arguments)
    if not file and sys.stdin.isatty():
        raise UserError("no text; give it as an argument, with --file, or on standard input")

    def lines() -> Iterator[str]:
        try:
            with open(file, encoding="utf-8") if file else contextlib.nullcontext(sys.stdin) as source:
                for line in source:
                    if line.strip():
                        yield line.rstrip("\n")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file or 'standard input'} is not UTF-8 ({error.reason}); convert it first"
            ) from error
        except OSError as error:
            raise UserError(
                f"--file {file} cannot be read ({error.strerror}); give a text file, one text a line"
            ) from error

    return lines()


def _define_export(values: Flags) -> None:
    flags.DEFINE_string("workdir", None, "the run directory of a pretrain or distill run", flag_values=values)
    flags.DEFINE_string("out", None, "the Hugging Face directory to write", flag_values=values)
    flags.DEFINE_string("checkpoint", "best", "best (lowest held-out loss) or last", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "replace what stands at --out", flag_values=values)


def _export(values: Flags, rest: list[str]) -> int:
    del rest
    workdir, out = _needed(values, "workdir", "out")
    import distiljax

    path = distiljax.export(workdir, out, checkpoint=values.checkpoint, overwrite=values.overwrite)
    print(f'wrote {path}; in Python: transformers.AutoModelForMaskedLM.from_pretrained("{path}")')
    return 0


def _define_report(values: Flags) -> None:
    flags.DEFINE_multi_string(
        "workdir", [], "a run directory; repeat it for several runs", flag_values=values
    )
    flags.DEFINE_string(
        "out", None, "where report.md and plots/ go; the last run directory by default", flag_values=values
    )


def _report(values: Flags, rest: list[str]) -> int:
    del rest
    (workdirs,) = _needed(values, "workdir")
    import distiljax

    print(f"wrote {distiljax.write_report(workdirs, values.out or workdirs[-1])}")
    return 0


COMMANDS = {
    "pretrain": Command(
        "Train or adapt a masked language model, such as a teacher for your own text.",
        "distiljax pretrain --config.model=bert-base-uncased --config.data.source='notes/*.txt' --workdir=runs/teacher",
        _workdir,
        _train("pretrain"),
        "pretrain_config",
    ),
    "distill": Command(
        "Distil a teacher into a student of half its depth; the same command resumes a run.",
        "distiljax distill --config=configs/distilbert_base.py --workdir=runs/distilbert",
        _workdir,
        _train("distill"),
        "distill_config",
    ),
    "evaluate": Command(
        "Masked-LM accuracy, size and speed of models side by side.",
        "distiljax evaluate --workdir=runs/distilbert\n"
        "distiljax evaluate --model=teacher=bert-base-uncased --model=student=out/student --data=DIR_OF_ROWS",
        _define_evaluate,
        _evaluate,
    ),
    "predict": Command(
        "The likeliest words for every [MASK].",
        "distiljax predict --model=runs/distilbert 'Paris is the [MASK] of France.'",
        _define_predict,
        _predict,
        arguments=True,
    ),
    "export": Command(
        "Write a run's model as a Hugging Face directory.",
        "distiljax export --workdir=runs/distilbert --out=out/distilbert",
        _define_export,
        _export,
    ),
    "report": Command(
        "Write report.md with tables and plots of one or more runs.",
        "distiljax report --workdir=runs/distilbert",
        _define_report,
        _report,
    ),
}
