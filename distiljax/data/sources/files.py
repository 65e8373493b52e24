"""Files as a source: a path, a glob, or a directory in the layout of the Hugging Face hub; local or remote."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from distiljax.data.document import Document
from distiljax.data.sources import columns, lines
from distiljax.data.sources.base import (
    Bad,
    Piece,
    ReadOptions,
    check_split,
    equal_pieces,
    first_line,
    number_of_parts,
)
from distiljax.data.sources.spec import SourceSpec
from distiljax.errors import UserError

if TYPE_CHECKING:
    import fsspec

FORMATS = (".txt", ".jsonl", ".parquet")
COMPRESSED = 3  # bytes of text in a byte of a compressed or Parquet file, about

# Each part unpacks the whole file (a row group: up to its end), at 550 MB/s for .zst, 200 for .gz, 85 for .xz and 30
# for .bz2: with so many parts that adds a third to four fifths to the time of tokenising, 3 MB/s on a core.
_MOST_PARTS = {".gz": 32, ".bz2": 8, ".xz": 16, ".zst": 64, ".parquet": 64}
FEW_PARTS = 8  # of a file of any size
LARGE_PART = 256 << 20  # bytes of text; more than FEW_PARTS are at least so large

# The words that the Hugging Face hub takes for a split in a file's or folder's name.
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}


@dataclasses.dataclass(frozen=True)
class _File:
    path: str
    split: str | None
    size: int | None  # estimated bytes of text, if known
    plain: bool  # it can be cut anywhere
    seekable: bool


class Files:
    """.txt, .jsonl (each also compressed) and .parquet files."""

    expensive = False

    def __init__(self, spec: SourceSpec):
        self.spec = spec

    def splits(self) -> tuple[str, ...]:
        return tuple(sorted({file.split for file in self._files if file.split}))

    def size(self, split: str | None) -> int:
        return sum(file.size or 0 for file in self._of(split))

    def pieces(self, split: str | None, target: int) -> list[Piece]:
        pieces = []
        for file in self._of(split):
            parts = number_of_parts(file.size or 0, target, self._most_parts(file))
            pieces += equal_pieces(file.path.removeprefix(self._root), parts, file.size, target)
        return pieces

    def read(self, split: str | None, piece: Piece, options: ReadOptions, bad: Bad) -> Iterator[Document]:
        place = (piece.part, piece.parts)
        path = self._root + piece.name
        kind = _format(path)
        label = self._label(path)
        if kind != ".parquet":
            opener, json_lines = functools.partial(self._open, path), kind == ".jsonl"
            return lines.documents(
                opener, label, place, options, bad, json_lines=json_lines, extension=_extension(path)
            )
        return self._parquet(path, label, place, options, bad)

    def _parquet(
        self, path: str, label: str, place: tuple[int, int], options: ReadOptions, bad: Bad
    ) -> Iterator[Document]:
        try:
            file = self._open(path)
        except OSError as error:
            raise UserError(f"{label} cannot be read: {first_line(error)}") from None
        with file:
            yield from columns.documents(file, label, place, options, bad)

    @functools.cached_property
    def _place(self) -> tuple[fsspec.AbstractFileSystem, str]:
        import fsspec

        try:
            return fsspec.core.url_to_fs(self.spec.location)
        except Exception as error:  # every store's client raises kinds of its own
            raise self._unreachable(error) from None

    @functools.cached_property
    def _root(self) -> str:
        """The last directory that the location names in full, with a slash; known without looking at it."""
        _, path = self._place
        named = re.split(r"[*?\[]", path)[0]
        if named == path and not _format(path):  # a directory
            return path.rstrip("/") + "/"
        return named[: named.rfind("/") + 1]

    @functools.cached_property
    def _files(self) -> list[_File]:
        """The files in the order of their paths."""
        fs, path = self._place
        try:
            directory = fs.isdir(path)
            if directory:
                found = fs.find(path, detail=True)
            elif fs.exists(path):
                found = {path: fs.info(path)}
            else:
                found = fs.glob(path, detail=True)
        except Exception as error:  # as above
            raise self._unreachable(error) from None
        found = {name: info for name, info in found.items() if info["type"] != "directory"}
        for name, info in found.items():
            if info["type"] == "other" and not directory:  # a pipe can be read once, and only by one process
                raise UserError(f"{self._label(name)} is no regular file; expected text in a file")
        if directory:
            return self._in_directory(path, found)
        if not found:
            what = "matches no file" if re.search(r"[*?\[]", self.spec.location) else "does not exist"
            raise UserError(
                f"data source {self.spec.location} {what}; expected docstrings, a file, a glob, a directory, hf:NAME "
                "or tfds:NAME"
            )
        for name in found:
            if not _format(name):
                raise UserError(
                    f"{self._label(name)} is not a text source; expected {', '.join(FORMATS)}, "
                    f"the first two also with {', '.join(lines.COMPRESSIONS)}"
                )
        return [_file(name, None, found[name]) for name in sorted(found)]

    def _in_directory(self, path: str, found: dict[str, Any]) -> list[_File]:
        relative = {name: os.path.relpath(name, path) for name in found}
        files = [
            _file(name, _split_in_name(relative[name]), found[name])
            for name in sorted(found)
            if _format(name) and not re.search(r"(^|/)(\.|__)", relative[name])
        ]
        if not files:
            raise UserError(
                f"directory {self.spec.location} has no {', '.join(FORMATS)} file; expected the text in such files"
            )
        return files

    def _of(self, split: str | None) -> list[_File]:
        if split is None:
            return self._files
        check_split(self.spec.location, split, self.splits())
        return [file for file in self._files if file.split == split]

    def _most_parts(self, file: _File) -> int | None:
        """What limits the parts of a file that is read up to their beginning: its row groups, or unpacking it."""
        if file.plain:
            return None if file.seekable else 1
        size, most = file.size or 0, FEW_PARTS
        if file.seekable:
            most = min(_MOST_PARTS[_extension(file.path)], max(most, size // LARGE_PART))
        if _format(file.path) != ".parquet" or size < FEW_PARTS << 20:
            return most
        import pyarrow.parquet

        try:
            with self._open(file.path) as opened:
                return max(most, pyarrow.parquet.ParquetFile(opened).metadata.num_row_groups)
        except (OSError, pyarrow.ArrowException):
            return most  # reading it says what is wrong

    def _open(self, path: str) -> BinaryIO:
        fs, _ = self._place
        # The local file as it is: fsspec's wrapper is slower.
        return open(path, "rb", 1 << 18) if _is_local(fs) else fs.open(path, "rb")

    def _label(self, path: str) -> str:
        fs, _ = self._place
        return path if _is_local(fs) else fs.unstrip_protocol(path)

    def _unreachable(self, error: Exception) -> UserError:
        return UserError(f"data source {self.spec.location} cannot be opened: {first_line(error)}")


def _is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def _file(name: str, split: str | None, info: dict[str, Any]) -> _File:
    size = info.get("size")
    plain = _without_query(name).lower().endswith((".txt", ".jsonl"))
    # Many web servers give files as a whole only.
    text = size if plain or size is None else size * COMPRESSED
    return _File(name, split, text, plain, not _is_web(name))


def _format(path: str) -> str | None:
    base, extension = os.path.splitext(_without_query(path).lower())
    inner = os.path.splitext(base)[1] if extension in lines.COMPRESSIONS else extension
    if inner not in FORMATS or (inner == ".parquet" and extension != inner):
        return None
    return inner


def _extension(path: str) -> str:
    """The last extension."""
    return os.path.splitext(_without_query(path).lower())[1]


def _without_query(path: str) -> str:
    """A web address may end with ?download=true."""
    return path.partition("?")[0] if _is_web(path) else path


def _is_web(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def _split_in_name(relative: str) -> str | None:
    """The split that a path inside a data set's directory stands for."""
    if sharded := re.match(r"(?:.*/)?(\w+(?:\.\w+)*)-\d{5}-of-\d{5}\.", relative):
        return _SPLIT_WORDS.get(sharded[1], sharded[1])
    for part in reversed(relative.lower().split("/")):
        for word in re.split(r"[^a-z]+", part):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return None
