from __future__ import annotations

import itertools
import subprocess
import sys
import threading

import numpy as np
import pytest

from distiljax.data import RowLoader, default_data_config, eval_batches, prepare
from distiljax.data.metadata import FORMAT_VERSION, Metadata, Statistics
from distiljax.data.prepare import write_shards
from distiljax.errors import UserError

NUM_ROWS = 53
SEQ_LEN = 6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """53 rows in shards of 10; row n is the one example [1000, n, 1001]."""
    directory = tmp_path_factory.mktemp("corpus")
    rows = ([np.array([1000, number, 1001])] for number in range(NUM_ROWS))
    shards = write_shards(rows, str(directory), np.dtype("<u2"), rows_per_shard=10)
    Metadata(
        format_version=FORMAT_VERSION,
        tokenizer_name="none",
        vocabulary_sha256="",
        vocab_size=1002,
        pad_token_id=7,
        split="train",
        settings={"seq_len": SEQ_LEN},
        statistics=vars(Statistics(tokens=3 * NUM_ROWS, rows=NUM_ROWS)),
        shards=tuple(shards),
    ).save(directory)
    return directory


def take(loader, count):
    """The row numbers of the first batches: [count, rows]."""
    return np.stack([batch["input_ids"][:, 1] for batch in itertools.islice(loader, count)])


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


def test_batch_size_cuts_one_and_the_same_order(corpus):
    assert (
        take(RowLoader(corpus, 4, seed=1), 30).ravel().tolist()
        == take(RowLoader(corpus, 12, seed=1), 10).ravel().tolist()
    )


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_read_contiguous_parts_of_the_same_batches(corpus, process_count):
    whole = take(RowLoader(corpus, 8, seed=2), 20)
    parts = [
        take(RowLoader(corpus, 8, seed=2, process_index=index, process_count=process_count), 20)
        for index in range(process_count)
    ]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize("start", [1, 6, 7, 1000])
def test_a_resumed_loader_goes_on_as_the_unbroken_one(corpus, start):
    unbroken = take(RowLoader(corpus, 8, seed=3), start + 5)[start:]
    np.testing.assert_array_equal(take(RowLoader(corpus, 8, seed=3, start=start), 5), unbroken)
    # … and on another number of processes.
    parts = [
        take(RowLoader(corpus, 8, seed=3, start=start, process_index=index, process_count=2), 5)
        for index in range(2)
    ]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), unbroken)


def test_far_positions_cost_nothing_to_reach(corpus):
    """10^8 epochs in: an order that was materialised or stepped through could not get here."""
    start = 10**8 * NUM_ROWS // 8
    assert take(RowLoader(corpus, 8, seed=3, start=start), 2).shape == (2, 8)


def test_the_seed_decides_the_order(corpus):
    first, again, other = (take(RowLoader(corpus, 8, seed=seed), 30) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first[:6] != other[:6]).any()
    # Not the order of the other seed shifted by an epoch either.
    assert first.ravel()[NUM_ROWS : 2 * NUM_ROWS].tolist() != other.ravel()[:NUM_ROWS].tolist()


def test_without_shuffling_rows_come_in_order(corpus):
    order = take(RowLoader(corpus, 8, seed=0, shuffle=False), 10).ravel()
    assert order.tolist() == [n % NUM_ROWS for n in range(80)]


def test_another_interpreter_draws_the_same_order(corpus):
    program = (
        "import itertools, sys; from distiljax.data import RowLoader\n"
        f"for b in itertools.islice(RowLoader({str(corpus)!r}, 8, seed=5), 4): print(*b['input_ids'][:, 1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{program}"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
    assert found == take(RowLoader(corpus, 8, seed=5), 4).tolist()


def test_reading_ahead_is_bounded_and_stops_with_the_iterator(corpus):
    before = threading.active_count()
    iterator = iter(RowLoader(corpus, 8, seed=0))
    next(iterator)
    assert threading.active_count() - before <= 6
    iterator.close()


@pytest.mark.parametrize("process_count", [1, 2])
def test_eval_batches_are_all_rows_once_in_order(corpus, process_count):
    parts = [
        list(eval_batches(corpus, 8, process_index=index, process_count=process_count))
        for index in range(process_count)
    ]
    assert {len(part) for part in parts} == {7}
    batches = [
        {key: np.concatenate([part[key] for part in batch]) for key in batch[0]}
        for batch in zip(*parts, strict=True)
    ]
    assert all(batch[key].shape == (8, SEQ_LEN) for batch in batches for key in batch)
    real = np.concatenate([batch["input_ids"][batch["segment_ids"][:, 0] > 0, 1] for batch in batches])
    assert real.tolist() == list(range(NUM_ROWS))
    last = batches[-1]
    assert (last["segment_ids"][5:] == 0).all() and (last["input_ids"][5:] == 7).all()


def test_batches_that_cannot_be_are_refused(corpus):
    with pytest.raises(UserError, match="has 53 rows, fewer than one batch of 64"):
        RowLoader(corpus, 64, seed=0)
    for make in (
        lambda: RowLoader(corpus, 8, seed=0, process_count=3),
        lambda: next(eval_batches(corpus, 8, process_count=3)),
    ):
        with pytest.raises(UserError, match="batch of 8 rows does not divide by 3 processes"):
            make()
    with pytest.raises(UserError, match="holds no prepared corpus"):
        RowLoader(corpus / "none", 8, seed=0)


@pytest.fixture
def damaged(corpus, tmp_path):
    for path in corpus.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_a_flipped_byte_is_found_and_named(damaged):
    shard = damaged / "rows-00002.array_record"
    data = bytearray(shard.read_bytes())
    data[108] ^= 0xFF  # in the first row: the file's header ends at byte 64, the first record's at 104
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"rows-00002\.array_record is damaged at row 0"):
        list(eval_batches(damaged, 8))
    with pytest.raises(UserError, match=r"rows-00002\.array_record is damaged at row 0"):
        take(RowLoader(damaged, 8, seed=0), 7)


def test_a_cut_shard_is_found_and_named(damaged):
    shard = damaged / "rows-00004.array_record"
    shard.write_bytes(shard.read_bytes()[:300])
    with pytest.raises(UserError, match=r"rows-00004\.array_record is damaged at row 0"):
        list(eval_batches(damaged, 8))


def test_a_shard_with_fewer_rows_than_told_is_found(damaged):
    (damaged / "rows-00001.array_record").write_bytes((damaged / "rows-00005.array_record").read_bytes())
    with pytest.raises(UserError, match=r"rows-00001\.array_record is damaged at row 3"):
        list(eval_batches(damaged, 8))


def test_rows_of_another_vocabulary_are_found(damaged):
    rows = ([np.array([1000, 5000, 1001])] for _ in range(10))
    write_shards(rows, str(damaged), np.dtype("<u2"), rows_per_shard=10)
    with pytest.raises(
        UserError, match=r"rows-00000\.array_record is damaged at row 0: token 5000 is outside"
    ):
        list(eval_batches(damaged, 8))


def test_prepared_text_comes_back(tmp_path, corpus_file, tokenizer):
    config = default_data_config()
    config.source, config.seq_len, config.holdout = str(corpus_file), 32, 0.2
    prepare(config, "train", tokenizer, tmp_path / "train")
    prepare(config, "validation", tokenizer, tmp_path / "validation")
    batch = next(iter(RowLoader(tmp_path / "train", 16, seed=0)))
    starts = (batch["positions"] == 0) & (batch["segment_ids"] > 0)
    assert (batch["input_ids"][starts] == tokenizer.cls_token_id).all()
    assert (batch["input_ids"][batch["segment_ids"] == 0] == tokenizer.pad_token_id).all()
    assert sum(len(batch["input_ids"]) for batch in eval_batches(tmp_path / "validation", 4)) >= 4
