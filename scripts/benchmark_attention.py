"""Attention by each kernel that the backend has, in turn: forward, and forward with backward.

    python scripts/benchmark_attention.py --tokens=4096 --lengths=128,512 --dtype=bfloat16

One layer's self-attention (projections included) as the encoder runs it: base width, packed rows of two segments, with
and without dropout of the weights. "plain" writes the [S, S] weights to memory; what "auto" takes instead is named.
Each ratio is the median over rounds in which both are timed one after the other. Prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distiljax.errors import UserError
from distiljax.nn import EncoderConfig
from distiljax.nn.attention import SelfAttention
from distiljax.nn.kernels import Visible, choose
from distiljax.train.format import human_bytes

SIDES = ("plain", "auto")


def program(
    args: argparse.Namespace, side: str, length: int, rate: float, backward: bool
) -> tuple[Any, tuple[Any, ...]]:
    """A compiled program and its arguments."""
    rows, heads = args.tokens // length, args.hidden // 64
    config = EncoderConfig(hidden_size=args.hidden, num_heads=heads, attention_dropout=rate)
    dtype = jnp.dtype(args.dtype)
    module = SelfAttention(config, dtype, side)
    x = jax.random.normal(jax.random.key(0), (rows, length, args.hidden)).astype(dtype)
    segments = jnp.broadcast_to(1 + (jnp.arange(length) >= length // 3), (rows, length))
    visible = Visible.of(None, segments)
    keys = jax.random.split(jax.random.key(1), rows) if rate else None
    params = module.init(jax.random.key(2), x, visible, None, 0)

    def forward(params: Any, x: jax.Array, keys: Any) -> jax.Array:
        out: Any = module.apply(params, x, visible, keys, 0)
        return out

    def total(params: Any, x: jax.Array, keys: Any) -> jax.Array:
        return jnp.square(forward(params, x, keys).astype(jnp.float32)).sum()

    run: Callable[..., Any] = jax.grad(total, argnums=(0, 1)) if backward else forward
    arguments = (params, x, keys)
    return jax.jit(run).lower(*arguments).compile(), arguments


def line(args: argparse.Namespace, length: int, rate: float, backward: bool) -> str:
    """A row of the table."""
    programs = {side: program(args, side, length, rate, backward) for side in SIDES}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(args.rounds + 1):
        for side in SIDES if number % 2 else reversed(SIDES):
            run, arguments = programs[side]
            began = time.perf_counter()
            for _ in range(args.repeats):
                result = run(*arguments)
            jax.block_until_ready(result)
            if number:  # the first round warms up
                seconds[side].append((time.perf_counter() - began) / args.repeats)
    ratio = statistics.median(a / b for a, b in zip(seconds["plain"], seconds["auto"], strict=True))
    shape = (args.tokens // length, args.hidden // 64, length, 64)
    kernel = choose(
        "auto", platform=jax.default_backend(), dtype=args.dtype, dropout=rate, shape=shape
    ).kernel
    memory = [programs[side][0].memory_analysis() for side in SIDES]
    return (
        " | ".join(
            [
                f"| {shape[0]} × {length}",
                "forward and backward" if backward else "forward",
                f"{rate:g}",
                kernel,
                *(f"{1e3 * statistics.median(seconds[side]):.1f} ms" for side in SIDES),
                f"{ratio:.2f} ×",
                *("–" if stats is None else human_bytes(stats.temp_size_in_bytes) for stats in memory),
            ]
        )
        + " |"
    )


def main(argv: list[str]) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    for name, default in {"tokens": 4096, "hidden": 768, "rounds": 7, "repeats": 1}.items():
        add(f"--{name}", type=int, default=default, help=f"{default} by default")
    add("--lengths", default="128,512", help="tokens of a row; 128,512 by default")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="float32 by default")
    args = parser.parse_args(argv)
    lengths = [int(length) for length in args.lengths.split(",")]
    if any(length < 1 or args.tokens % length for length in lengths):
        raise UserError(f"lengths is {args.lengths}; expected divisors of --tokens={args.tokens}")
    print(
        f"| {args.dtype}, width {args.hidden} | pass | dropout | auto takes | plain | auto | plain over auto "
        "| plain's temporaries | auto's |"
    )
    print("|---|---|---:|---|---:|---:|---:|---:|---:|")
    for length in lengths:
        for rate in (0.0, 0.1):
            for backward in (False, True):
                if backward or not rate:  # a forward pass alone is the teacher's, without dropout
                    print(line(args, length, rate, backward), flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"benchmark_attention: error: {error}", file=sys.stderr)
        sys.exit(2)
