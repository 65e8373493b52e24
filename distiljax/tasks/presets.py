"""Tasks: what is predicted from which columns, where the data are, and how it is scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from distiljax.errors import UserError
from distiljax.nn.heads import ANSWERS, SEQUENCES, TOKENS

# The roles that columns have, by kind, and the columns that are taken where none are named.
COLUMNS: Mapping[str, Mapping[str, str]] = {
    SEQUENCES: {"text": "text", "label": "label"},
    TOKENS: {"tokens": "tokens", "tags": "tags"},
    ANSWERS: {"id": "id", "question": "question", "context": "context", "answers": "answers"},
}
# The role that is predicted.
TARGET: Mapping[str, str] = {SEQUENCES: "label", TOKENS: "tags", ANSWERS: "answers"}

_SPLITS = {"train": "train", "validation": "validation", "test": "test"}


@dataclasses.dataclass(frozen=True)
class Task:
    """A task and its data.

    Args:
      name: of the preset; the kind for a user's own data.
      kind: "sequence_classification", "token_classification" or "question_answering".
      regression: a number is predicted, no class.
      source: a hub name or NAME/CONFIG, a directory, a CSV, JSON or Parquet file; "" = the user says.
      columns: role → column. The roles are those of `COLUMNS`, and `text_pair`.
      labels: the classes' names in the order of their ids; None: from the data.
      metrics: names in `distiljax.tasks.metrics.METRICS`; the first decides which checkpoint is the best.
      splits: "train", "validation", "test", … → split of the source.
      no_answer: questions may have no answer, as in SQuAD 2.0.
    """

    name: str
    kind: str
    regression: bool = False
    source: str = ""
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    labels: tuple[str, ...] | None = None
    metrics: tuple[str, ...] = ()
    splits: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict(_SPLITS))
    no_answer: bool = False


def find_task(name: str) -> Task:
    """A preset, or a task without data of its own by its kind.

    Args:
      name: a preset; "sequence_classification", "regression", "token_classification" or "question_answering".

    Raises:
      UserError: neither, with the list of both.
    """
    found = PRESETS.get(name) or KINDS.get(name)
    if found is None:
        raise UserError(
            f"task is {name!r}; expected one of {', '.join(PRESETS)}, or for your own data {', '.join(KINDS)}"
        )
    return found


def _entities(*types: str) -> tuple[str, ...]:
    return ("O", *(f"{prefix}-{kind}" for kind in types for prefix in "BI"))


def _glue(name: str, labels: tuple[str, ...], metrics: tuple[str, ...], *texts: str, **changes: Any) -> Task:
    # The test splits of GLUE have no labels: its server scores them.
    roles = dict(zip(("text", "text_pair"), texts, strict=False))
    settings: dict[str, Any] = {
        "source": f"nyu-mll/glue/{name}",
        "columns": roles | {"label": "label"},
        "splits": {"train": "train", "validation": "validation"},
        **changes,
    }
    return Task(name, SEQUENCES, labels=labels, metrics=metrics, **settings)


_ENTAILMENT = ("entailment", "not_entailment")
_ENTITY_METRICS = ("entity_f1", "entity_precision", "entity_recall")
_ANSWER_METRICS = ("squad_f1", "exact_match")

# The metrics are GLUE's. Where it has two, the first is the one beside the DistilBERT paper's Table 1, which does not
# say what it prints: F1 for MRPC, whose two classes are two to one, accuracy for QQP, and for STS-B the mean of both
# correlations, as GLUE's own table has it.
_TASKS = (
    _glue("cola", ("unacceptable", "acceptable"), ("matthews", "accuracy"), "sentence"),
    _glue("sst2", ("negative", "positive"), ("accuracy",), "sentence"),
    _glue("mrpc", ("not_equivalent", "equivalent"), ("f1", "accuracy"), "sentence1", "sentence2"),
    _glue(
        "stsb",
        ("score",),
        ("pearson_spearman", "pearson", "spearman"),
        "sentence1",
        "sentence2",
        regression=True,
    ),
    _glue("qqp", ("not_duplicate", "duplicate"), ("accuracy", "f1"), "question1", "question2"),
    _glue(
        "mnli",
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        "premise",
        "hypothesis",
        splits={
            "train": "train",
            "validation": "validation_matched",
            "validation_mismatched": "validation_mismatched",
        },
    ),
    _glue("qnli", _ENTAILMENT, ("accuracy",), "question", "sentence"),
    _glue("rte", _ENTAILMENT, ("accuracy",), "sentence1", "sentence2"),
    _glue("wnli", ("not_entailment", "entailment"), ("accuracy",), "sentence1", "sentence2"),
    Task(
        "imdb",
        SEQUENCES,
        source="stanfordnlp/imdb",
        columns=COLUMNS[SEQUENCES],
        labels=("neg", "pos"),
        metrics=("accuracy",),
        # It has no validation split; papers report the test split.
        splits={"train": "train", "validation": "test"},
    ),
    Task(
        "squad",
        ANSWERS,
        source="rajpurkar/squad",
        columns=COLUMNS[ANSWERS],
        metrics=_ANSWER_METRICS,
        splits={"train": "train", "validation": "validation"},
    ),
    Task(
        "squad_v2",
        ANSWERS,
        source="rajpurkar/squad_v2",
        columns=COLUMNS[ANSWERS],
        metrics=_ANSWER_METRICS,
        splits={"train": "train", "validation": "validation"},
        no_answer=True,
    ),
    Task(
        "conll2003",
        TOKENS,
        # The same data as eriktks/conll2003, which is a script that `datasets` no longer runs.
        source="lhoestq/conll2003",
        columns={"tokens": "tokens", "tags": "ner_tags"},
        labels=_entities("PER", "ORG", "LOC", "MISC"),
        metrics=_ENTITY_METRICS,
    ),
    Task(
        "wnut17",
        TOKENS,
        source="leondz/wnut_17",
        columns={"tokens": "tokens", "tags": "ner_tags"},
        labels=_entities("corporation", "creative-work", "group", "location", "person", "product"),
        metrics=_ENTITY_METRICS,
    ),
)

PRESETS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _TASKS})

# For a user's own data, whose source and columns the config names.
KINDS: Mapping[str, Task] = MappingProxyType(
    {
        SEQUENCES: Task(SEQUENCES, SEQUENCES, columns=COLUMNS[SEQUENCES], metrics=("accuracy", "macro_f1")),
        "regression": Task(
            "regression",
            SEQUENCES,
            regression=True,
            columns=COLUMNS[SEQUENCES],
            labels=("score",),
            metrics=("pearson_spearman", "pearson", "spearman"),
        ),
        TOKENS: Task(TOKENS, TOKENS, columns=COLUMNS[TOKENS], metrics=(*_ENTITY_METRICS, "accuracy")),
        ANSWERS: Task(ANSWERS, ANSWERS, columns=COLUMNS[ANSWERS], metrics=_ANSWER_METRICS),
    }
)
