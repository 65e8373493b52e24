"""Prepared corpora made by hand, for tests and measurements of what reads them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from distiljax.data.metadata import FORMAT_VERSION, TOKEN_COUNTS_FILE, Metadata, Shard, Statistics
from distiljax.data.rows import encode_row, token_dtype

Row = Sequence[Sequence[int]]  # the examples that share it


def write_shard(path, rows: Iterable[Row], vocab_size: int, *, source: int = 0, seq_len: int) -> Shard:
    """One shard of rows."""
    count = tokens = 0
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for row in rows:
        writer.write(encode_row([np.asarray(example) for example in row], token_dtype(vocab_size)))
        count, tokens = count + 1, tokens + sum(map(len, row))
    writer.close()
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Shard(os.path.basename(path), count, tokens, os.path.getsize(path), sha256, source, seq_len)


def write_corpus(
    directory,
    shards: Iterable[Iterable[Row]],
    *,
    seq_len: int,
    vocab_size: int = 1002,
    pad_token_id: int = 7,
    layout: str = "packed",
    sources: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    weights: Sequence[float] = (),
) -> Metadata:
    """A corpus directory.

    Args:
      directory: made if it is not there.
      shards: their rows.
      seq_len: the longest row, padding included.
      vocab_size: the highest token id + 1.
      pad_token_id: of the corpus.
      layout: as data.layout.
      sources: which source each shard is from; by default all from one.
      lengths: the longest row of each shard, for layout "bucketed".
      weights: of the sources.
    """
    os.makedirs(directory, exist_ok=True)
    written = []
    for i, rows in enumerate(shards):
        path = os.path.join(directory, f"rows-{i:05d}.array_record")
        source = sources[i] if sources else 0
        written.append(
            write_shard(path, rows, vocab_size, source=source, seq_len=lengths[i] if lengths else seq_len)
        )
    rows, tokens = (sum(getattr(shard, name) for shard in written) for name in ("rows", "tokens"))
    count = 1 + max(shard.source for shard in written)
    metadata = Metadata(
        format_version=FORMAT_VERSION,
        tokenizer_name="none",
        vocabulary_sha256="",
        vocab_size=vocab_size,
        pad_token_id=pad_token_id,
        split="train",
        settings={"seq_len": seq_len, "layout": layout, "source": [f"text-{i}" for i in range(count)]},
        sources_sha256="",
        weights=tuple(weights),
        statistics=vars(Statistics(tokens=tokens, rows=rows)),
        problems=(),
        shards=tuple(written),
    )
    np.save(os.path.join(directory, TOKEN_COUNTS_FILE), np.ones(vocab_size, np.int64))
    metadata.save(directory)
    return metadata


def numbered_rows(numbers: Iterable[int]) -> list[Row]:
    """Rows of the one example [1000, number, 1001], for vocabularies of 1002."""
    return [[[1000, number, 1001]] for number in numbers]
