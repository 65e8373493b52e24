"""Text columns of Arrow tables and Parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from distiljax.data.document import Document
from distiljax.data.sources.base import (
    Bad,
    ReadOptions,
    first_line,
    no_field,
    record_documents,
    share,
    unreachable,
)
from distiljax.errors import UserError

if TYPE_CHECKING:
    import pyarrow

RECORDS = 64  # decoded at a time; one may be a whole book


def is_text(kind: pyarrow.DataType) -> bool:
    """Whether a column of this type holds strings or bytes."""
    import pyarrow.types as types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return any(
        is_one(kind)
        for is_one in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    )


def texts(column: pyarrow.Array | pyarrow.ChunkedArray) -> list[Any]:
    """A column's values; bytes in place of strings if one of them is not UTF-8."""
    import pyarrow

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        if pyarrow.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        return column.cast(pyarrow.large_binary()).to_pylist()


def documents(
    file: Any, label: str, piece: tuple[int, int], options: ReadOptions, bad: Bad
) -> Iterator[Document]:
    """The documents of a part of a Parquet file.

    Args:
      file: a path or an open file.
      label: the file's name in messages.
      piece: (part, parts) of its rows.
    """
    import pyarrow.parquet

    begin = number = 0
    repeated = piece[0] > 0
    try:
        # A buffer size makes pyarrow stream the column; without it a whole row group is read at once.
        parquet = pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20)
        if options.field not in parquet.schema_arrow.names:
            bad(no_field(label, options.field, parquet.schema_arrow.names), repeated)
            return
        begin, end = share(parquet.metadata.num_rows, *piece)
        repeated = begin > 0
        groups, number = _row_groups(parquet.metadata, begin, end)
        for batch in parquet.iter_batches(RECORDS, row_groups=groups, columns=[options.field]):
            column = batch.column(0)[max(0, begin - number) : max(0, end - number)]
            first = max(begin, number)
            number += len(batch)
            for index, text in enumerate(texts(column), first + 1):
                yield from record_documents(text, options, partial("{} record {}".format, label, index), bad)
            if number >= end:
                return
    except (OSError, pyarrow.ArrowException) as error:
        if unreachable(error):
            raise UserError(f"{label} cannot be read: {first_line(error)}") from None
        if number:
            bad(f"{label} cannot be read after record {max(begin, number)}: {first_line(error)}")
        else:  # all parts say so, or those that begin in the first row group
            bad(f"{label} cannot be read: {first_line(error)}", repeated)


def _row_groups(metadata: Any, begin: int, end: int) -> tuple[list[int], int]:
    """The row groups that hold rows begin to end, and the number of the first row in them."""
    groups: list[int] = []
    first = row = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if row < end and row + rows > begin:
            if not groups:
                first = row
            groups.append(group)
        row += rows
    return groups, first
