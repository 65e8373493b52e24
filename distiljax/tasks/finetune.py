"""`finetune`: from a pre-trained model and a task's data to a finished run directory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from distiljax.distill.config import check_ranges
from distiljax.distill.losses import Term
from distiljax.distill.runs import (
    Result,
    checked,
    count_micro_batches,
    finished,
    fit,
    kernels_in_words,
    log_start,
    log_steps,
    named_dtype,
    open_together,
    run_facts,
    with_kernels,
)
from distiljax.errors import UserError
from distiljax.hub import check_vocabulary
from distiljax.nn import HeadConfig, TaskModel
from distiljax.nn.linear import compute_params
from distiljax.tasks.datasets import label_names, load_task
from distiljax.tasks.features import Features, choose_lengths, make_features
from distiljax.tasks.forward import Forward
from distiljax.tasks.label_order import label_order
from distiljax.tasks.loader import Logits, TaskLoader
from distiljax.tasks.objective import FineTuning, TaskLoss
from distiljax.tasks.presets import Task, find_task
from distiljax.tasks.scoring import Scorer
from distiljax.train import distributed, storage
from distiljax.train.checkpoint import checkpoint_step
from distiljax.train.load import from_pretrained, load_tokenizer
from distiljax.train.parallel import Parallel
from distiljax.train.run import MODEL, RESULT, read_json, write_json, write_model, write_tokenizer

log = logging.getLogger(__name__)

TEACHER_LOGITS = "teacher_logits.npz"

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Networks:
    """What is trained, and the teacher with its parameters, if there is one."""

    student: TaskModel
    teacher: TaskModel | None
    teacher_params: Params | None


def finetune(config: ConfigDict, workdir: str | os.PathLike[str]) -> Result:
    """Fine-tune a model on a task, with `config.teacher` also towards the soft targets of a fine-tuned teacher.

    The second distillation of Sanh et al. 2019, section 4.1. Runs to the end, or goes on from the newest checkpoint
    of `workdir`; a finished run is returned as it is. Its result.json has the task's metrics under `best`.

    Args:
      config: see `distiljax.finetune_config`.
      workdir: the run directory.

    Raises:
      UserError: bad input, in one line.
    """
    check_ranges(config)
    task = find_task(config.task)
    with open_together(workdir, config, "finetune") as path:
        return finished(path) or _finetune(config, task, path)


def _finetune(config: ConfigDict, task: Task, path: Path) -> Result:
    parallel = Parallel(config.parallel.mode, model=config.parallel.model)
    micro_batches = count_micro_batches(config, parallel.devices)
    if not (config.loss.label or config.teacher):
        raise UserError("loss.label is 0 and there is no teacher; give one of them")
    loss = checked(TaskLoss, **config.loss)
    if not config.teacher:
        loss = dataclasses.replace(loss, soft=0.0)
    splits = load_task(task, config.data, splits=("train", "validation"))
    dropout = None if config.head_dropout < 0 else config.head_dropout
    head = checked(HeadConfig, task.kind, label_names(task, splits), task.regression, dropout)
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    networks, params = _load(config, head, tokenizer)
    networks = with_kernels(config, networks)
    module = networks.student
    positions = min(m.config.max_positions for m in (module, networks.teacher) if m is not None)
    features = {
        split: task_features(task, splits[split], tokenizer, config.data, positions)
        for split in ("train", "validation")
    }
    model = {"head": dataclasses.asdict(head), "encoder": dataclasses.asdict(module.config)}
    distributed.from_first(lambda: _write_model(path, config, task, model, tokenizer))
    train = features["train"]
    _refuse_empty_texts(train)
    lengths = row_lengths(features.values(), config.data)
    rows = config.batch_size // parallel.devices // micro_batches
    platform, spread = parallel.mesh.devices.flat[0].platform, parallel.model > 1
    attention = kernels_in_words(networks, platform, rows, lengths, spread=spread)
    eval_rows = config.eval.batch_size or config.batch_size // micro_batches
    teacher_dtype = (networks.teacher or networks.student).dtype
    placed_teacher = parallel.place_teacher(compute_params(networks.teacher_params, teacher_dtype))
    cached = None
    if networks.teacher is not None and config.cache_teacher:
        read = Forward(networks.teacher, parallel, eval_rows, lengths)
        cached = _teacher_logits(
            path, len(train), _digest(train, networks), parallel, lambda: read(placed_teacher, train)
        )
        placed_teacher = None

    def batches(start: int) -> TaskLoader:
        return TaskLoader(
            train,
            config.batch_size,
            config.seed,
            lengths,
            teacher_logits=cached,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            start=start,
        )

    loader = batches(0)
    total_steps = config.steps or loader.steps(min(config.epochs, 1e9))
    if total_steps >= 2**31:
        raise UserError(f"epochs is {config.epochs}: {total_steps} steps; expected fewer than 2**31")
    objective = FineTuning(module, networks.teacher, loss)
    scorer = Scorer(task, head, features["validation"], splits["validation"])
    forward = Forward(module, parallel, eval_rows, lengths)
    label_terms = jax.jit(objective.label_terms)

    def evaluate(params: Any) -> dict[str, float]:
        logits = forward(params, features["validation"])
        loss = label_loss(label_terms, logits, features["validation"])
        return {"loss": loss, "loss_label": loss, **scorer(logits)}

    log_start(config, "finetune", networks, params, parallel)
    log.info("attention: %s", attention)
    _log_data(task, features, splits, lengths)
    log_steps(config, total_steps, micro_batches, loader.steps_per_epoch, len(train))
    outcome = fit(
        config,
        path,
        description=f"fine-tuning on {task.name}",
        objective=objective,
        encoder=module.config,
        params=params,
        frozen={"teacher": placed_teacher},
        parallel=parallel,
        total_steps=total_steps,
        batches=batches,
        whole_batch=loader.whole_batch,
        evaluate=evaluate,
        rank=lambda metrics: -metrics[task.metrics[0]],
        validate_start=bool(config.eval.every),
    )
    facts = run_facts("finetune", outcome, params, networks.teacher_params)
    facts |= {"task": task.name, "metric": task.metrics[0], "examples": len(splits["train"])}
    if outcome.finished and distributed.first():
        write_json(path / RESULT, facts)
    return Result(path, outcome.finished, facts)


def _write_model(path: Path, config: ConfigDict, task: Task, model: dict[str, Any], tokenizer: Any) -> None:
    """Notes what is trained.

    Raises:
      UserError: the run has begun with another model: its data have other labels now.
    """
    stored = read_json(path / MODEL)
    if stored and checkpoint_step(path, "last") is not None:
        for part, now in json.loads(json.dumps(model)).items():
            if stored.get(part) != now:
                before = (stored.get(part) or {}).get("labels", stored.get(part))
                raise UserError(
                    f"{path} was started with the {part} {_short(before)}, and the data and model now ask for "
                    f"{_short(now.get('labels', now))}; give the data that it was started with, or another --workdir"
                )
    write_tokenizer(path, tokenizer)
    write_model(path, kind="finetune", task=task.name, source=config.model, **model)


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 200 else text[:197] + "…"


def _load(config: ConfigDict, head: HeadConfig, tokenizer: Any) -> tuple[_Networks, Params]:
    dtype = named_dtype("dtype", config.dtype)
    module, params = from_pretrained(config.model, head, dtype, init_head=True, seed=config.seed)
    check_vocabulary(tokenizer, module.config, str(config.model))
    for key in ("hidden_dropout", "attention_dropout", "head_dropout"):
        if not (config[key] == -1 or 0 <= config[key] < 1):
            raise UserError(f"{key} is {config[key]}; expected -1, or a rate from 0 to below 1")
    drops = {key: config[key] for key in ("hidden_dropout", "attention_dropout") if config[key] >= 0}
    module = module.clone(config=checked(module.config.replace, **drops))
    if not config.teacher or not config.loss.soft:
        return _Networks(module, None, None), params
    teacher_dtype = named_dtype("teacher_dtype", config.teacher_dtype or config.dtype)
    teacher, teacher_params = from_pretrained(config.teacher, head.kind, teacher_dtype)
    assert isinstance(teacher, TaskModel)
    if teacher.head.regression != head.regression:
        raise UserError(
            f"teacher {config.teacher} has {len(teacher.head.labels)} outputs; expected a teacher of the same task"
        )
    if head.labels and not head.regression:
        order = label_order(teacher.head.labels, head.labels, f"teacher {config.teacher}")
        if order is not None:
            classifier = {k: x[..., order] for k, x in teacher_params["head"]["classifier"].items()}
            teacher_params = {
                **teacher_params,
                "head": {**teacher_params["head"], "classifier": classifier},
            }
        teacher = teacher.clone(head=head)
    if load_tokenizer(config.teacher).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"teacher {config.teacher} and {config.model} have different vocabularies; expected a teacher that reads "
            "the same tokens"
        )
    return _Networks(module, teacher, teacher_params), params


def task_features(task: Task, dataset: Any, tokenizer: Any, data: ConfigDict, positions: int) -> Features:
    """A split's examples as a model with so many positions reads them; `data` as in `finetune_config`.

    Raises:
      UserError: rows longer than the model has positions, or a window that is no wider than its stride.
    """
    if not 8 <= data.max_length <= positions:
        raise UserError(
            f"data.max_length is {data.max_length}; expected 8 to {positions}, the model's positions"
        )
    stride = data.max_length // 3 if data.stride < 0 else data.stride
    if stride >= data.max_length - 3:
        raise UserError(
            f"data.stride is {stride}; expected less than data.max_length - 3, {data.max_length - 3}"
        )
    return make_features(
        task.kind,
        dataset,
        tokenizer,
        max_length=data.max_length,
        stride=stride,
        regression=task.regression,
    )


def row_lengths(features: Iterable[Features], data: ConfigDict) -> tuple[int, ...]:
    """The lengths that batches of these rows come in; none is over `data.max_length`."""
    held = np.concatenate([rows.lengths for rows in features])
    return tuple(min(length, data.max_length) for length in choose_lengths(held, data.shapes))


def label_loss(
    label_terms: Callable[[Any, Any], dict[str, Term]], logits: Sequence[np.ndarray], features: Features
) -> float:
    """The labels' mean loss of logits on the host, one array a row without padding."""
    total = count = 0.0
    held = Logits.of(logits)
    length, chunk = int(features.lengths.max()), 256
    for first in range(0, len(features), chunk):
        rows = np.full(chunk, -1)
        part = range(first, min(first + chunk, len(features)))
        rows[: len(part)] = part
        found = label_terms(held.batch(rows, length), features.batch(rows, length))["label"]
        total, count = total + float(found.sum), count + float(found.count)
    return total / max(count, 1.0)


def _teacher_logits(
    path: Path, rows: int, digest: str, parallel: Parallel, compute: Callable[[], list[np.ndarray]]
) -> Logits:
    """The teacher's logits of every row, from the disk where they are those of this teacher and these rows."""
    file = path / TEACHER_LOGITS

    def stored() -> dict[str, np.ndarray] | None:
        try:
            with (
                storage.errors(file),
                file.open("rb") as stream,
                np.load(stream, allow_pickle=False) as arrays,
            ):
                fits = str(arrays["digest"]) == digest and len(arrays["starts"]) == rows + 1
                return {name: arrays[name] for name in ("values", "starts")} if fits else None
        except Exception:  # none yet, or damaged: NumPy raises whatever the bytes lead to
            return None

    held = stored()
    # All processes compute together, or none: one may not have been able to read the file.
    missing = int(parallel.any(held is None))
    if held is not None and not missing:
        log.info("the teacher's outputs are in %s", file)
        return Logits(held["values"], held["starts"])
    logits = Logits.of(compute())
    if distributed.first():
        try:
            with storage.writing(path) as directory:
                temporary = directory / f".{TEACHER_LOGITS}"
                with open(temporary, "wb") as stream:
                    np.savez(stream, values=logits.values, starts=logits.starts, digest=np.asarray(digest))
                os.replace(temporary, directory / TEACHER_LOGITS)
            log.info("the teacher's outputs for %d rows are kept in %s", len(logits.starts) - 1, file)
        except (OSError, UserError) as error:
            log.warning(
                "the teacher's outputs cannot be kept (%s); a run that goes on computes them again", error
            )
    return logits


def _digest(features: Features, networks: _Networks) -> str:
    """Of what the teacher's outputs depend on."""
    digest = hashlib.sha256(repr(networks.teacher).encode())
    arrays = (features.tokens, features.starts, features.second, *jax.tree.leaves(networks.teacher_params))
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _refuse_empty_texts(features: Features) -> None:
    empty = int((features.lengths <= 2).sum())  # [CLS] and [SEP]
    if empty == len(features):
        raise UserError(f"none of {empty} training examples has a token in its text; is it the right column?")
    if empty:
        log.warning(
            "%s of %s training examples have no token in their text", f"{empty:,}", f"{len(features):,}"
        )


def _log_data(
    task: Task, features: dict[str, Features], splits: dict[str, Any], lengths: Sequence[int]
) -> None:
    for split, rows in features.items():
        log.info(
            "%s %s: %s examples in %s rows, %.1f tokens a row%s",
            task.name,
            split,
            f"{len(splits[split]):,}",
            f"{len(rows):,}",
            rows.lengths.mean(),
            f", {rows.truncated:,} of them cut at the end" if rows.truncated else "",
        )
    log.info("batches are %s tokens long", ", ".join(map(str, lengths)))
