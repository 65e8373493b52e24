"""TensorFlow Datasets, read without TensorFlow: tfds:NAME[/CONFIG][:VERSION], prepared as array_record."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
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


class Tfds:
    """A data set of TensorFlow Datasets; it is downloaded and prepared first where it is not yet."""

    expensive = False

    def __init__(self, spec: SourceSpec):
        self.spec = spec

    def splits(self) -> tuple[str, ...]:
        return tuple(sorted(self._builder.info.splits))

    def size(self, split: str | None) -> int:
        check_split(self.spec.location, split, self.splits())
        return self._builder.info.splits[split].num_bytes

    def pieces(self, split: str | None, target: int) -> list[Piece]:
        size = self.size(split)
        return equal_pieces("", number_of_parts(size, target), size or None, target)

    def read(self, split: str | None, piece: Piece, options: ReadOptions, bad: Bad) -> Iterator[Document]:
        check_split(self.spec.location, split, self.splits())
        features = self._builder.info.features
        names = sorted(features) if hasattr(features, "keys") else []
        if options.field not in names:
            raise UserError(no_field(self.spec.location, options.field, names))
        return self._rows(self._data(split, options.field), piece, options, bad)

    def _rows(self, data: Any, piece: Piece, options: ReadOptions, bad: Bad) -> Iterator[Document]:
        name = self.spec.location
        begin, end = share(len(data), piece.part, piece.parts)
        for first in range(begin, end, columns.RECORDS):
            try:
                records = data.__getitems__(range(first, min(end, first + columns.RECORDS)))
            except Exception as error:  # the format's own kinds, about these records
                bad(f"{name} cannot be read after record {first}: {first_line(error)}")
                return
            for number, record in enumerate(records, first + 1):
                text = record[options.field]
                yield from record_documents(text, options, partial("{} record {}".format, name, number), bad)

    def _data(self, split: str | None, field: str) -> Any:
        import tensorflow_datasets

        # What is not text (images, sound) is not decoded.
        others = {
            name for name, feature in self._builder.info.features.items() if not hasattr(feature, "keys")
        }
        skipped = {name: tensorflow_datasets.decode.SkipDecoding() for name in others - {field}}
        with _quiet():
            return self._builder.as_data_source(split=split, decoders=skipped)

    @property
    def _builder(self) -> Any:
        return _builder(self.spec.location, self.spec.data_dir)


@functools.lru_cache
def _builder(location: str, data_dir: str | None) -> Any:
    """The builder of a data set that is prepared in a format of random access."""
    name = location.removeprefix("tfds:")
    if not name:
        raise UserError(
            "data source tfds: names no data set; expected tfds:NAME, tfds:NAME/CONFIG or …:VERSION"
        )
    import tensorflow_datasets

    try:
        with _quiet():
            builder = tensorflow_datasets.builder(name, data_dir=data_dir)
            prepared = builder.is_prepared()
            if not prepared:
                builder = tensorflow_datasets.builder(name, data_dir=data_dir, file_format="array_record")
    except Exception as error:  # registry, network and file system raise kinds of their own
        raise UserError(
            f"data source {location} cannot be opened: {first_line(error)} (expected tfds:NAME, tfds:NAME/CONFIG or "
            "…:VERSION; data sets are looked for in TFDS_DATA_DIR or ?data_dir=)"
        ) from error
    if not prepared:
        _prepare(builder, location, name)
    kind = builder.info.file_format.value
    if kind not in ("array_record", "parquet"):
        raise UserError(
            f"data source {location} is prepared as {kind} in {builder.data_dir}; expected array_record: "
            "set another ?data_dir=, or remove that directory to have it prepared again"
        )
    return builder


def _prepare(builder: Any, location: str, name: str) -> None:
    print(f"{location}: downloading and preparing in {builder.data_dir}", file=sys.stderr)
    try:
        with _quiet():
            builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # as many kinds as there are data sets
        raise UserError(
            f"data source {location} cannot be prepared in {builder.data_dir}: {first_line(error)}; if it needs "
            f"TensorFlow, prepare it where that is installed: tfds build {name} --file_format=array_record"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and chat on stdout, and no warnings that are about the library's own code."""
    import tensorflow_datasets

    tensorflow_datasets.disable_progress_bar()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.filterwarnings("ignore", r"label\(\) is deprecated", DeprecationWarning)
        yield
