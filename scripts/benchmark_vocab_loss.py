"""The vocabulary losses without all logits, against the plain ones: time and memory of loss and gradient.

    python scripts/benchmark_vocab_loss.py --positions=4096 --dtype=float32
    python scripts/benchmark_vocab_loss.py --step --batch=64 --seq_len=512
    python scripts/benchmark_vocab_loss.py --topology=v5e:1 --positions=16384 --dtype=bfloat16

L_ce and L_mlm with random decoders of the size of BERT-base: by `distill/losses.py` on the logits of all positions; by
`distill/vocab_loss.py` with chunks of several sizes; and over the vocabulary instead of the positions, in chunks with
an online softmax: a first pass for the normalisers, a second one, with every product again, for the gradient. First
all are compared with the plain ones; then they run in turn, and medians count. Memory is what XLA reserves beside
arguments and results.

`--step` compiles the whole training step of a 12-layer teacher and its student both ways and prints its memory;
`--topology` compiles the candidates for a TPU chip, and prints what each would cost there at the chip's published
peaks, and by the compiler's own estimate. Both run nothing. Prints Markdown.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import distiljax
from distiljax.distill import step
from distiljax.distill.losses import Term, agreement, masked_lm_loss, soft_target_loss
from distiljax.distill.vocab_loss import Targets, vocabulary_losses
from distiljax.errors import UserError
from distiljax.nn import EncoderConfig
from distiljax.nn.heads import Decoder
from distiljax.nn.linear import einsum
from distiljax.plan.compiler import tpu_devices
from distiljax.plan.hlo import Program
from distiljax.plan.machines import parse_topology
from distiljax.plan.program import load_program
from distiljax.programs import nothing_kept
from distiljax.report import markdown_table
from distiljax.train.format import human_bytes

Array = jax.Array
SCALES = {"ce": 5.0, "mlm": 2.0}
TEMPERATURE = 2.0


def plain(
    student: Decoder,
    teacher: Decoder | None,
    targets: Targets,
    scales: Mapping[str, Array],
    *,
    temperature: float,
) -> tuple[Array, dict[str, Term]]:
    """As `vocabulary_losses` (without L_mse), from the logits of all positions."""
    assert teacher is not None
    logits, soft = student.logits(), lax.stop_gradient(teacher.logits())
    terms = {
        "ce": soft_target_loss(logits, soft, targets.soft, temperature),
        "mlm": masked_lm_loss(logits, targets.labels, targets.masked),
        "mlm_accuracy": agreement(logits, targets.labels, targets.masked),
        "teacher_agreement": agreement(logits, soft.argmax(-1), targets.masked),
    }
    return sum((scale * terms[name].sum for name, scale in scales.items()), jnp.zeros(())), terms


def over_vocabulary(
    student: Decoder, teacher: Decoder, targets: Targets, width: int
) -> tuple[Array, Decoder]:
    """L_ce and L_mlm and their gradient, `width` words of the vocabulary at a time."""
    T, dtype = TEMPERATURE, student.dtype
    states, soft_states = student.states.astype(dtype), teacher.states.astype(dtype)
    words = len(student.bias)
    chunks = -(-words // width)

    def cut(x: Array, fill: float = 0.0) -> Array:
        pads = ((0, chunks * width - words),) + ((0, 0),) * (x.ndim - 1)
        return jnp.pad(x, pads, constant_values=fill).reshape(chunks, width, *x.shape[1:])

    never = -1e30  # the logit of words that only fill the last chunk
    tables = (
        *(cut(x.embedding.astype(dtype)) for x in (student, teacher)),
        *(cut(x.bias, never) for x in (student, teacher)),
        jnp.arange(chunks) * width,
    )

    def logits(xs: Any) -> tuple[Array, Array]:
        s = einsum("ne,ve->nv", states, xs[0], dtype) + xs[2]
        return s, einsum("ne,ve->nv", soft_states, xs[1], dtype) + xs[3]

    def normalise(sums: Any, xs: Any) -> tuple[Any, None]:
        s, t = logits(xs)
        top, total, soft_total, label, teacher_top, teacher_total, cross = sums
        new, teacher_new = jnp.maximum(top, s.max(-1)), jnp.maximum(teacher_top, t.max(-1))
        total = total * jnp.exp(top - new) + jnp.exp(s - new[:, None]).sum(-1)
        soft_total = soft_total * jnp.exp((top - new) / T) + jnp.exp((s - new[:, None]) / T).sum(-1)
        shrink, p = jnp.exp((teacher_top - teacher_new) / T), jnp.exp((t - teacher_new[:, None]) / T)
        teacher_total = teacher_total * shrink + p.sum(-1)
        cross = cross * shrink + jnp.where(p > 0, p * (t - s), 0).sum(-1) / T
        here = targets.labels[:, None] - xs[4] == jnp.arange(width)
        label += jnp.where(here, s, 0).sum(-1)
        return (new, total, soft_total, label, teacher_new, teacher_total, cross), None

    zeros = jnp.zeros(len(states))
    start: Any = (zeros - jnp.inf, zeros, zeros, zeros, zeros - jnp.inf, zeros, zeros)
    (top, total, soft_total, label, teacher_top, teacher_total, cross), _ = lax.scan(normalise, start, tables)
    kl = (
        cross / teacher_total - jnp.log(teacher_total) - teacher_top / T + jnp.log(soft_total) + top / T
    ) * T**2
    nll = jnp.log(total) + top - label
    loss = SCALES["ce"] * (kl * targets.soft).sum() + SCALES["mlm"] * (nll * targets.masked).sum()

    def gradient(sum_states: Array, xs: Any) -> tuple[Array, tuple[Array, Array]]:
        s, t = logits(xs)
        here = targets.labels[:, None] - xs[4] == jnp.arange(width)
        q = jnp.exp((s - top[:, None]) / T) / soft_total[:, None]
        p = jnp.exp((t - teacher_top[:, None]) / T) / teacher_total[:, None]
        hard = jnp.exp(s - top[:, None]) / total[:, None] - here
        d = (
            SCALES["ce"] * T * targets.soft[:, None] * (q - p)
            + SCALES["mlm"] * targets.masked[:, None] * hard
        )
        grouped, inputs = (x.reshape(8, -1, x.shape[-1]) for x in (d, states))
        table = einsum("gnv,gne->ve", grouped, inputs, dtype)
        return sum_states + einsum("nv,ve->ne", d, xs[0], dtype), (table, d.sum(0))

    states_gradient, (table, bias) = lax.scan(gradient, jnp.zeros(student.states.shape), tables)
    table, bias = (x.reshape(chunks * width, *x.shape[2:])[:words] for x in (table, bias))
    return loss, Decoder(states_gradient.astype(student.states.dtype), table, bias, dtype)


def candidates(args: argparse.Namespace) -> dict[str, Callable[..., tuple[Array, Decoder]]]:
    """By name, what gives the loss and its gradient with respect to the student's decoder."""

    def of(loss: Callable[..., Any]) -> Callable[..., tuple[Array, Decoder]]:
        def run(student: Decoder, teacher: Decoder, targets: Targets) -> tuple[Array, Decoder]:
            def value(student: Decoder) -> Array:
                return loss(student, teacher, targets, SCALES, temperature=TEMPERATURE)[0]

            return jax.value_and_grad(value)(student)

        return run

    found = {"plain": of(plain)}
    for chunk in args.chunks:
        found[f"{chunk:,} positions at once"] = of(functools.partial(vocabulary_losses, chunk=chunk))
    for width in args.widths:
        found[f"{width:,} words at once"] = functools.partial(over_vocabulary, width=width)
    return found


def decoders(args: argparse.Namespace) -> tuple[Decoder, Decoder, Targets]:
    """A student's and a teacher's decoder and targets, with logits of a trained model's spread."""
    keys = iter(jax.random.split(jax.random.key(0), 9))
    dtype = jnp.dtype(args.dtype)

    def draw() -> Decoder:
        states = jax.random.normal(next(keys), (args.positions, args.hidden)).astype(dtype)
        table = 2 * args.hidden**-0.5 * jax.random.normal(next(keys), (args.vocabulary, args.hidden))
        return Decoder(states, table, jax.random.normal(next(keys), (args.vocabulary,)), dtype)

    labels = jax.random.randint(next(keys), (args.positions,), 0, args.vocabulary)
    masked = jax.random.bernoulli(next(keys), 0.15, (args.positions,)).astype(jnp.float32)
    return draw(), draw(), Targets(labels, masked, jnp.ones(args.positions))


def measure(args: argparse.Namespace) -> str:
    """The table of all candidates."""
    arrays = decoders(args)
    programs = {name: jax.jit(f).lower(*arrays).compile() for name, f in candidates(args).items()}
    expected = programs["plain"](*arrays)
    errors: dict[str, float] = {}
    for name, program in programs.items():
        pairs = zip(*map(jax.tree.leaves, (program(*arrays), expected)), strict=True)
        scaled = [jnp.abs(a - b).max() / jnp.abs(b).max() for a, b in pairs]
        errors[name] = float(jnp.stack([x.astype(jnp.float32) for x in scaled]).max())
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(args.rounds):
        for name, program in programs.items():
            began = time.monotonic()
            jax.block_until_ready(program(*arrays))
            seconds[name].append(time.monotonic() - began)
    # Both decoders forwards, and two products for the student's gradient.
    work = 8 * args.positions * args.hidden * args.vocabulary
    lines = [
        f"| {args.positions:,} positions, {args.vocabulary:,} words, width {args.hidden}, {args.dtype} | time "
        "| plain's time over it | GFLOP/s of 4 products | memory | largest relative difference |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds["plain"], times, strict=True))
        median = statistics.median(times)
        memory = reserved(programs[name])
        lines.append(
            f"| {name} | {median:.2f} s | {ratio:.2f} × | {work / median / 1e9:,.0f} | {human_bytes(memory)} | "
            f"{errors[name]:.1e} |"
        )
    return "\n".join(lines)


def measure_for_tpu(args: argparse.Namespace) -> str:
    """What the TPU compiler makes of all candidates."""
    topology = parse_topology(args.topology)
    if not topology.chip.is_tpu or topology.chips * topology.devices_per_chip > 1:
        raise UserError(f"topology is {args.topology}; expected one TPU chip of one device, such as v5e:1")
    chip, mesh = topology.chip, Mesh(np.array(tpu_devices(topology)), ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(functools.partial(decoders, args)),
    )
    rows = []
    for name, candidate in candidates(args).items():
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nothing_kept():
            program = jax.jit(candidate).lower(*shapes).compile()
        profile = Program(program.as_text() or "").profile()
        times = (
            profile.matrix_flops / chip.flops,
            profile.moved_bytes / chip.bandwidth,
            profile.cycles / chip.clock,
        )
        costs = [f"{1e9 * seconds / args.positions:,.0f} ns" for seconds in times]
        rows.append([name, *costs, human_bytes(reserved(program))])
    title = f"{args.positions:,} positions, {args.vocabulary:,} words, {args.dtype}, {topology.name}"
    head = ["matrix units at their peak", "memory at its peak", "compiler's estimate", "temporaries"]
    return markdown_table([f"{title}, a position", *head], rows)


def reserved(program: jax.stages.Compiled) -> int:
    """Bytes that a program takes beside its arguments and results."""
    stats = program.memory_analysis()
    if stats is None:
        raise UserError("this backend does not say what memory a program takes; run it on a CPU, GPU or TPU")
    return stats.temp_size_in_bytes


def measure_step(args: argparse.Namespace) -> str:
    """The memory of the whole step, with the plain losses and with ours."""
    config = distiljax.distill_config()
    config.batch_size, config.data.seq_len, config.dtype, config.steps = (
        args.batch,
        args.seq_len,
        args.dtype,
        1,
    )
    shape = EncoderConfig(vocab_size=args.vocabulary, hidden_size=args.hidden, num_heads=args.hidden // 64)
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(shape.to_hf()))
        config.teacher = directory
        for name, loss in (("plain", plain), ("ours", vocabulary_losses)):
            step.vocabulary_losses = loss  # type: ignore[assignment]
            lowered = load_program(config).lower(jax.devices()[:1], args.micro_batch or args.batch)
            found[name] = reserved(lowered.compile())
    step.vocabulary_losses = vocabulary_losses
    title = f"step of {args.batch} × {args.seq_len}, {args.vocabulary:,} words, {args.dtype}"
    return "\n".join(
        [
            f"| {title} | memory beside parameters and rows |\n|---|---:|",
            *(f"| {name} | {human_bytes(size)} |" for name, size in found.items()),
            f"| ours over plain | {found['ours'] / found['plain']:.2f} |",
        ]
    )


def main() -> int:
    """Prints what was asked for."""
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    numbers = {"positions": 4096, "vocabulary": 30522, "hidden": 768, "rounds": 5}
    for name, default in (numbers | {"batch": 64, "seq_len": 512, "micro_batch": 0}).items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{default} by default")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    for name, default_list in (("chunks", "256,512,1024,2048,4096"), ("widths", "1024,4096")):
        parser.add_argument(f"--{name}", default=default_list, help=f"{default_list} by default")
    parser.add_argument("--step", action="store_true", help="compile the whole training step instead")
    parser.add_argument("--topology", default="", help="compile for this TPU chip instead, such as v5e:1")
    args = parser.parse_args()
    try:
        for name in ("chunks", "widths"):
            setattr(args, name, [int(size) for size in getattr(args, name).split(",") if size])
    except ValueError as error:
        raise UserError(
            f"chunks {args.chunks}, widths {args.widths}; expected whole numbers with commas"
        ) from error
    if args.positions % 8:
        raise UserError(f"positions is {args.positions}; expected a multiple of 8")
    print(measure_step(args) if args.step else measure_for_tpu(args) if args.topology else measure(args))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"benchmark_vocab_loss: error: {error}", file=sys.stderr)
        sys.exit(2)
