"""The data part of a run's config: every key, its default and the check of its values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distiljax.errors import UserError

if TYPE_CHECKING:
    import ml_collections

UNITS = ("document", "line", "paragraph", "sentence")
LAYOUTS = ("packed", "padded", "bucketed")
ON_ERROR = ("fail", "skip")


def default_data_config() -> ml_collections.ConfigDict:
    """The data config with every key at its default.

    source: where the text comes from: `docstrings`, a file, a glob, a directory (local, gs://, s3://), `hf:NAME` or
      `tfds:NAME`; or a tuple of them. Each may carry settings of its own: `?split=…&field=…&weight=…&streaming=1`;
      with weights, so many parts of the rows are drawn from each source; without, in proportion to their size.
    split: the sources' split that is read for training.
    text_field: the column (Parquet, hub, tfds) or key (JSONL) that holds the text.
    unit: what one document is: "document" (a record; in .txt files a line), "line", "paragraph" (separated by blank
      lines) or "sentence".
    language: of the text, an ISO 639-1 code; it decides where sentences end.
    max_documents: read at most so many documents of each split of the sources; 0 reads all.
    seq_len: tokens in a row, [CLS] and [SEP] included.
    min_tokens: shorter examples are dropped, [CLS] and [SEP] counted (the original: 11 or fewer dropped).
    max_unknown: examples with at least this share of unknown tokens are dropped (the original: 0.5).
    layout: "packed" puts several examples into a row, "padded" has one example a row, "bucketed" too, and its batches
      are of examples of like length, as long as the next of `buckets`.
    buckets: lengths of the rows where layout is "bucketed"; seq_len is one of them in any case.
    holdout: share of the documents kept for validation where the source has no validation split; 0 is none.
    deduplicate: drop documents whose text was already read.
    on_error: "fail" stops at a record that cannot be used (not UTF-8, no JSON, without the field, cut short), "skip"
      goes on without it and counts it.
    """
    import ml_collections

    config = ml_collections.ConfigDict()
    # A placeholder takes both a string and a tuple.
    config.source = ml_collections.config_dict.placeholder(object)
    config.source = "docstrings"
    config.split = "train"
    config.text_field = "text"
    config.unit = "document"
    config.language = "en"
    config.max_documents = 0
    config.seq_len = 512
    config.min_tokens = 12
    config.max_unknown = 0.5
    config.layout = "packed"
    config.buckets = (64, 128, 256)
    config.holdout = 0.02
    config.deduplicate = True
    config.on_error = "fail"
    return config


def settings(config: Any) -> dict[str, Any]:
    """The checked config as a JSON-ready dict, with `source` and `buckets` as lists.

    Raises:
      UserError: a key is missing or unknown, or a value is out of range.
    """
    known = default_data_config().to_dict()
    values = dict(config)
    for key in known:
        if key not in values:
            raise UserError(f"data.{key} is missing; start from distiljax.data.default_data_config()")
    for key in values:
        if key not in known:
            raise UserError(f"data.{key} is not a data setting; expected one of {', '.join(known)}")
    _check_types(values, known)
    source = values["source"]
    sources = list(source) if isinstance(source, (list, tuple)) else [source]
    if not sources or not all(isinstance(source, str) and source for source in sources):
        raise UserError(
            f"data.source is {values['source']!r}; expected a source (a path, docstrings, hf:NAME) or a tuple"
        )
    buckets = list(values["buckets"])
    seq_len = values["seq_len"]
    one_of = [
        (key, values[key], known)
        for key, known in (("unit", UNITS), ("layout", LAYOUTS), ("on_error", ON_ERROR))
    ]
    ranges = [
        *((key, value in known, f"one of {', '.join(known)}") for key, value, known in one_of),
        ("max_documents", values["max_documents"] >= 0, "a number of documents, or 0 for all"),
        ("seq_len", 3 <= seq_len <= 65_535, "3 to 65535: [CLS], at least one token and [SEP]"),
        ("min_tokens", values["min_tokens"] <= seq_len, f"at most data.seq_len, {seq_len}"),
        ("max_unknown", values["max_unknown"] > 0, "a share above 0, such as 0.5"),
        ("holdout", 0 <= values["holdout"] < 1, "a share from 0 to below 1, such as 0.02"),
        (
            "buckets",
            all(isinstance(length, int) and length > 0 for length in buckets),
            "lengths in tokens, such as (64, 128, 256)",
        ),
    ]
    for key, holds, expected in ranges:
        if not holds:
            raise UserError(f"data.{key} is {values[key]!r}; expected {expected}")
    return {**values, "source": sources, "buckets": buckets}


def _check_types(values: dict[str, Any], defaults: dict[str, Any]) -> None:
    for key, default in defaults.items():
        value = values[key]
        if key == "source":
            continue
        if isinstance(default, (tuple, list)):
            fits = isinstance(value, (tuple, list))
        elif isinstance(default, bool) or isinstance(value, bool):
            fits = type(value) is type(default)
        else:
            fits = isinstance(value, (int, float) if isinstance(default, float) else type(default))
        if not fits:
            kind = {bool: "True or False", str: "a string", int: "a whole number", float: "a number"}.get(
                type(default), "a tuple"
            )
            raise UserError(f"data.{key} is {value!r}; expected {kind}")


def row_lengths(settings: dict[str, Any]) -> list[int]:
    """The lengths that rows of a corpus come in, ascending; the last is seq_len."""
    seq_len = settings["seq_len"]
    if settings["layout"] != "bucketed":
        return [seq_len]
    return sorted({length for length in settings["buckets"] if length < seq_len} | {seq_len})
