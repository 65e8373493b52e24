"""The order of a task's batches: every row once an epoch, of like length, the same for any number of processes."""

import itertools

import numpy as np
import pytest

from distiljax.errors import UserError
from distiljax.tasks.features import Features
from distiljax.tasks.loader import Logits, TaskLoader, all_batches

LENGTHS = (8, 16, 40)


def features(count=50, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 41, count)
    starts = np.cumsum([0, *lengths])
    return Features(
        "sequence_classification",
        tokens=rng.integers(5, 99, starts[-1]).astype(np.int32),
        starts=starts,
        second=lengths.astype(np.int32),
        examples=np.arange(count, dtype=np.int32),
        labels=rng.integers(0, 2, count).astype(np.int32),
    )


def take(loader, count):
    batches = iter(loader)
    found = list(itertools.islice(batches, count))
    batches.close()
    return found


@pytest.mark.parametrize(("count", "size"), [(50, 8), (48, 8), (3, 8), (50, 1)])
def test_every_row_once_an_epoch_and_in_another_order_in_the_next(count, size):
    rows = features(count)
    loader = TaskLoader(rows, size, 1, LENGTHS)
    assert loader.steps_per_epoch == -(-count // size)
    epochs = []
    for epoch in range(2):
        batches = [
            loader.whole_batch(epoch * loader.steps_per_epoch + i) for i in range(loader.steps_per_epoch)
        ]
        seen = np.concatenate([batch["row"] for batch in batches])
        assert sorted(seen[seen >= 0]) == list(range(count))
        assert (seen < 0).sum() == loader.steps_per_epoch * size - count
        epochs.append(seen)
    assert count <= size or not np.array_equal(*epochs)


def test_batches_hold_rows_of_like_length_in_the_given_shapes():
    rows = features(2000)
    loader = TaskLoader(rows, 8, 0, LENGTHS)
    batches = take(loader, loader.steps_per_epoch)
    assert {batch["input_ids"].shape[1] for batch in batches} == set(LENGTHS)
    filled = sum(batch["attention_mask"].sum() for batch in batches)
    assert filled == rows.lengths.sum()
    padded = sum(batch["input_ids"].size for batch in batches)
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(2000).reshape(-1, 8)
    longest = np.searchsorted(LENGTHS, rows.lengths[shuffled].max(1))
    assert padded < 0.8 * 8 * np.array(LENGTHS)[longest].sum()
    for batch in batches:
        for at, row in enumerate(batch["row"]):
            tokens = rows.tokens[rows.starts[row] : rows.starts[row + 1]]
            assert np.array_equal(batch["input_ids"][at, : len(tokens)], tokens)
            assert batch["labels"][at] == rows.labels[row]


def test_processes_share_batches_and_reading_begins_anywhere():
    rows = features()
    whole = take(TaskLoader(rows, 8, 3, LENGTHS), 12)
    parts = [take(TaskLoader(rows, 8, 3, LENGTHS, process_index=i, process_count=4), 12) for i in range(4)]
    for batch, *split in zip(whole, *parts, strict=True):
        for name, values in batch.items():
            assert np.array_equal(values, np.concatenate([part[name] for part in split]))
    later = take(TaskLoader(rows, 8, 3, LENGTHS, start=5), 7)
    for batch, again in zip(whole[5:], later, strict=True):
        assert all(np.array_equal(batch[name], again[name]) for name in batch)
    assert not np.array_equal(whole[0]["row"], take(TaskLoader(rows, 8, 4, LENGTHS), 1)[0]["row"])


@pytest.mark.parametrize("single", [True, False])
def test_teacher_logits_come_with_their_rows(single):
    rows = features()
    rng = np.random.default_rng(0)
    shapes = [(3,) if single else (n, 2) for n in rows.lengths]
    logits = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    loader = TaskLoader(rows, 8, 3, LENGTHS, teacher_logits=Logits.of(logits))
    for batch in take(loader, loader.steps_per_epoch):
        for at, row in enumerate(batch["row"]):
            found = batch["teacher_logits"][at]
            if row < 0:
                assert not found.any()
            elif single:
                assert np.array_equal(found, logits[row])
            else:
                assert np.array_equal(found[: len(logits[row])], logits[row])
                assert not found[len(logits[row]) :].any()


def test_all_batches_give_every_row_once():
    rows = features()
    for count in (1, 2):
        parts = [list(all_batches(rows, 8, LENGTHS, i, count)) for i in range(count)]
        seen = np.concatenate([numbers for numbers, _ in parts[0]])
        assert sorted(seen[seen >= 0]) == list(range(50))
        for split in zip(*parts, strict=True):
            joined = np.concatenate([batch["row"] for _, batch in split])
            assert all(np.array_equal(joined, numbers) for numbers, _ in split)


def test_bad_batches():
    with pytest.raises(UserError, match="batch of 9 rows does not divide by 2 processes"):
        TaskLoader(features(), 9, 0, LENGTHS, process_count=2)
    with pytest.raises(UserError, match="no training example"):
        TaskLoader(features(0), 8, 0, LENGTHS)
