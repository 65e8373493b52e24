"""How inputs are read ahead, cut into windows, and given back."""

import itertools
import threading

import numpy as np
import pytest

from distiljax.errors import UserError
from distiljax.tasks.features import Features
from distiljax.tasks.stream import stream


class Sums:
    """Sums each input's numbers; one that is negative cannot be used."""

    def __init__(self):
        self.prepared = []

    def size(self, item):
        return len(item["numbers"])

    def prepare(self, items):
        self.prepared.append(len(items))
        for item in items:
            if min(item["numbers"]) < 0:
                raise UserError(f"input {item['id']} is negative")
        lengths = np.array([len(item["numbers"]) for item in items])
        return Features(
            "sequence_classification",
            np.concatenate([np.array(item["numbers"], np.int32) for item in items]),
            np.concatenate([[0], np.cumsum(lengths)]),
            lengths.astype(np.int32),
            np.arange(len(items), dtype=np.int32),
        )

    def run(self, batch):
        return (batch["input_ids"].sum(1),)

    def result(self, item, features, rows, outputs):
        ((total,),) = outputs
        return {"id": item["id"], "sum": int(total)}


def inputs(count):
    rng = np.random.default_rng(0)
    return [{"id": n, "numbers": rng.integers(0, 9, rng.integers(1, 30)).tolist()} for n in range(count)]


def test_results_are_those_of_the_inputs_in_their_order():
    job, items = Sums(), inputs(1000)
    results = list(stream(items, job, batch_size=8, limit=32))
    assert results == [{"id": item["id"], "sum": sum(item["numbers"])} for item in items]
    # What is there is not cut into small windows.
    assert job.prepared == [32, 64, 128, 256, 512, 8]


def test_inputs_that_come_slowly_are_answered_as_they_come():
    answered = threading.Event()

    def typed():
        for item in inputs(3):
            yield item
            assert answered.wait(60), "the input before was not answered"
            answered.clear()

    results = []
    for result in stream(typed(), Sums(), batch_size=8, limit=32):
        results.append(result["id"])
        answered.set()
    assert results == [0, 1, 2]


@pytest.mark.parametrize("bad", [{0}, {1}, {100}, {127}, {3, 90}, {126, 127}, set(range(128))])
def test_an_input_that_cannot_be_used_is_found_by_halves(bad):
    job, items = Sums(), inputs(128)
    for number in bad:
        items[number]["numbers"][-1] = -1
    first = min(bad)
    results = stream(items, job, batch_size=32, limit=32)
    assert [result["id"] for result in itertools.islice(results, first)] == list(range(first))
    with pytest.raises(UserError, match=f"input {first} is negative"):
        next(results)
    # All at once, seven halves, and those before it.
    assert len(job.prepared) <= 9 and sum(job.prepared) <= 3 * 128


def test_inputs_before_an_error_in_reading_are_answered():
    def broken():
        yield from inputs(5)
        raise UserError("line 6 is no JSON")

    results = stream(broken(), Sums(), batch_size=8, limit=32)
    assert [result["id"] for result in itertools.islice(results, 5)] == list(range(5))
    with pytest.raises(UserError, match="line 6"):
        next(results)
