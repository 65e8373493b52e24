"""What some choices for a CPU's caches and memory are worth, each with and without, in turn.

    python scripts/benchmark_choices.py --dtype=bfloat16 [--choices=heads,portions,gelu,activation,draws]
    python scripts/benchmark_choices.py --quick

- heads: of long rows attention goes a few heads at a time (nn/rowwise.py), in place of a row's heads all at once. One
  layer's self-attention, forward, and forward and backward with dropout.
- portions: a forward pass goes some rows at a time (tasks/chunks.py), in place of all. A student's encoder of 32 rows.
- gelu: it is computed by the error function (nn/encoder.py), in place of the complementary one. A student's encoder,
  forward, and forward and backward with dropout.
- activation: the backward pass computes the feed-forward activation again (nn/encoder.py), in place of keeping it. A
  student's encoder, forward and backward with dropout.
- draws: dropout takes four from a hash (nn/linear.py), in place of one. Dropout of attention weights alone, and a
  student's encoder, forward and backward.

Base size, random weights; --quick is a small model, to try the program. Each ratio is the median over rounds in which
both are timed one after the other. Prints Markdown.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from benchmark_attention import program as attention_program

from distiljax.errors import UserError
from distiljax.nn import Encoder, EncoderConfig, encoder, linear, rowwise
from distiljax.nn.linear import place_compute_params
from distiljax.report import markdown_table
from distiljax.tasks import chunks
from distiljax.tasks.speed import compile_forward, in_turn, random_tokens
from distiljax.train.format import human_bytes

STUDENT = EncoderConfig(num_layers=6, hidden_dropout=0.1, attention_dropout=0.1)
SMALL = STUDENT.replace(num_layers=2, hidden_size=128, num_heads=2, intermediate_size=512, vocab_size=512)

# A compiled program and its arguments.
Compiled = tuple[Any, tuple[Any, ...]]
# What is computed, in words; how to compile it; and what undoes the choice while it is compiled.
Case = tuple[str, Callable[[], Compiled], AbstractContextManager[Any]]


def heads(args: argparse.Namespace) -> Iterator[Case]:
    """One layer's attention over long rows."""
    shapes = ((1024, 1024),) if args.quick else ((512, 512), (1024, 512), (2048, 1024), (2048, 2048))
    for tokens, length in shapes:
        for rate, backward in ((0.0, False), (0.1, True)):
            one = argparse.Namespace(tokens=tokens, hidden=args.config.hidden_size, dtype=args.dtype)
            make = functools.partial(attention_program, one, "auto", length, rate, backward)
            what = "forward and backward, dropout" if backward else "forward"
            undone = mock.patch.object(rowwise, "heads_at_once", lambda shape: shape[1])
            yield f"attention, {tokens // length} × {length}, {what}", make, undone


def portions(args: argparse.Namespace) -> Iterator[Case]:
    """The encoder over many rows."""
    for length in (128,) if args.quick else (32, 128, 512):
        undone = mock.patch.object(chunks, "CPU_TOKENS", 32 * length)
        yield f"encoder, 32 × {length}, forward", forward(args, 32, length), undone


def gelu(args: argparse.Namespace) -> Iterator[Case]:
    """The encoder, and its gradient."""
    undone = {"gelu": functools.partial(jax.nn.gelu, approximate=False)}
    for rows, length in ((4, 128),) if args.quick else ((1, 32), (32, 128)):
        what = f"encoder, {rows} × {length}, forward"
        yield what, forward(args, rows, length), mock.patch.dict(encoder.ACTIVATIONS, undone)
    for rows, length in ((4, 128),) if args.quick else ((8, 512),):
        what = f"encoder, {rows} × {length}, forward and backward, dropout"
        yield what, gradient(args, rows, length), mock.patch.dict(encoder.ACTIVATIONS, undone)


def activation(args: argparse.Namespace) -> Iterator[Case]:
    """The encoder's gradient."""
    for rows, length in ((4, 128),) if args.quick else ((16, 128), (2, 512), (8, 512)):
        undone = mock.patch.object(jax, "checkpoint", lambda function: function)
        what = f"encoder, {rows} × {length}, forward and backward, dropout"
        yield what, gradient(args, rows, length), undone


def draws(args: argparse.Namespace) -> Iterator[Case]:
    """Dropout, and the encoder's gradient."""
    rows, heads, length = (2, 2, 64) if args.quick else (4, args.config.num_heads, 512)

    def one(key: jax.Array, rows: int, width: int) -> jax.Array:
        return jax.random.bits(key, (rows, width), jnp.uint16)

    def make() -> Compiled:
        x = jnp.ones((rows, heads, length, length), args.dtype)
        arguments = x, jax.random.split(jax.random.key(1), rows)
        dropout = functools.partial(linear.dropout, rate=0.1, site=0)
        return jax.jit(lambda x, keys: dropout(x, keys=keys)).lower(*arguments).compile(), arguments

    undone = functools.partial(mock.patch.object, linear, "_draw_fours", one)
    yield f"dropout, {rows} × {heads} × {length} × {length}", make, undone()
    many, long = (4, 128) if args.quick else (8, 512)
    yield f"encoder, {many} × {long}, forward and backward, dropout", gradient(args, many, long), undone()


def forward(args: argparse.Namespace, rows: int, length: int) -> Callable[[], Compiled]:
    """Compiles the encoder."""
    module, params = args.model
    params = place_compute_params(params, module.dtype)

    def make() -> Compiled:
        call, compiled = compile_forward(module, params, rows, length)
        return compiled, call.args  # type: ignore[attr-defined]

    return make


def gradient(args: argparse.Namespace, rows: int, length: int) -> Callable[[], Compiled]:
    """Compiles the gradient of something that all of the encoder's output goes into."""
    module, params = args.model

    def total(params: Any, ids: jax.Array, keys: jax.Array) -> jax.Array:
        out: Any = module.apply({"params": params}, ids, dropout_keys=keys)
        return jnp.square(out.last_hidden_state.astype(jnp.float32)).sum()

    def make() -> Compiled:
        ids = random_tokens(module.config.vocab_size, rows, length)
        arguments = jax.device_put((params, ids, jax.random.split(jax.random.key(1), rows)))
        return jax.jit(jax.grad(total)).lower(*arguments).compile(), arguments

    return make


CHOICES = {"heads": heads, "portions": portions, "gelu": gelu, "activation": activation, "draws": draws}


def measure(case: Case, args: argparse.Namespace) -> list[str]:
    """A row of the table."""
    what, make, undone = case
    program, arguments = make()
    # A function that was traced before is not traced again.
    jax.clear_caches()
    with undone:
        without, _ = make()
    jax.clear_caches()
    calls = [functools.partial(one, *arguments) for one in (program, without)]
    times = in_turn(calls, args.seconds)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    sizes = [one.memory_analysis().temp_size_in_bytes for one in (program, without)]
    return [
        what,
        *(f"{1e3 * statistics.median(side):,.1f} ms" for side in times),
        f"{statistics.median(ratios):.2f} × ({min(ratios):.2f} to {max(ratios):.2f})",
        *map(human_bytes, sizes),
    ]


def main(argv: list[str]) -> int:
    """Measures and prints."""
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("--choices", default=",".join(CHOICES), help="all by default")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="float32 by default"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="a measurement, on average; 5 by default")
    parser.add_argument("--quick", action="store_true", help="a small model")
    args = parser.parse_args(argv)
    args.config = SMALL if args.quick else STUDENT
    module = Encoder(args.config, jnp.dtype(args.dtype))
    args.model = module, jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    chosen = args.choices.split(",")
    if unknown := [name for name in chosen if name not in CHOICES]:
        raise UserError(f"choices has {unknown[0]!r}; expected some of {', '.join(CHOICES)}")
    if jax.default_backend() != "cpu":
        raise UserError(
            f"JAX runs on {jax.default_backend()}, where nothing of this is chosen; set JAX_PLATFORMS=cpu"
        )
    head = [args.dtype, "with", "without", "its time over with (range)", "temporaries with", "without"]
    rows = []
    for name in chosen:
        for case in CHOICES[name](args):
            rows.append([name, *measure(case, args)])
            print(" | ".join(rows[-1]), file=sys.stderr)
    print(markdown_table(["choice", *head], rows))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"benchmark_choices: error: {error}", file=sys.stderr)
        sys.exit(2)
