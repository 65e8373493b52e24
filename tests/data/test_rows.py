from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distiljax.data import rows

SEQ_LEN, VOCAB_SIZE, PAD = 12, 100, 99
ROWS = st.lists(
    st.lists(st.integers(1, 6), min_size=1, max_size=4).filter(lambda r: sum(r) <= SEQ_LEN), min_size=1
)


def record(values, dtype="<u2"):
    return np.array(values, dtype).tobytes()


@given(ROWS, st.sampled_from([VOCAB_SIZE, 65_536, 65_537]), st.integers(0, 3))
def test_rows_come_back_as_the_batch_contract_says(lengths, vocab_size, fill):
    dtype = rows.token_dtype(vocab_size)
    packed = [[np.arange(n) + vocab_size - n for n in row] for row in lengths]
    records = [rows.encode_row(row, dtype) for row in packed]
    size = len(records) + fill
    batch = rows.make_batch(rows.decode_rows(records, dtype, SEQ_LEN, vocab_size), SEQ_LEN, PAD, size)
    assert {(key, a.shape, a.dtype.name) for key, a in batch.items()} == {
        (key, (size, SEQ_LEN), "int32") for key in ("input_ids", "segment_ids", "positions")
    }
    for ids, segments, positions, row in zip(*batch.values(), packed + [[]] * fill, strict=True):
        used = sum(map(len, row))
        assert ids.tolist() == [token for e in row for token in e] + [PAD] * (SEQ_LEN - used)
        assert segments.tolist() == [n for n, e in enumerate(row, 1) for _ in e] + [0] * (SEQ_LEN - used)
        assert positions.tolist() == [i for e in row for i in range(len(e))] + [0] * (SEQ_LEN - used)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([], "0 bytes are no row"),
        ([0], "2 bytes are no row"),
        ([0, 5, 6], "2 numbers cannot be 0 examples"),
        ([3, 1, 2], "2 numbers cannot be 3 examples"),
        ([65_535, 1, 2], "2 numbers cannot be 65535 examples"),
        ([1, 5, 1, 2], r"lengths \[5\] do not add up to 2 tokens"),
        ([2, 1, 2, 7, 7], r"lengths \[1, 2\] do not add up to 2 tokens"),
        ([2, 2, 0, 7, 7], r"lengths \[2, 0\] do not add up to 2 tokens"),
        ([1, 13, *range(13)], "13 tokens, row length 12"),
        ([1, 2, 3, 100], "token 100 is outside the vocabulary of 100"),
    ],
    ids=str,
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_bytes_that_are_no_row_are_refused_and_the_row_is_told(values, reason, place):
    records = [record([2, 1, 2, 5, 6, 7]), record([1, 1, 99])]
    records.insert(place, record(values))
    with pytest.raises(rows.BadRow, match=reason) as caught:
        rows.decode_rows(records, np.dtype("<u2"), SEQ_LEN, VOCAB_SIZE)
    assert caught.value.index == place


def test_half_a_number_is_refused():
    with pytest.raises(rows.BadRow, match="7 bytes are no row of 2-byte numbers") as caught:
        rows.decode_rows([record([1, 1, 4]), record([1, 1, 4]) + b"x"], np.dtype("<u2"), SEQ_LEN, VOCAB_SIZE)
    assert caught.value.index == 1


def is_row(data: bytes) -> bool:
    """The definition, for one row, in plain Python."""
    if len(data) % 2 or not data:
        return False
    count, *rest = np.frombuffer(data, "<u2").tolist()
    lengths, tokens = rest[:count], rest[count:]
    return (
        1 <= count == len(lengths)
        and min(lengths) > 0
        and sum(lengths) == len(tokens) <= SEQ_LEN
        and max(tokens) < VOCAB_SIZE
    )


@given(
    st.lists(
        st.one_of(
            st.lists(st.one_of(st.integers(0, 4), st.integers(0, 65_535)), max_size=16).map(record),
            st.binary(max_size=12),
            ROWS.map(lambda lengths: rows.encode_row([np.zeros(n) for n in lengths[0]], np.dtype("<u2"))),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_a_batch_is_refused_exactly_when_one_of_its_rows_is_none(records):
    bad = [i for i, data in enumerate(records) if not is_row(data)]
    try:
        decoded = rows.decode_rows(records, np.dtype("<u2"), SEQ_LEN, VOCAB_SIZE)
    except rows.BadRow as error:
        assert error.index in bad
    else:
        assert not bad
        assert decoded.tokens.sum() == sum(
            np.frombuffer(data, "<u2")[1 + np.frombuffer(data, "<u2")[0] :].sum() for data in records
        )
