"""Data sets of the Hugging Face hub, or a local directory in its layout: hf:NAME[/CONFIG], hf:./DIRECTORY."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

from distiljax.data.document import Document
from distiljax.data.sources import columns
from distiljax.data.sources.base import (
    Bad,
    Piece,
    ReadOptions,
    check_split,
    equal_pieces,
    first_line,
    no_field,
    number_of_parts,
    record_documents,
    share,
)
from distiljax.data.sources.spec import SourceSpec
from distiljax.errors import UserError


class Hub:
    """A data set of the hub: on disk, memory-mapped (the default), or streamed."""

    def __init__(self, spec: SourceSpec):
        self.spec = spec
        self.expensive = spec.streaming

    def splits(self) -> tuple[str, ...]:
        return _splits(self.spec.location)

    def size(self, split: str | None) -> int:
        check_split(self.spec.location, split, self.splits())
        data = self._data(split)
        if self.spec.streaming:
            known = (data.info.splits or {}).get(split)
            return known.num_bytes or 0 if known is not None else 0
        # Not the column that will be read, which a source need not know: the text is the longest.
        columns_of_text = [column for column in data.data.table.columns if columns.is_text(column.type)]
        return max((column.nbytes for column in columns_of_text), default=data.data.nbytes)

    def pieces(self, split: str | None, target: int) -> list[Piece]:
        size = self.size(split)
        if not self.spec.streaming:
            return equal_pieces("", number_of_parts(size, target), size, target)
        return equal_pieces("", self._data(split).num_shards, size or None, target)

    def read(self, split: str | None, piece: Piece, options: ReadOptions, bad: Bad) -> Iterator[Document]:
        check_split(self.spec.location, split, self.splits())
        data = self._data(split)
        names = data.column_names
        if names is not None:
            if options.field not in names:
                raise UserError(no_field(self.spec.location, options.field, names))
            data = data.select_columns([options.field])
        if self.spec.streaming:
            return self._streamed(data, piece, options, bad)
        return self._mapped(data, piece, options, bad)

    def _mapped(self, data: Any, piece: Piece, options: ReadOptions, bad: Bad) -> Iterator[Document]:
        name = self.spec.location
        begin, end = share(len(data), piece.part, piece.parts)
        table = data.with_format("arrow")
        for first in range(begin, end, columns.RECORDS):
            batch = table[first : min(end, first + columns.RECORDS)]
            for number, text in enumerate(columns.texts(batch.column(0)), first + 1):
                yield from record_documents(text, options, partial("{} record {}".format, name, number), bad)

    def _streamed(self, data: Any, piece: Piece, options: ReadOptions, bad: Bad) -> Iterator[Document]:
        import pyarrow

        name = f"{self.spec.location} shard {piece.part}"
        number = 0
        try:
            for number, record in enumerate(data.shard(num_shards=piece.parts, index=piece.part), 1):
                where = f"{name} record {number}"
                if options.field not in record:
                    bad(no_field(where, options.field, record))
                    continue
                yield from record_documents(record[options.field], options, partial(str, where), bad)
        except UserError:
            raise
        except (ValueError, pyarrow.ArrowException) as error:  # what the readers of the formats raise
            bad(f"{name} cannot be read after record {number}: {first_line(error)}")
        except Exception as error:  # the network: going on without the rest would lose it silently
            raise UserError(f"{name} cannot be read after record {number}: {first_line(error)}") from error

    def _data(self, split: str | None) -> Any:
        return _load(self.spec.location, split, self.spec.streaming)


@functools.lru_cache
def _splits(location: str) -> tuple[str, ...]:
    return tuple(sorted(_call(location, "get_dataset_split_names")))


@functools.lru_cache
def _load(location: str, split: str | None, streaming: bool) -> Any:
    return _call(location, "load_dataset", split=split, streaming=streaming)


def _call(location: str, function: str, **options: Any) -> Any:
    import datasets

    name, config = _name(location)
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return getattr(datasets, function)(name, config, **options)
    except Exception as error:  # the hub client raises many kinds; all are about this name or the connection
        raise UserError(
            f"data source {location} cannot be opened: {first_line(error)} "
            "(expected hf:USER/NAME or hf:USER/NAME/CONFIG)"
        ) from error
    finally:
        if not bars:
            datasets.enable_progress_bars()


def _name(location: str) -> tuple[str, str | None]:
    """hf:USER/NAME/CONFIG → (USER/NAME, CONFIG); a local directory (hf:/…, hf:./…) has no config."""
    name = location.removeprefix("hf:")
    if not name:
        raise UserError("data source hf: names no data set; expected hf:USER/NAME or hf:USER/NAME/CONFIG")
    if name.startswith(("/", "./", "../", "~")):
        return os.path.expanduser(name), None
    parts = name.split("/", 2)
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None
