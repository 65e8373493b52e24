"""Labels as data sets have them (ids, named ids, words, numbers as text) to ids of named classes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from distiljax.errors import UserError

if TYPE_CHECKING:
    import pyarrow

_SHOWN = 10  # values that a message lists


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

    def classes(self, wanted: Sequence[str] | None) -> tuple[str, ...]:
        """The names of the classes in the order of their ids.

        The task's, unless the data set names its ids otherwise; then the data set's; else the values, sorted.

        Args:
          wanted: the task's names, None if it has none.
        """
        if self.own and (wanted is None or set(self.own) != set(wanted)):
            return self.own
        if wanted is not None:
            return tuple(wanted)
        self._all_present()
        names = {_name(value) for value in self.values}
        fractions = [value for value in self.values if isinstance(value, float) and value != int(value)]
        if fractions:
            raise UserError(
                f"the column {self.column!r} of {self.where} holds {fractions[0]}, which is no class; "
                "take task regression for numbers"
            )
        if len(names) < 2:
            raise UserError(
                f"the column {self.column!r} of {self.where} holds nothing but {names.pop()!r}; "
                "expected two classes or more"
            )
        numeric = all(name.removeprefix("-").isdecimal() for name in names)
        return tuple(sorted(names, key=int) if numeric else sorted(names))

    def ids(self, names: Sequence[str]) -> np.ndarray:
        """int64 [M]: the class of each label.

        Raises:
          UserError: a label that is none of the classes, with its row and value.
        """
        self._all_present()
        place = {name: index for index, name in enumerate(names)}
        found = np.array([self._id(value, names, place) for value in self.values], np.int64)
        ids = found[self.index]
        if (bad := np.flatnonzero(ids < 0)).size:
            strange = [_shown(value) for value, id_ in zip(self.values, found, strict=True) if id_ < 0]
            others = f" (so are {', '.join(strange[1:_SHOWN])})" if len(strange) > 1 else ""
            raise UserError(
                f"{self.where} row {self._row(bad[0])}: {self.column!r} is {_shown(self.values[self.index[bad[0]]])}, "
                f"which is no class{others}; expected {_expected(names)}"
            )
        return ids

    def numbers(self) -> np.ndarray:
        """float64 [M]: the labels as numbers.

        Raises:
          UserError: a label that is no finite number, with its row and value.
        """
        self._all_present()
        found = np.array([_number(value) for value in self.values])
        numbers = found[self.index]
        if (bad := np.flatnonzero(~np.isfinite(numbers))).size:
            raise UserError(
                f"{self.where} row {self._row(bad[0])}: {self.column!r} is {_shown(self.values[self.index[bad[0]]])}; "
                "expected a number"
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

    def _all_present(self) -> None:
        if None in self.values:
            missing = np.flatnonzero(self.index == self.values.index(None))
            raise UserError(
                f"{self.where} row {self._row(missing[0])} has no {self.column!r} "
                f"({len(missing):,} such rows); expected a label in each"
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
    import pyarrow.types as types

    if types.is_nested(column.type):
        return column.null_count == len(column)
    return all(value is None or _name(value) in ("-1", "") for value in column.unique().to_pylist())


def _targets(
    values: pyarrow.Array, starts: np.ndarray, own: Sequence[str] | None, where: str, name: str
) -> Targets:
    import pyarrow
    import pyarrow.types as types

    if types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if types.is_nested(values.type) or types.is_binary(values.type):
        raise UserError(
            f"the column {name!r} of {where} holds {values.type}; expected labels: text or numbers"
        )
    if types.is_null(values.type):
        values = values.cast(pyarrow.string())
    encoded = values.dictionary_encode("encode")
    distinct = [
        None if isinstance(value, float) and math.isnan(value) else value
        for value in encoded.dictionary.to_pylist()
    ]
    index = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    return Targets(distinct, index, starts, tuple(own) if own else None, where, name)


def _name(value: Any) -> str:
    """The name of a class that has no other: 1, 1.0, "1" and " 1" are the same."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _number(value: Any) -> float:
    try:
        return float(value)
    except ValueError:
        return math.nan


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"


def _expected(names: Sequence[str]) -> str:
    listed = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
    if any(name.isdecimal() for name in names):
        return f"one of {listed}"
    return f"0 to {len(names) - 1}, or one of {listed}"
