"""L_ce, L_mse and L_mlm (Sanh et al. 2019, section 3) without the logits of all positions.

The decoder of a masked LM is a third of a step's work, and its logits [positions, V] would be most of its memory. Here
a chunk of positions at a time goes through both models' decoders, and where a gradient is asked for it is computed at
once, while the chunk's logits are at hand (the fused linear losses of Hsu et al. 2024, Liger Kernel, section 3.2).
Nothing is kept for the backward pass but the gradient itself, and no product is computed twice.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from distiljax.distill.losses import Term, over_positions
from distiljax.nn.heads import Decoder
from distiljax.nn.linear import einsum
from distiljax.nn.target import target_platform

Array = jax.Array

# Logits that a chunk holds of one model: enough positions for the products to run at full speed, and for the gradient
# of the embedding, which every chunk adds to, to cost little beside them.
CHUNK_LOGITS = 2**26
CHUNK_LOGITS_CPU = 2**24
# By the TPU compiler's estimates, for v4 to v6e; see BENCHMARKS.md.
CHUNK_LOGITS_TPU = 24_000_000
# On a CPU, logits that are gone through at once: what is made of them on the way to the gradient stays in its cache.
CACHED_LOGITS_CPU = 2**18
# XLA:CPU multiplies bfloat16 on its fast units if two axes are summed over, not if it is one.
GROUPS = 8


@struct.dataclass
class Targets:
    """What the student's logits are held against, position by position.

    Attributes:
      labels: int32 [...], the original tokens.
      masked: [...], 1 where L_mlm and the metrics run, else 0.
      soft: [...], 1 where L_ce and L_mse run, else 0.
    """

    labels: Array
    masked: Array
    soft: Array


def vocabulary_losses(
    student: Decoder,
    teacher: Decoder | None,
    targets: Targets,
    scales: Mapping[str, Array],
    *,
    temperature: float,
    chunk: int = 0,
) -> tuple[Array, dict[str, Term]]:
    """The part of the loss that is taken over the vocabulary.

    Equal to `soft_target_loss`, `logit_mse_loss` and `masked_lm_loss` of the logits, and to their gradients with
    respect to the student's states, embedding and bias.

    Args:
      student: with states [..., E].
      teacher: of the same positions; no gradient flows to it. None for L_mlm alone.
      targets: of the positions.
      scales: what the sums of `ce`, `mse` and `mlm` are multiplied by in the loss; a term that is not there is not
        computed (L_mlm is, as a metric).
      temperature: T of L_ce.
      chunk: positions at once; 0 for as many as the backend computes well.

    Returns:
      The sum of the scaled terms, and the terms with `mlm_accuracy` and (with a teacher) `teacher_agreement` at the
      masked positions. Only the first is differentiable, and not with respect to the scales.
    """
    student, targets = _flat(student), jax.tree.map(jnp.ravel, targets)
    teacher, targets = lax.stop_gradient((teacher and _flat(teacher), targets))
    positions, vocabulary = len(student.states), len(student.embedding)
    most = {"cpu": CHUNK_LOGITS_CPU, "tpu": CHUNK_LOGITS_TPU}.get(target_platform(), CHUNK_LOGITS)
    chunks = math.ceil(positions / (chunk or math.ceil(most / vocabulary)))
    if not scales:
        student = lax.stop_gradient(student)  # metrics alone: no gradient to compute
    return _losses(chunks, temperature, student, teacher, targets, dict(scales))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _losses(
    chunks: int,
    temperature: float,
    student: Decoder,
    teacher: Decoder | None,
    targets: Targets,
    scales: dict[str, Array],
) -> tuple[Array, dict[str, Term]]:
    decoders = _cast(student), _cast(teacher)

    def body(_: None, xs: Any) -> tuple[None, dict[str, Term]]:
        return None, _of_chunk(decoders, xs, scales, temperature, differentiate=False)[0]

    _, terms = lax.scan(body, None, _cut(chunks, student, teacher, targets))
    return _total(terms, scales)


def _forward(
    chunks: int,
    temperature: float,
    student: Decoder,
    teacher: Decoder | None,
    targets: Targets,
    scales: dict[str, Array],
) -> tuple[tuple[Array, dict[str, Term]], Decoder]:
    decoders = _cast(student), _cast(teacher)

    def body(sums: tuple[Array, Array], xs: Any) -> tuple[tuple[Array, Array], tuple[dict[str, Term], Array]]:
        terms, gradient, bias = _of_chunk(decoders, xs, scales, temperature, differentiate=True)
        grouped, inputs = (x.reshape(GROUPS, -1, x.shape[-1]) for x in (gradient, xs[0]))
        embedding = sums[0] + einsum("gne,gnv->ev", inputs, grouped, student.dtype)
        states = einsum("nv,ve->ne", gradient, decoders[0].embedding, student.dtype)
        return (embedding, sums[1] + bias), (terms, states.astype(student.states.dtype))

    zeros = (
        jnp.zeros(student.embedding.shape[::-1], jnp.float32),
        jnp.zeros(student.bias.shape, jnp.float32),
    )
    (embedding, bias), (terms, states) = lax.scan(body, zeros, _cut(chunks, student, teacher, targets))
    # XLA:CPU would make one product of product and transpose, and cannot compute that one in bfloat16.
    embedding = lax.optimization_barrier(embedding).T
    states = states.reshape(-1, states.shape[-1])[: len(student.states)]
    return _total(terms, scales), dataclasses.replace(student, states=states, embedding=embedding, bias=bias)


def _backward(chunks: int, temperature: float, gradient: Decoder, cotangents: Any) -> tuple[Any, ...]:
    del chunks, temperature
    return jax.tree.map(lambda x: (cotangents[0] * x).astype(x.dtype), gradient), None, None, None


_losses.defvjp(_forward, _backward)


def _flat(decoder: Decoder) -> Decoder:
    return dataclasses.replace(decoder, states=decoder.states.reshape(-1, decoder.states.shape[-1]))


def _cast(decoder: Decoder | None) -> Any:
    """The decoder with its embedding in the compute dtype: once, not once a chunk."""
    return decoder and dataclasses.replace(decoder, embedding=decoder.embedding.astype(decoder.dtype))


def _cut(chunks: int, student: Decoder, teacher: Decoder | None, targets: Targets) -> Any:
    """States and targets as [chunks, n, …], filled up with positions of weight 0."""
    arrays = (student.states, None if teacher is None else teacher.states, targets)
    fill = -len(student.states) % (chunks * GROUPS)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, fill),) + ((0, 0),) * (x.ndim - 1)) if fill else x
        return x.reshape(chunks, -1, *x.shape[1:])

    return jax.tree.map(cut, arrays)


def _of_chunk(
    decoders: tuple[Decoder, Decoder | None],
    xs: Any,
    scales: dict[str, Array],
    temperature: float,
    *,
    differentiate: bool,
) -> tuple[dict[str, Term], Any, Any]:
    """The terms over a chunk, and the gradients (or None) with respect to its logits [n, V] and to the bias [V]."""
    *states, targets = xs
    products = [
        model and einsum("ne,ve->nv", x, model.embedding, model.dtype)
        for model, x in zip(decoders, states, strict=True)
    ]
    biases = [model and model.bias for model in decoders]

    def body(total: Any, some: Any) -> tuple[Any, Any]:
        student, teacher, targets = some
        logits = _Logits(student, teacher, targets, biases, scales, temperature)
        gradient = logits.gradient() if differentiate else None
        return jax.tree.map(jnp.add, total, gradient), (logits.terms(), gradient)

    n, vocabulary = len(targets.labels), len(decoders[0].bias)
    rows = _rows_at_once(n, vocabulary)
    total = jnp.zeros((rows, vocabulary)) if differentiate else None
    some = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), (*products, targets))
    total, (terms, gradient) = lax.scan(body, total, some)
    return (
        jax.tree.map(lambda x: x.sum(0), terms),
        jax.tree.map(lambda x: x.reshape(n, vocabulary), gradient),
        jax.tree.map(lambda x: x.sum(0), total),
    )


def _rows_at_once(n: int, vocabulary: int) -> int:
    """Of how many of n positions to go through the logits at once."""
    if target_platform() != "cpu":
        return n
    most = min(max(CACHED_LOGITS_CPU // vocabulary, GROUPS), n)
    return max(rows for rows in range(1, most + 1) if n % rows == 0)


def _total(terms: dict[str, Term], scales: dict[str, Array]) -> tuple[Array, dict[str, Term]]:
    """The scaled sum of the terms, and the terms, from those of the chunks."""
    terms = jax.tree.map(lambda x: x.sum(0), terms)
    return sum((scale * terms[name].sum for name, scale in scales.items()), jnp.zeros(())), terms


class _Logits:
    """The logits of some positions [n, V], and what is made of them."""

    def __init__(
        self,
        student: Array,
        teacher: Any,  # None without one
        targets: Targets,
        biases: Any,  # of both
        scales: dict[str, Array],
        temperature: float,
    ) -> None:
        self.scales, self.targets, self.temperature = scales, targets, temperature
        bias, teacher_bias = biases
        self.student = student + bias
        self.top = self.student.max(-1, keepdims=True)
        self.exp = jnp.exp(self.student - self.top)
        self.sum = self.exp.sum(-1, keepdims=True)
        self.teacher: Any = None
        if teacher is not None:
            self.teacher = teacher + teacher_bias
            self.teacher_top = self.teacher.max(-1, keepdims=True)
            if "ce" in scales:
                self.soft = jnp.exp((self.student - self.top) / temperature)
                self.soft_sum = self.soft.sum(-1, keepdims=True)
                self.teacher_soft = jnp.exp((self.teacher - self.teacher_top) / temperature)
                self.teacher_soft_sum = self.teacher_soft.sum(-1, keepdims=True)

    def terms(self) -> dict[str, Term]:
        """The terms over the positions."""
        T, targets = self.temperature, self.targets
        label = jnp.take_along_axis(self.student, targets.labels[:, None], -1)
        nll = jnp.log(self.sum) + self.top - label
        terms = {
            "mlm": over_positions(nll[:, 0], targets.masked),
            "mlm_accuracy": over_positions((label >= self.top).astype(jnp.float32)[:, 0], targets.masked),
        }
        if self.teacher is None:
            return terms
        same = ((self.student >= self.top) & (self.teacher >= self.teacher_top)).any(-1)
        terms["teacher_agreement"] = over_positions(same.astype(jnp.float32), targets.masked)
        if "ce" in self.scales:
            # log of teacher's over student's probability: of each word, then of the whole vocabulary.
            words = (self.teacher - self.teacher_top - self.student + self.top) / T
            mean = (self.teacher_soft * words).sum(-1, keepdims=True) / self.teacher_soft_sum
            kl = mean + jnp.log(self.soft_sum) - jnp.log(self.teacher_soft_sum)
            terms["ce"] = over_positions(T**2 * kl[:, 0], targets.soft)
        if "mse" in self.scales:
            terms["mse"] = over_positions(jnp.square(self.student - self.teacher).sum(-1), targets.soft)
        return terms

    def gradient(self) -> Array:
        """The scaled loss differentiated with respect to the student's logits, float32 [n, V]."""
        targets, gradient = self.targets, jnp.zeros(())
        if "mlm" in self.scales:
            label = jnp.arange(self.student.shape[-1]) == targets.labels[:, None]
            gradient += self._weighted("mlm", targets.masked, self.exp / self.sum - label)
        if "ce" in self.scales:
            difference = self.soft / self.soft_sum - self.teacher_soft / self.teacher_soft_sum
            gradient += self._weighted("ce", targets.soft, self.temperature * difference)
        if "mse" in self.scales:
            gradient += self._weighted("mse", targets.soft, 2 * (self.student - self.teacher))
        return jnp.broadcast_to(gradient, self.student.shape)

    def _weighted(self, name: str, weights: Array, gradient: Array) -> Array:
        # As in `over_positions`: what is not finite at a position of weight 0 stays there.
        weights = weights[:, None]
        return jnp.where(weights > 0, self.scales[name] * weights * gradient, 0.0)
