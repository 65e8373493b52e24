"""Documents out of everything that text comes in: one spelling of a source for every command.

    docstrings                 the docstrings of the Python installation, which every machine has
    PATH, GLOB                 .txt, .jsonl (each also .gz, .bz2, .xz or .zst) and .parquet files; gs://, s3:// and
                               https:// too
    DIRECTORY                  such files in the layout of the Hugging Face hub: train.parquet,
                               validation-00000-of-00001.parquet, test/0.jsonl, …
    hf:NAME[/CONFIG]           a data set of the Hugging Face hub (hf:USER/NAME/CONFIG), streamed

Every reader is a generator that holds a few records at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from distiljax.data.document import Document
from distiljax.data.metadata import Statistics
from distiljax.errors import UserError

if TYPE_CHECKING:
    import fsspec

FORMATS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
PARQUET_RECORDS = 64  # records decoded at a time; one may be a whole book

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


def documents(
    source: str | Sequence[str],
    split: str = "train",
    *,
    train_split: str = "train",
    text_field: str = "text",
    unit: str = "document",
    max_documents: int = 0,
    holdout: float = 0.0,
    deduplicate: bool = True,
    statistics: Statistics | None = None,
) -> Iterator[str]:
    """The documents of a split of one source, or of several one after the other.

    `split` "train" reads `train_split`. Where a source has no validation split, "validation" is the share
    `holdout` of its training documents, chosen by a hash of the text (of the file for docstrings), and
    "train" is the others: the two never overlap, and a document's side does not depend on what else is in the
    corpus.

    Args:
      source: a source or a sequence of them, see the head of this module.
      split: "train", "validation" or a split that the source names.
      train_split: the source's split that is for training.
      text_field: column or key that holds the text.
      unit: "document" (a record; in .txt files a line), "line", or "paragraph" (separated by blank lines).
      max_documents: stop after so many; 0 is all.
      holdout: share of the documents to hold out where there is no validation split, 0 ≤ holdout < 1.
      deduplicate: drop texts that were already read (their 64-bit hashes are kept: about 70 bytes a
        document).
      statistics: counters to add to.

    Yields:
      Texts, in the order of the source.

    Raises:
      UserError: the source, split or field is not there, or a file is not what its name says; with file and
        line.
    """
    count = statistics if statistics is not None else Statistics()
    seen: set[int] = set()
    yielded = 0
    for name in [source] if isinstance(source, str) else source:
        source_split, side = _side(name, split, train_split, holdout)
        for document in read(name, source_split, text_field=text_field, unit=unit):
            count.documents_read += 1
            if deduplicate:
                digest = _hash(document.text)
                if digest in seen:
                    count.dropped_duplicate += 1
                    continue
                seen.add(digest)
            if side is not None and (_hash(document.group) < holdout * 2**64) != (side == "held out"):
                count.dropped_held_out += 1
                continue
            count.documents += 1
            yielded += 1
            yield document.text
            if yielded == max_documents:
                return


def read(
    source: str, split: str | None, *, text_field: str = "text", unit: str = "document"
) -> Iterator[Document]:
    """All documents of one source's split (None for a source without splits), unfiltered."""
    if source == "docstrings":
        from distiljax.data import docstrings

        yield from docstrings.read()
    elif source.startswith("hf:"):
        for number, text in enumerate(_hub_texts(source, split, text_field), 1):
            yield from _units(text, unit, f"{source} record {number}")
    else:
        fs, files = _files(source)
        for path in files.get(split, ()) if split is not None else _all(files):
            yield from _file_documents(fs, path, text_field, unit)


def splits(source: str) -> tuple[str, ...]:
    """The names of a source's splits, sorted; empty for one that is not divided into splits.

    Raises:
      UserError: the source is not there.
    """
    if source == "docstrings":
        return ()
    if source.startswith("hf:"):
        return _hub_splits(source)
    return tuple(sorted(split for split in _files(source)[1] if split))


def _side(source: str, split: str, train_split: str, holdout: float) -> tuple[str | None, str | None]:
    """The split of the source to read, and the side of the holdout: "kept", "held out", None without one."""
    names = splits(source)
    wanted = train_split if split == "train" else split
    if wanted in names:
        has_holdout = split == "train" and holdout > 0 and "validation" not in names
        return wanted, "kept" if has_holdout else None
    kept_split = train_split if train_split in names else None
    if split == "train" and not names:
        return None, "kept" if holdout > 0 else None
    if split == "validation" and (kept_split or not names):
        if holdout > 0:
            return kept_split, "held out"
        raise UserError(
            f"{source} has no validation split; set data.holdout to the "
            "share of documents to hold out, such as 0.02"
        )
    raise UserError(
        f"{source} has no split {wanted!r}; it has {', '.join(names) if names else 'no splits: only train'}"
    )


def _hash(text: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big"
    )


def _units(text: Any, unit: str, where: str) -> Iterator[Document]:
    """A record as documents; those of one record are one group."""
    if text is None:
        return
    if not isinstance(text, str):
        raise UserError(f"{where}: the text is of type {type(text).__name__}, expected a string")
    if unit == "line":
        parts = text.splitlines()
    elif unit == "paragraph":
        parts = re.split(r"\n[ \t\r]*\n", text)
    else:
        parts = [text]
    for part in parts:
        if part and not part.isspace():
            yield Document(part, text)


# Files.


def _files(source: str) -> tuple[fsspec.AbstractFileSystem, dict[str | None, list[str]]]:
    """The file system and a source's sorted files by split (None: no split in the name)."""
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(source)
        directory = fs.isdir(path)
        if directory:
            found = [name for name in fs.find(path) if _format(name)]
        else:
            found = [path] if fs.exists(path) else [name for name in fs.glob(path) if not fs.isdir(name)]
    except (ImportError, OSError, ValueError) as error:
        raise UserError(f"data source {source} cannot be opened: {_first_line(error)}") from None
    if not found:
        if directory:
            raise UserError(
                f"directory {source} has no {', '.join(FORMATS)} file; expected the text in such files"
            )
        what = "matches no file" if any(letter in source for letter in "*?[") else "does not exist"
        raise UserError(
            f"data source {source} {what}; expected docstrings, a file, a glob, a directory or hf:NAME"
        )
    for name in found:
        if not _format(name):
            raise UserError(
                f"{name} is not a text source; expected {', '.join(FORMATS)}, "
                f"the first two also with {', '.join(COMPRESSIONS)}"
            )
    files: dict[str | None, list[str]] = {}
    for name in sorted(found):
        files.setdefault(_split_in_name(os.path.relpath(name, path)) if directory else None, []).append(name)
    return fs, files


def _all(files: dict[str | None, list[str]]) -> list[str]:
    return [path for paths in files.values() for path in paths]


def _format(path: str) -> str | None:
    base, extension = os.path.splitext(path.lower())
    inner = os.path.splitext(base)[1] if extension in COMPRESSIONS else extension
    if inner not in FORMATS or (inner == ".parquet" and extension != inner):
        return None
    return inner


def _split_in_name(relative: str) -> str | None:
    """The split that a path inside a data set's directory stands for."""
    if sharded := re.match(r"(?:.*/)?(\w+(?:\.\w+)*)-\d{5}-of-\d{5}\.", relative):
        return _SPLIT_WORDS.get(sharded[1], sharded[1])
    for part in reversed(relative.lower().split("/")):
        for word in re.split(r"[^a-z]+", part):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return None


def _file_documents(
    fs: fsspec.AbstractFileSystem, path: str, text_field: str, unit: str
) -> Iterator[Document]:
    import lzma

    import pyarrow

    kind = _format(path)
    try:
        with fs.open(path, "rb") as file:
            if kind == ".parquet":
                yield from _parquet_documents(file, path, text_field, unit)
                return
            lines = _lines(_decompressed(file, path), path)
            if kind == ".jsonl":
                yield from _jsonl_documents(lines, path, text_field, unit)
            elif unit == "paragraph":
                yield from _paragraphs(lines)
            else:
                yield from (Document(line, line) for _, line in lines if line and not line.isspace())
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {_first_line(error)}") from None


def _decompressed(file: BinaryIO, path: str) -> BinaryIO:
    extension = os.path.splitext(path.lower())[1]
    if extension == ".zst":
        import io

        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))
    if extension in COMPRESSIONS:
        import bz2
        import gzip
        import lzma

        opener = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[extension]
        return opener(file, "rb")  # type: ignore[operator]
    return file


def _lines(file: BinaryIO, path: str) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ends."""
    for number, line in enumerate(file, 1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} line {number} is not UTF-8 (byte {line[error.start]:#04x}); "
                "convert the file to UTF-8"
            ) from None
        yield number, text.removeprefix("\ufeff").rstrip("\r\n") if number == 1 else text.rstrip("\r\n")


def _paragraphs(lines: Iterator[tuple[int, str]]) -> Iterator[Document]:
    block: list[str] = []
    for _, line in lines:
        if line and not line.isspace():
            block.append(line)
        elif block:
            yield Document("\n".join(block), "\n".join(block))
            block = []
    if block:
        yield Document("\n".join(block), "\n".join(block))


def _jsonl_documents(
    lines: Iterator[tuple[int, str]], path: str, text_field: str, unit: str
) -> Iterator[Document]:
    for number, line in lines:
        if not line or line.isspace():
            continue
        where = f"{path} line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where} is not JSON: {_first_line(error)}") from None
        if not isinstance(record, dict):
            raise UserError(
                f"{where} is a JSON {type(record).__name__}, expected an object with the key {text_field!r}"
            )
        if text_field not in record:
            raise UserError(_no_field(where, text_field, list(record)))
        yield from _units(record[text_field], unit, where)


def _parquet_documents(file: BinaryIO, path: str, text_field: str, unit: str) -> Iterator[Document]:
    import pyarrow.parquet

    # A buffer size makes pyarrow stream the column; without it a whole row group is read at once.
    parquet = pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20)
    if text_field not in parquet.schema_arrow.names:
        raise UserError(_no_field(path, text_field, parquet.schema_arrow.names))
    number = 0
    for batch in parquet.iter_batches(PARQUET_RECORDS, columns=[text_field]):
        try:
            texts = batch.column(0).to_pylist()
        except UnicodeDecodeError:
            raise UserError(f"{path} records {number + 1}-{number + len(batch)} are not all UTF-8") from None
        for text in texts:
            number += 1
            yield from _units(text, unit, f"{path} record {number}")


def _no_field(where: str, text_field: str, fields: Sequence[str]) -> str:
    return f"{where} has no field {text_field!r}; it has {', '.join(fields) or 'none'}: set data.text_field"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


# The Hugging Face hub.


def _hub_name(source: str) -> tuple[str, str | None]:
    """hf:USER/NAME/CONFIG → (USER/NAME, CONFIG); a local directory (hf:/…, hf:./…) has no config."""
    name = source.removeprefix("hf:")
    if not name:
        raise UserError("data source hf: names no data set; expected hf:USER/NAME or hf:USER/NAME/CONFIG")
    if name.startswith(("/", "./", "../", "~")):
        return os.path.expanduser(name), None
    parts = name.split("/", 2)
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None


def _hub(source: str, call: str, **options: Any) -> Any:
    import datasets

    name, config = _hub_name(source)
    try:
        return getattr(datasets, call)(name, config, **options)
    except Exception as error:  # the hub client raises many kinds; all are about this name or the connection
        raise UserError(
            f"data source {source} cannot be opened: {_first_line(error)} "
            "(expected hf:USER/NAME or hf:USER/NAME/CONFIG)"
        ) from error


def _hub_splits(source: str) -> tuple[str, ...]:
    return tuple(sorted(_hub(source, "get_dataset_split_names")))


def _hub_texts(source: str, split: str | None, text_field: str) -> Iterator[Any]:
    stream = _hub(source, "load_dataset", split=split, streaming=True)
    names = stream.column_names
    if names is not None:
        if text_field not in names:
            raise UserError(_no_field(source, text_field, names))
        stream = stream.select_columns([text_field])
    try:
        for record in stream:
            if text_field not in record:
                raise UserError(_no_field(source, text_field, list(record)))
            yield record[text_field]
    except OSError as error:
        raise UserError(f"data source {source} cannot be read: {_first_line(error)}") from None
