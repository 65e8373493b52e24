"""What models that are already fine-tuned are worth on a task: the retention table."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from distiljax.comparison import summarise
from distiljax.distill.runs import count_parameters, named_dtype
from distiljax.errors import UserError
from distiljax.hub import check_vocabulary
from distiljax.nn import HeadConfig, TaskModel
from distiljax.tasks.config import finetune_data_config
from distiljax.tasks.datasets import label_names, load_task
from distiljax.tasks.features import choose_lengths
from distiljax.tasks.finetune import task_features
from distiljax.tasks.forward import Forward
from distiljax.tasks.presets import Task, find_task
from distiljax.tasks.scoring import Scorer
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
    data: ConfigDict,
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
      data: the data set, as `finetune_config().data`; with `max_length` 0 each model reads rows as long as those that
        it was fine-tuned on.
      split: of the data set; it must be labelled.
      dtype: compute dtype.
      batch_size: rows at once.
      speed: whether to measure latency and throughput, of each name's first model, in turn.

    Returns:
      `{"tasks": [{"name", "kind", "metrics", "split", "source", "examples"}], "models": [{"name", "paths",
      "parameters", "bytes", "latency_ms", "tokens_per_second", "scores", "mean", "share_kept", …}], "speed": …,
      "machine": …}`; the scores are described at `distiljax.comparison.summarise`.

    Raises:
      UserError: a model that cannot be loaded or is of another task, a split that is not there or has no labels.
    """
    if not models or not all(models.values()):
        raise UserError("no model to evaluate; give at least one")
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


class TaskScores:
    """The metrics of models on one split of one task's data, which are read once.

    Args:
      task: the task.
      data, split, dtype, batch_size: as of `evaluate_task`.

    Raises:
      UserError: as `load_task`; or no such split, or one without labels.
    """

    def __init__(self, task: Task, data: ConfigDict, split: str, dtype: str, batch_size: int = 64) -> None:
        if not 1 <= batch_size <= 4096:
            raise UserError(f"batch_size is {batch_size}; expected 1 to 4096")
        self._dtype = named_dtype("dtype", dtype)
        splits = load_task(task, data)
        if split not in splits:
            raise UserError(
                f"{data.source or task.source} has no split {split!r}; it has {', '.join(splits)}"
            )
        self._task, self._data, self._batch_size = task, data, batch_size
        self._parallel = Parallel()
        self._dataset = splits[split]
        self._labels = label_names(task, splits)
        self.facts = {
            "name": task.name,
            "kind": task.kind,
            "metrics": list(task.metrics),
            "split": split,
            "source": str(data.source or task.source),
            "examples": len(self._dataset),
        }

    def __call__(self, path: str | os.PathLike[str]) -> dict[str, float]:
        """The metrics of a fine-tuned model.

        Raises:
          UserError: a model that cannot be loaded, is of another task, or has other labels.
        """
        module, params = load_fine_tuned(path, self._dtype)
        if module.head.kind != self._task.kind or module.head.regression != self._task.regression:
            kind = "regression" if module.head.regression else module.head.kind
            raise UserError(
                f"{path} is a model of {kind}; task {self._task.name} expects one of "
                f"{'regression' if self._task.regression else self._task.kind}"
            )
        order = label_order(module.head, self._labels, path)
        tokenizer = load_tokenizer(path)
        check_vocabulary(tokenizer, module.config, str(path))
        data = window_settings(path, self._data, module.config.max_positions)
        features = task_features(self._task, self._dataset, tokenizer, data, module.config.max_positions)
        lengths = choose_lengths(features.lengths, data.shapes)
        forward = Forward(module, self._parallel, self._batch_size, lengths)
        logits = forward(self._parallel.replicate(params), features)
        head = module.head
        if order is not None:
            logits = [row[..., order] for row in logits]
            head = dataclasses.replace(head, labels=self._labels)
        metrics = Scorer(self._task, head, features, self._dataset)(logits)
        first = self._task.metrics[0]
        log.info("%s: %s %.2f", path, first, 100 * metrics[first])
        return metrics


def load_fine_tuned(path: str | os.PathLike[str], dtype: Any) -> tuple[TaskModel, Any]:
    """A model with the head of a task.

    Raises:
      UserError: it cannot be loaded, or has none.
    """
    module, params = from_pretrained(path, head="any", dtype=dtype)
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
    data.stride = stored.get("stride", min(default.stride, data.max_length // 4))
    return data


def label_order(head: HeadConfig, labels: Sequence[str], path: str | os.PathLike[str]) -> list[int] | None:
    """Where the data's labels stand among a model's outputs; None where they stand in the data's order already.

    A model whose labels have other names, such as LABEL_0, is taken by their order.

    Raises:
      UserError: another number of labels.
    """
    own, wanted = ([label.casefold() for label in names] for names in (head.labels, labels))
    if head.regression or own == wanted:
        return None
    if len(own) != len(wanted):
        raise UserError(
            f"{path} has {len(own)} labels ({', '.join(head.labels)}), the data {len(wanted)} ({', '.join(labels)}); "
            "give a model fine-tuned on this task"
        )
    if sorted(own) == sorted(wanted):
        return [own.index(label) for label in wanted]
    log.warning("%s calls its labels %s, not %s; taken in this order", path, head.labels, tuple(labels))
    return None


def model_facts(
    models: Mapping[str, str | os.PathLike[str]], dtype: str, speed: bool = True
) -> tuple[dict[str, dict[str, Any]], dict[str, Any] | None]:
    """Parameters, bytes and speed of models, by name; and how the speed was measured (None if it was not)."""
    loaded = {name: load_fine_tuned(path, named_dtype("dtype", dtype)) for name, path in models.items()}
    facts: dict[str, dict[str, Any]] = {}
    for name, (_, params) in loaded.items():
        parameters = count_parameters(params)
        facts[name] = {"parameters": parameters, "bytes": 4 * parameters}
    if not speed:
        return facts, None
    length = min([SPEED_LENGTH, *(module.config.max_positions for module, _ in loaded.values())])
    for name, figures in zip(loaded, model_speed(list(loaded.values()), length), strict=True):
        facts[name] |= figures
    return facts, {"batch_size": BATCH_ROWS, "seq_len": length, "dtype": dtype}
