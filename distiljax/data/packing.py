"""Examples to rows: several examples share a row, none is split.

Best-fit decreasing (Johnson et al. 1974, "Worst-case performance bounds for simple one-dimensional packing
algorithms") within a window of examples, as Ding et al. 2024 (arXiv:2404.10830) use it for language-model
data. That attention must not cross the examples of a row is Krell et al. 2021 (arXiv:2107.02027); the
segments that rows carry are for that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

# Rows' worth of tokens held while packing. Every window ends with a few rows that are not full, so larger
# wastes less; 2,048 rows of 512 uint32 tokens are 4 MB.
WINDOW_ROWS = 2048


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assigns items to rows: longest first, each into the fullest row that still has room for it.

    The set of free spaces that open rows have is one integer with a bit for each space, so the smallest space
    that is large enough is the lowest bit above the item's length: the search costs the same however many
    rows are open.

    Args:
      lengths: the items' lengths, each from 1 to `capacity`.
      capacity: the row length.

    Returns:
      The items' indices, row by row; ascending in a row, and rows in the order of their first item.
    """
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # free space → rows that have exactly that
    spaces = 0
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[item]
        if not 1 <= length <= capacity:
            raise ValueError(f"an example of {length} tokens does not fit a row of {capacity}")
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[space].pop()
            if not open_rows[space]:
                spaces ^= 1 << space
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        if left := space - length:
            open_rows[left].append(row)
            spaces |= 1 << left
    return sorted(sorted(row) for row in rows)


def pack(
    examples: Iterable[np.ndarray], seq_len: int, window_rows: int = WINDOW_ROWS
) -> Iterator[list[np.ndarray]]:
    """Packs examples into rows of at most `seq_len` tokens; the same examples always give the same rows.

    Args:
      examples: int arrays [length], each from 1 to `seq_len` tokens.
      seq_len: tokens in a row.
      window_rows: rows' worth of tokens to hold at once.

    Yields:
      Rows: the list of the examples that share one.

    Raises:
      ValueError: an example is empty or longer than `seq_len`.
    """
    window: list[np.ndarray] = []
    tokens = 0
    for example in examples:
        window.append(example)
        tokens += len(example)
        if tokens >= window_rows * seq_len:
            yield from _pack_window(window, seq_len)
            window, tokens = [], 0
    yield from _pack_window(window, seq_len)


def _pack_window(window: list[np.ndarray], seq_len: int) -> Iterator[list[np.ndarray]]:
    for row in best_fit_decreasing([len(example) for example in window], seq_len):
        yield [window[item] for item in row]


def one_a_row(examples: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """The alternative to packing: every example is a row, to be padded."""
    for example in examples:
        yield [example]
