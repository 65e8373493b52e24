"""Rows as bytes, and bytes as batches.

A record is one array of unsigned integers: the number of examples, their lengths, then their tokens one
example after the other. uint16 holds the vocabularies up to 65,536; larger ones take uint32. Padding is not
stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Batch = dict[str, np.ndarray]
Row = tuple[np.ndarray, np.ndarray]  # lengths [examples], tokens [sum(lengths)]


def token_dtype(vocab_size: int) -> np.dtype:
    """The stored integer type for a vocabulary; little-endian, so that a corpus moves between machines."""
    return np.dtype("<u2" if vocab_size <= 65_536 else "<u4")


def encode_row(row: Sequence[np.ndarray], dtype: np.dtype) -> bytes:
    """One row's record, from the examples that share it."""
    lengths = [len(example) for example in row]
    return np.concatenate([[len(row)], lengths, *row]).astype(dtype).tobytes()


def decode_row(record: bytes, dtype: np.dtype, seq_len: int, vocab_size: int) -> Row:
    """The lengths and tokens of a record.

    Raises:
      ValueError: the bytes are not a row of at most `seq_len` tokens of this vocabulary.
    """
    values = np.frombuffer(record, dtype)
    count = int(values[0]) if len(values) else 0
    lengths, tokens = values[1 : 1 + count], values[1 + count :]
    if not 1 <= len(tokens) <= seq_len or lengths.sum() != len(tokens):
        raise ValueError(
            f"lengths {lengths[:8].tolist()} do not add up to {len(tokens)} tokens, row length {seq_len}"
        )
    if tokens.max() >= vocab_size:
        raise ValueError(f"token {tokens.max()} is outside the vocabulary of {vocab_size}")
    return lengths, tokens


def make_batch(rows: Sequence[Row], seq_len: int, pad_token_id: int, batch_size: int = 0) -> Batch:
    """Lays rows out as a batch: int32 `input_ids`, `segment_ids` and `positions`, each [B, S].

    Args:
      rows: decoded rows.
      seq_len: S.
      pad_token_id: fills `input_ids` where `segment_ids` is 0.
      batch_size: B; when there are fewer rows the rest is padding. By default as many as there are rows.
    """
    shape = (max(batch_size, len(rows)), seq_len)
    input_ids = np.full(shape, pad_token_id, np.int32)
    segment_ids = np.zeros(shape, np.int32)
    positions = np.zeros(shape, np.int32)
    for index, (lengths, tokens) in enumerate(rows):
        lengths = lengths.astype(np.int32)
        used = len(tokens)
        starts = np.cumsum(lengths) - lengths
        input_ids[index, :used] = tokens
        segment_ids[index, :used] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        positions[index, :used] = np.arange(used) - np.repeat(starts, lengths)
    return {"input_ids": input_ids, "segment_ids": segment_ids, "positions": positions}
