from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distiljax.data import packing, rows

CAPACITY = 24
lengths_strategy = st.lists(st.integers(1, CAPACITY), max_size=80)


def numbered_examples(lengths):
    """Examples whose tokens are all different, so that a lost, doubled or moved token shows."""
    ends = np.cumsum(lengths)
    return [np.arange(end - length, end, dtype=np.int32) for end, length in zip(ends, lengths, strict=True)]


@given(lengths_strategy)
def test_every_item_is_in_one_row_and_rows_fit(lengths):
    packed = packing.best_fit_decreasing(lengths, CAPACITY)
    assert sorted(item for row in packed for item in row) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in row) <= CAPACITY for row in packed)
    assert all(row == sorted(row) for row in packed)
    assert [row[0] for row in packed] == sorted(row[0] for row in packed)


@given(lengths_strategy)
def test_no_two_rows_could_have_been_one(lengths):
    """Holds for any-fit packings, and bounds the rows to fewer than twice the least possible."""
    used = sorted(
        sum(lengths[item] for item in row) for row in packing.best_fit_decreasing(lengths, CAPACITY)
    )
    assert len(used) < 2 or used[0] + used[1] > CAPACITY


@given(st.lists(st.integers(1, CAPACITY // 4), max_size=120))
def test_short_items_fill_rows(lengths):
    """A row that is not the last was left only because no item, of at most 1/4 row, fitted any more."""
    used = sorted(
        sum(lengths[item] for item in row) for row in packing.best_fit_decreasing(lengths, CAPACITY)
    )
    assert all(tokens > CAPACITY * 3 // 4 for tokens in used[1:])


def test_best_fit_prefers_the_tightest_row():
    # 7 and 5 leave 3 and 5 free; 3 belongs with the 7 and 4 with the 5.
    assert packing.best_fit_decreasing([7, 5, 4, 3], 10) == [[0, 3], [1, 2]]


@pytest.mark.parametrize("lengths", [[0], [11], [3, 11]])
def test_an_example_that_cannot_fit_is_a_defect(lengths):
    with pytest.raises(ValueError, match="does not fit a row of 10"):
        packing.best_fit_decreasing(lengths, 10)


@given(lengths_strategy, st.integers(1, 5))
def test_packed_rows_hold_the_examples_unsplit_for_any_window(lengths, window_rows):
    examples = numbered_examples(lengths)
    packed = list(packing.pack(iter(examples), CAPACITY, window_rows))
    found = sorted(tuple(example) for row in packed for example in row)
    assert found == sorted(tuple(example) for example in examples)


def test_packing_is_a_function_of_its_input_and_reads_a_window_at_a_time():
    examples = numbered_examples([5, 20, 9, 3, 12, 7] * 30)
    first, second = (list(packing.pack(iter(examples), CAPACITY, 4)) for _ in range(2))
    assert [[e.tolist() for e in row] for row in first] == [[e.tolist() for e in row] for row in second]

    read = 0

    def counted():
        nonlocal read
        for example in examples:
            read += 1
            yield example

    next(packing.pack(counted(), CAPACITY, window_rows=4))
    assert sum(map(len, examples[:read])) <= 5 * CAPACITY


def test_one_a_row():
    examples = numbered_examples([4, 2])
    assert list(packing.one_a_row(examples)) == [[examples[0]], [examples[1]]]


@given(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=40), st.sampled_from([1_000, 70_000]))
def test_batch_of_packed_rows_keeps_the_contract(lengths, vocab_size):
    dtype = rows.token_dtype(vocab_size)
    packed = list(packing.pack(numbered_examples(lengths), CAPACITY))
    records = [rows.encode_row(row, dtype) for row in packed]
    batch = rows.make_batch(rows.decode_rows(records, dtype, CAPACITY, vocab_size), CAPACITY, 999)

    assert {key: (a.shape, a.dtype) for key, a in batch.items()} == {
        key: ((len(packed), CAPACITY), np.dtype(np.int32))
        for key in ("input_ids", "segment_ids", "positions")
    }
    for ids, segments, positions, row in zip(*batch.values(), packed, strict=True):
        used = sum(map(len, row))
        assert segments[:used].tolist() == [n for n, e in enumerate(row, 1) for _ in e]
        assert ids[:used].tolist() == [token for example in row for token in example]
        assert positions[:used].tolist() == [i for example in row for i in range(len(example))]
        assert (ids[used:] == 999).all() and not segments[used:].any() and not positions[used:].any()
