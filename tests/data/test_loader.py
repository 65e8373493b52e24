from __future__ import annotations

import collections
import dataclasses
import itertools
import os
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distiljax.data.loader import RowLoader, eval_batches
from distiljax.errors import UserError
from tests.data.corpora import numbered_rows, write_corpus

NUM_ROWS = 53
SEQ_LEN = 6
LENGTHS = {3: 21, 4: 4, 6: 12}  # of the bucketed corpus: rows of each length


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """53 rows in shards of 10; row n is the one example [1000, n, 1001]."""
    return numbered_corpus(tmp_path_factory.mktemp("corpus"), NUM_ROWS)


def numbered_corpus(directory, num_rows, rows_per_shard=10):
    shards = [
        numbered_rows(range(first, min(first + rows_per_shard, num_rows)))
        for first in range(0, num_rows, rows_per_shard)
    ]
    write_corpus(directory, shards, seq_len=SEQ_LEN)
    return directory


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Rows 0…29 are from source 0; 30…39 from source 1, which is drawn three times as often."""
    directory = tmp_path_factory.mktemp("mixed")
    shards = [numbered_rows(numbers) for numbers in (range(20), range(30, 40), range(20, 30))]
    write_corpus(directory, shards, seq_len=SEQ_LEN, sources=[0, 1, 0], weights=(1.0, 3.0))
    return directory


@pytest.fixture(scope="module")
def bucketed(tmp_path_factory):
    return bucketed_corpus(tmp_path_factory.mktemp("bucketed"), LENGTHS)


def bucketed_corpus(directory, rows_by_length):
    """Rows numbered through, each length in two shards that do not lie together."""
    numbers = itertools.count()
    halves = [(n // 2, n - n // 2) for n in rows_by_length.values()]
    sizes = [pair[half] for half in (0, 1) for pair in halves]
    shards = [numbered_rows(itertools.islice(numbers, size)) for size in sizes]
    write_corpus(
        directory, shards, seq_len=max(rows_by_length), layout="bucketed", lengths=[*rows_by_length] * 2
    )
    return directory


def take(loader, count):
    """The row numbers of the first batches: [count, rows]."""
    iterator = iter(loader)
    found = np.stack([batch["input_ids"][:, 1] for batch in itertools.islice(iterator, count)])
    iterator.close()
    return found


def take_bucketed(loader, count):
    """Length and row numbers of the first batches."""
    iterator = iter(loader)
    found = [
        (batch["input_ids"].shape[1], batch["input_ids"][:, 1].tolist())
        for batch in itertools.islice(iterator, count)
    ]
    iterator.close()
    return found


def test_batches_keep_the_contract(corpus):
    loader = RowLoader(corpus, 4, seed=0)
    batch = next(iter(loader))
    assert {key: (a.dtype, a.shape) for key, a in batch.items()} == {
        key: (np.dtype(np.int32), (4, SEQ_LEN)) for key in ("input_ids", "segment_ids", "positions")
    }
    assert (batch["input_ids"][:, [0, 2, 3, 4, 5]] == [1000, 1001, 7, 7, 7]).all()
    assert (batch["segment_ids"] == [1, 1, 1, 0, 0, 0]).all()
    assert (batch["positions"] == [0, 1, 2, 0, 0, 0]).all()
    assert (loader.num_rows, loader.steps_per_epoch, loader.tokens_per_row) == (NUM_ROWS, 13, 3.0)
    assert (loader.steps(1), loader.steps(2.5)) == (14, 34)


@pytest.mark.parametrize(
    ("seed", "start", "expected"),
    [
        (0, 0, [[18, 35, 50, 7, 20, 45, 24, 52], [19, 51, 10, 28, 39, 15, 40, 34]]),
        (0, 6, [[33, 6, 16, 17, 0, 42, 27, 4], [35, 33, 28, 24, 16, 51, 46, 3]]),
        (1, 1000, [[0, 8, 9, 25, 33, 30, 41, 46], [28, 47, 26, 43, 2, 22, 32, 0]]),
        (2**40, 0, [[14, 12, 23, 34, 28, 52, 10, 31], [50, 29, 27, 45, 24, 6, 37, 51]]),
    ],
)
def test_the_order_is_this_one_in_every_version(corpus, seed, start, expected):
    """Runs that were begun with an earlier version go on in the same order."""
    assert take(RowLoader(corpus, 8, seed=seed, start=start), 2).tolist() == expected


@pytest.mark.parametrize("batch_size", [1, 4, 53])
def test_every_epoch_has_every_row_once_and_its_own_order(corpus, batch_size):
    epochs = 3
    order = take(RowLoader(corpus, batch_size, seed=1), -(-epochs * NUM_ROWS // batch_size)).ravel()
    found = [order[epoch * NUM_ROWS : (epoch + 1) * NUM_ROWS] for epoch in range(epochs)]
    for epoch in found:
        assert sorted(epoch) == list(range(NUM_ROWS))
        assert list(epoch) != list(range(NUM_ROWS))
    for one, other in itertools.combinations(found, 2):
        assert list(one) != list(other)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_size_any_processes_any_start(tmp_path_factory, data):
    num_rows = data.draw(st.integers(1, 40), "rows")
    process_count = data.draw(st.integers(1, min(4, num_rows)), "processes")
    batch_size = process_count * data.draw(st.integers(1, num_rows // process_count), "rows a process")
    start, seed = data.draw(st.integers(0, 50), "start"), data.draw(st.integers(0, 2**64), "seed")
    per_shard = data.draw(st.integers(1, 12), "rows a shard")
    directory = numbered_corpus(tmp_path_factory.mktemp("corpus"), num_rows, per_shard)
    count = -(-2 * num_rows // batch_size)
    whole = take(RowLoader(directory, batch_size, seed), start + count)
    for epoch in range(2):
        rows = whole.ravel()[epoch * num_rows : (epoch + 1) * num_rows]
        assert sorted(rows) == list(range(num_rows))
    parts = [
        take(
            RowLoader(directory, batch_size, seed, start=start, process_index=i, process_count=process_count),
            count,
        )
        for i in range(process_count)
    ]
    assert np.concatenate(parts, axis=1).tolist() == whole[start:].tolist()


def test_batch_size_cuts_one_and_the_same_order(corpus):
    assert (
        take(RowLoader(corpus, 4, seed=1), 30).ravel().tolist()
        == take(RowLoader(corpus, 12, seed=1), 10).ravel().tolist()
    )


def test_far_positions_cost_nothing_to_reach(corpus, mixed, bucketed):
    """10^8 epochs in: an order that was materialised or stepped through could not get here."""
    for directory in (corpus, mixed):
        start = 10**8 * NUM_ROWS // 8
        assert take(RowLoader(directory, 8, seed=3, start=start), 2).shape == (2, 8)
    assert len(take_bucketed(RowLoader(bucketed, 4, seed=3, start=10**9), 2)) == 2


def test_the_seed_decides_the_order(corpus):
    first, again, other = (take(RowLoader(corpus, 8, seed=seed), 30) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first[:6] != other[:6]).any()
    # Not the order of the other seed shifted by an epoch either.
    assert first.ravel()[NUM_ROWS : 2 * NUM_ROWS].tolist() != other.ravel()[:NUM_ROWS].tolist()


def test_without_shuffling_rows_come_in_order(corpus):
    order = take(RowLoader(corpus, 8, seed=0, shuffle=False), 10).ravel()
    assert order.tolist() == [n % NUM_ROWS for n in range(80)]


def test_another_interpreter_draws_the_same_order(corpus, mixed, bucketed):
    program = (
        "import itertools; from distiljax.data.loader import RowLoader\n"
        f"for path in {[str(corpus), str(mixed), str(bucketed)]}:\n"
        "  for b in itertools.islice(RowLoader(path, 4, seed=5), 4): print(*b['input_ids'][:, 1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{program}"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
    here = [RowLoader(directory, 4, seed=5) for directory in (corpus, mixed, bucketed)]
    assert found == [rows for loader in here for _, rows in take_bucketed(loader, 4)]


def test_rows_are_drawn_from_the_sources_by_their_weights(mixed):
    rows = take(RowLoader(mixed, 8, seed=0), 60).ravel()  # 480 rows: 120 of source 0, 360 of source 1
    first, second = rows[rows < 30], rows[rows >= 30]
    assert (len(first), len(second)) == (120, 360)
    # Each source by permutations of its own: every row as often, and no two epochs in one order.
    assert set(collections.Counter(first.tolist()).values()) == {4}
    assert set(collections.Counter(second.tolist()).values()) == {36}
    assert len({tuple(second[i : i + 10]) for i in range(0, 360, 10)}) > 30
    # Every stretch has them in proportion, not one source after the other.
    for i in range(0, 480, 40):
        assert (rows[i : i + 40] >= 30).sum() == 30


@given(seed=st.integers(0, 2**32), start=st.integers(0, 10**6), weight=st.floats(0.01, 100))
@settings(max_examples=12, deadline=None)
def test_weighted_rows_are_the_same_for_any_processes_and_from_any_step(mixed, seed, start, weight):
    def rows(start, count, **process):
        return take(RowLoader(mixed, 8, seed, weights=(1, weight), start=start, **process), count)

    whole = rows(start, 6)
    np.testing.assert_array_equal(rows(start + 2, 4), whole[2:])
    parts = [rows(start, 6, process_index=i, process_count=4) for i in range(4)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    share = weight / (1 + weight)
    assert abs((whole >= 30).mean() - share) <= 0.01 * share + 1 / whole.size


def test_no_weights_draw_in_proportion_to_the_rows(mixed):
    rows = take(RowLoader(mixed, 8, seed=0, weights=()), 5).ravel()
    assert sorted(rows) == list(range(40))


def test_weights_that_do_not_fit_are_refused(mixed, bucketed, tmp_path):
    def refused(match, directory=mixed, **options):
        with pytest.raises(UserError, match=match) as caught:
            RowLoader(directory, 4, seed=0, **options)
        assert "\n" not in str(caught.value)

    refused(r"weights \(1,\) for the 2 sources of .*; expected 2 weights", weights=(1,))
    refused("weight of source text-1 is 0; expected more than 0", weights=(1, 0))
    refused("weight of source text-0 is nan", weights=(float("nan"), 1))
    refused(r"bucketed by length and weights \(1, 1\)", bucketed, weights=(1, 1))
    write_corpus(tmp_path, [numbered_rows(range(9)), []], seq_len=SEQ_LEN, sources=[0, 1], weights=(1, 2))
    refused("no rows of source text-1, whose weight is 2", tmp_path)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_every_epoch_has_all_whole_batches_of_all_buckets(tmp_path_factory, data):
    counts = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any), "rows by length")
    process_count = data.draw(st.integers(1, min(3, max(counts))), "processes")
    batch_size = process_count * data.draw(st.integers(1, max(counts) // process_count), "rows a process")
    start, seed = data.draw(st.integers(0, 30), "start"), data.draw(st.integers(0, 2**64), "seed")
    lengths = dict(zip((3, 4, 6, 9), counts, strict=False))
    directory = bucketed_corpus(tmp_path_factory.mktemp("bucketed"), lengths)
    loader = RowLoader(directory, batch_size, seed)
    steps = loader.steps_per_epoch
    assert steps == sum(count // batch_size for count in counts)
    whole = take_bucketed(loader, 2 * steps + start)

    of_length = collections.defaultdict(set)
    for length, rows in eval_rows(directory, 1):
        of_length[length].update(rows)
    for epoch in (whole[:steps], whole[steps : 2 * steps]):
        batches = collections.Counter(length for length, _ in epoch)
        assert batches == {n: count // batch_size for n, count in lengths.items() if count >= batch_size}
        rows = [row for _, rows in epoch for row in rows]
        assert len(rows) == len(set(rows)) == steps * batch_size
        assert all(set(rows) <= of_length[length] for length, rows in epoch)

    parts = [
        take_bucketed(
            RowLoader(directory, batch_size, seed, start=start, process_index=i, process_count=process_count),
            2 * steps,
        )
        for i in range(process_count)
    ]
    joined = [(batch[0][0], [row for _, part in batch for row in part]) for batch in zip(*parts, strict=True)]
    assert joined == whole[start:]


def test_the_rows_that_sit_an_epoch_out_are_others_in_the_next(bucketed):
    loader = RowLoader(bucketed, 8, seed=0)
    assert loader.steps_per_epoch == 3 and loader.steps(1.5) == 5  # 16 of 21 rows, none of 4, 8 of 12
    epochs = take_bucketed(loader, 30)
    left_out = [
        set(range(37)) - {row for _, rows in epochs[i : i + 3] for row in rows} for i in range(0, 30, 3)
    ]
    assert {len(rows) for rows in left_out} == {13}
    always = set.intersection(*left_out)
    assert len(always) == 4  # the bucket that fills no batch
    assert len({tuple(length for length, _ in epochs[i : i + 3]) for i in range(0, 30, 3)}) > 1


def test_unshuffled_buckets_come_in_order(bucketed):
    assert [length for length, _ in take_bucketed(RowLoader(bucketed, 8, 0, shuffle=False), 6)] == [
        3,
        3,
        6,
    ] * 2


def test_reading_ahead_is_bounded_and_stops_with_the_iterator(corpus):
    before = set(threading.enumerate())
    iterator = iter(RowLoader(corpus, 8, seed=0))
    next(iterator)
    started = set(threading.enumerate()) - before
    assert len(started) <= 4
    iterator.close()
    for thread in started:
        thread.join(timeout=10)
        assert not thread.is_alive()


@pytest.mark.parametrize("layout", ["packed", "weighted", "bucketed"])
def test_memory_does_not_grow_with_the_number_of_rows(tmp_path, layout):
    """The metadata tell of 2·10⁹ rows; finding out which of them the first batch has is all that can be done."""
    shards = [numbered_rows(range(10)) for _ in range(2)]
    metadata = write_corpus(
        tmp_path,
        shards,
        seq_len=SEQ_LEN,
        layout="bucketed" if layout == "bucketed" else "packed",
        sources=[0, 1],
        lengths=[3, SEQ_LEN],
        weights=(1, 2) if layout == "weighted" else (),
    )
    shards = tuple(dataclasses.replace(shard, rows=10**9) for shard in metadata.shards)
    dataclasses.replace(metadata, shards=shards).save(tmp_path)
    take(RowLoader(numbered_corpus(tmp_path / "small", 20), 8, seed=0), 1)  # so that all modules are loaded
    tracemalloc.start()
    with pytest.raises(UserError, match=r"is damaged at row \d{5,}: "):
        next(iter(RowLoader(tmp_path, 8, seed=0, start=10**6)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6


def eval_rows(directory, batch_size, process_count=1):
    """Length and rows of every batch of `eval_batches`, -1 for an empty row."""
    parts = [
        list(eval_batches(directory, batch_size, process_index=index, process_count=process_count))
        for index in range(process_count)
    ]
    batches = [
        {key: np.concatenate([part[key] for part in batch]) for key in batch[0]}
        for batch in zip(*parts, strict=True)
    ]
    for batch in batches:
        assert len({array.shape for array in batch.values()}) == 1 and len(batch["input_ids"]) == batch_size
        empty = batch["segment_ids"][:, 0] == 0
        assert (batch["input_ids"][empty] == 7).all() and not batch["segment_ids"][empty].any()
    return [
        (b["input_ids"].shape[1], np.where(b["segment_ids"][:, 0], b["input_ids"][:, 1], -1).tolist())
        for b in batches
    ]


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_eval_batches_are_all_rows_once_in_order(corpus, process_count):
    batches = eval_rows(corpus, 8, process_count)
    assert [rows for _, rows in batches] == [
        [n if n < NUM_ROWS else -1 for n in range(first, first + 8)] for first in range(0, NUM_ROWS, 8)
    ]
    assert {length for length, _ in batches} == {SEQ_LEN}


@pytest.mark.parametrize("process_count", [1, 2])
def test_eval_batches_of_buckets_are_of_one_length_each(bucketed, process_count):
    batches = eval_rows(bucketed, 8, process_count)
    # Rows are numbered shard by shard: 10 of length 3, 2 of 4, 6 of 6, then the other halves.
    expected = {3: [*range(10), *range(18, 29)], 4: [10, 11, 29, 30], 6: [*range(12, 18), *range(31, 37)]}
    for length, rows in expected.items():
        found = [row for n, batch in batches if n == length for row in batch]
        assert found == rows + [-1] * (-len(rows) % 8)
    assert [length for length, _ in batches] == [3, 6, 3, 4, 6, 3]  # in turn, in proportion


def test_batches_that_cannot_be_are_refused(corpus, bucketed):
    with pytest.raises(UserError, match="has 53 rows, fewer than one batch of 64"):
        RowLoader(corpus, 64, seed=0)
    with pytest.raises(
        UserError, match=r"has at most 21 rows of one length \(3\), fewer than one batch of 24"
    ):
        RowLoader(bucketed, 24, seed=0)
    for make in (
        lambda: RowLoader(corpus, 8, seed=0, process_count=3),
        lambda: next(eval_batches(corpus, 8, process_count=3)),
    ):
        with pytest.raises(UserError, match="batch of 8 rows does not divide by 3 processes"):
            make()
    with pytest.raises(UserError, match="holds no prepared corpus"):
        RowLoader(corpus / "none", 8, seed=0)


def test_damage_is_told_by_whoever_reads(corpus, tmp_path):
    for path in corpus.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / "rows-00002.array_record"
    data = bytearray(shard.read_bytes())
    data[108] ^= 0xFF  # in the first row: the file's header ends at byte 64, the first record's at 104
    shard.write_bytes(data)
    match = r"rows-00002\.array_record \(shard 2 of 6\) is damaged at row 0: "
    with pytest.raises(UserError, match=match):
        list(eval_batches(tmp_path, 8))
    with pytest.raises(UserError, match=match) as caught:
        take(RowLoader(tmp_path, 8, seed=0), 7)
    assert "\n" not in str(caught.value)
    os.remove(shard)
    with pytest.raises(UserError, match=r"rows-00002\.array_record \(shard 2 of 6\) is missing"):
        RowLoader(tmp_path, 8, seed=0)
