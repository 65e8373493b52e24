"""The train step, from token rows to updated parameters (Sanh et al. 2019, section 3).

`pretrain` runs the same step without a teacher: then L_mlm is the only term. What a step minimises is an `Objective`:
here `Distillation`; fine-tuning brings its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import lax

from distiljax.distill.losses import Term, cosine_loss
from distiljax.distill.masking import MaskedRows, Masking, mask_tokens
from distiljax.distill.vocab_loss import Targets, vocabulary_losses
from distiljax.nn import MaskedLM
from distiljax.nn.heads import Decoder
from distiljax.nn.linear import einsum
from distiljax.train.parallel import AXIS
from distiljax.train.state import TrainState

Array = jax.Array
Params = Any

PROJECTION = "cosine_projection"

# Terms that are metrics; the others are losses.
_METRICS = ("mlm_accuracy", "teacher_agreement", "accuracy")


class Objective(Protocol):
    """What a step minimises: terms over the rows of a batch, each a sum that is divided by its own count."""

    def weighted(self) -> Mapping[str, float]:
        """The terms of the loss, with their weights."""

    def rows(self, keys: Array, frozen: Params, batch: dict[str, Array]) -> Any:
        """What the models read of a batch, with one PRNG key a row [B]: a pytree of arrays [B, …]."""

    def tokens(self, rows: Any) -> Array:
        """How many tokens that are not padding."""

    def counts(self, rows: Any) -> dict[str, Array]:
        """How much each term of the loss runs over; known before any forward pass."""

    def loss_and_terms(
        self,
        params: Params,
        frozen: Params,
        rows: Any,
        dropout_keys: Array | None,
        scales: Mapping[str, Array],
    ) -> tuple[Array, dict[str, Term]]:
        """The loss over some of the rows, its terms' sums times their scales, and every term and metric.

        Only the loss is to be differentiated; the terms are for the log.
        """


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The weights of the loss terms; a term of weight 0 is not computed (L_mlm still is, as a metric).

    Attributes:
      ce, mlm, cos, mse: weights of L_ce, L_mlm, L_cos and L_mse.
      temperature: T of L_ce.
      ce_positions: where L_ce and L_mse run: "all" non-padding positions, or "masked" ones only.
    """

    ce: float = 5.0
    mlm: float = 2.0
    cos: float = 1.0
    mse: float = 0.0
    temperature: float = 2.0
    ce_positions: str = "all"

    def __post_init__(self) -> None:
        if min(self.ce, self.mlm, self.cos, self.mse) < 0 or not any((self.ce, self.mlm, self.cos, self.mse)):
            raise ValueError(
                f"loss weights ce {self.ce}, mlm {self.mlm}, cos {self.cos}, mse {self.mse}; "
                "expected none below 0 and one above"
            )
        if self.temperature <= 0:
            raise ValueError(f"loss.temperature is {self.temperature}; expected more than 0")
        if self.ce_positions not in ("all", "masked"):
            raise ValueError(f"loss.ce_positions is {self.ce_positions!r}; expected all or masked")

    def weighted(self) -> dict[str, float]:
        """The terms that are computed, with their weights."""
        weights = {"ce": self.ce, "mlm": self.mlm, "cos": self.cos, "mse": self.mse}
        return {name: weight for name, weight in weights.items() if weight}


@dataclasses.dataclass(frozen=True)
class Models:
    """The two networks; their parameters are passed beside them.

    Attributes:
      student: trained.
      teacher: frozen and in evaluation mode; None for masked-language-model training alone.
    """

    student: MaskedLM
    teacher: MaskedLM | None = None


@dataclasses.dataclass(frozen=True)
class Distillation:
    """The objective of `distill` and, without a teacher, of `pretrain`.

    `frozen` holds the teacher's parameters under `teacher` and the masking weights [V] under `masking_weights`.
    """

    models: Models
    recipe: Recipe
    masking: Masking

    def weighted(self) -> Mapping[str, float]:
        return self.recipe.weighted()

    def rows(self, keys: Array, frozen: Params, batch: dict[str, Array]) -> MaskedRows:
        with jax.named_scope("masking"):
            return mask_tokens(keys, batch, frozen["masking_weights"], self.masking)

    def tokens(self, rows: MaskedRows) -> Array:
        return rows.token_weights.sum()

    def counts(self, rows: MaskedRows) -> dict[str, Array]:
        tokens, masked = rows.token_weights.sum(), rows.masked_weights.sum()
        logits = masked if self.recipe.ce_positions == "masked" else tokens
        return {"ce": logits, "mse": logits, "mlm": masked, "cos": tokens}

    def loss_and_terms(
        self,
        params: Params,
        frozen: Params,
        rows: MaskedRows,
        dropout_keys: Array | None,
        scales: Mapping[str, Array],
    ) -> tuple[Array, dict[str, Term]]:
        teacher = frozen["teacher"]
        return distillation_loss(self.models, self.recipe, params, teacher, rows, dropout_keys, scales)


def distillation_loss(
    models: Models,
    recipe: Recipe,
    params: Params,
    teacher_params: Params,
    rows: MaskedRows,
    dropout_keys: Array | None,
    scales: Mapping[str, Array],
) -> tuple[Array, dict[str, Term]]:
    """The loss over some masked rows, to be differentiated with respect to `params`, and its terms.

    Args:
      models, recipe: what is trained on what.
      params, teacher_params: the teacher's are not read without a teacher.
      rows: B of them.
      dropout_keys: of the student [B]; None for evaluation.
      scales: of each of the recipe's terms: what its sum is multiplied by in the loss, its weight over its count.

    Returns:
      The loss, and the recipe's terms with `mlm_accuracy` and (with a teacher) `teacher_agreement` at the masked
      positions.
    """

    # The names are for profiles: both models' modules are called the same.
    def run(name: str, module: MaskedLM, params: Params, keys: Array | None = None) -> tuple[Array, Decoder]:
        variables = {"params": params}
        with jax.named_scope(name):
            hidden: Any = module.apply(
                variables,
                rows.input_ids,
                positions=rows.positions,
                segment_ids=rows.segment_ids,
                dropout_keys=keys,
                method="encode",
            )
            decoded = (
                hidden if everywhere else jnp.take_along_axis(hidden, rows.masked_positions[..., None], 1)
            )
            decoder: Any = module.apply(variables, decoded, method="decoder")
            return hidden, decoder

    # Without soft targets at all positions only the masked ones are decoded.
    soft = models.teacher is not None and (recipe.ce or recipe.mse)
    everywhere = soft and recipe.ce_positions == "all"
    masked = Targets(rows.labels, rows.masked_weights, rows.masked_weights)
    targets = targets_everywhere(rows) if everywhere else masked

    hidden, decoder = run("student", models.student, params, dropout_keys)
    teacher_hidden = teacher_decoder = None
    if models.teacher is not None:
        # The teacher reads the same masked rows, without dropout and without a gradient.
        teacher_hidden, teacher_decoder = run("teacher", models.teacher, lax.stop_gradient(teacher_params))
    of_vocabulary = {name: scale for name, scale in scales.items() if name != "cos"}
    with jax.named_scope("losses"):
        loss, terms = vocabulary_losses(
            decoder, teacher_decoder, targets, of_vocabulary, temperature=recipe.temperature
        )
    if recipe.cos and teacher_hidden is not None:
        if PROJECTION in params:  # a student narrower than its teacher
            hidden = einsum("bsi,io->bso", hidden, params[PROJECTION]["kernel"], models.student.dtype)
        with jax.named_scope("losses"):
            terms["cos"] = cosine_loss(hidden, teacher_hidden, rows.token_weights)
        loss += scales["cos"] * terms["cos"].sum
    return loss, lax.stop_gradient(terms)


def targets_everywhere(rows: MaskedRows) -> Targets:
    """What the logits of all positions [B, S] are held against."""

    def spread(values: Array) -> Array:  # [B, K] → [B, S]
        empty = jnp.zeros(rows.input_ids.shape, values.dtype)
        return jax.vmap(lambda row, at, x: row.at[at].set(x))(empty, rows.masked_positions, values)

    return Targets(spread(rows.labels), spread(rows.masked_weights), rows.token_weights)


def example_keys(seed: int | Array, step: Array, first: Array, count: int) -> Array:
    """One PRNG key a row, a function of (seed, step, the row's index in the global batch) and nothing else."""
    # Threefry whatever JAX is set to: other generators draw differently on other devices.
    step_key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(step_key, first + jnp.arange(count))


def split_keys(keys: Array) -> tuple[Array, Array]:
    """The masking and the dropout key of each row."""
    both = jax.vmap(jax.random.split)(keys)
    return both[:, 0], both[:, 1]


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    micro_batches: int,
) -> Callable[[TrainState, Params, dict[str, Array]], tuple[TrainState, dict[str, Array]]]:
    """The step of one optimiser update, for `Parallel.wrap`.

    `step(state, frozen, batch) -> (state, metrics)`: `frozen` is what no step changes: what the objective needs, and
    under `seed` that of all draws (uint32; a seed in the program would make another program of it); `batch` holds this
    device's rows, arrays [b, …], where b divides by `micro_batches`; metrics are float32 scalars over the global batch.
    """
    weights = objective.weighted()

    def step(
        state: TrainState, frozen: Params, batch: dict[str, Array]
    ) -> tuple[TrainState, dict[str, Array]]:
        b = batch["input_ids"].shape[0]
        keys = example_keys(frozen["seed"], state.step, lax.axis_index(AXIS) * b, b)
        row_keys, dropout_keys = split_keys(keys)
        rows = objective.rows(row_keys, frozen, batch)

        # Each term is divided by its count over the global batch, so micro-batches simply add up.
        counts = lax.psum(objective.counts(rows), AXIS)
        scales = {name: weight / jnp.maximum(counts[name], 1.0) for name, weight in weights.items()}

        def loss_fn(params: Params, rows: Any, dropout_keys: Array) -> tuple[Array, dict[str, Term]]:
            return objective.loss_and_terms(params, frozen, rows, dropout_keys, scales)

        def accumulate(gradients: Params, micro: tuple[Any, Array]) -> tuple[Params, dict[str, Term]]:
            gradient, terms = jax.grad(loss_fn, has_aux=True)(state.params, *micro)
            return jax.tree.map(jnp.add, gradients, gradient), terms

        micro = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), (rows, dropout_keys))
        gradients, terms = lax.scan(accumulate, jax.tree.map(jnp.zeros_like, state.params), micro)
        terms = jax.tree.map(lambda x: x.sum(0), terms)

        gradients, terms, tokens = lax.psum((gradients, terms, objective.tokens(rows)), AXIS)

        metrics = term_means(objective, terms) | {
            "grad_norm": optax.tree.norm(gradients),
            "learning_rate": schedule(updates_made(state)),
            "tokens": tokens,
        }

        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        # One batch that overflows must not end a run of days: its update is left out, and the loop says so.
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        metrics["skipped"] = 1.0 - finite
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def make_eval_step(
    objective: Objective, *, seed: int
) -> Callable[[Params, Params, Array, dict[str, Array]], dict[str, Term]]:
    """The terms of one batch of held-out rows without dropout and on fixed masks, for `Parallel.wrap`.

    `step(params, frozen, first, batch) -> terms`: what is drawn of a row is a function of (seed, the row's index in
    the corpus), where `first` is the index of the global batch's first row; the terms are over the global batch.
    """

    def step(params: Params, frozen: Params, first: Array, batch: dict[str, Array]) -> dict[str, Term]:
        b = batch["input_ids"].shape[0]
        keys = example_keys(seed, jnp.zeros((), jnp.int32), first + lax.axis_index(AXIS) * b, b)
        row_keys, _ = split_keys(keys)
        rows = objective.rows(row_keys, frozen, batch)
        scales = {name: jnp.asarray(weight) for name, weight in objective.weighted().items()}
        _, terms = objective.loss_and_terms(params, frozen, rows, None, scales)
        return lax.psum(terms, AXIS)

    return step


def updates_made(state: TrainState) -> Array:
    """How many updates the optimiser has made, by which it goes through its schedule: skipped steps made none."""
    return optax.tree.get(state.opt_state, "ScaleByScheduleState").count


def term_means(objective: Objective | Recipe, terms: dict[str, Term]) -> dict[str, Array]:
    """The named means of summed terms: `loss`, `loss_ce`, `loss_mlm`, …, `mlm_accuracy`, `teacher_agreement`."""
    means = {name: term.sum / jnp.maximum(term.count, 1.0) for name, term in terms.items()}
    weighted = objective.weighted()
    metrics = {"loss": jnp.sum(jnp.stack([weight * means[name] for name, weight in weighted.items()]))}
    for name, mean in means.items():
        metrics[name if name in _METRICS else f"loss_{name}"] = mean
    return metrics
