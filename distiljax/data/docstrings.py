"""The corpus that every Python installation has: the docstrings of the standard library and of the installed
packages.

Files are parsed, never imported. Files come in an order that looks random but is the same on every machine
with the same packages, one file of every package in turn, and a package stops at its share, so that any
beginning of the corpus is spread over all of them. What is not prose (doctests, code, tables, signatures) is
left out.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence

from distiljax.data.document import Document

PACKAGE_CHARACTERS = 400_000  # of prose; at most this from one package
MAX_FILE_BYTES = 400_000  # larger ones are generated tables more often than not, and slow to parse
MIN_CHARACTERS = 40

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


def read(roots: Sequence[str] | None = None) -> Iterator[Document]:
    """The docstrings as documents; the group of a document is its file, so that a file is held out as a
    whole.

    Args:
      roots: directories to read; by default the standard library and site-packages.
    """
    if roots is None:
        paths = sysconfig.get_paths()
        roots = [paths["stdlib"], paths["purelib"], paths["platlib"]]
    seen: set[bytes] = set()
    packages = _packages(roots)
    turns = {name: _package(packages[name]) for name in sorted(packages, key=_shuffled)}
    while turns:
        for name in list(turns):
            found = next(turns[name], None)
            if found is None:
                del turns[name]
                continue
            for document in found:
                # Exact repetitions (inherited and vendored docstrings) would leak over the holdout.
                digest = hashlib.blake2b(document.text.encode("utf-8", "replace"), digest_size=16).digest()
                if digest not in seen:
                    seen.add(digest)
                    yield document


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


def _package(files: list[tuple[str, str]]) -> Iterator[list[Document]]:
    """A package's documents, file by file, up to its share."""
    characters = 0
    for relative, path in sorted(files, key=lambda file: _shuffled(file[0])):
        found = [Document(text, relative) for text in _docstrings(path)]
        characters += sum(len(document.text) for document in found)
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
        if len(text) >= MIN_CHARACTERS:
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
