"""The data part of a run's config: every key, its default and the check of its values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distiljax.errors import UserError

if TYPE_CHECKING:
    import ml_collections

UNITS = ("document", "line", "paragraph")


def default_data_config() -> ml_collections.ConfigDict:
    """The data config with every key at its default.

    source: where the text comes from: `docstrings`, a file, a glob, a directory or `hf:NAME` (see
      distiljax.data.sources); or a tuple of them, read one after the other.
    split: the source's split that is read for training.
    text_field: the column (Parquet, hub) or key (JSONL) that holds the text.
    unit: what one document is: "document" (a record; in .txt files a line), "line", or "paragraph"
      (blank-line separated).
    max_documents: take at most so many documents of each split; 0 takes all.
    seq_len: tokens in a row, [CLS] and [SEP] included.
    min_tokens: shorter examples are dropped, [CLS] and [SEP] counted (the original: 11 or fewer dropped).
    max_unknown: examples with at least this share of unknown tokens are dropped (the original: 0.5).
    pack: put several examples into a row; False is one example a row.
    holdout: share of the documents kept for validation where the source has no validation split; 0 is none.
    deduplicate: drop documents whose text was already read.
    """
    import ml_collections

    config = ml_collections.ConfigDict()
    # A placeholder takes both a string and a tuple.
    config.source = ml_collections.config_dict.placeholder(object)
    config.source = "docstrings"
    config.split = "train"
    config.text_field = "text"
    config.unit = "document"
    config.max_documents = 0
    config.seq_len = 512
    config.min_tokens = 12
    config.max_unknown = 0.5
    config.pack = True
    config.holdout = 0.02
    config.deduplicate = True
    return config


def settings(config: Any) -> dict[str, Any]:
    """The checked config as a JSON-ready dict, with `source` as a list.

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
    source = values["source"]
    sources = list(source) if isinstance(source, (list, tuple)) else [source]
    if not sources or not all(isinstance(source, str) and source for source in sources):
        raise UserError(
            f"data.source is {values['source']!r}; expected a source (a path, docstrings, hf:NAME) or a tuple"
        )
    ranges = [
        ("unit", values["unit"] in UNITS, f"one of {', '.join(UNITS)}"),
        ("max_documents", values["max_documents"] >= 0, "a number of documents, or 0 for all"),
        ("seq_len", 3 <= values["seq_len"] <= 65_535, "3 to 65535: [CLS], at least one token and [SEP]"),
        (
            "min_tokens",
            values["min_tokens"] <= values["seq_len"],
            f"at most data.seq_len, {values['seq_len']}",
        ),
        ("max_unknown", values["max_unknown"] > 0, "a share above 0, such as 0.5"),
        ("holdout", 0 <= values["holdout"] < 1, "a share from 0 to below 1, such as 0.02"),
    ]
    for key, holds, expected in ranges:
        if not holds:
            raise UserError(f"data.{key} is {values[key]!r}; expected {expected}")
    return {**values, "source": sources}
