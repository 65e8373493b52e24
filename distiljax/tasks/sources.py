"""Where a task's rows come from: files on disk, read with Arrow and without a cache, or a data set of the hub."""

from __future__ import annotations

import dataclasses
import functools
import glob
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from distiljax.data.sources.base import first_line
from distiljax.errors import UserError
from distiljax.tasks.labels import plain, shown

if TYPE_CHECKING:
    import datasets
    import pyarrow

log = logging.getLogger(__name__)

FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_COMPRESSIONS = (".gz", ".bz2", ".zst")
_ALL = "train"  # the split of files whose names say nothing

# The words that the Hugging Face hub takes for a split in a file's or folder's name.
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# GLUE's place on the hub; its short name reads like a user's data set.
_GLUE = "nyu-mll/glue"


class Source(Protocol):
    """Splits of rows."""

    @property
    def location(self) -> str:
        """What the user wrote."""

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that are there, sorted."""

    def columns(self, split: str) -> list[str]:
        """The names of a split's columns."""

    def read(self, split: str, columns: Sequence[str]) -> datasets.Dataset:
        """All rows of a split, of some columns."""


def open_source(location: str) -> Source:
    """The source that a config names.

    Args:
      location: a file, a glob, a directory in the hub's layout (train.parquet, validation-00000-of-00001.parquet,
        test/part.csv), or a hub name, with /CONFIG where it has several.

    Raises:
      UserError: nothing there, a remote address, or files in no known format.
    """
    if "://" in location:
        raise UserError(f"data source {location} is remote; copy it to a local directory and name that")
    path = os.path.expanduser(location)
    if os.path.isdir(path):
        return _directory(location, path)
    if is_path(location):
        found = sorted(glob.glob(path)) if re.search(r"[*?\[]", path) and not os.path.exists(path) else [path]
        if not found or not os.path.isfile(found[0]):
            is_not = "is no regular file" if os.path.exists(path) else "does not exist"
            raise UserError(f"data source {location} {is_not}; expected a file, a directory or a hub name")
        for name in found:
            if not _format(name):
                raise UserError(f"{name} is no table; expected {', '.join(FORMATS)}")
        return _files(location, found, _by_split(found) if len(found) > 1 else {})
    return Hub(location)


def is_path(location: str) -> bool:
    """Whether a name is that of files, there or not, and of no data set of the hub."""
    return bool(
        _format(location)
        or re.search(r"[*?\[]", location)
        or location.startswith(("/", "./", "../", "~"))
        or os.path.isfile(location)
    )


@dataclasses.dataclass(frozen=True)
class Files:
    """Files on disk.

    Args:
      location: what the user wrote.
      files: split → paths in order.
      unsplit: no name says a split; all files are then one, which is for whatever is asked for.
    """

    location: str
    files: Mapping[str, Sequence[str]]
    unsplit: bool = False

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(sorted(self.files))

    def columns(self, split: str) -> list[str]:
        names = None
        for path in self.files[split]:
            own = _guarded(_READERS[_format(path)].names, path)
            if twice := [name for name in own if own.count(name) > 1]:
                raise UserError(f"{path} has the column {twice[0]!r} twice; rename one of them")
            names = own if names is None else [name for name in names if name in own]
        return names or []

    def read(self, split: str, columns: Sequence[str]) -> datasets.Dataset:
        import datasets
        import pyarrow
        from datasets.table import InMemoryTable

        columns = list(dict.fromkeys(columns))
        tables = [_guarded(_READERS[_format(path)].rows, path, columns) for path in self.files[split]]
        try:
            table = pyarrow.concat_tables(tables, promote_options="permissive")
        except pyarrow.ArrowException as error:
            raise UserError(
                f"the files of {self.location} differ in their columns: {first_line(error)}; "
                "give a column one type in all of them"
            ) from error
        # The features of a Parquet file that `datasets` wrote, such as the names of classes, are in its metadata.
        try:
            return datasets.Dataset(InMemoryTable(table))
        except Exception as error:  # whatever `datasets` makes of metadata that are damaged, or not its own
            if not table.schema.metadata:
                raise
            log.warning(
                "%s: the metadata cannot be read, and are left out: %s", self.location, first_line(error)
            )
            return datasets.Dataset(InMemoryTable(table.replace_schema_metadata(None)))


class Hub:
    """A data set of the Hugging Face hub, NAME or NAME/CONFIG; `datasets` keeps it in its cache."""

    def __init__(self, location: str) -> None:
        self.location = location

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(sorted(self._data))

    def columns(self, split: str) -> list[str]:
        return list(self._data[split].column_names)

    def read(self, split: str, columns: Sequence[str]) -> datasets.Dataset:
        return self._data[split].select_columns(list(dict.fromkeys(columns)))

    @functools.cached_property
    def _data(self) -> datasets.DatasetDict:
        import datasets

        name, config = hub_name(self.location)
        bars = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            try:
                return datasets.load_dataset(name, config)
            except (RuntimeError, ValueError) as error:
                if not re.search("script|custom code", str(error)):
                    raise
                # `datasets` no longer runs scripts; the hub keeps what they gave as Parquet files.
                return datasets.load_dataset(name, config, revision="refs/convert/parquet")
        except (
            Exception
        ) as error:  # the hub client raises many kinds; all are about this name or the connection
            raise UserError(
                f"data source {self.location} is no file or directory here, and the hub gives no such data set: "
                f"{first_line(error)} (without network, give a directory that holds it as data.source)"
            ) from error
        finally:
            if not bars:
                datasets.enable_progress_bars()


def hub_name(location: str) -> tuple[str, str | None]:
    """USER/NAME/CONFIG → (USER/NAME, CONFIG); without CONFIG, None. `glue/sst2` is short for GLUE's SST-2."""
    name = location.removeprefix("hf:")
    if name.startswith("glue/"):
        name = f"{_GLUE}/{name.removeprefix('glue/')}"
    parts = name.split("/", 2)
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None


def _directory(location: str, path: str) -> Files:
    found = sorted(
        str(file)
        for file in Path(path).rglob("*")
        if file.is_file() and _format(str(file)) and not re.search(r"(^|/)[._]", os.path.relpath(file, path))
    )
    # Notes about a data set are no rows of it.
    found = [
        name for name in found if os.path.basename(name) not in ("dataset_infos.json", "dataset_dict.json")
    ]
    if not found:
        raise UserError(
            f"directory {location} holds no {', '.join(FORMATS)} file; expected a data set's files"
        )
    return _files(location, found, _by_split(found, path))


def _files(location: str, paths: list[str], splits: Mapping[str, Sequence[str]]) -> Files:
    return Files(location, splits) if splits else Files(location, {_ALL: paths}, unsplit=True)


def _by_split(paths: Sequence[str], root: str = "") -> dict[str, list[str]]:
    """The files of each split, by their names; none where no name says a split."""
    root = root or os.path.commonpath([os.path.dirname(path) or "." for path in paths])
    splits: dict[str, list[str]] = {}
    for path in paths:
        if split := _split_of(os.path.relpath(path, root)):
            splits.setdefault(split, []).append(path)
    return splits


def _split_of(relative: str) -> str | None:
    """The split that a file's path inside a data set stands for.

    A shard's name says it (train-00000-of-00004.parquet). Elsewhere a name that begins with a split's word and an
    underscore is a split of its own, as MNLI's validation_matched; else one of the hub's words in the path decides.
    """
    if sharded := re.match(r"(?:.*/)?(\w+(?:\.\w+)*)-\d{5}-of-\d{5}\.", relative):
        return _SPLIT_WORDS.get(sharded[1], sharded[1])
    stem = os.path.basename(relative).split(".")[0]
    if re.fullmatch(r"(train|validation|test)_(matched|mismatched)", stem):
        return stem
    for part in reversed(relative.lower().split("/")):
        for word in re.split(r"[^a-z]+", part):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return None


def _format(path: str) -> str:
    base, extension = os.path.splitext(path.lower())
    inner = os.path.splitext(base)[1] if extension in _COMPRESSIONS else extension
    return inner if inner in FORMATS and (inner != ".parquet" or inner == extension) else ""


def _guarded(function: Callable[..., Any], path: str, *arguments: Any) -> Any:
    import pyarrow

    try:
        return function(path, *arguments)
    except UserError:
        raise
    except (OSError, ValueError, EOFError, pyarrow.ArrowException) as error:
        reason, fix = _diagnosis(error, path)
        raise UserError(f"{path} cannot be read: {reason}; {fix}") from error


def _diagnosis(error: BaseException, path: str) -> tuple[str, str]:
    """What is wrong with a file, in one line, and what to do about it."""
    reason = " ".join(first_line(error).split())[:200]
    if isinstance(error, OSError) and error.errno:
        return error.strerror or reason, "let it be read, or name another file"
    if _format(path) not in (".csv", ".tsv"):
        return reason, f"expected a whole {_format(path)} file: copy or write it again"
    # Arrow counts the line of column names, too.
    reason = re.sub(r"Row #(\d+)", lambda row: f"row {int(row[1]) - 1}", reason)
    if "UTF" in reason:
        return reason, "convert it to UTF-8"
    if "Empty" in reason:
        return reason, "expected a line of column names, then rows"
    if _format(path) == ".tsv":
        return (
            reason,
            "expected as many tabs in each row as between the column names, and no quotes around fields",
        )
    return reason, "put double quotes around fields that hold commas, quotes or line breaks"


class _Parquet:
    @staticmethod
    def names(path: str) -> list[str]:
        import pyarrow.parquet

        return list(pyarrow.parquet.read_schema(path).names)

    @staticmethod
    def rows(path: str, columns: list[str]) -> pyarrow.Table:
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path, columns=columns, partitioning=None)


class _Delimited:
    """CSV with quotes, or TSV without: there a quotation mark is a character, as in GLUE's files."""

    def __init__(self, delimiter: str) -> None:
        self._delimiter = delimiter

    def names(self, path: str) -> list[str]:
        with self._open(path) as reader:
            return list(reader.schema.names)

    def rows(self, path: str, columns: list[str]) -> pyarrow.Table:
        import pyarrow

        # Text stays text: "007" is no number, and "null" is a word.
        with self._open(path, columns, {name: pyarrow.string() for name in columns}) as reader:
            return reader.read_all()

    def _open(self, path: str, columns: list[str] | None = None, types: dict | None = None) -> Any:
        import pyarrow
        from pyarrow import csv

        quoted = self._delimiter == ","
        return csv.open_csv(
            pyarrow.input_stream(path),
            # Only one thread knows the number of a row that is wrong.
            read_options=csv.ReadOptions(block_size=16 << 20, use_threads=False),
            parse_options=csv.ParseOptions(
                delimiter=self._delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted
            ),
            convert_options=csv.ConvertOptions(column_types=types, include_columns=columns),
        )


class _Json:
    """Objects: one a line, in one array, or SQuAD's own nested file."""

    @staticmethod
    def names(path: str) -> list[str]:
        return list(dict.fromkeys(name for record in _records(path) for name in record))

    @staticmethod
    def rows(path: str, columns: list[str]) -> pyarrow.Table:
        import pyarrow

        records = _records(path)
        arrays = [_array([record.get(name) for record in records], path, name) for name in columns]
        _parsed.cache_clear()
        return pyarrow.table(arrays, names=columns)


def _array(values: list[Any], path: str, name: str) -> pyarrow.Array:
    """Values of JSON as a column.

    Raises:
      UserError: values of different types, or a number of more than 64 bits, with the first such row.
    """
    import pyarrow

    try:
        return pyarrow.array(values)
    except UnicodeError:
        return _array([_without_surrogates(value) for value in values], path, name)
    except (pyarrow.ArrowException, OverflowError) as error:
        good, bad = 0, len(values)  # so many rows are, or are not, a column
        while bad - good > 1:
            middle = (good + bad) // 2
            try:
                pyarrow.array(values[:middle])
                good = middle
            except (pyarrow.ArrowException, OverflowError):
                bad = middle
        found = f"{path} row {bad}: {plain(name)!r} is {shown(values[bad - 1])}"
        if isinstance(error, OverflowError):
            raise UserError(
                f"{found}, which holds a number that is too large; mend or remove the row"
            ) from error
        raise UserError(
            f"{found}; the values of {plain(name)!r} are not all of one type: expected one like those in the rows "
            "before it"
        ) from error


def _without_surrogates(value: Any) -> Any:
    """Half a character, as JSON may have one, is no text: "?" stands in for it, so that offsets stay."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return value


def _records(path: str) -> list[dict[str, Any]]:
    return _parsed(path, os.stat(path).st_mtime_ns)


@functools.lru_cache(maxsize=1)  # the names are asked for first, the rows next
def _parsed(path: str, _changed: int) -> list[dict[str, Any]]:
    import pyarrow

    with pyarrow.input_stream(path) as file:
        content = file.read()
    if not content.strip():
        raise UserError(f"{path} is empty; expected one JSON object a line")
    if content.lstrip()[:1] == b"[" or _format(path) == ".json":
        try:
            whole = json.loads(content)
        except (ValueError, RecursionError):
            whole = None  # a .json of one object a line
        if isinstance(whole, dict) and isinstance(whole.get("data"), list):
            whole = whole["data"]
        if isinstance(whole, list) and all(isinstance(record, dict) for record in whole):
            return _questions(whole, path) if whole and "paragraphs" in whole[0] else whole
        if isinstance(whole, dict) and b"\n" in content.strip():
            raise UserError(f"{path} holds one object; expected a list of objects, or one object a line")
    records = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
            raise UserError(
                f"{path} line {number} is no JSON: {reason}; expected one object a line, in UTF-8"
            ) from error
        if not isinstance(record, dict):
            raise UserError(
                f"{path} line {number} holds {line[:40].decode(errors='replace')!r}; expected an object in each line"
            )
        records.append(record)
    return records


def _questions(articles: list[dict[str, Any]], path: str) -> list[dict[str, Any]]:
    """The rows of SQuAD's own files."""

    def inner(value: Any, key: str, where: str, kind: type | tuple[type, ...]) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get(key), kind):
            expected = "a list" if kind is list else "a text"
            raise UserError(f"{path}: {where} has no {key!r} that is {expected}; expected SQuAD's layout")
        return value[key]

    rows = []
    for a, article in enumerate(articles, 1):
        for p, paragraph in enumerate(inner(article, "paragraphs", f"article {a}", list), 1):
            where = f"paragraph {p} of article {a}"
            for q, question in enumerate(inner(paragraph, "qas", where, list), 1):
                asked = f"question {q} of {where}"
                rows.append(
                    {
                        "id": inner(question, "id", asked, (str, int)),
                        "question": inner(question, "question", asked, str),
                        "context": inner(paragraph, "context", where, str),
                        "answers": question.get("answers", []),
                    }
                )
    return rows


_READERS: Mapping[str, Any] = {
    ".parquet": _Parquet(),
    ".csv": _Delimited(","),
    ".tsv": _Delimited("\t"),
    ".jsonl": _Json(),
    ".json": _Json(),
}
