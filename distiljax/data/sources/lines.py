"""Text files: lines and paragraphs, of a part of a file that can be sought or of a compressed one."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, BinaryIO

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

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
BLOCK = 64  # consecutive records of a compressed file that stay in one part

_BOM = b"\xef\xbb\xbf"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class _Part:
    """The lines of a part of a file, with the place where they are.

    A line or paragraph belongs to the part in whose nominal bytes size·part/parts to size·(part+1)/parts it begins. A
    compressed file has no such bytes: its parts take turns with blocks of records.
    """

    def __init__(self, open_file: Callable[[], BinaryIO], label: str, part: int, parts: int, extension: str):
        self.open_file, self.label, self.part, self.parts = open_file, label, part, parts
        self.extension = extension if extension in COMPRESSIONS else ""
        self.begin, self.end = 0, None if self.extension or parts == 1 else 0
        self.lines = 0  # read so far
        self._first = 0  # where the first line read begins
        self._before: int | None = None  # lines of the file before it

    def read(self) -> Iterator[tuple[int, int, bytes]]:
        """(index, position, line without its end) of the lines from the nominal begin to the end of the file."""
        position = 0
        with self.open_file() as raw:
            file = _decompressed(raw, self.extension) if self.extension else raw
            if self.end is not None:
                self.begin, self.end = share(file.seek(0, os.SEEK_END), self.part, self.parts)
                if self.begin == self.end:
                    return
                file.seek(max(0, self.begin - 1))
                if self.begin:  # the line that the byte before is in belongs to an earlier part
                    position = self.begin - 1 + len(file.readline())
            self._first = position
            for index, line in enumerate(file):
                start = position
                position += len(line)
                self.lines = index + 1
                yield index, start, (line if start else line.removeprefix(_BOM)).rstrip(b"\r\n")

    def ends(self, position: int) -> bool:
        """Whether what begins at a position belongs to a later part."""
        return self.end is not None and position >= self.end

    def has_block(self, number: int) -> bool:
        """Whether a record is in this part of a compressed file."""
        return not self.extension or number // BLOCK % self.parts == self.part

    def line(self, index: int) -> str:
        """The name of a line that was read. The lines before a part are counted when the first one is asked for."""
        if self._before is None:
            self._before, left = 0, self._first
            if left:
                with self.open_file() as file:
                    while left and (chunk := file.read(min(left, 1 << 20))):
                        self._before += chunk.count(b"\n")
                        left -= len(chunk)
        return f"{self.label} line {self._before + index + 1}"


def documents(
    open_file: Callable[[], BinaryIO],
    label: str,
    piece: tuple[int, int],
    options: ReadOptions,
    bad: Bad,
    *,
    json_lines: bool,
    extension: str,
) -> Iterator[Document]:
    """The documents of a part of a .txt or .jsonl file.

    Args:
      open_file: opens the file for reading bytes.
      label: the file's name in messages.
      piece: (part, parts).
      json_lines: whether it is .jsonl.
      extension: the last of the file's name, which says how it is compressed.
    """
    import lzma

    part = _Part(open_file, label, *piece, extension)
    try:
        if json_lines:
            yield from _json_documents(part, options, bad)
        elif options.unit == "paragraph":
            yield from _paragraphs(part, options, bad)
        else:
            yield from _line_documents(part, options, bad)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if unreachable(error) or not part.extension:
            raise UserError(f"{label} cannot be read: {first_line(error)}") from None
        # Every part of a compressed file meets the damage; it is one.
        message = f"{label} is damaged or cut short after line {part.lines}: {first_line(error)}"
        bad(message, repeated=piece[0] > 0)


def _decompressed(file: BinaryIO, extension: str) -> BinaryIO:
    import bz2
    import gzip
    import io
    import lzma

    if extension == ".zst":
        import pyarrow

        # A read that meets the damage gives nothing: small ones lose little of what is before it.
        return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"), 1 << 14)
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[extension]
    return opener(file, "rb")


def _lines(part: _Part) -> Iterator[tuple[int, bytes]]:
    """The lines that begin in the part, with their index."""
    for index, position, line in part.read():
        if part.ends(position):
            return
        if part.has_block(index):
            yield index, line


def _line_documents(part: _Part, options: ReadOptions, bad: Bad) -> Iterator[Document]:
    cut = options.unit == "sentence"
    for index, line in _lines(part):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            bad(_not_utf8(part, index, error))
            continue
        if cut:
            yield from record_documents(text, options, partial(part.line, index), bad)
        elif text and not text.isspace():
            yield Document(text, text)


def _paragraphs(part: _Part, options: ReadOptions, bad: Bad) -> Iterator[Document]:
    """Blocks of lines between blank ones: those after the first blank line that begins in the part, or after it, up
    to the first that begins after the part."""
    block: list[tuple[int, bytes]] = []
    number = 0
    inside = False
    for index, position, line in part.read():
        inside = inside or part.begin == 0
        if line and not _is_blank(line):
            if inside:
                block.append((index, line))
            continue
        if block:
            yield from _paragraph(part, block, number, bad)
            block, number = [], number + 1
        inside = True
        if part.ends(position):
            return
    if block:
        yield from _paragraph(part, block, number, bad)


def _paragraph(part: _Part, block: list[tuple[int, bytes]], number: int, bad: Bad) -> Iterator[Document]:
    if not part.has_block(number):
        return
    try:
        text = b"\n".join([line for _, line in block]).decode("utf-8")
    except UnicodeDecodeError:
        for index, line in block:
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                bad(_not_utf8(part, index, error))
                return
    else:
        yield Document(text, text)


def _is_blank(line: bytes) -> bool:
    return not 32 < line[0] < 128 and line.decode("utf-8", "replace").isspace()


def _not_utf8(part: _Part, index: int, error: UnicodeDecodeError) -> str:
    return (
        f"{part.line(index)} is not UTF-8 (byte {error.object[error.start]:#04x}); convert the file to UTF-8"
    )


def _json_documents(part: _Part, options: ReadOptions, bad: Bad) -> Iterator[Document]:
    for index, line in _lines(part):
        if not line or _is_blank(line):
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            bad(_not_utf8(part, index, error))
        except (ValueError, RecursionError) as error:
            bad(f"{part.line(index)} is not JSON: {first_line(error)}")
        else:
            yield from _record(part, index, line, record, options, bad)


def _record(
    part: _Part, index: int, line: bytes, record: Any, options: ReadOptions, bad: Bad
) -> Iterator[Document]:
    field = options.field
    if not isinstance(record, dict):
        kind = type(record).__name__
        bad(f"{part.line(index)} is a JSON {kind}, expected an object with the key {field!r}")
        return
    if field not in record:
        bad(no_field(part.line(index), field, record))
        return
    text = record[field]
    if isinstance(text, str) and _SURROGATE.search(line):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            bad(f"{part.line(index)}: the text has half a character (\\u{code:04x}); expected valid Unicode")
            return
    yield from record_documents(text, options, partial(part.line, index), bad)
