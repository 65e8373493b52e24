from __future__ import annotations

import numpy as np
import pytest

from distiljax.data import rows


def test_vocabularies_over_16_bits_take_32():
    assert rows.token_dtype(65_536) == np.uint16
    assert rows.token_dtype(65_537) == np.uint32
    for size in (65_536, 65_537):
        record = rows.encode_row([np.array([0, size - 1])], rows.token_dtype(size))
        _, tokens = rows.decode_row(record, rows.token_dtype(size), 8, size)
        assert tokens.tolist() == [0, size - 1]


@pytest.mark.parametrize(
    "values", [[], [0], [1, 5, 1, 2], [2, 1, 1, 7], [1, 9, *range(9)], [1, 2, 3, 100]], ids=str
)
def test_bytes_that_are_no_row_are_refused(values):
    with pytest.raises(ValueError):
        rows.decode_row(np.array(values, "<u2").tobytes(), np.dtype("<u2"), 8, 100)


def test_a_batch_is_filled_up_with_empty_rows():
    row = (np.array([2], np.uint16), np.array([5, 6], np.uint16))
    batch = rows.make_batch([row], 4, pad_token_id=1, batch_size=3)
    assert batch["input_ids"].tolist() == [[5, 6, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert batch["segment_ids"].tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
