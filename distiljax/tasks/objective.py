"""What fine-tuning minimises: the labels' loss, and the soft targets of a fine-tuned teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from distiljax.distill.losses import Term, agreement, masked_lm_loss, over_positions, soft_target_loss
from distiljax.nn import TaskModel
from distiljax.nn.heads import ANSWERS, SEQUENCES, TOKENS

Array = jax.Array
Params = Any

# What a logit of padding is taken for: its probability is 0, and differences of two of them stay finite.
_NEVER = -1e9


@dataclasses.dataclass(frozen=True)
class TaskLoss:
    """The weights of the loss terms; a term of weight 0 is not computed (the labels' still is, as a metric).

    Attributes:
      label: of the labels: cross-entropy, or the squared error of a regression.
      soft: of the teacher's soft targets; for a regression the squared difference to its numbers.
      temperature: T of the soft targets.
    """

    label: float = 1.0
    soft: float = 0.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if min(self.label, self.soft) < 0 or not (self.label or self.soft):
            raise ValueError(
                f"loss weights label {self.label}, soft {self.soft}; expected none below 0 and one above"
            )
        if self.temperature <= 0:
            raise ValueError(f"loss.temperature is {self.temperature}; expected more than 0")

    def weighted(self) -> dict[str, float]:
        """The terms that are computed, with their weights."""
        weights = {"label": self.label, "soft": self.soft}
        return {name: weight for name, weight in weights.items() if weight}


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """The objective of `finetune`, on the batches of `Features.batch`.

    `frozen` holds the teacher's parameters under `teacher`; where its logits were computed before, they are in the
    batch under `teacher_logits`.
    """

    model: TaskModel
    teacher: TaskModel | None
    loss: TaskLoss

    def weighted(self) -> Mapping[str, float]:
        return self.loss.weighted()

    def rows(self, keys: Array, frozen: Params, batch: dict[str, Array]) -> dict[str, Array]:
        del keys, frozen  # nothing is drawn
        return batch

    def tokens(self, rows: dict[str, Array]) -> Array:
        return rows["attention_mask"].sum().astype(jnp.float32)

    def counts(self, rows: dict[str, Array]) -> dict[str, Array]:
        return {"label": self._labelled(rows).sum(), "soft": self._real(rows).sum()}

    def loss_and_terms(
        self,
        params: Params,
        frozen: Params,
        rows: dict[str, Array],
        dropout_keys: Array | None,
        scales: Mapping[str, Array],
    ) -> tuple[Array, dict[str, Term]]:
        logits = run(self.model, params, rows, dropout_keys)
        terms = self.label_terms(logits, rows)
        if self.loss.soft:
            if "teacher_logits" in rows:
                teacher_logits = rows["teacher_logits"]
            else:
                assert self.teacher is not None
                teacher_logits = run(self.teacher, lax.stop_gradient(frozen["teacher"]), rows, None)
            terms |= self.soft_terms(logits, teacher_logits, rows)
        loss = jnp.sum(jnp.stack([scale * terms[name].sum for name, scale in scales.items()]))
        return loss, lax.stop_gradient(terms)

    def label_terms(self, logits: Array, rows: dict[str, Array]) -> dict[str, Term]:
        """The labels' loss and (but for regression) the accuracy."""
        labels, weights = rows["labels"], self._labelled(rows)
        if self.model.head.regression:
            return {"label": over_positions(jnp.square(logits[..., 0] - labels), weights)}
        if self.model.head.kind == ANSWERS:
            # The loss of a span is the mean of its two ends' (Devlin et al. 2019, section 4.2).
            logits, weights = _ends(logits, rows), weights[:, None]
            right = (logits.argmax(-1) == labels).all(-1, keepdims=True)
            losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]
            return {
                "label": over_positions(losses.mean(-1, keepdims=True), weights),
                "accuracy": over_positions(right.astype(jnp.float32), weights),
            }
        labels = jnp.maximum(labels, 0)
        return {
            "label": masked_lm_loss(logits, labels, weights),
            "accuracy": agreement(logits, labels, weights),
        }

    def soft_terms(self, logits: Array, teacher_logits: Array, rows: dict[str, Array]) -> dict[str, Term]:
        """The soft targets' loss over everything that is not padding, and how often both prefer the same."""
        weights = self._real(rows)
        if self.model.head.regression:
            return {"soft": over_positions(jnp.square(logits - teacher_logits)[..., 0], weights)}
        if self.model.head.kind == ANSWERS:
            logits, teacher_logits = _ends(logits, rows), _ends(teacher_logits, rows)
            # Two distributions a row, each worth a half of it.
            weights = jnp.repeat(weights[:, None] / 2, 2, axis=1)
        return {
            "soft": soft_target_loss(logits, teacher_logits, weights, self.loss.temperature),
            "teacher_agreement": agreement(logits, teacher_logits.argmax(-1), weights),
        }

    def _labelled(self, rows: dict[str, Array]) -> Array:
        """1 where there is a label, else 0: [B], of tokens [B, S]."""
        if self.model.head.kind == SEQUENCES and not self.model.head.regression:
            return ((rows["row"] >= 0) & (rows["labels"] >= 0)).astype(jnp.float32)
        if self.model.head.kind == TOKENS:
            return (rows["labels"] >= 0).astype(jnp.float32)
        return (rows["row"] >= 0).astype(jnp.float32)

    def _real(self, rows: dict[str, Array]) -> Array:
        """1 for what is no filler and no padding, else 0: [B], of tokens [B, S]."""
        if self.model.head.kind == TOKENS:
            return (rows["attention_mask"] > 0).astype(jnp.float32)
        return (rows["row"] >= 0).astype(jnp.float32)


def run(module: TaskModel, params: Params, rows: dict[str, Array], dropout_keys: Array | None) -> Array:
    """The model's logits on a batch of `Features.batch`, float32; see `TaskModel`."""
    logits: Any = module.apply(
        {"params": params},
        rows["input_ids"],
        attention_mask=rows["attention_mask"],
        token_type_ids=rows["token_type_ids"],
        dropout_keys=dropout_keys,
    )
    return logits


def _ends(logits: Array, rows: dict[str, Array]) -> Array:
    """Logits of starts and ends, [B, S, 2] → [B, 2, S], without those of padding."""
    return jnp.where(rows["attention_mask"][:, None, :] > 0, jnp.moveaxis(logits, -1, 1), _NEVER)
