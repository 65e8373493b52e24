"""Inference by distiljax and by transformers in PyTorch: the same models and tokens, in turn on one machine.

    python scripts/benchmark_inference.py [--teacher=DIR] [--student=DIR] [--lengths=32,128,512] [--batch_sizes=1,32]
        [--dtypes=float32,bfloat16] [--seconds=3] [--no-compile]
    python scripts/benchmark_inference.py --quick

Without --teacher a BERT of base size with random weights, and without --student its student of half the depth: what
the weights say does not change the speed. Both sides run the encoder from the same directory over full rows of random
tokens: distiljax with an attention mask, PyTorch with scaled-dot-product attention and without a mask, as it is and
by torch.compile, of which the faster one counts. What is compiled is for one size, on a CPU with frozen parameters,
on a GPU as CUDA graphs ("reduce-overhead"); the kernels of "max-autotune" are not tried, as timing them takes long.
First the hidden states of both are compared. Then, at each batch size and length, all models, dtypes and sides take
turns in one process, on all its cores: medians and ranges of the rounds. Each call begins after a rest of 20 ms, so
that the threads of the other library have gone to sleep. The share of the machine's matrix-product rate is that of
the models' matrix products at the faster side's rate for 2,048 × 2,048 matrices. Memory is that of processes of their
own, which load a model and run it at the last size. --quick does small sizes, without torch.compile and memory, in
two minutes on 2 cores.

Prints Markdown for BENCHMARKS.md; needs PyTorch, and a C++ compiler for torch.compile.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both sides share an accelerator

import jax
import numpy as np

import distiljax
from distiljax.errors import UserError
from distiljax.nn.linear import einsum, place_compute_params
from distiljax.plan.analytic import encoder_flops
from distiljax.report import markdown_table
from distiljax.tasks.speed import compile_forward, in_turn, random_tokens
from distiljax.train.format import human_bytes, human_count, human_number, human_percent
from distiljax.train.memory import device_peak_memory, peak_memory
from distiljax.train.run import machine

OURS, THEIRS, COMPILED = "distiljax", "PyTorch", "PyTorch, compiled"
# Mean difference of hidden states, whose variance is one.
TOLERANCES = {"float32": 1e-5, "bfloat16": 3e-2}
PAUSE = 0.02  # seconds
PREFIX = "benchmark_inference: error: "
Way = tuple[str, str, str]
"""Model, dtype and side."""


# --- the two sides ---


def make_models(args: argparse.Namespace, directory: Path) -> dict[str, str]:
    """Teacher and student as directories that both sides read."""
    if args.student and not args.teacher:
        raise UserError("--student without --teacher; give both, --teacher alone, or none")
    if args.teacher:
        teacher, params = distiljax.from_pretrained(args.teacher, init_head=True)
    else:
        teacher = distiljax.MaskedLM(distiljax.EncoderConfig())
        init = jax.jit(teacher.init)
        params = jax.device_get(init(jax.random.key(0), np.zeros((1, 4), np.int32))["params"])
    if args.student:
        student = distiljax.from_pretrained(args.student, init_head=True)
    else:
        student = distiljax.student_of(teacher, params)
    models = {"teacher": (teacher, params), "student": student}
    for name, model in models.items():
        distiljax.save_pretrained(*model, directory / name)
    return {name: str(directory / name) for name in models}


def our_model(directory: str, dtype: str) -> tuple[Any, Any]:
    """The encoder by distiljax, its parameters on the device."""
    module, params = distiljax.from_pretrained(directory, head=None, dtype=jax.numpy.dtype(dtype))
    return module, place_compute_params(params, module.dtype)


def torch_model(directory: str, dtype: str) -> Any:
    """The encoder by transformers, on the accelerator if there is one."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind = transformers.AutoConfig.from_pretrained(directory).model_type
    bare = {"add_pooling_layer": False} if kind == "bert" else {}
    model = transformers.AutoModel.from_pretrained(
        directory, attn_implementation="sdpa", dtype=getattr(torch, dtype), **bare
    )
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def torch_forward(model: Any, rows: int, seq_len: int, compiled: bool = False) -> Callable[[], Any]:
    """A forward pass in PyTorch, over the same tokens as `compile_forward`; gives the hidden states."""
    import torch

    forward: Any = model
    without_gradients: Any = torch.inference_mode
    if compiled:
        cuda = model.device.type == "cuda"
        forward = torch.compile(model, dynamic=False, mode="reduce-overhead" if cuda else None)
        # Under no_grad parameters are frozen: laid out once as the products read them.
        without_gradients, torch._inductor.config.freezing = torch.no_grad, not cuda

    ids = torch.from_numpy(random_tokens(model.config.vocab_size, rows, seq_len)).long().to(model.device)

    def call() -> Any:
        with without_gradients():
            hidden = forward(input_ids=ids)[0]
        if hidden.is_cuda:
            torch.cuda.synchronize()
        return hidden

    return call


def matrix_rates(dtypes: Sequence[str]) -> dict[str, float]:
    """FLOP/s of a large matrix product in each dtype, on the faster side."""
    import torch

    # Large enough that starting it counts for nothing.
    device, size = ("cuda", 16_384) if torch.cuda.is_available() else ("cpu", 2048)
    values = np.random.default_rng(0).standard_normal((size, size), np.float32)
    calls: list[Callable[[], Any]] = []
    for dtype in dtypes:
        ours = jax.numpy.asarray(values, dtype)
        theirs = torch.from_numpy(values).to(device, getattr(torch, dtype))
        calls.append(
            functools.partial(jax.jit(functools.partial(einsum, "ij,jk->ik", dtype=dtype)), ours, ours)
        )
        calls.append(functools.partial(_torch_product, theirs))
    best = [min(times) for times in in_turn(calls, pause=PAUSE)]
    return {
        dtype: 2 * size**3 / min(pair)
        for dtype, pair in zip(dtypes, zip(best[::2], best[1::2], strict=True), strict=True)
    }


def _torch_product(matrix: Any) -> Any:
    import torch

    product = matrix @ matrix
    if product.is_cuda:
        torch.cuda.synchronize()
    return product


# --- measurements ---


def compare_outputs(models: Mapping[str, str], dtypes: Sequence[str]) -> str:
    """A table of how far the hidden states are from PyTorch's in float32.

    Raises:
      UserError: too far for the same model.
    """
    cells = []
    for name, directory in models.items():
        expected: Any = None
        for dtype in dict.fromkeys(("float32", *dtypes)):
            module, params = our_model(directory, dtype)
            shape = 3, min(37, module.config.max_positions)
            theirs = torch_forward(torch_model(directory, dtype), *shape)().float().cpu().numpy()
            ours = np.asarray(compile_forward(module, params, *shape)[0](), np.float32)
            expected = theirs if expected is None else expected
            apart = [np.abs(hidden - expected) for hidden in (theirs, ours)]
            cells.append([name, dtype, *(f"{a.mean():.1e}, {a.max():.1e}" for a in apart)])
            if not max(a.mean() for a in apart) < TOLERANCES[dtype]:
                raise UserError(f"{name} is another model in {dtype} ({', '.join(cells[-1][2:])})")
    return markdown_table(["model", "dtype", f"{THEIRS}: mean, largest", f"{OURS}: mean, largest"], cells)


class Race:
    """All models in all dtypes on all sides, over several sizes."""

    def __init__(self, models: Mapping[str, str], dtypes: Sequence[str], compiled: bool) -> None:
        self.models, self.dtypes = models, dtypes
        self.sides = [THEIRS, *([COMPILED] if compiled else []), OURS]
        self.ours = {(m, d): our_model(path, d) for m, path in models.items() for d in dtypes}
        self.theirs = {(m, d): torch_model(path, d) for m, path in models.items() for d in dtypes}
        self.configs = {m: self.ours[m, dtypes[0]][0].config for m in models}
        self.once: dict[Way, float] = {}  # seconds of compiling, over all sizes
        self.programs: dict[tuple[str, str], Any] = {}  # the last one
        self.times: dict[tuple[int, int], dict[Way, list[float]]] = {}

    def run(self, rows: int, seq_len: int, seconds: float) -> None:
        """Measures one size."""
        if COMPILED in self.sides:
            import torch

            torch.compiler.reset()  # else the second size would be compiled for any, which is slower
        calls: dict[Way, Callable[[], Any]] = {}
        for model, dtype in self.ours:
            for side in self.sides:
                began = time.perf_counter()
                way = model, dtype, side
                calls[way] = self._call(way, rows, seq_len)
                self.once[way] = self.once.get(way, 0.0) + time.perf_counter() - began
        times = in_turn(list(calls.values()), seconds, PAUSE)
        self.times[rows, seq_len] = dict(zip(calls, times, strict=True))

    def _call(self, way: Way, rows: int, seq_len: int) -> Callable[[], Any]:
        model, dtype, side = way
        if side == OURS:
            call, self.programs[model, dtype] = compile_forward(*self.ours[model, dtype], rows, seq_len)
            return call
        if side == THEIRS:
            return torch_forward(self.theirs[model, dtype], rows, seq_len)

        call = torch_forward(self.theirs[model, dtype], rows, seq_len, compiled=True)
        call()
        return call

    def rows(self, rates: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
        """The table of times; of several dtypes also with each side in its best one."""
        columns = ["rows × tokens", "model", "dtype", *(f"{side}, ms" for side in self.sides)]
        columns += ["speed of distiljax over PyTorch (range)"]
        columns += [f"tokens/s, {side}" for side in (THEIRS, OURS)]
        columns += [f"share of matrix rate, {side}" for side in (THEIRS, OURS)]
        cells = []
        for (rows, seq_len), times in self.times.items():
            for model, config in self.configs.items():
                work = rows * seq_len * sum(encoder_flops(config, seq_len))
                best: dict[str, list[float]] = {}
                for dtype in self.dtypes:
                    by_side = {side: times[model, dtype, side] for side in self.sides}
                    for side, taken in by_side.items():
                        best[side] = min(best.get(side, taken), taken, key=statistics.median)
                    cells.append(
                        [f"{rows} × {seq_len}", model, dtype, *self._figures(by_side, rows * seq_len)]
                    )
                    for side in (THEIRS, OURS):
                        rate = work / statistics.median(_fastest(by_side, side))
                        cells[-1].append(human_percent(rate / rates[dtype]))
                if len(self.dtypes) > 1:
                    figures = self._figures(best, rows * seq_len)
                    cells.append([f"{rows} × {seq_len}", model, "each side's best", *figures, "", ""])
        return columns, cells

    def _figures(self, by_side: Mapping[str, list[float]], tokens: int) -> list[str]:
        theirs, ours = _fastest(by_side, THEIRS), by_side[OURS]
        ratios = [one / other for one, other in zip(theirs, ours, strict=True)]
        return [
            *(human_number(1000 * statistics.median(by_side[side])) for side in self.sides),
            f"{statistics.median(ratios):.2f} × ({min(ratios):.2f} to {max(ratios):.2f})",
            *(human_count(tokens / statistics.median(taken)) for taken in (theirs, ours)),
        ]

    def student_rows(self) -> tuple[list[str], list[list[str]]]:
        """The table of the student's speed over the teacher's."""
        cells = []
        for (rows, seq_len), times in self.times.items():
            for dtype in self.dtypes:
                cells.append([f"{rows} × {seq_len}", dtype])
                for side in self.sides:
                    pairs = zip(times["teacher", dtype, side], times["student", dtype, side], strict=True)
                    ratios = [teacher / student for teacher, student in pairs]
                    cells[-1].append(
                        f"{statistics.median(ratios):.2f} × ({min(ratios):.2f} to {max(ratios):.2f})"
                    )
        return ["rows × tokens", "dtype", *self.sides], cells


def _fastest(by_side: Mapping[str, list[float]], side: str) -> list[float]:
    """The times of a side; of PyTorch's, which may be two, the better ones."""
    kinds = [taken for name, taken in by_side.items() if name.partition(",")[0] == side]
    return min(kinds, key=statistics.median)


def run_alone(model: str, dtype: str, side: str, rows: int, seq_len: int) -> dict[str, float]:
    """Loads one model and runs it: most bytes that were in use, on the accelerator or else by this process."""
    if side == OURS:
        jax.block_until_ready(compile_forward(*our_model(model, dtype), rows, seq_len)[0]())
        return {"bytes": device_peak_memory() or peak_memory()}
    import torch

    torch_forward(torch_model(model, dtype), rows, seq_len)()
    return {"bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory()}


def memory_rows(race: Race, rows: int, seq_len: int) -> tuple[list[str], list[list[str]]]:
    """The table of memory, from processes of their own."""
    cells = []
    for model, dtype in race.ours:
        peaks = []
        for side in (THEIRS, OURS):
            part = json.dumps([race.models[model], dtype, side, rows, seq_len])
            command = [sys.executable, __file__, f"--part={part}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise UserError((done.stderr.strip() or "no message").splitlines()[-1])
            peaks.append(human_bytes(json.loads(done.stdout.splitlines()[-1])["bytes"]))
        stats = race.programs[model, dtype].memory_analysis()
        held = stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.output_size_in_bytes
        cells.append([model, dtype, *peaks, human_bytes(held)])
    return ["model", "dtype", f"process, {THEIRS}", f"process, {OURS}", f"program, {OURS}"], cells


# --- the program ---


def main() -> int:
    """Measures and prints the tables."""
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("--teacher", default="", help="a run, a Hugging Face directory or a hub name")
    parser.add_argument("--student", default="", help="likewise")
    parser.add_argument("--lengths", default="32,128,512", help="tokens in a row")
    parser.add_argument("--batch_sizes", default="1,32", help="rows at once")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each measurement, on average")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="PyTorch by torch.compile, too"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, no torch.compile, no memory")
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if importlib.util.find_spec("torch") is None:
        raise UserError("the other side needs PyTorch; pip install torch")
    if args.part:
        print(json.dumps(run_alone(*json.loads(args.part))))
        return 0
    if args.quick:
        args.lengths, args.batch_sizes, args.seconds, args.compile = "32,128", "1,8", 0.5, False
    try:
        lengths, batch_sizes = (
            [int(n) for n in text.split(",")] for text in (args.lengths, args.batch_sizes)
        )
    except ValueError:
        raise UserError(
            f"--lengths={args.lengths} --batch_sizes={args.batch_sizes}; expected numbers"
        ) from None
    dtypes = args.dtypes.split(",")
    if unknown := sorted({*dtypes} - {*TOLERANCES}):
        raise UserError(f"--dtypes has {unknown[0]!r}; expected {','.join(TOLERANCES)}")

    import torch
    import transformers

    print(
        f"{machine()}; {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, jax {jax.__version__}\n"
    )
    with tempfile.TemporaryDirectory(prefix="benchmark_inference-") as directory:
        models = make_models(args, Path(directory))
        print(f"Differences from PyTorch's hidden states in float32:\n\n{compare_outputs(models, dtypes)}\n")
        rates = matrix_rates(dtypes)
        print(f"Matrix products: {', '.join(f'{d} {r / 1e9:,.0f} GFLOP/s' for d, r in rates.items())}.\n")
        race = Race(models, dtypes, args.compile)
        for rows in batch_sizes:
            for seq_len in lengths:
                race.run(rows, seq_len, args.seconds)
                print(f"{rows} × {seq_len} done", file=sys.stderr)
        print(f"{markdown_table(*race.rows(rates))}\n")
        print(f"Speed of the student over the teacher:\n\n{markdown_table(*race.student_rows())}\n")
        compiling = [
            f"{model} {dtype} {human_number(seconds / len(race.times))} s"
            for (model, dtype, side), seconds in race.once.items()
            if side == OURS
        ]
        print(f"Compiling a size by distiljax: {', '.join(compiling)}.")
        if not args.quick:
            size = batch_sizes[-1], lengths[-1]
            print(f"\nPeak memory, {size[0]} × {size[1]}:\n\n{markdown_table(*memory_rows(race, *size))}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"{PREFIX}{error}", file=sys.stderr)
        sys.exit(2)
