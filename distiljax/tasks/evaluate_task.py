"""What models that are already fine-tuned are worth on a task: the retention table."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from distiljax.comparison import summarise
from distiljax.distill.runs import count_parameters
from distiljax.errors import UserError
from distiljax.hub import check_vocabulary
from distiljax.nn import TaskModel
from distiljax.tasks.config import finetune_data_config
from distiljax.tasks.datasets import holds_out, label_names, load_task
from distiljax.tasks.features import Features
from distiljax.tasks.finetune import row_lengths, task_features
from distiljax.tasks.forward import Forward
from distiljax.tasks.label_order import label_order
from distiljax.tasks.precision import check_precision, in_precision
from distiljax.tasks.presets import Task, find_task
from distiljax.tasks.scoring import Scorer
from distiljax.tasks.sources import Files, is_path, open_source
from distiljax.tasks.speed import BATCH_ROWS, model_speed
from distiljax.train import storage
from distiljax.train.load import from_pretrained, is_run, load_tokenizer
from distiljax.train.parallel import Parallel
from distiljax.train.run import CONFIG, machine, read_json

log = logging.getLogger(__name__)

SPEED_LENGTH = 128
"""Tokens in the rows on which speed is measured, the longest that GLUE is usually run with."""


def evaluate_task(
    task: str,
    models: Mapping[str, Sequence[str | os.PathLike[str]]],
    data: ConfigDict | None = None,
    *,
    split: str = "validation",
    dtype: str = "float32",
    batch_size: int = 64,
    speed: bool = True,
) -> dict[str, Any]:
    """Score fine-tuned models on a task; the first is the reference for what the others keep.

    Args:
      task: a preset, or the kind of a task of one's own.
      models: name → its fine-tuned models (run directories, Hugging Face directories or hub names), one a seed.
      data: the data set, as `finetune_config().data`, by default what the models were fine-tuned on (`data_settings`);
        where it has no validation split, `holdout` and `seed` say which share of the training split is one. With
        `max_length` 0 each model reads rows as long as those that it was fine-tuned on.
      split: of the data set, or a file; it must be labelled.
      dtype: "float32", "bfloat16" or "int8" (kernels in int8, see `nn.int8`).
      batch_size: rows at once.
      speed: whether to measure latency and throughput, of each name's first model, in turn.

    Returns:
      `{"tasks": [{"name", "kind", "metrics", "split", "source", "examples"}], "models": [{"name", "paths",
      "parameters", "bytes", "latency_ms", "tokens_per_second", "scores", "mean", "share_kept", …}], "speed": …,
      "machine": …}`; the scores are described at `distiljax.comparison.summarise`.

    Raises:
      UserError: a model that cannot be loaded or is of another task, a split that is not there or has no labels, or
        models that hold out different examples.
    """
    if not models or not all(models.values()):
        raise UserError("no model to evaluate; give at least one")
    if data is None:
        data = data_settings(find_task(task), models, split=split)
    scores = TaskScores(find_task(task), data, split, dtype, batch_size)
    runs = {name: {task: [scores(path) for path in paths]} for name, paths in models.items()}
    described = [scores.facts]
    facts, measured = model_facts({name: paths[0] for name, paths in models.items()}, dtype, speed)
    summary = summarise(described, runs)
    return {
        "tasks": described,
        "models": [
            {"name": name, "paths": list(map(str, paths)), **facts[name], **summary[name]}
            for name, paths in models.items()
        ],
        "speed": measured,
        "machine": machine(),
    }


def data_settings(
    task: Task,
    models: Mapping[str, Sequence[str | os.PathLike[str]]],
    *,
    source: str = "",
    split: str = "validation",
    columns: Mapping[str, str] | None = None,
    max_length: int = 0,
) -> ConfigDict:
    """The `data` of `evaluate_task`: what the models were fine-tuned on, or all of another source.

    Args:
      task: the task.
      models: as of `evaluate_task`. Without `source` the settings are those of the first that is a run on this task;
        if none is, the preset's.
      source: another data set, of which nothing is held out. Where its files' names say no split, all are scored.
      split: what is scored.
      columns: role → column, in place of those in the settings.
      max_length: 0 = as each model was fine-tuned.

    Raises:
      UserError: no such source, or runs of which one may have been trained on what is held out of the other.
    """
    data = finetune_data_config()
    runs = {} if source else _run_settings(task, [path for paths in models.values() for path in paths])
    if runs:
        data.update(next(iter(runs.values())))
        if split == "validation":
            _check_held_out(task, runs)
    else:
        data.source, data.holdout = source, 0.0
        opened = open_source(source) if source else None
        if isinstance(opened, Files) and opened.unsplit and split in data:
            data[split] = opened.splits[0]
            log.info("%s has no splits; all of it is scored", source)
    data.update(dict(columns or {}))
    data.max_length = max_length
    if max_length:
        data.stride = finetune_data_config().stride  # that of the run is for its own max_length
    return data


def _run_settings(task: Task, paths: Sequence[str | os.PathLike[str]]) -> dict[str, dict[str, Any]]:
    """Of the models that are runs on this task: path → the data settings of its fine-tuning."""
    known = finetune_data_config()
    found = {}
    for path in paths:
        config = (read_json(storage.as_path(path) / CONFIG) or {}) if is_run(path) else {}
        if config.get("task") == task.name:
            found[str(path)] = {key: value for key, value in config.get("data", {}).items() if key in known}
    return found


def _check_held_out(task: Task, runs: Mapping[str, Mapping[str, Any]]) -> None:
    (first, wanted), *others = runs.items()
    always, of_holdout = ("source", "validation"), ("train", "holdout", "seed")
    for path, settings in others:
        differing = [key for key in (*always, *of_holdout) if settings.get(key) != wanted.get(key)]
        if set(differing) & set(always) or (differing and holds_out(task, wanted)):
            key = differing[0]
            raise UserError(
                f"{first} and {path} hold out different examples: data.{key} is {wanted.get(key)!r} and "
                f"{settings.get(key)!r}; name data that neither was trained on, as --source or --split"
            )


class TaskScores:
    """The metrics of models on one split of one task's data, which are read once.

    What models share is kept from one to the next: the rows of those with the same tokenizer and the compiled programs
    of those of the same shape.

    Args:
      task: the task.
      data, split, dtype, batch_size: as of `evaluate_task`.

    Raises:
      UserError: as `load_task`; or no such split, or one without labels.
    """

    def __init__(self, task: Task, data: ConfigDict, split: str, dtype: str, batch_size: int = 64) -> None:
        if not 1 <= batch_size <= 4096:
            raise UserError(f"batch_size is {batch_size}; expected 1 to 4096")
        check_precision(dtype)
        self._dtype = dtype
        data, role = ConfigDict(data), split
        if split not in ("train", "validation", "test", *task.splits):
            role, data.validation = "validation", split  # a file, or a split by the source's own name
            if is_path(split):
                data.update({"source": "", "train": "", "test": ""})
        splits = load_task(task, data, splits=(role,), required=(role,))
        self._task, self._data, self._batch_size = task, data, batch_size
        self._parallel = Parallel()
        self._dataset = splits[role]
        self._labels = label_names(task, splits)
        self._features: dict[Any, Features] = {}
        self._forwards: dict[Any, Forward] = {}
        self.facts = {
            "name": task.name,
            "kind": task.kind,
            "metrics": list(task.metrics),
            "split": split,
            "source": str(data.source or (data.validation if is_path(data.validation) else task.source)),
            "examples": len(self._dataset),
        }

    def __call__(self, path: str | os.PathLike[str]) -> dict[str, float]:
        """The metrics of a fine-tuned model.

        Raises:
          UserError: a model that cannot be loaded, is of another task, or has other labels.
        """
        module, params = in_precision(*load_fine_tuned(path), self._dtype)
        head = module.head
        if head.kind != self._task.kind or head.regression != self._task.regression:
            kind = "regression" if head.regression else head.kind
            raise UserError(
                f"{path} is a model of {kind}; task {self._task.name} expects one of "
                f"{'regression' if self._task.regression else self._task.kind}"
            )
        order = None
        if self._labels and not head.regression:
            order = label_order(head.labels, self._labels, str(path))
            if (
                order is not None
            ):  # the classes that the data do not have come last; they can be predicted, too
                order += [output for output in range(len(head.labels)) if output not in order]
            rest = [] if order is None else [head.labels[output] for output in order[len(self._labels) :]]
            head = dataclasses.replace(head, labels=(*self._labels, *rest))
        features, lengths = self._rows(path, module)
        key = (module, lengths)
        if key not in self._forwards:
            self._forwards[key] = Forward(module, self._parallel, self._batch_size, lengths)
        logits = self._forwards[key](self._parallel.replicate(params), features)
        if order is not None:
            logits = [row[..., order] for row in logits]
        metrics = Scorer(self._task, head, features, self._dataset)(logits)
        first = self._task.metrics[0]
        log.info("%s: %s %.2f", path, first, 100 * metrics[first])
        return metrics

    def _rows(self, path: str | os.PathLike[str], module: TaskModel) -> tuple[Features, tuple[int, ...]]:
        """The split's rows as a model reads them, and the lengths that their batches come in."""
        tokenizer = load_tokenizer(path)
        check_vocabulary(tokenizer, module.config, str(path))
        positions = module.config.max_positions
        data = window_settings(path, self._data, positions)
        fingerprint = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        key = (fingerprint, tokenizer.pad_token_id, data.max_length, data.stride, positions)
        if key not in self._features:
            self._features[key] = task_features(self._task, self._dataset, tokenizer, data, positions)
        features = self._features[key]
        return features, row_lengths([features], data)


def load_fine_tuned(path: str | os.PathLike[str]) -> tuple[TaskModel, Any]:
    """A model with the head of a task.

    Raises:
      UserError: it cannot be loaded, or has none.
    """
    module, params = from_pretrained(path, head="any")
    if not isinstance(module, TaskModel):
        raise UserError(
            f"{path} has no head of a task; fine-tune it: distiljax finetune --config=configs/finetune.py "
            f"--config.model={path} --config.task=TASK --workdir=RUN"
        )
    return module, params


def window_settings(path: str | os.PathLike[str], data: ConfigDict, positions: int) -> ConfigDict:
    """`data` with the `max_length` and `stride` of the fine-tuning where `max_length` is 0.

    Of a model that is no run these are not known: then the default's, or what its positions allow.
    """
    if data.max_length:
        return data
    data = ConfigDict(data)
    stored = (read_json(storage.as_path(path) / CONFIG) or {}).get("data", {}) if is_run(path) else {}
    default = finetune_data_config()
    data.max_length = stored.get("max_length") or min(default.max_length, positions)
    data.stride = stored.get("stride", default.stride)
    return data


def model_facts(
    models: Mapping[str, str | os.PathLike[str]], dtype: str, speed: bool = True
) -> tuple[dict[str, dict[str, Any]], dict[str, Any] | None]:
    """Parameters, bytes and speed of models, by name; and how the speed was measured (None if it was not)."""
    loaded = {name: load_fine_tuned(path) for name, path in models.items()}
    facts: dict[str, dict[str, Any]] = {}
    for name, (_, params) in loaded.items():
        parameters = count_parameters(params)
        # Bytes of a file, which is in float32 whatever the dtype.
        facts[name] = {"parameters": parameters, "bytes": 4 * parameters}
    if not speed:
        return facts, None
    length = min([SPEED_LENGTH, *(module.config.max_positions for module, _ in loaded.values())])
    run = [in_precision(*model, dtype) for model in loaded.values()]
    for name, figures in zip(loaded, model_speed(run, length), strict=True):
        facts[name] |= figures
    return facts, {"batch_size": BATCH_ROWS, "seq_len": length, "dtype": dtype}
