"""`distill` and `pretrain`: from a config to a finished run directory."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from distiljax.data import Metadata, RowLoader, remote
from distiljax.data.metadata import METADATA_FILE
from distiljax.data.watch import prepare_watched
from distiljax.distill.config import check_ranges
from distiljax.distill.evaluator import Evaluator, full_counts
from distiljax.distill.masking import Masking, masking_weights
from distiljax.distill.step import PROJECTION, Distillation, Models, Objective, Recipe, make_train_step
from distiljax.distill.student import Params, student_of
from distiljax.errors import UserError
from distiljax.hub import check_vocabulary, vocabulary_size
from distiljax.nn import EncoderConfig, MaskedLM, kernels
from distiljax.nn.linear import compute_params
from distiljax.train import distributed, storage
from distiljax.train.format import human_count
from distiljax.train.load import from_pretrained, load_tokenizer
from distiljax.train.loop import Outcome, Schedule, run_loop
from distiljax.train.optimizer import make_optimizer
from distiljax.train.parallel import Parallel
from distiljax.train.run import RESULT, machine, open_run, read_json, write_json, write_model, write_tokenizer
from distiljax.train.state import TrainState

log = logging.getLogger(__name__)

POSITION_TABLE = ("encoder", "embeddings", "position", "embedding")

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
      workdir: its directory, which `from_pretrained`, `evaluate` and `export` take.
      finished: False if it was told to stop; the same call goes on.
      facts: what result.json holds (or would).
    """

    workdir: Path
    finished: bool
    facts: dict[str, Any]


def distill(config: ConfigDict, workdir: str | os.PathLike[str]) -> Result:
    """Distil a teacher into a student by the recipe of Sanh et al. 2019.

    Runs to the end, or goes on from the newest checkpoint of `workdir`; a finished run is returned as it is.

    Args:
      config: see `distiljax.distill_config`.
      workdir: the run directory.

    Raises:
      UserError: bad input, in one line.
    """
    check_ranges(config)
    with open_together(workdir, config, "distill") as path:
        return finished(path) or _distill(config, path)


def _distill(config: ConfigDict, path: Path) -> Result:
    dtype = named_dtype("dtype", config.dtype)
    teacher, teacher_params = from_pretrained(
        config.teacher, dtype=named_dtype("teacher_dtype", config.teacher_dtype or config.dtype)
    )
    tokenizer = load_tokenizer(config.tokenizer or config.teacher)
    check_vocabulary(tokenizer, teacher.config, str(config.teacher))
    student, params = run_student(config, teacher, teacher_params)
    student = student.clone(dtype=dtype)
    width, teacher_width = student.config.hidden_size, teacher.config.hidden_size
    if width != teacher_width and config.loss.cos:
        kernel = jax.random.normal(jax.random.key(config.seed), (width, teacher_width)) * width**-0.5
        params = {**params, PROJECTION: {"kernel": np.asarray(kernel)}}
    recipe = checked(Recipe, **config.loss)
    return _run(config, path, "distill", tokenizer, Models(student, teacher), recipe, params, teacher_params)


def run_student(config: ConfigDict, teacher: MaskedLM, teacher_params: Params) -> tuple[MaskedLM, Params]:
    """The student of a distillation run before its first step."""
    options = dict(config.student)
    layers = options.pop("layers")
    layers = None if layers == 0 and layers is not False else layers
    return student_of(teacher, teacher_params, layers, **options, seed=config.seed)


def pretrain(config: ConfigDict, workdir: str | os.PathLike[str]) -> Result:
    """Train or adapt a masked language model; one without a head gets a fresh one.

    The same step as `distill` without a teacher. A fresh head's decoder bias starts at the logarithm of the token
    frequencies at masked positions, so that training need not spend its first steps on learning them.

    Args:
      config: see `distiljax.pretrain_config`.
      workdir: the run directory.

    Raises:
      UserError: bad input, in one line.
    """
    check_ranges(config)
    with open_together(workdir, config, "pretrain") as path:
        return finished(path) or _pretrain(config, path)


def _pretrain(config: ConfigDict, path: Path) -> Result:
    dtype = named_dtype("dtype", config.dtype)
    model, params = from_pretrained(config.model, dtype=dtype, init_head=True, seed=config.seed)
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    check_vocabulary(tokenizer, model.config, str(config.model))
    drops = {"hidden_dropout": config.hidden_dropout, "attention_dropout": config.attention_dropout}
    model = model.clone(config=checked(model.config.replace, **drops))
    recipe = Recipe(ce=0.0, mlm=1.0, cos=0.0)
    return _run(config, path, "pretrain", tokenizer, Models(model), recipe, params, None)


@contextlib.contextmanager
def open_together(workdir: str | os.PathLike[str], config: ConfigDict, kind: str) -> Iterator[Path]:
    """`open_run` in process 0, for all processes of the run.

    Raises:
      UserError: as `open_run`; or a directory that is not the same for all processes.
    """
    path = storage.as_path(workdir)
    with contextlib.ExitStack() as stack:

        def open_it() -> str:
            stack.enter_context(open_run(workdir, config, kind))
            return distributed.leave_token(path)

        token = distributed.from_first(open_it)
        distributed.check_token(path, token)
        yield path


def finished(path: Path) -> Result | None:
    """The result of a run directory whose run is finished, for all processes of the run.

    Raises:
      UserError: it is damaged.
    """
    facts = distributed.from_first(lambda: read_json(path / RESULT))
    if facts is None:
        return None
    scored = facts.get("best") or facts.get("validation")
    if "steps" not in facts or not isinstance(scored, dict) or "loss" not in scored:
        raise UserError(f"{path / RESULT} is damaged; delete it, and the same command writes it again")
    log.info("%s holds a finished run of this config; nothing to do", path)
    return Result(path, True, facts)


def _run(
    config: ConfigDict,
    path: Path,
    kind: str,
    tokenizer: Any,
    models: Models,
    recipe: Recipe,
    params: Params,
    teacher_params: Params | None,
) -> Result:
    parallel = Parallel(config.parallel.mode, model=config.parallel.model)
    micro_batches = count_micro_batches(config, parallel.devices)
    masking = checked(
        Masking,
        mask_token_id=tokenizer.mask_token_id,
        vocab_size=vocabulary_size(tokenizer),
        rate=config.masking.rate,
        mask=config.masking.mask,
        random=config.masking.random,
    )
    models, platform = with_kernels(config, models), parallel.mesh.devices.flat[0].platform
    rows, spread = config.batch_size // parallel.devices // micro_batches, parallel.model > 1
    if not config.data_dir:
        _check_length(config.data.seq_len, models)
        kernels_in_words(models, platform, rows, [config.data.seq_len], spread=spread)
    if distributed.first():
        write_tokenizer(path, tokenizer)
        write_model(
            path,
            kind=kind,
            head="masked_lm",
            encoder=dataclasses.asdict(models.student.config),
            source=config.get("teacher") or config.get("model"),
        )
    directory, corpora = prepare_corpus(config, path, tokenizer)
    train_rows, held_out, metadata = directory / "train", directory / "validation", corpora["train"]

    def batches(start: int) -> RowLoader:
        return RowLoader(
            train_rows,
            config.batch_size,
            config.seed,
            weights=metadata.weights,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            start=start,
        )

    loader = batches(0)  # refuses a corpus of less than one batch
    _check_length(metadata.seq_len, models)
    attention = kernels_in_words(models, platform, rows, [metadata.seq_len], spread=spread)
    total_steps = config.steps or loader.steps(config.epochs)
    counts = full_counts(metadata.token_counts(train_rows), models.student.config.vocab_size)
    weights, eval_weights = (
        masking_weights(counts, tokenizer.all_special_ids, smoothing)
        for smoothing in (config.masking.smoothing, config.eval.smoothing)
    )
    if kind == "pretrain" and _is_fresh(params["head"]):
        params["head"]["bias"] = unigram_bias(counts * weights)
    placed_teacher = parallel.place_teacher(
        compute_params(teacher_params, (models.teacher or models.student).dtype)
    )
    frozen = {"teacher": placed_teacher, "masking_weights": parallel.replicate(weights)}
    eval_frozen = {"teacher": placed_teacher, "masking_weights": parallel.replicate(eval_weights)}

    objective = Distillation(models, recipe, masking)
    evaluator = Evaluator(objective, parallel, config.eval.batch_size or config.batch_size // micro_batches)
    log_start(config, kind, models, params, parallel)
    log.info("attention: %s", attention)
    log_steps(config, total_steps, micro_batches, loader.steps_per_epoch, loader.num_rows)
    outcome = fit(
        config,
        path,
        description="distilling" if kind == "distill" else "training",
        objective=objective,
        encoder=models.student.config,
        params=params,
        frozen=frozen,
        parallel=parallel,
        total_steps=total_steps,
        batches=batches,
        whole_batch=loader.whole_batch,
        evaluate=lambda params: evaluator(params, eval_frozen, held_out, config.eval.rows),
    )
    facts = run_facts(kind, outcome, params, teacher_params)
    if outcome.finished and distributed.first():
        write_json(path / RESULT, facts)
    return Result(path, outcome.finished, facts)


def fit(
    config: ConfigDict,
    workdir: Path,
    *,
    description: str,
    objective: Objective,
    encoder: EncoderConfig,
    params: Params,
    frozen: Params,
    parallel: Parallel,
    total_steps: int,
    **data: Any,
) -> Outcome:
    """Train parameters towards an objective by the settings that all training commands share.

    Args:
      config: `optimizer`, `batch_size`, `micro_batch_size`, `seed`, `log_every`, `eval.every`, `checkpoint` and
        `max_nonfinite_steps` are read.
      workdir: the run directory.
      description: for the progress bar.
      objective: what a step minimises.
      encoder: the shape of what is trained.
      params: before the first step, on the host.
      frozen: what the objective needs besides, on the devices.
      parallel: the devices.
      total_steps: optimiser steps.
      **data: `batches`, `whole_batch`, `evaluate` and perhaps `rank` and `validate_start` of `run_loop`.
    """
    fixed = {POSITION_TABLE} if encoder.position_kind == "sinusoidal" else set()
    optimizer, learning_rate = make_optimizer(config.optimizer, total_steps, fixed)
    micro_batches = count_micro_batches(config, parallel.devices)
    frozen = {**frozen, "seed": parallel.replicate(np.uint32(config.seed))}
    step = parallel.wrap(
        make_train_step(objective, optimizer, learning_rate, micro_batches=micro_batches),
        donate=True,
    )
    return run_loop(
        description=description,
        workdir=workdir,
        schedule=Schedule(
            total_steps,
            config.log_every,
            config.eval.every,
            config.checkpoint.every,
            config.checkpoint.keep,
            config.max_nonfinite_steps,
        ),
        parallel=parallel,
        state=jax.device_get(TrainState.create(params, optimizer)),
        step=lambda state, rows: step(state, frozen, rows),
        **data,
    )


def with_kernels(config: ConfigDict, models: Any) -> Any:
    """The student and the teacher with the run's choice of attention kernels, the student with its `remat`."""
    changes = {"student": models.student.clone(attention=config.attention, remat=config.remat)}
    if models.teacher is not None:
        changes["teacher"] = models.teacher.clone(attention=config.attention)
    return dataclasses.replace(models, **changes)


def kernels_in_words(
    models: Any,
    platform: str,
    rows: int,
    seq_lens: Sequence[int],
    *,
    capable: bool | None = None,
    spread: bool = False,
) -> str:
    """Which kernels compute the attention of student and teacher on so many rows of these lengths, and why.

    `platform`, `capable` and `spread` are those of `kernels.choose`.

    Raises:
      UserError: `attention` is unknown, or is fused where it cannot be.
    """
    options = {"platform": platform, "rows": rows, "seq_lens": seq_lens, "capable": capable, "spread": spread}
    kernel, why = checked(kernels.choose_for, models.student, training=True, **options)
    words = [f"student {kernel} ({why})"]
    if models.teacher is not None:
        kernel, why = checked(kernels.choose_for, models.teacher, training=False, **options)
        words.append(f"teacher {kernel} ({why})")
    return ", ".join(words)


def prepare_corpus(config: ConfigDict, workdir: Path, tokenizer: Any) -> tuple[Path, dict[str, Metadata]]:
    """The directory of the training and held-out rows, prepared now or before, and what is in it.

    Process 0 prepares, while the others wait. Of rows that are remote every machine keeps a copy.
    """
    place = storage.as_path(config.data_dir) if config.data_dir else workdir / "data"

    def prepare() -> list[str]:
        with remote.preparing(place) as directory:
            if not (directory / "train" / METADATA_FILE).is_file():
                log.info("%s has no prepared rows yet; preparing them from %s", place, config.data.source)
            # Whoever names a directory means what is in it, and need not repeat every setting that it was made with.
            return list(prepare_watched(config.data, tokenizer, directory, adopt=bool(config.data_dir)))

    splits = distributed.from_first(prepare)
    directory = remote.local(place)
    distributed.wait_for_all()  # copying may take longer than a first collective waits
    corpora = {split: Metadata.load(directory / split) for split in splits}
    for name, metadata in corpora.items():
        log.info(
            "%s: %s rows of %d, %s tokens, %.1f %% filled",
            name,
            f"{metadata.num_rows:,}",
            metadata.seq_len,
            human_count(metadata.statistics["tokens"]),
            100 * metadata.fill_rate,
        )
    return directory, corpora


def _check_length(seq_len: int, models: Models) -> None:
    positions = models.student.config.max_positions
    if seq_len > positions:
        raise UserError(f"data.seq_len is {seq_len}; expected at most {positions}, the model's positions")


def _is_fresh(head: Params) -> bool:
    """Whether a masked-LM head has never been trained: its bias and its LayerNorm are as they were drawn."""
    norm = head["norm"]
    return not (np.any(head["bias"]) or np.any(norm["bias"]) or np.any(norm["scale"] != 1))


def unigram_bias(counts: np.ndarray) -> np.ndarray:
    """Logarithm of the frequencies [V] of the tokens to predict; tokens that do not occur get half the smallest."""
    smoothed = np.maximum(counts, counts[counts > 0].min() / 2)
    return np.log(smoothed / smoothed.sum()).astype(np.float32)


def count_micro_batches(config: ConfigDict, devices: int) -> int:
    """Micro-batches of one step on each device, from the three numbers that must divide.

    Raises:
      UserError: they do not.
    """
    if config.batch_size % devices:
        raise UserError(
            f"batch_size {config.batch_size} does not divide by {devices} devices; choose a multiple of {devices}"
        )
    share = config.batch_size // devices
    micro = config.micro_batch_size or share
    if share % micro:
        raise UserError(
            f"batch_size {config.batch_size} does not divide by {devices} devices × micro_batch_size {micro}; "
            f"choose a micro_batch_size that divides {share}"
        )
    return share // micro


def named_dtype(key: str, name: str) -> Any:
    """The compute dtype of a config key.

    Raises:
      UserError: another name than float32 and bfloat16.
    """
    if name not in DTYPES:
        raise UserError(f"{key} is {name!r}; expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def checked(make: Callable[..., Any], *values: Any, **fields: Any) -> Any:
    """`make(*values, **fields)`; what it refuses, it refuses as bad input.

    Raises:
      UserError: for its ValueError.
    """
    try:
        return make(*values, **fields)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def count_parameters(params: Params) -> int:
    """How many numbers a model is; the projection of a narrower student is not part of it."""
    return sum(int(np.prod(x.shape)) for name in ("encoder", "head") for x in jax.tree.leaves(params[name]))


def run_facts(kind: str, outcome: Outcome, params: Params, teacher_params: Params | None) -> dict[str, Any]:
    """What result.json says of a run."""
    facts = {
        "kind": kind,
        "steps": outcome.step,
        "skipped_steps": outcome.skipped,
        "tokens": outcome.tokens,
        "seconds": outcome.seconds,
        "programs": outcome.programs,
        "compile_seconds": outcome.compile_seconds,
        "best_step": outcome.best.get("step", outcome.step),
        "start": outcome.start,
        "validation": outcome.last,
        "best": outcome.best,
        "machine": machine(),
        "parameters": count_parameters(params),
    }
    if teacher_params is not None:
        facts["teacher_parameters"] = count_parameters(teacher_params)
    return facts


def log_start(config: ConfigDict, kind: str, models: Any, params: Params, parallel: Parallel) -> None:
    """Say what is trained, and on what."""
    spread = f", each teacher over {parallel.model}" if parallel.model > 1 else ""
    log.info("%s on %s, %s over %d devices%s", kind, machine(), parallel.mode, parallel.devices, spread)
    if models.teacher is not None:
        log.info("teacher: %s, %d layers", config.teacher, models.teacher.config.num_layers)
    log.info(
        "model: %d layers, width %d, %s parameters, %s",
        models.student.config.num_layers,
        models.student.config.hidden_size,
        f"{count_parameters(params):,}",
        config.dtype,
    )


def log_steps(
    config: ConfigDict, total_steps: int, micro_batches: int, steps_per_epoch: int, rows: int
) -> None:
    """Say how long the run is."""
    log.info(
        "%s steps of %s rows (%d micro-batches), %.2f epochs of %s rows",
        f"{total_steps:,}",
        f"{config.batch_size:,}",
        micro_batches,
        total_steps / steps_per_epoch,
        f"{rows:,}",
    )
