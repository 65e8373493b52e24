"""Documents out of everything that text comes in: one spelling of a source for every command.

    docstrings                  the docstrings of the Python installation, which every machine has
    PATH, GLOB                  .txt, .jsonl (each also .gz, .bz2, .xz or .zst) and .parquet files; gs://, s3:// and
                                https:// too
    DIRECTORY                   such files in the layout of the Hugging Face hub: train.parquet,
                                validation-00000-of-00001.parquet, test/0.jsonl, …
    hf:NAME[/CONFIG]            a data set of the Hugging Face hub (hf:USER/NAME/CONFIG), or hf:./DIRECTORY
    tfds:NAME[/CONFIG][:VERSION]
                                a data set of TensorFlow Datasets; TensorFlow is not needed

and settings of its own: ?split=NAME&field=NAME&weight=NUMBER, &streaming=1 with hf:, &data_dir=DIRECTORY with tfds:.

A source gives pieces; a piece gives documents, and every reader is a generator that holds a few records at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from distiljax.data.document import Document
from distiljax.data.sources.base import Bad, Piece, ReadOptions, Source
from distiljax.data.sources.spec import SourceSpec, parse
from distiljax.errors import UserError

__all__ = [
    "Bad",
    "Document",
    "Piece",
    "ReadOptions",
    "Source",
    "SourceSpec",
    "documents",
    "open_source",
    "parse",
]


def open_source(source: str | SourceSpec) -> Source:
    """The source that a spelling means. Nothing is looked at before it is asked for.

    Raises:
      UserError: the spelling is wrong.
    """
    spec = source if isinstance(source, SourceSpec) else parse(source)
    if spec.location == "docstrings":
        from distiljax.data.sources.docstrings import Docstrings

        return Docstrings(spec)
    if spec.location.startswith("hf:"):
        from distiljax.data.sources.hub import Hub

        return Hub(spec)
    if spec.location.startswith("tfds:"):
        from distiljax.data.sources.tfds import Tfds

        return Tfds(spec)
    from distiljax.data.sources.files import Files

    return Files(spec)


def documents(
    source: str | SourceSpec,
    split: str | None = None,
    *,
    field: str = "text",
    unit: str = "document",
    language: str = "en",
    bad: Callable[[str], None] | None = None,
) -> Iterator[Document]:
    """All documents of one source, unfiltered.

    Args:
      source: see the head of this module.
      split: the split to read; without one what the source's own settings say, or else all splits.
      field: column or key that holds the text, where the source's own settings do not name it.
      unit: "document" (a record; in .txt files a line), "line", "paragraph" (separated by blank lines) or "sentence".
      language: of the text, an ISO 639-1 code; it decides where sentences end.
      bad: called with one line for every record that cannot be used; by default it raises UserError.

    Yields:
      Documents, in the order of the source's pieces.

    Raises:
      UserError: the source, split or field is not there, or a file is not what its name says; with file and line.
    """

    def told(message: str, repeated: bool = False) -> None:
        if bad is None:
            raise UserError(message)
        if not repeated:
            bad(message)

    opened = open_source(source)
    options = ReadOptions(opened.spec.field or field, unit, language)
    chosen = split or opened.spec.split
    for name in (chosen,) if chosen else opened.splits() or (None,):
        for piece in opened.pieces(name, sys.maxsize):
            yield from opened.read(name, piece, options, told)
