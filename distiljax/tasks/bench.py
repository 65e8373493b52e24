"""Latency, throughput and memory of models side by side, and the paper's table 3 beside them."""

from __future__ import annotations

import dataclasses
import logging
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from distiljax.errors import UserError
from distiljax.hub import Model
from distiljax.hub.pretrained import head_kind
from distiljax.report import human_times, markdown_table
from distiljax.tasks.precision import check_precisions, in_precision
from distiljax.tasks.speed import SECONDS, compile_forward, in_turn
from distiljax.train import storage
from distiljax.train.format import human_bytes, human_count, human_number, human_percent
from distiljax.train.load import from_pretrained
from distiljax.train.memory import device_peak_memory, peak_memory
from distiljax.train.run import machine, write_json

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger(__name__)

Bench = Mapping[str, Any]
"""What `bench` gives."""

JSON, MARKDOWN = "bench.json", "bench.md"

# Sanh et al. 2019, table 3: parameters, and seconds of a pass over the development set of STS-B on a CPU, batch size 1.
PAPER = {
    "ELMo (paper)": (180e6, 895.0),
    "BERT-base (paper)": (110e6, 668.0),
    "DistilBERT (paper)": (66e6, 410.0),
}
PAPER_REFERENCE = "BERT-base (paper)"
STSB_PAIRS = 1500


# --- the figures ---


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model in one dtype, its parameters on the device."""

    model: str
    dtype: str
    module: Model
    params: Any


def bench(
    models: Mapping[str, str | os.PathLike[str]],
    *,
    lengths: Sequence[int] = (32, 128, 512),
    batch_sizes: Sequence[int] = (1, 32),
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    seconds: float = SECONDS,
) -> dict[str, Any]:
    """Measure models on full rows of random tokens; the first one, in the first dtype, is the reference.

    At each batch size and length all models, in all dtypes, take turns (`speed.in_turn`). What of a model is run says
    `speed.compile_forward`.

    Args:
      models: name → run directory, Hugging Face directory or hub name; with any head or none.
      lengths: tokens in a row.
      batch_sizes: rows at once.
      dtypes: "float32", "bfloat16" or "int8" (kernels in int8, see `nn.int8`).
      seconds: how long each is measured, on average, in 3 to 50 rounds.

    Returns:
      `{"machine", "seconds", "process_bytes", "device_bytes", "models": [{"name", "path", "head", "parameters",
      "bytes": {dtype: …}}], "figures": [{"batch_size", "seq_len", "model", "dtype", "rounds",
      "latency_ms": {"median", "min", "max"}, "tokens_per_second": {…}, "speed_ratio", "program_bytes"}]}`.
      `bytes` is the size of the parameters;
      `program_bytes` what a compiled program holds when it runs, its parameters, inputs, temporaries and outputs
      (XLA's buffer assignment); `process_bytes` the highest resident memory of this process, with all models in it,
      and `device_bytes` the most that an accelerator held, None without one.

    Raises:
      UserError: a model that cannot be loaded, a length over its positions, or a bad setting.
    """
    _check(models, {"lengths": lengths, "batch_sizes": batch_sizes}, dtypes)
    described, variants = [], []
    for name, path in models.items():
        module, params = _load(path)
        if max(lengths) > module.config.max_positions:
            raise UserError(
                f"lengths has {max(lengths)}; {path} has {module.config.max_positions} positions, expected no more"
            )
        own = [_variant(name, dtype, module, params) for dtype in dtypes]
        variants += own
        described.append(
            {
                "name": name,
                "path": str(path),
                "head": head_kind(module),
                "parameters": sum(array.size for array in jax.tree.leaves(params)),
                "bytes": {variant.dtype: _bytes(variant.params) for variant in own},
            }
        )
    figures = []
    for rows in batch_sizes:
        for seq_len in lengths:
            log.info("%s", f"{rows} × {seq_len} tokens, {len(variants)} in turn")
            figures += _measure(variants, rows, seq_len, seconds)
    return {
        "machine": machine(),
        "seconds": seconds,
        "models": described,
        "figures": figures,
        "process_bytes": peak_memory(),
        "device_bytes": device_peak_memory(),
    }


def _check(models: Mapping[str, Any], numbers: Mapping[str, Sequence[int]], dtypes: Sequence[str]) -> None:
    if not models:
        raise UserError("no model to measure; give at least one")
    for name, values in numbers.items():
        if not values or min(values) < 1 or len(set(values)) != len(values):
            given = ",".join(map(str, values)) or "empty"
            raise UserError(f"{name} is {given}; expected whole numbers of 1 or more, each once")
    check_precisions(dtypes)


def _load(path: str | os.PathLike[str]) -> tuple[Model, Any]:
    """The model with the head that it has."""
    try:
        return from_pretrained(path, head="any")
    except UserError as error:
        try:
            model = from_pretrained(path, head=None)
        except UserError:
            raise error from None
        log.info("%s; its encoder is measured", error)
        return model


def _variant(name: str, dtype: str, module: Model, params: Any) -> Variant:
    module, params = in_precision(module, params, dtype)
    return Variant(name, dtype, module, jax.device_put(params))


def _bytes(params: Any) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(params))


def _measure(variants: Sequence[Variant], rows: int, seq_len: int, seconds: float) -> list[dict[str, Any]]:
    compiled = [compile_forward(v.module, v.params, rows, seq_len) for v in variants]
    times = in_turn([call for call, _ in compiled], seconds)
    reference = statistics.median(times[0])
    return [
        {
            "batch_size": rows,
            "seq_len": seq_len,
            "model": variant.model,
            "dtype": variant.dtype,
            "rounds": len(taken),
            "latency_ms": _spread([1000 * one for one in taken]),
            "tokens_per_second": _spread([rows * seq_len / one for one in taken]),
            "speed_ratio": reference / statistics.median(taken),
            "program_bytes": _program_bytes(program),
        }
        for variant, (_, program), taken in zip(variants, compiled, times, strict=True)
    ]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _program_bytes(program: Any) -> int | None:
    stats = program.memory_analysis()
    if stats is None:  # not every backend says
        return None
    return stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.output_size_in_bytes


# --- tables ---


def _model_cells(result: Bench) -> tuple[list[str], list[list[str]]]:
    dtypes = list(result["models"][0]["bytes"])
    columns = ["Model", "Head", "Parameters", *(f"Size, {dtype}" for dtype in dtypes)]
    return columns, [
        [
            model["name"],
            (model["head"] or "none").replace("_", " "),
            human_count(model["parameters"]),
            *(human_bytes(model["bytes"][dtype]) for dtype in dtypes),
        ]
        for model in result["models"]
    ]


def _figure_cells(result: Bench, rows: int) -> tuple[list[str], list[list[str]]]:
    """The table of a batch size: latency of one row, throughput of several."""
    one = rows == 1
    columns = ["Tokens", "Model", "dtype", "Latency, ms" if one else "Tokens/s", "Range", "Speed", "Memory"]
    cells, before = [], None
    for figure in (figure for figure in result["figures"] if figure["batch_size"] == rows):
        value = figure["latency_ms"] if one else figure["tokens_per_second"]
        human: Callable[[float], str] = human_number if one else human_count
        length = figure["seq_len"]
        cells.append(
            [
                str(length) if length != before else "",
                figure["model"],
                figure["dtype"],
                human(value["median"]),
                f"{human(value['min'])}–{human(value['max'])}",
                human_times(figure["speed_ratio"]),
                human_bytes(figure["program_bytes"]),
            ]
        )
        before = length
    return columns, cells


def paper_cells(result: Bench) -> tuple[list[str], list[list[str]]] | None:
    """The paper's table 3 with what was measured below; None where no row was run alone."""
    alone = [figure for figure in result["figures"] if figure["batch_size"] == 1]
    if not alone:
        return None
    shortest = min(figure["seq_len"] for figure in alone)
    measured = [figure for figure in alone if figure["seq_len"] == shortest]
    parameters = {model["name"]: model["parameters"] for model in result["models"]}

    def row(name: str, count: float, seconds: float, reference: float) -> list[str]:
        return [name, human_count(count), human_number(seconds), human_percent(seconds / reference)]

    paper = [row(name, *values, PAPER[PAPER_REFERENCE][1]) for name, values in PAPER.items()]
    seconds = [STSB_PAIRS * figure["latency_ms"]["median"] / 1000 for figure in measured]
    ours = [
        row(f"{figure['model']}, {figure['dtype']}", parameters[figure["model"]], taken, seconds[0])
        for figure, taken in zip(measured, seconds, strict=True)
    ]
    return ["Model", "Parameters", "Seconds", "Share of time"], [*paper, *ours]


def _sections(result: Bench) -> Iterator[tuple[str, tuple[list[str], list[list[str]]], str]]:
    """Each table with its title and a note."""
    yield "Models", _model_cells(result), _model_note(result)
    for rows in dict.fromkeys(figure["batch_size"] for figure in result["figures"]):
        title = "One row at a time" if rows == 1 else f"{rows} rows at once"
        yield title, _figure_cells(result, rows), ""
    if paper := paper_cells(result):
        yield "Beside the paper's table 3", paper, _paper_note(result)


def _first(result: Bench) -> str:
    return f"{result['figures'][0]['model']} in {result['figures'][0]['dtype']}"


def _model_note(result: Bench) -> str:
    headless = [model["name"] for model in result["models"] if model["head"] in (None, "masked_lm")]
    held = {"the process": result["process_bytes"], "the device": result["device_bytes"]}
    most = " and ".join(f"{who} took {human_bytes(size)}" for who, size in held.items() if size)
    text = f"Of {' and '.join(headless)} the encoder is run, as tasks run it. " if headless else ""
    return text + (
        "Full rows of random tokens; medians and ranges of rounds in which all take turns. "
        f"Speed: times that of {_first(result)}. Memory: parameters, inputs, temporaries and outputs of the compiled "
        f"program; with all models {most} at most. "
        f"Machine: {result['machine']}."
    )


def _paper_note(result: Bench) -> str:
    lengths = [figure["seq_len"] for figure in result["figures"] if figure["batch_size"] == 1]
    return (
        "Paper (Sanh et al. 2019): a pass over the development set of STS-B on a CPU, batch size 1. Here: "
        f"{STSB_PAIRS:,} (the pairs in it) times the latency of a row of {min(lengths)} tokens. Share of the time of "
        f"{PAPER_REFERENCE.removesuffix(' (paper)')}, and of {_first(result)}."
    )


def print_bench(result: Bench, console: Console | None = None) -> None:
    """Prints the tables with rich, on standard output unless `console` is given."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console(highlight=False, markup=False, emoji=False)
    for title, (columns, rows), note in _sections(result):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for column in columns:
            name = column == "Model"
            table.add_column(
                column.replace("Parameters", "Params").replace(", ", ",\n").replace("Share of", "Share of\n"),
                justify="left" if name or column in ("Head", "dtype") else "right",
                vertical="bottom",
                no_wrap=not name,
                overflow="fold",
            )
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(Text(title, "bold"))
        console.print(table)
        if note:
            console.print(f"{note}\n")


def bench_markdown(result: Bench) -> str:
    """The tables as Markdown."""
    parts = ["# Speed and memory"]
    for title, cells, note in _sections(result):
        parts += [f"## {title}", markdown_table(*cells), *([note] if note else [])]
    return "\n\n".join(parts) + "\n"


def write_bench(result: Bench, out_dir: str | os.PathLike[str]) -> Path:
    """Writes bench.json and bench.md to `out_dir`, also a remote one; gives bench.md's path.

    Raises:
      UserError: `out_dir` cannot be written.
    """
    try:
        with storage.writing(out_dir) as directory:
            write_json(directory / JSON, result)
            storage.write_text(directory / MARKDOWN, bench_markdown(result))
    except OSError as error:
        raise UserError(
            f"cannot write to {out_dir}: {error.strerror or error}; give another folder"
        ) from error
    return storage.as_path(out_dir) / MARKDOWN
