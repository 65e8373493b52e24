"""The two sides of scripts/benchmark_step.py, each in a process of its own, and the rows and models that they share.

PyTorch's step is in torch_distillation.py; a process imports only what its side needs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import resource
import runpy
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from distiljax.errors import UserError
from distiljax.train.format import human_seconds
from distiljax.train.memory import device_peak_memory, peak_memory

SIDES = {"jax": "distiljax", "torch": "PyTorch"}
SIZES: dict[str, dict[str, int]] = {
    "base": {},
    "minilm": {"hidden_size": 384, "num_layers": 6, "num_heads": 12, "intermediate_size": 1536},
    "tiny": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "intermediate_size": 128},
}
ROWS_KEPT = 1024  # rows that are kept in memory; later steps begin with the first again
SCHEDULE = 1000  # steps of the learning rate's schedule
NO_ROOM = re.compile(r"RESOURCE_EXHAUSTED|out of memory|can't allocate|MemoryError|bad_alloc", re.IGNORECASE)
ENVIRONMENT = dict(os.environ)  # of the sides, whatever the caller sets for itself afterwards


class JaxSide:
    """The step as `distiljax distill` makes and wraps it.

    Args:
      directory: has `teacher` and rows.npz.
      settings: `batch`, `micro_batch`, `dtype`, `attention`, `remat`, `dropout`, `attention_dropout`, `ce_positions`,
        `devices`.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]):
        import jax

        import distiljax
        from distiljax.distill.masking import Masking
        from distiljax.distill.runs import kernels_in_words, with_kernels
        from distiljax.distill.step import Distillation, Models, Recipe, make_train_step
        from distiljax.nn.linear import compute_params
        from distiljax.train.optimizer import make_optimizer
        from distiljax.train.parallel import Parallel
        from distiljax.train.state import TrainState

        self.settings, config = settings, distiljax.distill_config()
        config.attention, config.remat = settings["attention"], settings["remat"]
        with np.load(directory / "rows.npz") as rows:
            self.data = dict(rows)
        self.parallel = Parallel("jit", jax.devices()[: settings["devices"]])
        teacher, teacher_params = distiljax.from_pretrained(directory / "teacher", dtype=settings["dtype"])
        drops = {"hidden_dropout": settings["dropout"], "attention_dropout": settings["attention_dropout"]}
        student, params = distiljax.student_of(teacher, teacher_params, **drops)
        models = with_kernels(config, Models(student, teacher))
        rows, lengths = settings["micro_batch"], [self.data["input_ids"].shape[1]]
        self.attention = kernels_in_words(models, jax.default_backend(), rows, lengths)
        recipe = Recipe(**{**config.loss, "ce_positions": settings["ce_positions"]})
        self.masking = Masking(int(self.data["mask_token_id"]), int(self.data["vocab_size"]))
        optimizer, schedule = make_optimizer(config.optimizer, SCHEDULE)
        step = make_train_step(
            Distillation(models, recipe, self.masking),
            optimizer,
            schedule,
            micro_batches=settings["batch"] // self.parallel.devices // settings["micro_batch"],
        )
        self.step: Any = self.parallel.wrap(step, donate=True)
        self.frozen = {
            "teacher": self.parallel.place_teacher(compute_params(teacher_params, teacher.dtype)),
            "masking_weights": self.parallel.replicate(self.data["weights"]),
            "seed": self.parallel.replicate(np.uint32(0)),
        }
        self.state = self.parallel.replicate(jax.device_get(TrainState.create(params, optimizer)))
        dtype = jax.numpy.dtype(settings["dtype"])
        # XLA:CPU has a fast product of bfloat16 only where float32 is asked for; a GPU's is faster without.
        wanted = jax.numpy.float32 if jax.default_backend() == "cpu" else dtype
        exact = jax.lax.Precision.HIGHEST if dtype == jax.numpy.float32 else None
        multiply = functools.partial(jax.numpy.matmul, precision=exact, preferred_element_type=wanted)
        self.multiply: Any = jax.jit(multiply)

    def describe(self) -> dict[str, str]:
        """Where it runs."""
        import jax

        from distiljax.train.run import machine

        return {"platform": jax.default_backend(), "machine": machine(), "versions": f"jax {jax.__version__}"}

    def build(self) -> dict[str, Any]:
        """Compiles the step, and says what XLA reserves for it."""
        began = time.perf_counter()
        self.step = self.step.lower(self.state, self.frozen, self._batch(0)).compile()
        found = {"compile_seconds": time.perf_counter() - began, "attention": self.attention}
        if memory := self.step.memory_analysis():
            found["arguments"] = memory.argument_size_in_bytes
            found["temporaries"] = memory.temp_size_in_bytes
        return found

    def run(self, first: int, count: int) -> dict[str, float]:
        """Optimiser steps on the batches `first` to `first + count - 1`, and the seconds that they take."""
        import jax

        began = time.perf_counter()
        for t in range(first, first + count):
            self.state, self.metrics = self.step(self.state, self.frozen, self._batch(t))
        jax.block_until_ready((self.state, self.metrics))
        return {"seconds": time.perf_counter() - began}

    def profile(self, first: int) -> dict[str, Any]:
        """Seconds of the parts of the step on batch `first`, which is traced."""
        from step_profile import trace

        return trace(lambda: self.run(first, 1), self.step.as_text())

    def losses(self) -> dict[str, float]:
        """The metrics of the first step."""
        self.run(0, 1)
        names = ("loss", "loss_ce", "loss_mlm", "loss_cos", "grad_norm")
        return {name: float(self.parallel.fetch(self.metrics[name])) for name in names}

    def write_masks(self, path: str) -> dict[str, Any]:
        """The first step's masked rows: `input_ids` and `labels`, −1 where nothing is predicted, [B, S]."""
        import jax

        from distiljax.distill.masking import mask_tokens
        from distiljax.distill.step import example_keys, split_keys

        batch = {name: self.data[name][: self.settings["batch"]] for name in ("input_ids", "segment_ids")}
        batch["positions"] = batch["segment_ids"]  # which masking does not look at

        @jax.jit
        def draw(batch: dict[str, Any], weights: Any) -> Any:
            zero = jax.numpy.zeros((), jax.numpy.int32)
            keys, _ = split_keys(example_keys(0, zero, zero, len(batch["input_ids"])))
            return mask_tokens(keys, batch, weights, self.masking)

        rows = jax.device_get(draw(batch, self.data["weights"]))
        labels = np.full(rows.input_ids.shape, -1, np.int32)
        row, column = np.nonzero(rows.masked_weights)
        labels[row, rows.masked_positions[row, column]] = rows.labels[row, column]
        np.savez(path, input_ids=rows.input_ids, labels=labels)
        return {}

    def programs(self) -> int:
        """How many programs there are."""
        return 1

    def product(self, size: int, count: int) -> dict[str, float]:
        """FLOP/s of a product of two square matrices in the compute dtype."""
        import jax

        dtype = jax.numpy.dtype(self.settings["dtype"])
        a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
        self.multiply(a, b).block_until_ready()
        began = time.perf_counter()
        for _ in range(count):
            result = self.multiply(a, b)
        result.block_until_ready()
        return {"flops": 2.0 * size**3 * count / (time.perf_counter() - began)}

    def device_memory(self) -> int | None:
        """Most bytes that were in use on a device."""
        return device_peak_memory()

    def _batch(self, t: int) -> Any:
        rows = np.arange(t * self.settings["batch"], (t + 1) * self.settings["batch"])
        names = ("input_ids", "segment_ids", "positions")
        return self.parallel.shard({name: self.data[name].take(rows, 0, mode="wrap") for name in names})


# --- a side in a process of its own ---


class SideFailed(Exception):
    """A side's process failed; `no_room`: for want of memory."""

    def __init__(self, side: str, message: str, no_room: bool = False):
        super().__init__(f"{SIDES[side]}: {' '.join(message.split())[:300]}")
        self.no_room = no_room or NO_ROOM.search(message) is not None


class Side:
    """A side in a process of its own; to be used in a `with`.

    Attributes:
      settings: those of `JaxSide` and TorchSide, and `memory_limit`, bytes of the host that it may take; 0 for any.
      process_memory: most bytes that the process has held so far.
    """

    def __init__(self, side: str, directory: Path, settings: dict[str, Any]):
        self.side, self.settings, self.process_memory = side, settings, 0
        environment = ENVIRONMENT | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "HF_HUB_OFFLINE": "1"}
        environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
        for cache, value in {
            "JAX_ENABLE_COMPILATION_CACHE": "0",
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        }.items():
            environment[cache] = value  # compile times are wanted
        if settings["devices"] > 1:  # of CPUs; accelerators are as many as they are
            flag = f"--xla_force_host_platform_device_count={settings['devices']}"
            environment["XLA_FLAGS"] = f"{ENVIRONMENT.get('XLA_FLAGS', '')} {flag}"
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, __file__, side, str(directory), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.kill()
        # What the process did not read any more is written, in vain, when the pipe is closed.
        with self._errors, contextlib.suppress(BrokenPipeError), self._process:
            pass

    def call(self, do: str, **arguments: Any) -> Any:
        """What a method of the side returns.

        Raises:
          SideFailed: it fails, or its process ends.
        """
        assert self._process.stdin and self._process.stdout
        try:
            print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            self._errors.seek(0)
            lines = self._errors.read().strip().splitlines() or ["no message"]
            last = ([line for line in lines if NO_ROOM.search(line)] or lines)[-1]
            killed = status == -signal.SIGKILL  # by the system, for want of memory
            raise SideFailed(self.side, f"ended with status {status}: {last}", killed)
        answer = json.loads(line)
        if "error" in answer:
            raise SideFailed(self.side, answer["error"])
        self.process_memory = answer["process_memory"]
        return answer["result"]


def serve(side: str, directory: Path, settings: dict[str, Any]) -> None:
    """Answers calls of a side's methods: a line of JSON in, a line of JSON out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not come between
    if settings["memory_limit"]:
        resource.setrlimit(resource.RLIMIT_DATA, (settings["memory_limit"],) * 2)
    made: Any = None
    for line in sys.stdin:
        call = json.loads(line)
        try:
            made = made or make_side(side, directory, settings)
            result = getattr(made, call.pop("do"))(**call)
            answer = {"result": result, "process_memory": peak_memory()}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def make_side(side: str, directory: Path, settings: dict[str, Any]) -> Any:
    """The side itself, in this process."""
    if side == "jax":
        return JaxSide(directory, settings)
    from torch_distillation import TorchSide

    return TorchSide(directory, settings)


def settings_of(args: argparse.Namespace, side: str, **changes: Any) -> dict[str, Any]:
    """What a side is told, before anything is tried."""
    torch = side == "torch"
    return {
        "batch": args.batch,
        "micro_batch": (args.torch_micro_batch if torch else args.micro_batch) or args.batch,
        "dtype": (torch and args.torch_dtype) or args.dtype,
        "attention": args.attention,
        "remat": args.remat == "yes",
        "dropout": args.dropout,
        "attention_dropout": args.dropout if args.attention_dropout is None else args.attention_dropout,
        "ce_positions": args.ce_positions,
        "devices": 1,
        "rows": "packed" if args.torch_rows == "auto" else args.torch_rows,
        "compile": args.torch_compile == "yes",
        "masks": "",
        "memory_limit": 0,
    } | changes


def how(side: str, settings: dict[str, Any]) -> str:
    """Settings in words."""
    words = [f"micro-batches of {settings['micro_batch']}", settings["dtype"]]
    if side == "jax" and settings["remat"]:
        words.append("remat")
    if side == "torch":
        words += [f"{settings['rows']} rows", "torch.compile" if settings["compile"] else "not compiled"]
    return ", ".join(words)


def outcome(side: str, tried: dict[str, Any]) -> str:
    """What became of settings that were tried."""
    return f"{how(side, tried['settings'])}: {tried.get('problem') or human_seconds(tried['seconds']) + ' a step'}"


def alone(
    side: str,
    directory: Path,
    settings: dict[str, Any],
    rows: dict[str, np.ndarray],
    rounds: int,
    steps: int = 0,
    traces: int = 0,
) -> dict[str, Any]:
    """Steps of one side that has the machine to itself; with `traces` also the `parts` of the fastest traced step."""
    with Side(side, directory, settings) as process:
        where = process.call("describe")
        steps = steps or steps_in_round(where["platform"])
        found = {"side": side, "settings": settings, "where": where, **process.call("build")}
        warm_up(process, where["platform"])
        runs = [process.call("run", first=1 + i * steps, count=steps)["seconds"] for i in range(rounds)]
        traced = [process.call("profile", first=1 + i) for i in range(traces)]
        if traced:
            found["parts"] = min(traced, key=lambda parts: sum(sum(x.values()) for x in parts.values()))
        found |= {"seconds": statistics.median(runs) / steps, **memory(process)}
        found["product"] = process.call("product", **product_size(where["platform"]))["flops"]
    found["tokens"] = real_tokens(rows, settings["batch"], 1, rounds * steps) / rounds / steps
    return found


def steps_in_round(platform: str) -> int:
    """How many steps are timed together, if nothing is said: an accelerator makes tens of them in a second."""
    return 1 if platform == "cpu" else 20


def warm_up(process: Side, platform: str) -> None:
    """Steps that are not timed: XLA records a GPU's kernels in one of the first, to start them all at once later."""
    process.call("run", first=0, count=1 if platform == "cpu" else 3)


def memory(process: Side) -> dict[str, Any]:
    """What a side has needed at most: its process, and on the device."""
    on_device = process.call("device_memory")
    return {"process_memory": process.process_memory, "device_memory": on_device}


def product_size(platform: str) -> dict[str, int]:
    """How large the products of matrices are, and how many: some tenths of a second."""
    return {"size": 3072, "count": 2} if platform == "cpu" else {"size": 8192, "count": 50}


def host_limit(platform: str) -> int:
    """Bytes that a process on the CPU may take to see whether it finds room; 0 where that cannot be told."""
    path = Path("/proc/meminfo")
    available = re.findall(r"MemAvailable:\s*(\d+)", path.read_text()) if path.is_file() else []
    return int(0.9 * 1024 * int(available[0])) if available and platform == "cpu" else 0


# --- text and models ---


def read_rows(args: argparse.Namespace, directory: Path) -> dict[str, np.ndarray]:
    """Packed rows of `--seq_len` tokens [R, S] with the masking weights [V], from `--rows` or from `--data`."""
    if args.rows and os.path.isfile(args.rows):
        with np.load(args.rows) as rows:
            found = dict(rows)
    else:
        found = prepared_rows(args, directory)
        if args.rows:
            partial = Path(f"{args.rows}.partial.npz")
            np.savez_compressed(partial, **found)  # type: ignore[arg-type]
            os.replace(partial, args.rows)
    held = found["input_ids"].shape[1]
    args.seq_len = args.seq_len or held
    if held < args.seq_len:
        raise UserError(
            f"seq_len is {args.seq_len}; expected at most {held}, the length of the prepared rows"
        )
    return cut(found, args.seq_len)


def prepared_rows(args: argparse.Namespace, directory: Path) -> dict[str, np.ndarray]:
    """Rows of a corpus, which is prepared first where `--data` is text."""
    from distiljax.data import Metadata, RowLoader, default_data_config, prepare
    from distiljax.data.metadata import METADATA_FILE, TOKENIZER_DIRECTORY
    from distiljax.distill.masking import masking_weights
    from distiljax.hub import load_tokenizer, vocabulary_size

    train = Path(args.data) if (Path(args.data) / METADATA_FILE).is_file() else Path(args.data) / "train"
    if not (train / METADATA_FILE).is_file():
        config = default_data_config()
        config.source, config.unit, config.max_documents = args.data, args.unit, args.documents
        config.seq_len = args.seq_len or 512
        prepare(config, load_tokenizer(args.tokenizer or packaged_tokenizer()), directory / "rows")
        train = directory / "rows" / "train"
    metadata = Metadata.load(train)
    if metadata.settings.get("layout") == "bucketed":
        raise UserError(f"{train} has rows of several lengths; prepare it with layout packed")
    tokenizer = load_tokenizer(args.tokenizer or train / TOKENIZER_DIRECTORY)
    loader = RowLoader(train, min(ROWS_KEPT, metadata.num_rows), seed=0)
    rows = loader.whole_batch(0)
    size = vocabulary_size(tokenizer)
    counts = np.pad(metadata.token_counts(train), (0, size - metadata.vocab_size))
    return {
        **{name: rows[name] for name in ("input_ids", "segment_ids", "positions")},
        "weights": masking_weights(counts, tokenizer.all_special_ids, 0.7),
        "mask_token_id": np.array(tokenizer.mask_token_id),
        "vocab_size": np.array(size),
    }


def packaged_tokenizer() -> str:
    """The tokenizer of the quickstart."""
    quickstart = Path(__file__).parents[1] / "configs" / "quickstart.py"
    return runpy.run_path(str(quickstart))["get_config"]("teacher").model


def cut(rows: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    """The same rows cut into rows of `length`; what is left over at the end of each is dropped."""
    held = rows["input_ids"].shape[1]
    if held == length:
        return rows
    whole = held // length * length
    found = {name: rows[name][:, :whole].reshape(-1, length) for name in ("input_ids", "segment_ids")}
    used = found["segment_ids"].any(1)
    found = {name: values[used] for name, values in found.items()}
    segments, columns = found["segment_ids"], np.arange(length)
    begins = np.diff(segments, axis=1, prepend=-1) != 0
    positions = columns - np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
    return {**rows, **found, "positions": np.where(segments > 0, positions, 0).astype(np.int32)}


def write_models(args: argparse.Namespace, vocab_size: int, directory: Path) -> str:
    """Writes a teacher of random weights and its student as transformers loads them; returns their sizes in words."""
    import jax

    import distiljax

    shape = SIZES[args.size] | ({"num_layers": args.teacher_layers} if args.teacher_layers else {})
    config = distiljax.EncoderConfig(vocab_size=vocab_size, max_positions=max(512, args.seq_len), **shape)
    # Wide enough that the student is not its teacher, so that there is something to compare.
    config = config.replace(initializer_range=config.hidden_size**-0.5)
    teacher = distiljax.MaskedLM(config)
    params = jax.device_get(jax.jit(teacher.init)(jax.random.key(0), np.zeros((1, 1), np.int32))["params"])
    student, student_params = distiljax.student_of(teacher, params)
    distiljax.save_pretrained(teacher, params, directory / "teacher")
    distiljax.save_pretrained(student, student_params, directory / "student")
    return f"{config.num_layers} → {student.config.num_layers} layers, width {config.hidden_size}, V = {vocab_size:,}"


def work(args: argparse.Namespace, directory: Path, batch: int, length: int) -> float:
    """FLOP of a step, counted from the shapes."""
    import distiljax
    from distiljax.plan.analytic import step_flops
    from distiljax.plan.program import load_program

    config = distiljax.distill_config()
    config.teacher, config.steps = str(directory / "teacher"), 1
    config.batch_size, config.data.seq_len = batch, length
    config.loss.ce_positions = args.ce_positions
    return sum(step_flops(load_program(config)).values())


def real_tokens(rows: dict[str, np.ndarray], batch: int, first: int, count: int) -> int:
    """Tokens that are not padding in the batches `first` to `first + count - 1`."""
    chosen = np.arange(first * batch, (first + count) * batch)
    return int(np.count_nonzero(rows["segment_ids"].take(chosen, 0, mode="wrap")))


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
