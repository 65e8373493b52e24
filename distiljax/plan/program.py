"""The train step of a config on abstract arrays: shapes and shardings, no weights."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from distiljax.data.metadata import METADATA_FILE, Metadata
from distiljax.distill.config import check_ranges
from distiljax.distill.masking import Masking
from distiljax.distill.runs import checked, named_dtype, run_student, with_kernels
from distiljax.distill.step import PROJECTION, Distillation, Models, Recipe, make_train_step
from distiljax.errors import UserError
from distiljax.hub import files
from distiljax.nn import EncoderConfig, MaskedLM
from distiljax.nn.linear import compute_params
from distiljax.train.load import is_run
from distiljax.train.optimizer import make_optimizer
from distiljax.train.parallel import AXIS, Parallel
from distiljax.train.run import MODEL, read_json
from distiljax.train.state import TrainState

Params = Any

_BERT = EncoderConfig()  # bert-base-uncased
_DISTILBERT = EncoderConfig(num_layers=6, type_vocab_size=0, drop_attention_output=False)
_LARGE = {"hidden_size": 1024, "num_layers": 24, "num_heads": 16, "intermediate_size": 4096}
# The config.json of models that everyone uses, so that planning for them needs no network.
WELL_KNOWN = {
    "bert-base-uncased": _BERT,
    "bert-base-cased": _BERT.replace(vocab_size=28_996),
    "bert-base-multilingual-uncased": _BERT.replace(vocab_size=105_879),
    "bert-base-multilingual-cased": _BERT.replace(vocab_size=119_547),
    "bert-base-chinese": _BERT.replace(vocab_size=21_128),
    "bert-base-german-cased": _BERT.replace(vocab_size=30_000),
    "bert-large-uncased": _BERT.replace(**_LARGE),
    "bert-large-cased": _BERT.replace(vocab_size=28_996, **_LARGE),
    "bert-large-uncased-whole-word-masking": _BERT.replace(**_LARGE),
    "distilbert-base-uncased": _DISTILBERT,
    "distilbert-base-cased": _DISTILBERT.replace(vocab_size=28_996),
    "distilbert-base-multilingual-cased": _DISTILBERT.replace(vocab_size=119_547),
}
_OWNERS = ("google-bert/", "distilbert/", "distilbert-base/")


@dataclasses.dataclass(frozen=True)
class Program:
    """What a config trains, and on how much.

    Attributes:
      models, recipe, masking, optimizer, schedule: as the run has them.
      params: shapes of the trained parameters.
      teacher_params: shapes of the teacher's, None without one.
      batch_size: rows of an optimiser step.
      seq_len: tokens of a row.
      micro_batch_size: as configured; 0 = a device's whole share.
      model_axis: over how many devices a teacher is spread.
      known_from: where the shape of the teacher (of the model) was found, in words.
      steps: optimiser steps of the run; None where they cannot be told.
      steps_from: what `steps` was told from, in words.
    """

    models: Models
    recipe: Recipe
    masking: Masking
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    params: Params
    teacher_params: Params | None
    batch_size: int
    seq_len: int
    micro_batch_size: int
    model_axis: int
    known_from: str
    steps: int | None
    steps_from: str

    def share(self, devices: int) -> int:
        """Rows of a device (of a group of `model_axis` devices).

        Raises:
          UserError: they do not divide.
        """
        if devices % self.model_axis:
            raise UserError(f"{devices} devices do not divide by parallel.model {self.model_axis}")
        groups = devices // self.model_axis
        if self.batch_size % groups:
            raise UserError(
                f"batch_size {self.batch_size} does not divide by {groups} devices; choose a multiple of {groups}"
            )
        share = self.batch_size // groups
        if self.micro_batch_size and share % self.micro_batch_size:
            raise UserError(
                f"batch_size {self.batch_size} does not divide by {groups} devices × micro_batch_size "
                f"{self.micro_batch_size}; choose a micro_batch_size that divides {share}"
            )
        return share

    def lower(self, devices: list[Any], micro_batch_size: int) -> jax.stages.Lowered:
        """The step for `devices`, with its shardings and with its state donated, ready to be compiled."""
        parallel = Parallel("jit", devices, self.model_axis)
        step = make_train_step(
            Distillation(self.models, self.recipe, self.masking),
            self.optimizer,
            self.schedule,
            micro_batches=self.batch_size // parallel.devices // micro_batch_size,
        )
        whole, split = NamedSharding(parallel.mesh, P()), NamedSharding(parallel.mesh, P(AXIS))

        def placed(tree: Any, sharding: NamedSharding = whole) -> Any:
            return jax.tree.map(lambda x: _abstract(x, sharding), tree)

        teacher = jax.tree.map(_abstract, self.teacher_params, parallel.model_sharding(self.teacher_params))
        weights = jax.ShapeDtypeStruct((self.models.student.config.vocab_size,), jnp.float32)
        rows = jax.ShapeDtypeStruct((self.batch_size, self.seq_len), jnp.int32)
        batch = dict.fromkeys(("input_ids", "segment_ids", "positions"), rows)
        state = jax.eval_shape(lambda params: TrainState.create(params, self.optimizer), self.params)
        seed = jax.ShapeDtypeStruct((), jnp.uint32)
        frozen = {"teacher": teacher, "masking_weights": placed(weights), "seed": placed(seed)}
        wrapped: Any = parallel.wrap(step, donate=True)
        return wrapped.lower(placed(state), frozen, placed(batch, split))


def _abstract(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def load_program(config: ConfigDict, tokens: float = 0.0) -> Program:
    """What the config of a distill or pretrain run computes; of a model only its config.json is read.

    Args:
      config: of `distiljax.distill_config` or `distiljax.pretrain_config`.
      tokens: of the corpus, padding not counted, to tell the length of the run by; 0 = not known.

    Raises:
      UserError: bad input.
    """
    check_ranges(config)
    dtype = named_dtype("dtype", config.dtype)
    if config.get("teacher"):
        shape, known_from = encoder_config(config.teacher)
        teacher = MaskedLM(shape, named_dtype("teacher_dtype", config.teacher_dtype or config.dtype))
        # Only the module is wanted: nothing is copied out of a teacher.
        options = ConfigDict(config.student)
        options.initialise = "random"
        student, drawn = run_student(ConfigDict({"student": options, "seed": 0}), teacher, {})
        student, params = student.clone(dtype=dtype), jax.eval_shape(lambda: drawn)
        width, teacher_width = student.config.hidden_size, shape.hidden_size
        if width != teacher_width and config.loss.cos:
            params = {
                **params,
                PROJECTION: {"kernel": jax.ShapeDtypeStruct((width, teacher_width), jnp.float32)},
            }
        models, recipe = Models(student, teacher), checked(Recipe, **config.loss)
    elif config.get("model"):
        shape, known_from = encoder_config(config.model)
        drops = {"hidden_dropout": config.hidden_dropout, "attention_dropout": config.attention_dropout}
        models = Models(MaskedLM(checked(shape.replace, **drops), dtype))
        params, recipe = param_shapes(models.student), Recipe(ce=0.0, mlm=1.0, cos=0.0)
    else:
        raise UserError(
            "the config names neither a teacher nor a model; expected one of a distill or pretrain run"
        )
    seq_len, steps, steps_from = _length(config, tokens)
    positions = models.student.config.max_positions
    if seq_len > positions:
        raise UserError(f"data.seq_len is {seq_len}; expected at most {positions}, the model's positions")
    masking = checked(
        Masking,
        mask_token_id=0,  # which one it is does not change the work
        vocab_size=models.student.config.vocab_size,
        rate=config.masking.rate,
        mask=config.masking.mask,
        random=config.masking.random,
    )
    optimizer, schedule = make_optimizer(config.optimizer, steps or 1000)
    teacher_params = None
    if models.teacher is not None:
        as_read = functools.partial(compute_params, dtype=models.teacher.dtype)
        teacher_params = jax.eval_shape(as_read, param_shapes(models.teacher))
    return Program(
        models=with_kernels(config, models),
        recipe=recipe,
        masking=masking,
        optimizer=optimizer,
        schedule=schedule,
        params=params,
        teacher_params=teacher_params,
        batch_size=config.batch_size,
        seq_len=seq_len,
        micro_batch_size=config.micro_batch_size,
        model_axis=config.parallel.get("model", 1),
        known_from=known_from,
        steps=steps,
        steps_from=steps_from,
    )


def encoder_config(name: str) -> tuple[EncoderConfig, str]:
    """The shape of a model by name, and where it was found: a run, a directory, our table, or the hub.

    Raises:
      UserError: nowhere.
    """
    path = Path(os.path.expanduser(str(name)))
    if is_run(path):
        try:
            return EncoderConfig(**(read_json(path / MODEL) or {})["encoder"]), f"{path / MODEL}"
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path / MODEL} is damaged ({error}); start the run's command again") from error
    known = str(name)
    for owner in _OWNERS:
        known = known.removeprefix(owner)
    if known in WELL_KNOWN and not path.is_dir():
        return WELL_KNOWN[known], "the built-in table of well-known models"
    try:
        directory = files.resolve(name, weights=False)
    except UserError as error:
        raise UserError(f"{error}; or name one of {', '.join(WELL_KNOWN)}") from error
    try:
        return EncoderConfig.from_hf(files.read_config(directory)), str(directory / files.CONFIG)
    except (TypeError, ValueError) as error:
        raise (
            error if isinstance(error, UserError) else UserError(f"{name}: {files.CONFIG}: {error}")
        ) from error


def param_shapes(module: MaskedLM) -> Params:
    """The shapes of a model's parameters."""
    return jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]


def count(params: Params) -> int:
    """How many numbers."""
    return sum(x.size for x in jax.tree.leaves(params))


def _length(config: ConfigDict, tokens: float) -> tuple[int, int | None, str]:
    """Tokens of a row, optimiser steps, and what the steps were told from."""
    seq_len, rows, source = config.data.seq_len, None, ""
    train = os.path.join(config.data_dir, "train") if config.data_dir else ""
    if train and os.path.isfile(os.path.join(train, METADATA_FILE)):
        metadata = Metadata.load(train)
        seq_len, rows = metadata.seq_len, metadata.num_rows
        source = f"{config.epochs:g} epochs of the {rows:,} rows in {train}"
    if config.steps:
        return seq_len, config.steps, "config.steps"
    if tokens:
        rows = round(tokens / (PACKED * seq_len))
        source = f"{config.epochs:g} epochs of {tokens:.3g} tokens in rows that are {100 * PACKED:g} % filled"
    if rows:
        return seq_len, -int(-config.epochs * rows // config.batch_size), source
    return seq_len, None, ""


PACKED = 0.998  # share of the positions of packed rows that hold a token
