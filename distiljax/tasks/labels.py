"""Labels as data sets have them (ids, named ids, words, numbers as text) to ids of named classes."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from distiljax.errors import UserError

if TYPE_CHECKING:
    import pyarrow

_SHOWN = 10  # values that a message lists
_LONGEST = 40  # characters of a value that a message shows
_NO_LABEL = ("-1", "-100")  # what stands for "not labelled" among ids from 0
# So many classes, with so few rows each, are texts, ids or numbers.
_MANY, _FEW = 50, 2


class Lists(NamedTuple):
    """A column of lists: row i holds values[offsets[i] : offsets[i + 1]]."""

    offsets: np.ndarray  # int32 [N + 1]
    values: pyarrow.Array


@dataclasses.dataclass(frozen=True)
class Targets:
    """The labels of a split.

    Args:
      values: the distinct ones, as Python values; None where a label is missing.
      index: int64 [M], which of them each label is.
      starts: int64 [N + 1], where each row's labels begin; one a row outside of token classification.
      own: the names that the data set gives its ids.
      where, column: for messages.
    """

    values: list[Any]
    index: np.ndarray
    starts: np.ndarray
    own: tuple[str, ...] | None
    where: str
    column: str

    def classes(
        self, wanted: Sequence[str] | None, also: Sequence[Targets] = (), least: int = 2
    ) -> tuple[str, ...]:
        """The names of the classes in the order of their ids.

        The task's, unless the data set names its ids otherwise; then the data set's; else the values, sorted.

        Args:
          wanted: the task's names, None if it has none.
          also: targets of other splits, whose values are classes, too.
          least: how many there must be.

        Raises:
          UserError: too few, or values that are no classes.
        """
        if self.own and (wanted is None or set(self.own) != set(wanted)):
            return self.own
        if wanted is not None:
            return tuple(wanted)
        for targets in (self, *also):
            targets._all_present(_missing)
        values = [value for targets in (self, *also) for value in targets.values]
        names = {_name(value) for value in values}
        column = f"the column {self.column!r} of {self.where}"
        if fraction := _fraction(values):
            raise UserError(f"{column} holds {fraction}, which is no class; take task regression for numbers")
        if len(names) < least:
            held = f"nothing but {shown(names.pop())}" if names else "no labels"
            raise UserError(f"{column} holds {held}; expected two classes or more")
        if len(names) > max(_MANY, len(self.index) // _FEW):
            raise UserError(
                f"{column} holds {len(names):,} different values in {len(self.index):,} labels; expected classes, with "
                "several rows each: name the column of the classes, or take task regression for numbers"
            )
        for targets in (self, *also):
            targets._no_placeholders(names)
        numeric = all(name.removeprefix("-").isdecimal() for name in names)
        return tuple(sorted(names, key=int) if numeric else sorted(names))

    def ids(self, names: Sequence[str]) -> np.ndarray:
        """int64 [M]: the class of each label.

        Raises:
          UserError: a label that is none of the classes, with its row and value.
        """
        self._all_present(_missing)
        place = {name: index for index, name in enumerate(names)}
        found = np.array([self._id(value, names, place) for value in self.values], np.int64)
        ids = found[self.index]
        if (bad := np.flatnonzero(ids < 0)).size:
            strange = [shown(value) for value, id_ in zip(self.values, found, strict=True) if id_ < 0]
            others = f" (so are {', '.join(strange[1:_SHOWN])})" if len(strange) > 1 else ""
            raise UserError(
                f"{self.where} row {self._row(bad[0])}: {self.column!r} is {shown(self.values[self.index[bad[0]]])}, "
                f"which is no class{others}; expected {_expected(names)}"
            )
        return ids

    def numbers(self) -> np.ndarray:
        """float64 [M]: the labels as numbers.

        Raises:
          UserError: a label that is no finite number of float32, with its row and value.
        """
        self._all_present(lambda value: value is None)
        found = np.array([_number(value) for value in self.values], np.float64)
        numbers = found[self.index]
        # The loss is computed in float32, where 1e39 is infinite.
        if (bad := np.flatnonzero(~(np.abs(numbers) <= np.finfo(np.float32).max))).size:
            large = np.isfinite(numbers[bad[0]])
            raise UserError(
                f"{self.where} row {self._row(bad[0])}: {self.column!r} is {shown(self.values[self.index[bad[0]]])}; "
                f"expected a number{' of at most 3.4e38' if large else ''}; mend or remove the row"
            )
        return numbers

    def _id(self, value: Any, names: Sequence[str], place: dict[str, int]) -> int:
        if self.own and isinstance(value, int):
            if not 0 <= value < len(self.own):
                return -1
            return place.get(self.own[value], -1)
        name = _name(value)
        if name in place:
            return place[name]
        if isinstance(value, bool):
            name = str(int(value))
        # Ids, unless the names themselves are numbers.
        if name.isdecimal() and int(name) < len(names) and not any(known.isdecimal() for known in names):
            return int(name)
        return -1

    def _all_present(self, missing: Callable[[Any], bool]) -> None:
        rows = np.flatnonzero(np.array([missing(value) for value in self.values], bool)[self.index])
        if rows.size:
            raise UserError(
                f"{self.where} row {self._row(rows[0])} has no {self.column!r} "
                f"({len(rows):,} such rows); expected a label in each: add them, or remove these rows"
            )

    def _no_placeholders(self, names: Collection[str]) -> None:
        """Refuses -1 and -100 as classes beside ids from 0."""
        own = {name for name in names if name not in _NO_LABEL}
        if own <= {"1"} or not all(map(str.isdecimal, own)):  # -1 and 1 are two classes
            return
        for value in self.values:
            if (name := _name(value)) in _NO_LABEL:
                rows = np.flatnonzero(self.index == self.values.index(value))
                raise UserError(
                    f"{self.where} row {self._row(rows[0])}: {self.column!r} is {name} ({len(rows):,} such labels), "
                    "which usually means not labelled; remove those rows, or, if it is a class, write the classes as "
                    "words"
                )

    def _row(self, label: int) -> int:
        return int(np.searchsorted(self.starts, label, side="right"))


def of_rows(column: pyarrow.Array, own: Sequence[str] | None, where: str, name: str) -> Targets:
    """The labels of a column with one a row."""
    return _targets(column, np.arange(len(column) + 1), own, where, name)


def of_tokens(column: pyarrow.Array, own: Sequence[str] | None, where: str, name: str) -> Targets:
    """The labels of a column of lists."""
    tags = lists(column, where, name)
    return _targets(tags.values, tags.offsets, own, where, name)


def lists(column: pyarrow.Array, where: str, name: str) -> Lists:
    """A column of lists, or of text with blanks between the items, as CSV has them.

    Raises:
      UserError: another type, or a row without a list.
    """
    import pyarrow
    import pyarrow.compute
    import pyarrow.types as types

    if types.is_string(column.type) or types.is_large_string(column.type):
        items = [None if text is None else text.split() for text in column.to_pylist()]
        column = pyarrow.array(items, pyarrow.list_(pyarrow.string()))
    if not (
        types.is_list(column.type)
        or types.is_large_list(column.type)
        or types.is_fixed_size_list(column.type)
    ):
        raise UserError(
            f"the column {name!r} of {where} holds {column.type}; expected lists, or text with blanks between the items"
        )
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise UserError(f"{where} row {row + 1} has no {name!r}; expected a list")
    lengths = pyarrow.compute.list_value_length(column).to_numpy(zero_copy_only=False)
    return Lists(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), column.flatten())


def unlabelled(column: pyarrow.Array) -> bool:
    """Whether all labels are missing, or -1 as in GLUE's test splits."""
    import pyarrow
    import pyarrow.types as types

    if types.is_nested(column.type):
        return column.null_count == len(column)
    try:
        distinct = _comparable(column).unique().to_pylist()
    except pyarrow.ArrowException:  # a type that is no label's, which is said where they are read
        return False
    return all(_missing(value) or _name(value) == "-1" for value in distinct)


def shown(value: Any) -> str:
    """A value for a message: on one line, and not too long."""
    text = repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def plain(name: Any) -> str:
    """A name for a message: as it is, if that is on one line, and not too long."""
    text = str(name)
    if not text.isprintable():
        text = repr(text)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def listed(names: Iterable[Any], show: Callable[[Any], str] = plain) -> str:
    """The first names of many, for a message."""
    names = list(names)
    return ", ".join(map(show, names[:_SHOWN])) + (", …" if len(names) > _SHOWN else "")


def _targets(
    values: pyarrow.Array, starts: np.ndarray, own: Sequence[str] | None, where: str, name: str
) -> Targets:
    import pyarrow
    import pyarrow.types as types

    wrong = f"the column {name!r} of {where} holds {values.type}; expected labels: text or numbers"
    values = _comparable(values)
    if types.is_nested(values.type) or types.is_binary(values.type) or types.is_large_binary(values.type):
        raise UserError(wrong)
    try:
        encoded = values.dictionary_encode("encode")
    except pyarrow.ArrowException as error:
        raise UserError(wrong) from error
    distinct = [
        None if isinstance(value, float) and math.isnan(value) else value
        for value in encoded.dictionary.to_pylist()
    ]
    index = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    return Targets(distinct, index, starts, tuple(own) if own else None, where, name)


def _comparable(values: pyarrow.Array) -> pyarrow.Array:
    """Labels in a type whose distinct values Arrow finds."""
    import pyarrow
    import pyarrow.types as types

    if types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if types.is_float16(values.type):
        return values.cast(pyarrow.float32())
    return values.cast(pyarrow.string()) if types.is_null(values.type) else values


def _missing(value: Any) -> bool:
    """Whether there is no label: null, an empty cell, or what pandas writes for one."""
    return value is None or (isinstance(value, str) and value.strip().lower() in ("", "nan"))


def _name(value: Any) -> str:
    """The name of a class that has no other: 1, 1.0, "1", "1.0" and " 1" are the same."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    name = str(value).strip()
    # As pandas writes ids where a row has none.
    whole = re.fullmatch(r"(-?(?:0|[1-9]\d*))\.0", name)
    return whole[1] if whole else name


def _fraction(values: Sequence[Any]) -> str:
    """The first value that is a number but no class; none of text, if other texts are words."""
    numbers = [_number(value) for value in values]
    words = any(map(math.isnan, numbers))
    for value, number in zip(values, numbers, strict=True):
        if not number.is_integer() and (isinstance(value, float) or not words):
            return plain(value)
    return ""


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):  # also a date or a time
        return math.nan
    except OverflowError:
        return math.inf


def _expected(names: Sequence[str]) -> str:
    if any(name.isdecimal() for name in names):
        return f"one of {listed(names)}"
    return f"0 to {len(names) - 1}, or one of {listed(names)}"
