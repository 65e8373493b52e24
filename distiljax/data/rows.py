"""Rows as bytes, and bytes as batches.

A record is one array of unsigned integers: the number of examples, their lengths, then their tokens one
example after the other. uint16 holds the vocabularies up to 65,536; larger ones take uint32. Padding is not
stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

Batch = dict[str, np.ndarray]


class BadRow(ValueError):
    """A record that is no row; `index` says which of those given."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


@dataclasses.dataclass(frozen=True)
class Rows:
    """Decoded rows, one after the other.

    Attributes:
      examples: examples in each row, int64 [rows].
      lengths: of the examples, int64 [examples].
      sizes: tokens in each row, int64 [rows].
      tokens: of all examples, unsigned [tokens].
    """

    examples: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray
    tokens: np.ndarray


def token_dtype(vocab_size: int) -> np.dtype:
    """The stored integer type for a vocabulary; little-endian, so that a corpus moves between machines."""
    return np.dtype("<u2" if vocab_size <= 65_536 else "<u4")


def encode_row(row: Sequence[np.ndarray], dtype: np.dtype) -> bytes:
    """One row's record, from the examples that share it."""
    lengths = [len(example) for example in row]
    return np.concatenate([[len(row)], lengths, *row]).astype(dtype).tobytes()


def decode_rows(records: Sequence[bytes], dtype: np.dtype, seq_len: int, vocab_size: int) -> Rows:
    """The rows of at least one record, without a step of Python for each.

    Raises:
      BadRow: the bytes are not a row of 1 to `seq_len` tokens of this vocabulary.
    """
    nbytes = np.fromiter(map(len, records), np.int64, len(records))
    _refuse(
        (nbytes % dtype.itemsize != 0) | (nbytes < 3 * dtype.itemsize),
        lambda i: f"{nbytes[i]} bytes are no row of {dtype.itemsize}-byte numbers",
    )
    values = np.frombuffer(b"".join(records), dtype)
    counts = nbytes // dtype.itemsize
    starts = np.cumsum(counts) - counts
    examples = values[starts].astype(np.int64)
    sizes = counts - 1 - examples

    # An example has a token at least; only then are the lengths all there to be looked at.
    _refuse(
        (examples < 1) | (sizes < examples),
        lambda i: f"{counts[i] - 1} numbers cannot be {examples[i]} examples",
    )
    _refuse(sizes > seq_len, lambda i: f"{sizes[i]} tokens, row length {seq_len}")
    first = np.cumsum(examples) - examples  # each row's first example
    where = np.repeat(starts + 1 - first, examples) + np.arange(examples.sum())
    lengths = values[where].astype(np.int64)
    _refuse(
        (np.add.reduceat(lengths, first) != sizes) | (np.minimum.reduceat(lengths, first) < 1),
        lambda i: (
            f"lengths {lengths[first[i] :][: examples[i]][:8].tolist()} do not add up to {sizes[i]} tokens"
        ),
    )

    is_token = np.ones(len(values), bool)
    is_token[starts] = is_token[where] = False
    tokens = values[is_token]
    if tokens.max() >= vocab_size:
        at = int(np.argmax(tokens >= vocab_size))
        row = int(np.searchsorted(np.cumsum(sizes), at, side="right"))
        raise BadRow(row, f"token {tokens[at]} is outside the vocabulary of {vocab_size}")
    return Rows(examples, lengths, sizes, tokens)


def make_batch(rows: Rows, seq_len: int, pad_token_id: int, batch_size: int = 0) -> Batch:
    """Lays rows out as a batch: int32 `input_ids`, `segment_ids` and `positions`, each [B, S].

    Args:
      rows: decoded rows.
      seq_len: S.
      pad_token_id: fills `input_ids` where `segment_ids` is 0.
      batch_size: B; when there are fewer rows the rest is padding. By default as many as there are rows.
    """
    batch = empty_batch(max(batch_size, len(rows.sizes)), seq_len, pad_token_id)
    first = np.cumsum(rows.examples) - rows.examples
    segments = np.arange(1, len(rows.lengths) + 1, dtype=np.int32) - np.repeat(first, rows.examples)
    starts = np.cumsum(rows.lengths) - rows.lengths
    used = np.zeros((len(batch["input_ids"]), seq_len), bool)
    used[: len(rows.sizes)] = np.arange(seq_len) < rows.sizes[:, None]
    batch["input_ids"][used] = rows.tokens
    batch["segment_ids"][used] = np.repeat(segments, rows.lengths)
    batch["positions"][used] = np.arange(len(rows.tokens)) - np.repeat(starts, rows.lengths)
    return batch


def empty_batch(batch_size: int, seq_len: int, pad_token_id: int) -> Batch:
    """A batch of padding: int32 [B, S]."""
    shape = (batch_size, seq_len)
    return {
        "input_ids": np.full(shape, pad_token_id, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
    }


def _refuse(bad: np.ndarray, reason: Callable[[int], str]) -> None:
    """Raises for the first of the rows that are marked as bad."""
    if bad.any():
        index = int(np.argmax(bad))
        raise BadRow(index, reason(index))
