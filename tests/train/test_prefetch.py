from __future__ import annotations

import itertools
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distiljax.errors import UserError
from distiljax.train.prefetch import Prefetch


def wait_for(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@given(st.lists(st.integers()), st.integers(1, 4))
def test_all_items_come_in_order_and_then_the_end(items, ahead):
    with Prefetch(items, lambda item: -item, ahead) as found:
        assert list(found) == [-item for item in items]
        assert list(found) == []


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_so_many_are_ahead_and_no_more(ahead):
    made = []
    with Prefetch(itertools.count(), made.append, ahead) as items:
        for taken in range(5):
            wait_for(lambda taken=taken: len(made) == taken + ahead)
            time.sleep(0.01)
            assert len(made) == taken + ahead and items.ready
            next(items)
    assert len(made) <= 5 + ahead


def test_the_work_is_done_in_the_thread_while_others_wait():
    gate = threading.Event()
    with Prefetch(itertools.count(), lambda item: (gate.wait(10), threading.current_thread().name)) as items:
        assert not items.ready
        gate.set()
        assert next(items) == (True, "prefetch")
        wait_for(lambda: items.ready)


def failing_source():
    yield 1
    raise UserError("bad row 7")


def failing_work(item):
    if item:
        raise UserError("bad row 7")
    return item


class NoIterator:
    def __iter__(self):
        raise UserError("bad row 7")


@pytest.mark.parametrize(
    ("source", "work", "before"),
    [(failing_source(), abs, 1), (range(5), failing_work, 1), (NoIterator(), abs, 0)],
    ids=["source", "work", "iter"],
)
def test_an_error_arrives_as_it_is_after_what_came_before(source, work, before):
    threads = threading.active_count()
    items = Prefetch(source, work)
    for _ in range(before):
        next(items)
    wait_for(lambda: items.ready)
    with pytest.raises(UserError, match="^bad row 7$"):
        next(items)
    assert threading.active_count() == threads
    assert list(items) == []
    items.close()


def test_leaving_ends_the_thread_and_closes_the_source():
    closed = []

    def source():
        try:
            yield from itertools.count()
        finally:
            closed.append(threading.current_thread().name)

    threads = threading.active_count()
    with pytest.raises(KeyError), Prefetch(source(), str) as items:
        assert next(items) == "0"
        raise KeyError
    assert closed == ["prefetch"] and threading.active_count() == threads
    assert list(items) == []
