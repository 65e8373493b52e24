"""A task's data with canonical columns: text, label; tokens, tags; question, context, answers."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from distiljax.data.sources.base import first_line
from distiljax.errors import UserError
from distiljax.nn.heads import ANSWERS, SEQUENCES, TOKENS
from distiljax.tasks import labels as labelling
from distiljax.tasks.presets import TARGET, Task
from distiljax.tasks.sources import Files, Source, is_path, open_source

if TYPE_CHECKING:
    import datasets
    import pyarrow
    from ml_collections import ConfigDict

log = logging.getLogger(__name__)

ROLES = ("text", "text_pair", "label", "tokens", "tags", "id", "question", "context", "answers")
_NAMED = 3  # examples that a message names


@dataclasses.dataclass(frozen=True)
class _Part:
    """One split before it is read; `asked`: the user named it, so it must be usable."""

    source: Source
    split: str
    asked: bool

    def __str__(self) -> str:
        if isinstance(self.source, Files) and len(self.source.files) == 1:
            return self.source.location
        return f"split {self.split} of {self.source.location}"


def load_task(
    task: Task,
    data: ConfigDict | Mapping[str, Any],
    *,
    splits: Sequence[str] | None = None,
    required: Sequence[str] = ("train", "validation"),
) -> dict[str, datasets.Dataset]:
    """Load the splits of a task, checked, with the roles as names of the columns.

    Args:
      task: what is predicted; see `find_task`.
      data: `source`: a hub name, NAME/CONFIG, a directory in the hub's layout, a .csv, .tsv, .jsonl, .json or .parquet
        file or a glob. `train`, `validation`, `test`: a split of the source, or a file of its own. The names of columns
        by their roles, such as `text`. "" leaves each of these to the preset. `holdout`: share of the training split
        that becomes the validation split where there is none. `max_train_examples`, `max_eval_examples`: a random
        sample of so many, 0 = all. `seed`: of both draws.
      splits: which are read, if they are there, and must be usable; by default all, but for test splits without labels.
      required: the splits that must be there.

    Returns:
      "train", "validation" and what else is there, such as "test" or "validation_mismatched". Columns: `text`,
      `text_pair`, `label` (class id, or float64); `tokens`, `tags` (lists of class ids); `id`, `question`, `context`,
      `answers` ({"text": [...], "answer_start": [...]}). Class ids carry their names, see `label_names`.

    Raises:
      UserError: no such data or split, a column that does not exist, or a row that cannot be used (counted from 1).
    """
    columns = _columns(task, data)
    parts = _parts(task, data)
    share, seed = _share(parts, data), int(data.get("seed", 0))
    wanted = {role: part for role, part in parts.items() if splits is None or role in splits}
    if splits is not None:
        wanted = {role: dataclasses.replace(part, asked=True) for role, part in wanted.items()}
        if share and "validation" in splits:
            wanted["train"] = parts["train"]
    tables, names = _tables(task, _read(task, wanted, columns))
    if share and "train" in tables:
        _hold_out(tables, parts["train"], share, seed)
    tables = {role: table for role, table in tables.items() if splits is None or role in splits}
    for role in required:
        if role not in tables:
            raise UserError(_no_split(task, parts, role))
    for role in tables:
        kind = "train" if role == "train" else "eval"
        tables[role] = _sampled(tables[role], f"max_{kind}_examples", data, seed)
    return {role: _dataset(task, table, names) for role, table in tables.items()}


@dataclasses.dataclass(frozen=True)
class _Split:
    """One split as it was read; `present`: role → column."""

    part: _Part
    rows: datasets.Dataset
    present: Mapping[str, str]


def _read(task: Task, parts: Mapping[str, _Part], columns: Mapping[str, str]) -> dict[str, _Split]:
    """The splits that have labels, the training split first."""
    found = {}
    for role in sorted(parts, key=lambda role: role != "train"):
        part = parts[role]
        present = _present(task, part, role, columns)
        if present is None:
            continue
        rows = part.source.read(part.split, list(present.values()))
        if not len(rows):
            raise UserError(f"{part} has no rows; expected examples")
        if TARGET[task.kind] in present and _unlabelled(task, rows, present):
            _leave_out(part, role, f"has no labels (all of {present[TARGET[task.kind]]!r} are -1 or empty)")
            continue
        found[role] = _Split(part, rows, present)
    return found


def _tables(task: Task, read: Mapping[str, _Split]) -> tuple[dict[str, pyarrow.Table], tuple[str, ...]]:
    """The splits with canonical columns, and the names of the classes."""
    if task.kind == ANSWERS:
        answers = {
            role: _answer_table(task, split.rows, split.present, split.part, training=role == "train")
            for role, split in read.items()
        }
        return answers, ()
    targets = {role: _targets(task, split.rows, split.present, split.part) for role, split in read.items()}
    names: tuple[str, ...] = task.labels or ()
    if targets and not task.regression:
        first = next(iter(targets))  # the classes are those of the training split, if it is read
        # A tag may be so rare that only the validation split has it.
        rare = [targets[role] for role in ("validation",) if task.kind == TOKENS and role in targets]
        least = 2 if first == "train" else 1  # what is only scored may be all of one class
        names = targets[first].classes(task.labels, [one for one in rare if not one.own], least)
    return {
        role: _class_table(task, split.rows, split.present, split.part, targets[role], names)
        for role, split in read.items()
    }, names


def holds_out(task: Task, data: ConfigDict | Mapping[str, Any]) -> bool:
    """Whether these settings make the validation split of a share of the training split.

    Args:
      task, data: as of `load_task`.

    Raises:
      UserError: no such data.
    """
    return _share(_parts(task, data), data) > 0


def label_names(task: Task, splits: Mapping[str, datasets.Dataset]) -> tuple[str, ...]:
    """The classes' names in the order of their ids: ("score",) for numbers, none for answers.

    Args:
      task, splits: as given to and returned by `load_task`.
    """
    if task.kind == ANSWERS:
        return ()
    if task.regression:
        return ("score",)
    feature = next(iter(splits.values())).features[TARGET[task.kind]]
    return tuple((feature.feature if task.kind == TOKENS else feature).names)


def _columns(task: Task, data: Any) -> dict[str, str]:
    """Role → column, in the data's names."""
    allowed = {**task.columns, **({"text_pair": ""} if task.kind == SEQUENCES else {})}
    columns = dict(task.columns)
    for role in ROLES:
        if column := data.get(role, ""):
            if role not in allowed:
                raise UserError(
                    f"data.{role} is {column!r}, but {task.name} has no such column; expected {', '.join(allowed)}"
                )
            columns[role] = column
    return columns


def _parts(task: Task, data: Any) -> dict[str, _Part]:
    """Where each split is read from."""
    given = {role: data.get(role, "") for role in ("train", "validation", "test")}
    files = {role: name for role, name in given.items() if name and is_path(name)}
    location = data.get("source", "") or ("" if files else task.source)
    if not location and not files:
        raise UserError(
            f"data.source is empty and {task.name} has no data of its own; expected a hub name, a directory, "
            "or a CSV, JSON or Parquet file"
        )
    source = open_source(location) if location else None
    parts = {}
    for role in dict.fromkeys((*given, *task.splits)):
        name = given.get(role, "")
        if role in files:
            own = open_source(name)
            if len(own.splits) > 1:
                raise UserError(
                    f"data.{role} is {name!r}, which has the splits {', '.join(own.splits)}; name one of its files, "
                    "or make it data.source"
                )
            parts[role] = _Part(own, own.splits[0], asked=True)
        elif source is None:
            if name:
                raise UserError(
                    f"data.{role} is {name!r}, a split of nothing: data.source is empty; name a file"
                )
        elif name:
            if name not in source.splits:
                raise UserError(
                    f"data.{role} is {name!r}; {location} has the splits {', '.join(source.splits)} (or name a file)"
                )
            parts[role] = _Part(source, name, asked=True)
        elif role in task.splits:
            found = [split for split in (task.splits[role], role) if split in source.splits]
            if found:
                parts[role] = _Part(source, found[0], asked=False)
    return parts


def _no_split(task: Task, parts: Mapping[str, _Part], role: str) -> str:
    sources = {part.source.location: part.source.splits for part in parts.values()}
    there = "; ".join(
        f"{location} has the splits {', '.join(splits)}" for location, splits in sources.items()
    )
    fix = f"name one, or a file, as data.{role} (of evaluate: as --split)"
    if role == "validation":
        fix += ", or take a share of the training split with data.holdout=0.1"
    return f"{task.name} has no {role} split: {there or 'the source has none of the splits it names'}; {fix}"


def _present(task: Task, part: _Part, role: str, columns: Mapping[str, str]) -> dict[str, str] | None:
    """The columns to read; None for a test split without labels, which nobody asked for."""
    there = part.source.columns(part.split)
    present = {name: column for name, column in columns.items() if column in there}
    # A test split may come without labels, and questions without ids.
    missing = [name for name in columns if name not in present and name != "id"]
    target = TARGET[task.kind]
    if missing == [target] and role == "test" and not part.asked:
        _leave_out(part, role, f"has no column {columns[target]!r}, the labels")
        return None
    if missing:
        raise UserError(
            f"{part} has no column {columns[missing[0]]!r} (data.{missing[0]}); it has "
            f"{labelling.listed(there, labelling.shown)}"
        )
    return present


def _leave_out(part: _Part, role: str, why: str) -> None:
    """Goes on without a test split that nobody asked for."""
    if role != "test" or part.asked:
        raise UserError(f"{part} {why}; name a split that has labels as data.{role}")
    log.info("%s %s; it is left out", part, why)


def _unlabelled(task: Task, read: datasets.Dataset, present: Mapping[str, str]) -> bool:
    column = _column(read, present[TARGET[task.kind]])
    if task.kind == ANSWERS:
        return column.null_count == len(column)
    return labelling.unlabelled(column)


def _column(read: datasets.Dataset, name: str) -> pyarrow.Array:
    """A column in one piece."""
    column = read.select_columns([name]).with_format("arrow")[:].column(0).combine_chunks()
    if hasattr(column, "chunks"):  # Arrow leaves several pieces where one would pass 2 GB
        raise UserError(f"the column {name!r} holds more than 2 GB of text; take a part of the data")
    return column


def _targets(
    task: Task, read: datasets.Dataset, present: Mapping[str, str], part: _Part
) -> labelling.Targets:
    name = present[TARGET[task.kind]]
    feature = read.features[name]
    if task.kind == TOKENS:
        feature = getattr(feature, "feature", feature)
        return labelling.of_tokens(_column(read, name), getattr(feature, "names", None), str(part), name)
    return labelling.of_rows(_column(read, name), getattr(feature, "names", None), str(part), name)


def _class_table(
    task: Task,
    read: datasets.Dataset,
    present: Mapping[str, str],
    part: _Part,
    targets: labelling.Targets,
    names: tuple[str, ...],
) -> pyarrow.Table:
    import pyarrow

    if task.kind == TOKENS:
        tokens = labelling.lists(_column(read, present["tokens"]), str(part), present["tokens"])
        lengths, tagged = np.diff(tokens.offsets), np.diff(targets.starts)
        if (wrong := np.flatnonzero(lengths != tagged)).size:
            row = wrong[0]
            raise UserError(
                f"{part} row {row + 1} has {lengths[row]} tokens and {tagged[row]} tags; "
                "expected as many tags as tokens"
            )
        words = _text(tokens.values, part, present["tokens"])
        tags = pyarrow.array(targets.ids(names))
        return pyarrow.table(
            {
                "tokens": pyarrow.ListArray.from_arrays(tokens.offsets, words),
                "tags": pyarrow.ListArray.from_arrays(tokens.offsets, tags),
            }
        )
    table = {
        role: _text(_column(read, present[role]), part, present[role])
        for role in ("text", "text_pair")
        if role in present
    }
    table["label"] = pyarrow.array(targets.numbers() if task.regression else targets.ids(names))
    return pyarrow.table(table)


def _text(column: pyarrow.Array, part: _Part, name: str) -> pyarrow.Array:
    """A column as strings; a missing text is an empty one, but some must be there."""
    import pyarrow
    import pyarrow.types as types

    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)):
        raise UserError(f"the column {name!r} of {part} holds {kind}; expected text")
    if missing := column.null_count:
        if missing == len(column):
            raise UserError(
                f"the column {name!r} of {part} holds no text: all rows lack it; name another one"
            )
        log.warning("%s: %s of %s %r are missing; they are taken as empty", part, missing, len(column), name)
    try:
        return column.cast(pyarrow.string()).fill_null("")
    except (pyarrow.ArrowException, UnicodeError) as error:
        raise UserError(
            f"the column {name!r} of {part} cannot be read as text: {first_line(error)}; convert it to UTF-8"
        ) from error


def _ids(column: pyarrow.Array, part: _Part, name: str) -> list[str]:
    """Ids as strings; where one is missing, the number of the row."""
    import pyarrow

    try:
        ids = column.cast(pyarrow.string()).to_pylist()
    except (pyarrow.ArrowException, UnicodeError) as error:
        raise UserError(
            f"the column {name!r} of {part} holds {column.type}; expected text or numbers"
        ) from error
    return [str(row) if id_ is None else id_ for row, id_ in enumerate(ids, 1)]


def _answer_table(
    task: Task, read: datasets.Dataset, present: Mapping[str, str], part: _Part, *, training: bool
) -> pyarrow.Table:
    import pyarrow

    context = _text(_column(read, present["context"]), part, present["context"])
    question = _text(_column(read, present["question"]), part, present["question"])
    if "id" in present:
        ids = _ids(_column(read, present["id"]), part, present["id"])
    else:
        ids = [str(row) for row in range(1, len(read) + 1)]
    answers = list(_answers(_column(read, present["answers"]), part, present["answers"]))
    without = [id_ for id_, answer in zip(ids, answers, strict=True) if not answer["text"]]
    if without and not task.no_answer:
        raise UserError(
            f"{part} has {len(without):,} questions without an answer (id {_some(without)}); "
            "take task squad_v2, which allows for that"
        )
    kept, elsewhere = [], []
    for row, (text, answer) in enumerate(zip(context.to_pylist(), answers, strict=True)):
        right = [
            (words, start)
            for words, start in zip(answer["text"], answer["answer_start"], strict=True)
            if words and start >= 0 and text.startswith(words, start)
        ]
        if len(right) == len(answer["text"]):
            kept.append(row)
            continue
        elsewhere.append(ids[row])
        if training and right:
            kept.append(row)
            answers[row] = {
                "text": [words for words, _ in right],
                "answer_start": [start for _, start in right],
            }
        elif not training:  # scored by its text, which needs no offset
            kept.append(row)
    if elsewhere:
        what = "they are not trained on" if training else "they are scored by their text"
        log.warning(
            "%s: %s of %s examples have answers that do not stand at their answer_start (id %s); %s",
            *(part, f"{len(elsewhere):,}", f"{len(ids):,}", _some(elsewhere), what),
        )
    if not kept:
        raise UserError(
            f"{part} has no answer at its answer_start, which counts characters of the context from 0; "
            f"first id {_some(ids[:1])}; mend the offsets"
        )
    kind = pyarrow.struct(
        [("text", pyarrow.list_(pyarrow.string())), ("answer_start", pyarrow.list_(pyarrow.int64()))]
    )
    table = pyarrow.table(
        {
            "id": pyarrow.array(ids, pyarrow.string()),
            "question": question,
            "context": context,
            "answers": pyarrow.array(answers, kind),
        }
    )
    return table if len(kept) == len(ids) else table.take(kept)


def _answers(column: pyarrow.Array, part: _Part, name: str) -> Iterator[dict[str, list]]:
    """Answers as SQuAD's columns have them, from these, a list of objects as in its files, or either as JSON text."""
    for row, value in enumerate(column.to_pylist(), 1):
        try:
            if isinstance(value, str):
                value = json.loads(value) if value.strip() else None
            if value is None:
                value = []
            if isinstance(value, Mapping):
                texts, begins = list(value["text"] or ()), list(value["answer_start"] or ())
            else:
                texts = [answer["text"] for answer in value]
                begins = [answer["answer_start"] for answer in value]
            begins = [int(begin) for begin in begins]
            if len(texts) != len(begins) or not all(isinstance(text, str) for text in texts):
                raise ValueError
            if any(abs(begin) >= 2**63 for begin in begins):
                raise OverflowError
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
            raise UserError(
                f"{part} row {row}: {name!r} is {str(value)[:60]!r}; expected "
                '{"text": ["…"], "answer_start": [12]} or a list of {"text": "…", "answer_start": 12}'
            ) from None
        yield {"text": texts, "answer_start": begins}


def _some(ids: Sequence[str]) -> str:
    return ", ".join(map(labelling.plain, ids[:_NAMED])) + (", …" if len(ids) > _NAMED else "")


def _share(parts: Mapping[str, _Part], data: Any) -> float:
    """The share of the training split that is held out; 0 where the source has a validation split."""
    share = float(data.get("holdout", 0.0))
    if not 0 <= share < 1:
        raise UserError(f"data.holdout is {share}; expected a share from 0 up to, but not, 1")
    return share if "train" in parts and "validation" not in parts else 0.0


def _hold_out(tables: dict[str, Any], part: _Part, share: float, seed: int) -> None:
    """Makes a validation split of a share of the training split."""
    train = tables["train"]
    count = max(1, round(share * len(train)))
    if count >= len(train):
        raise UserError(
            f"data.holdout is {share}, which leaves nothing of {len(train)} training examples; give a smaller share"
        )
    log.info(
        "%s of the %s examples of %s are held out for validation (data.holdout=%s, data.seed=%s)",
        *(f"{count:,}", f"{len(train):,}", part, share, seed),
    )
    order = np.random.default_rng(seed).permutation(len(train))
    tables["train"] = train.take(np.sort(order[count:]))
    tables["validation"] = train.take(np.sort(order[:count]))


def _sampled(table: pyarrow.Table, key: str, data: Any, seed: int) -> pyarrow.Table:
    count = int(data.get(key, 0))
    if count < 0:
        raise UserError(f"data.{key} is {count}; expected 0 (all) or more")
    if not count or count >= len(table):
        return table
    return table.take(np.sort(np.random.default_rng(seed).permutation(len(table))[:count]))


def _dataset(task: Task, table: pyarrow.Table, names: tuple[str, ...]) -> datasets.Dataset:
    import datasets
    from datasets.table import InMemoryTable

    features = datasets.Features.from_arrow_schema(table.schema)
    if task.kind == TOKENS:
        features["tags"] = datasets.Sequence(datasets.ClassLabel(names=list(names)))
    elif task.kind == SEQUENCES and not task.regression:
        features["label"] = datasets.ClassLabel(names=list(names))
    return datasets.Dataset(InMemoryTable(table), info=datasets.DatasetInfo(features=features))
