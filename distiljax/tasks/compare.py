"""`compare`: several models fine-tuned on the same tasks with the same seeds, and what each of them is worth."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from distiljax.comparison import summarise, task_title, write_comparison
from distiljax.distill.runs import Result
from distiljax.errors import UserError
from distiljax.tasks.config import COMPARED, finetune_config
from distiljax.tasks.evaluate_task import TaskScores, model_facts
from distiljax.tasks.finetune import finetune
from distiljax.tasks.presets import PRESETS, Task, find_task
from distiljax.train import distributed, storage
from distiljax.train.checkpoint import LAST, checkpoint_step
from distiljax.train.load import load_tokenizer
from distiljax.train.progress import stage
from distiljax.train.run import CONFIG, MODEL, machine

log = logging.getLogger(__name__)

DISTILLED = "{} + task distillation"


@dataclasses.dataclass(frozen=True)
class Fit:
    """One fine-tuning of the comparison: what is trained on what, and where it is kept."""

    model: str
    task: Task
    seed: int
    config: ConfigDict
    path: Path


def compare(config: ConfigDict, workdir: str | os.PathLike[str]) -> Result:
    """Fine-tune models on tasks with several seeds, and say what they keep of the first one.

    Each fine-tuning is a run directory of its own, `WORKDIR/TASK/MODEL/seed-N`. Those that are finished are not
    repeated, so the same call goes on where it was stopped, and one with more tasks, models or seeds adds to it. Of a
    finished run only the best parameters are kept, not the state to go on from. At the end comparison.json,
    comparison.md and its plots are in `workdir`.

    Args:
      config: see `compare_config`.
      workdir: a directory, local or remote.

    Returns:
      What `distiljax.comparison` shows, as `facts`; `finished` is False if a run was told to stop.

    Raises:
      UserError: bad input, in one line.
    """
    models = model_paths(config.models)
    path = storage.as_path(workdir)
    if held := {MODEL, CONFIG} & set(storage.names(path)):
        raise UserError(
            f"workdir {path} holds a run or a model ({', '.join(sorted(held))}); give a directory of its own"
        )
    fits = plan_fits(config, models, path)
    for model in models.values():
        load_tokenizer(model)  # what is wrong shows now, not after the first models' runs
    other: dict[str, TaskScores] = {}
    if config.split != "validation":
        for fit in {fit.task.name: fit for fit in fits}.values():
            other[fit.task.name] = TaskScores(fit.task, fit.config.data, config.split, config.finetune.dtype)
    found: dict[str, dict[str, list[Mapping[str, float]]]] = {}
    for number, fit in enumerate(fits, 1):
        if distributed.first():
            stage(f"{task_title(fit.task.name)}: {fit.model}, seed {fit.seed}", number, len(fits))
        result = finetune(fit.config, fit.path)
        if not result.finished:
            return Result(path, False, {})
        _remove_state(fit.path)
        metrics = result.facts["best"] or result.facts["validation"]
        found.setdefault(fit.model, {}).setdefault(fit.task.name, []).append(metrics)
    if other:
        found = _scored(fits, other)
    comparison = _comparison(config, models, fits, found)
    if distributed.first():
        log.info("wrote %s", write_comparison(comparison, workdir))
    return Result(path, True, comparison)


def _remove_state(run: Path) -> None:
    """Remove what a run could go on from: parameters and Adam's moments, which a finished one no longer needs."""
    if distributed.first() and checkpoint_step(run) is not None:
        storage.remove_tree(run / LAST)


def _scored(
    fits: Sequence[Fit], scores: Mapping[str, TaskScores]
) -> dict[str, dict[str, list[Mapping[str, float]]]]:
    """The metrics on another split than the one that the runs were validated on: model → task → by seed."""
    found: dict[str, dict[str, list[Mapping[str, float]]]] = {}
    for fit in fits:
        metrics = scores[fit.task.name](fit.path)
        found.setdefault(fit.model, {}).setdefault(fit.task.name, []).append(metrics)
    return found


def _comparison(
    config: ConfigDict,
    models: Mapping[str, str],
    fits: Sequence[Fit],
    found: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]],
) -> dict[str, Any]:
    tasks = [
        {
            "name": fit.task.name,
            "kind": fit.task.kind,
            "metrics": list(fit.task.metrics),
            "split": config.split,
            "source": str(fit.config.data.source or fit.task.source),
        }
        for fit in {fit.task.name: fit for fit in fits}.values()
    ]
    # A model is as large and as fast on every task but for the last layer; its first run stands for all.
    firsts = {fit.model: fit.path for fit in reversed(fits)}
    facts, speed = model_facts({name: firsts[name] for name in found}, config.finetune.dtype)
    summary = summarise(tasks, found)
    return {
        "tasks": tasks,
        "seeds": list(config.seeds),
        "models": [
            {"name": name, "path": models.get(name, ""), **facts[name], **summary[name]} for name in found
        ],
        "speed": speed,
        "machine": machine(),
    }


def model_paths(models: Any) -> dict[str, str]:
    """Name → path of the models of a comparison, from `NAME=PATH,…`, a sequence of such, or a mapping.

    Raises:
      UserError: none, a name that no directory can have, or one that stands there twice.
    """
    if isinstance(models, (Mapping, ConfigDict)):
        pairs = [(str(name), str(path)) for name, path in models.items()]
    else:
        specs = _parts(models)
        pairs = [(name.strip(), path.strip()) for name, _, path in (spec.partition("=") for spec in specs)]
    found: dict[str, str] = {}
    for name, path in pairs:
        if not path or name in found or not re.fullmatch(r"\w[\w.+ -]*", name):
            raise UserError(
                f"models has {name!r} with path {path!r}; expected NAME=PATH,NAME=PATH,…, each name once, of letters, "
                "digits, spaces and .+-_"
            )
        found[name] = path
    if not found:
        raise UserError("models is empty; expected NAME=PATH,NAME=PATH,…, the first being the reference")
    return found


def plan_fits(config: ConfigDict, models: Mapping[str, str], workdir: Path) -> list[Fit]:
    """The fine-tunings of a comparison, in the order in which they are run: task by task, seed by seed.

    Raises:
      UserError: no task or seed, an unknown one, a task without a folder in `data_root`, or an override that no run
        knows.
    """
    names = _parts(config.tasks)
    seeds = list(config.seeds) if isinstance(config.seeds, (list, tuple)) else [config.seeds]
    tasks = {name: find_task(name) for name in names}
    if not names or len(tasks) != len(names):
        raise UserError(f"tasks is {', '.join(names) or 'empty'}; expected one or more, each once")
    if not seeds or len(set(seeds)) != len(seeds) or not all(map(_is_seed, seeds)):
        raise UserError(f"seeds is {tuple(seeds)}; expected one or more whole numbers, each once")
    if config.task_teacher and config.task_teacher not in models:
        raise UserError(f"task_teacher is {config.task_teacher!r}; expected one of {', '.join(models)}")
    for name in config.overrides:
        if name not in tasks and name not in PRESETS:  # those of a task that is left out today do no harm
            raise UserError(f"overrides has {name!r}; expected a task, such as {', '.join(tasks)}")
    if config.finetune.data.source and len(tasks) > 1:
        raise UserError(
            f"finetune.data.source is {config.finetune.data.source!r} for {len(tasks)} tasks; give data_root, a "
            "directory with a folder for each"
        )
    rows: dict[str, tuple[str, str]] = {name: (path, "") for name, path in models.items()}
    if config.task_teacher:
        for name, path in models.items():
            if name != config.task_teacher:
                rows[DISTILLED.format(name)] = (path, config.task_teacher)
    if len(set(map(_folder, rows))) != len(rows):
        raise UserError(
            f"models are named {', '.join(rows)}; some give the same directory, name them otherwise"
        )
    fits = []
    for name, task in tasks.items():
        shared = _task_config(config, name)
        for seed in seeds:
            for row, (path, teacher) in rows.items():
                run = ConfigDict(shared)
                run.task, run.model, run.seed = name, path, seed
                run.teacher = str(workdir / name / _folder(teacher) / f"seed-{seed}") if teacher else ""
                fits.append(Fit(row, task, seed, run, workdir / name / _folder(row) / f"seed-{seed}"))
    return fits


def _is_seed(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _task_config(config: ConfigDict, task: str) -> ConfigDict:
    """The config of the runs on a task, all but the model and the seed."""
    run = finetune_config()
    _update(run, config.finetune, "finetune")
    if config.data_root:
        root = storage.as_path(config.data_root)
        if not (root / task).is_dir():
            there = ", ".join(storage.names(root)) or "nothing"
            raise UserError(f"data_root {root} has no folder {task!r}; it has {there}")
        run.data.source = str(root / task)
    _update(run, config.overrides.get(task, {}), f"overrides.{task}")
    return run


def _update(config: ConfigDict, changes: Any, where: str) -> None:
    """Set what `changes` has in a config that knows every key.

    Raises:
      UserError: a key that it does not know, or a value of another type.
    """
    if not isinstance(changes, (Mapping, ConfigDict)):
        raise UserError(f"{where} is {changes!r}; expected settings by their names")
    for key, value in changes.items():
        if key not in config or (where.startswith("overrides") and key in COMPARED):
            known = ", ".join(known for known in config if known not in COMPARED)
            raise UserError(f"{where} has {key!r}; expected one of {known}")
        if isinstance(config[key], ConfigDict):
            _update(config[key], value, f"{where}.{key}")
            continue
        try:
            config[key] = value
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}.{key} is {value!r}: {' '.join(str(error).split())}") from error


def _folder(name: str) -> str:
    """The directory of a model's runs."""
    return re.sub(r"[^\w.]+", "-", name)


def _parts(values: Any) -> list[str]:
    """The parts of a text with commas, or of several."""
    if not isinstance(values, (str, list, tuple, type(None))):
        raise UserError(f"{values!r} stands where names are expected, such as a,b")
    texts = [values] if isinstance(values, str) else list(values or ())
    return [part.strip() for text in texts for part in str(text).split(",") if part.strip()]
