"""The corpus that every Python installation has: the docstrings of the standard library and of the installed
packages.

Files are parsed, never imported. Files come in an order that looks random but is the same on every machine with the
same packages, one file of every package of a part in turn, and a package stops at its share, so that any beginning of a
part is spread over many of them. What is not prose (doctests, code, tables, signatures) is left out.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from functools import partial

from distiljax.data.document import Document
from distiljax.data.sources.base import Bad, Piece, ReadOptions, check_split, record_documents
from distiljax.data.sources.spec import SourceSpec

PACKAGE_CHARACTERS = 400_000  # of prose; at most this from one package
MAX_FILE_BYTES = 400_000  # larger ones are generated tables more often than not, and slow to parse
MIN_CHARACTERS = 40
PARTS = 8
PROSE = 0.1  # bytes of prose in a byte of Python, about

_SKIPPED_DIRECTORIES = {
    "__pycache__",
    "test",
    "tests",
    "testing",
    "_vendor",
    "vendored",
    "site-packages",
    "dist-packages",
}
_DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Docstrings:
    """The docstrings as a source without splits; its parts take turns with the packages."""

    expensive = True  # everything is parsed

    def __init__(self, spec: SourceSpec, roots: Sequence[str] | None = None):
        """Args:
        spec: the source.
        roots: directories to read; by default the standard library and site-packages.
        """
        self.spec = spec
        self._roots = roots

    def splits(self) -> tuple[str, ...]:
        return ()

    def size(self, split: str | None) -> int:
        return sum(piece.size for piece in self.pieces(split, 0))

    def pieces(self, split: str | None, target: int) -> list[Piece]:
        check_split(self.spec.location, split, ())
        return [
            Piece("", part, PARTS, sum(self._size(name) for name in self._order[part::PARTS]))
            for part in range(PARTS)
        ]

    def read(self, split: str | None, piece: Piece, options: ReadOptions, bad: Bad) -> Iterator[Document]:
        """The documents of a part of the packages; the group of a document is its file, so that a file is held out as
        a whole."""
        names = self._order[piece.part :: piece.parts]
        turns = {name: _package(self._packages[name]) for name in names}
        while turns:
            for name in list(turns):
                found = next(turns[name], None)
                if found is None:
                    del turns[name]
                    continue
                for text, file in found:
                    yield from record_documents(text, options, partial(str, file), bad, group=file)

    @functools.cached_property
    def _packages(self) -> dict[str, list[tuple[str, str]]]:
        paths = sysconfig.get_paths()
        return _packages(self._roots or [paths["stdlib"], paths["purelib"], paths["platlib"]])

    @functools.cached_property
    def _order(self) -> list[str]:
        return sorted(self._packages, key=_shuffled)

    def _size(self, name: str) -> int:
        sizes = [os.stat(path).st_size for _, path in self._packages[name] if os.path.exists(path)]
        return min(PACKAGE_CHARACTERS, int(PROSE * sum(size for size in sizes if size <= MAX_FILE_BYTES)))


def _packages(roots: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Top-level package or module → its files as (path relative to the root, path)."""
    packages: dict[str, list[tuple[str, str]]] = {}
    for root in dict.fromkeys(os.path.realpath(root) for root in roots):
        for directory, subdirectories, files in os.walk(root):
            subdirectories[:] = [name for name in subdirectories if name not in _SKIPPED_DIRECTORIES]
            for file in files:
                if file.endswith(".py"):
                    path = os.path.join(directory, file)
                    relative = os.path.relpath(path, root).replace(os.sep, "/")
                    packages.setdefault(relative.split("/")[0], []).append((relative, path))
    packages.pop("distiljax", None)
    return packages


def _shuffled(name: str) -> bytes:
    """A sort key that is as good as random and the same everywhere."""
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()


def _package(files: list[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """A package's (docstring, file), file by file, up to its share."""
    characters = 0
    for relative, path in sorted(files, key=lambda file: _shuffled(file[0])):
        found = [(text, relative) for text in _docstrings(path)]
        characters += sum(len(text) for text, _ in found)
        if found:
            yield found
        if characters >= PACKAGE_CHARACTERS:
            return


def _docstrings(path: str) -> Iterator[str]:
    """The prose of a file's docstrings; nothing from a file that cannot be parsed."""
    try:
        if os.path.getsize(path) > MAX_FILE_BYTES:
            return
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            tree = ast.parse(file.read())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in _definitions(tree):
        text = prose(ast.get_docstring(node, clean=False) or "")
        # Half a character, written as an escape, cannot be tokenised.
        if len(text) >= MIN_CHARACTERS and not re.search("[\ud800-\udfff]", text):
            yield text


def _definitions(
    tree: ast.Module,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """The module, its classes and functions, in order; expressions hold none and are not visited."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, _DEFINITIONS):
            yield node
        bodies = (getattr(node, name, ()) for name in ("body", "orelse", "handlers", "finalbody"))
        stack.extend(reversed([child for body in bodies if isinstance(body, list) for child in body]))


def prose(docstring: str) -> str:
    """The paragraphs of a docstring that read as sentences, dedented; the rest is dropped."""
    kept = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        lines = [line for line in block.splitlines() if re.search(r"[A-Za-z]", line)]
        text = "\n".join(lines)
        if _is_prose(text):
            kept.append(text)
    return "\n\n".join(kept)


def _is_prose(block: str) -> bool:
    if ">>>" in block or "\n... " in block:
        return False
    words = block.split()
    plain = sum(
        re.fullmatch(r"[(\"'`]*[A-Za-z][a-z'’-]*[)\"'`]*[.,:;!?)]*", word) is not None for word in words
    )
    return len(words) >= 4 and plain >= 0.75 * len(words)
