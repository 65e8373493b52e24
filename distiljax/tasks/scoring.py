"""From the logits of all rows to the metrics of a task."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distiljax.errors import UserError
from distiljax.nn.heads import ANSWERS, TOKENS, HeadConfig
from distiljax.tasks.features import Features
from distiljax.tasks.metrics import ANSWER_METRICS, ENTITY_METRICS, METRICS
from distiljax.tasks.presets import Task
from distiljax.tasks.spans import best_spans

OUTSIDE = "O"  # the tag of a word that no row has


class Scorer:
    """Scores the predictions for one split.

    Args:
      task: says which metrics.
      head: of the models to score; its labels name the class ids.
      features: the split's rows, with labels.
      dataset: the split's examples in their canonical columns: `tags`, or `context` and `answers`.

    Raises:
      UserError: a split without labels.
    """

    def __init__(self, task: Task, head: HeadConfig, features: Features, dataset: Any):
        self._task, self._head, self._features = task, head, features
        if head.kind == TOKENS:
            self._references: Any = self._names(dataset["tags"][:])
        elif head.kind == ANSWERS:
            self._contexts = list(dataset["context"][:])
            self._references = [answers["text"] for answers in dataset["answers"][:]]
        elif features.labels is None:
            raise UserError(f"the split to score for {task.name} has no labels; choose one that has")
        else:
            self._references = features.labels

    def __call__(self, logits: Sequence[np.ndarray]) -> dict[str, float]:
        """The task's metrics by name, shares of 1.

        Args:
          logits: of each row of the features, without padding: float [L], [S_i, L] or [S_i, 2], as `head.kind` has it.
        """
        predictions = self.predictions(logits)
        return {name: self._metric(name)(predictions, self._references) for name in self._task.metrics}

    def predictions(self, logits: Sequence[np.ndarray]) -> Any:
        """What the logits say: class ids or numbers [N], label names of each example's words, or answers' texts."""
        if len(logits) != len(self._features):
            raise ValueError(f"logits of {len(logits)} rows; expected {len(self._features)}")
        if self._head.kind == TOKENS:
            return self._tags(logits)
        if self._head.kind == ANSWERS:
            return self._answers(logits)
        return np.stack(logits)[:, 0] if self._head.regression else np.argmax(np.stack(logits), axis=1)

    def _metric(self, name: str) -> Callable[[Any, Any], float]:
        if name in ANSWER_METRICS:
            return functools.partial(METRICS[name], no_answer=self._task.no_answer)
        if self._head.kind == TOKENS and name not in ENTITY_METRICS:
            return lambda found, wanted: METRICS[name](_flat(found), _flat(wanted))
        return METRICS[name]

    def _row(self, values: np.ndarray, row: int) -> np.ndarray:
        return values[self._features.starts[row] : self._features.starts[row + 1]]

    def _names(self, tags: Sequence[Sequence[int]]) -> list[list[str]]:
        return [[self._head.labels[tag] for tag in example] for example in tags]

    def _tags(self, logits: Sequence[np.ndarray]) -> list[list[str]]:
        words = self._features.words
        assert words is not None
        found = [[OUTSIDE] * len(tags) for tags in self._references]
        for row, example in enumerate(self._features.examples):
            places = self._row(words, row)
            (scored,) = np.nonzero(places >= 0)
            for word, label in zip(places[scored], np.argmax(logits[row][scored], axis=-1), strict=True):
                found[example][word] = self._head.labels[label]
        return found

    def _answers(self, logits: Sequence[np.ndarray]) -> list[str]:
        offsets = self._features.offsets
        assert offsets is not None
        windows: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in self._contexts]
        for row, example in enumerate(self._features.examples):
            windows[example].append((logits[row], self._row(offsets, row)))
        return [
            best_spans(context, seen, no_answer=self._task.no_answer)[0].text if seen else ""
            for context, seen in zip(self._contexts, windows, strict=True)
        ]


def _flat(lists: Sequence[Sequence[str]]) -> list[str]:
    return [value for values in lists for value in values]
