"""The loss terms of DistilBERT (Sanh et al. 2019, section 3) as sums over positions and counts of positions.

A term is divided once, after sums and counts have been added over micro-batches, devices and hosts, so the loss
does not depend on how a batch is split.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array


@struct.dataclass
class Term:
    """A loss or metric summed over positions, and how many positions there were (both float32 scalars)."""

    sum: Array
    count: Array


def over_positions(values: Array, weights: Array) -> Term:
    """A quantity of each position summed by the positions' weights, which are also its count."""
    # `where`, not a product: a non-finite value at a position of weight 0 must not reach the sum.
    return Term(jnp.where(weights > 0, values * weights, 0.0).sum(), weights.sum())


def soft_target_loss(
    student_logits: Array, teacher_logits: Array, weights: Array, temperature: float
) -> Term:
    """L_ce: T² · KL(softmax(t/T) ‖ softmax(s/T)), summed over the vocabulary (Hinton et al. 2015, section 2).

    Args:
      student_logits, teacher_logits: [..., V]; no gradient flows to the teacher's.
      weights: [...], 1 where a position counts, else 0.
      temperature: T.
    """
    teacher_logits = jax.lax.stop_gradient(teacher_logits)
    log_student = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature)
    log_teacher = jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / temperature)
    kl = (jnp.exp(log_teacher) * (log_teacher - log_student)).sum(-1)
    return over_positions(temperature**2 * kl, weights)


def masked_lm_loss(logits: Array, labels: Array, weights: Array) -> Term:
    """L_mlm: cross-entropy of the original tokens at masked positions (Devlin et al. 2019, task 1).

    Args:
      logits: [..., V].
      labels: int32 [...].
      weights: [...], 1 at masked positions, else 0.
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    picked = jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
    return over_positions(-picked, weights)


def cosine_loss(student_hidden: Array, teacher_hidden: Array, weights: Array) -> Term:
    """L_cos: 1 − cos(student, teacher) of the last hidden states (Sanh et al. 2019, section 3).

    Args:
      student_hidden, teacher_hidden: [..., E]; no gradient flows to the teacher's.
      weights: [...], 1 where a position counts, else 0.
    """
    student = student_hidden.astype(jnp.float32)
    teacher = jax.lax.stop_gradient(teacher_hidden).astype(jnp.float32)
    # The same guard against vectors of zeros as torch.nn.functional.cosine_embedding_loss.
    norm = jnp.sqrt((jnp.square(student).sum(-1) + 1e-12) * (jnp.square(teacher).sum(-1) + 1e-12))
    return over_positions(1.0 - (student * teacher).sum(-1) / norm, weights)


def logit_mse_loss(student_logits: Array, teacher_logits: Array, weights: Array) -> Term:
    """L_mse: squared difference of the logits, summed over the vocabulary (an option of the original script).

    Args:
      student_logits, teacher_logits: [..., V]; no gradient flows to the teacher's.
      weights: [...], 1 where a position counts, else 0.
    """
    difference = student_logits.astype(jnp.float32) - jax.lax.stop_gradient(teacher_logits).astype(
        jnp.float32
    )
    return over_positions(jnp.square(difference).sum(-1), weights)


def agreement(logits: Array, targets: Array, weights: Array) -> Term:
    """How often the most likely token of `logits` [..., V] is `targets` [...]; a metric, not a loss."""
    return over_positions((jnp.argmax(logits, -1) == targets).astype(jnp.float32), weights)
