from __future__ import annotations

import contextlib
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from distiljax.data.loader import RowLoader
from distiljax.errors import Failed, UserError
from distiljax.train.loop import Schedule, run_loop
from distiljax.train.metrics import read_metrics
from distiljax.train.parallel import AXIS, Parallel
from distiljax.train.state import TrainState
from tests.data.corpora import numbered_rows, write_corpus

BATCH = 8
SEQ_LEN = 6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """40 rows; row n is the one example [1000, n, 1001]."""
    directory = tmp_path_factory.mktemp("corpus")
    write_corpus(directory, [numbered_rows(range(20)), numbered_rows(range(20, 40))], seq_len=SEQ_LEN)
    return directory


@pytest.fixture(autouse=True)
def no_threads_are_left():
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        if "prefetch" in thread.name:
            thread.join(timeout=10)
            assert not thread.is_alive(), thread


def run(workdir, parallel, batches, steps=6, wait=0.0, log_every=1):
    """The sums of the second tokens, step by step, as the devices saw them. A step takes `wait` seconds."""

    def sleep(x):
        time.sleep(wait)
        return x

    def train_step(state, rows):
        tokens = (rows["segment_ids"] > 0).sum().astype(jnp.float32)
        seen = rows["input_ids"][:, 1].sum().astype(jnp.float32)
        tokens, seen = lax.psum((tokens, seen), AXIS)
        if wait:
            seen = jax.pure_callback(sleep, jax.ShapeDtypeStruct((), jnp.float32), seen)
        params = {"w": state.params["w"] + seen}
        metrics = {
            "loss": params["w"],
            "seen": seen,
            "tokens": tokens,
            "grad_norm": seen,
            "skipped": 0 * seen,
        }
        return TrainState(state.step + 1, params, state.opt_state), metrics

    outcome = run_loop(
        description="testing",
        workdir=workdir,
        schedule=Schedule(steps, log_every, 0, 0, 1, 1),
        parallel=parallel,
        state=jax.device_get(TrainState.create({"w": jnp.zeros(())}, optax.sgd(0.1))),
        step=parallel.wrap(train_step, donate=True),
        batches=batches,
        whole_batch=RowLoader.whole_batch,
        evaluate=lambda params: {"loss": 1.0},
    )
    assert outcome.finished and outcome.step == steps
    train = read_metrics(workdir)["train"]
    return {name: [value for _, value in values] for name, values in train.items()}


@pytest.mark.parametrize("mode", ["jit", "pmap"])
@pytest.mark.parametrize("devices", [1, 4])
def test_the_devices_see_the_batches_of_the_loader(tmp_path, corpus, mode, devices):
    train = run(
        tmp_path,
        Parallel(mode, jax.devices()[:devices]),
        lambda start: RowLoader(corpus, BATCH, seed=3, start=start),
    )
    with contextlib.closing(iter(RowLoader(corpus, BATCH, seed=3))) as batches:
        assert train["seen"] == [next(batches)["input_ids"][:, 1].sum() for _ in range(6)]
    assert all(0 <= share <= 1 for share in train["data_wait"])


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_batches_of_several_lengths(tmp_path, mode):
    shards = [numbered_rows(range(16)), numbered_rows(range(16, 40))]
    write_corpus(tmp_path / "rows", shards, seq_len=SEQ_LEN, layout="bucketed", lengths=[4, SEQ_LEN])
    loader = RowLoader(tmp_path / "rows", BATCH, seed=0)
    train = run(tmp_path, Parallel(mode), lambda start: loader, loader.steps_per_epoch)
    assert sum(train["seen"]) == sum(range(40))


def test_what_the_loader_raises_in_its_thread_arrives_as_it_is(tmp_path, corpus):
    directory = tmp_path / "rows"
    directory.mkdir()
    for path in corpus.iterdir():
        data = bytearray(path.read_bytes())
        if path.name == "rows-00001.array_record":
            data[108] ^= 0xFF  # in the first record
        (directory / path.name).write_bytes(data)
    with pytest.raises(UserError, match=r"rows-00001\.array_record \(shard 1 of 2\) is damaged at row 0: "):
        run(tmp_path, Parallel(), lambda start: RowLoader(directory, BATCH, seed=3, start=start))


def test_rows_that_do_not_divide_are_refused(tmp_path, corpus):
    with pytest.raises(UserError, match="6 rows do not divide by 8 devices"):
        run(tmp_path, Parallel(), lambda start: RowLoader(corpus, 6, seed=3, start=start))


def slow_batches(seconds):
    def batches(start):
        while True:
            time.sleep(seconds)
            yield {name: np.ones((BATCH, SEQ_LEN), np.int32) for name in ("input_ids", "segment_ids")}

    return batches


# A step and the reading of a batch take so long; the share of the time that the devices wait for data.
@pytest.mark.parametrize(
    ("step", "reading", "share"), [(0.1, 0.0, 0.0), (0.1, 0.06, 0.0), (0.05, 0.1, 0.5), (0.0, 0.1, 1.0)]
)
def test_data_wait_is_the_time_that_the_devices_wait(tmp_path, step, reading, share):
    began = time.monotonic()
    train = run(tmp_path, Parallel("pmap", jax.devices()[:1]), slow_batches(reading), 15, step, log_every=15)
    steps = 15
    assert abs(train["data_wait"][0] - share) < 0.2
    # Reading and training overlap.
    assert time.monotonic() - began < steps * max(step, reading) + 3


def test_no_time_in_which_steps_ran_is_left_out_with_the_compilation(tmp_path):
    """The fourth step is compiled again, for rows of another length, while two steps could run."""
    lengths, wait = (SEQ_LEN, SEQ_LEN, SEQ_LEN, 4), 0.2

    def batches(start):
        for length in lengths:
            yield {name: np.ones((BATCH, length), np.int32) for name in ("input_ids", "segment_ids")}

    train = run(
        tmp_path, Parallel("pmap", jax.devices()[:1]), batches, len(lengths), wait, log_every=len(lengths)
    )
    seconds = BATCH * sum(lengths) / train["tokens_per_second"][0]
    assert len(lengths) * wait <= seconds + 0.01


def run_on_poison(workdir, corpus, poison, *, limit, steps=10, checkpoint_every=2, log_every=4):
    """Every step adds 1 to `w`, but for those whose batch has one of the `poison` rows, which are skipped."""

    def train_step(state, rows):
        bad = lax.psum(jnp.isin(rows["input_ids"][:, 1], jnp.asarray(poison)).sum(), AXIS)
        loss = jnp.where(bad > 0, jnp.nan, 1.0)
        params = {"w": state.params["w"] + jnp.where(bad > 0, 0.0, 1.0)}
        metrics = {
            "loss": loss,
            "tokens": jnp.float32(1),
            "grad_norm": loss,
            "skipped": 1.0 - jnp.isfinite(loss),
        }
        return TrainState(state.step + 1, params, state.opt_state), metrics

    parallel = Parallel("jit", jax.devices()[:2])
    loader = RowLoader(corpus, BATCH, seed=3)
    return run_loop(
        description="testing",
        workdir=workdir,
        schedule=Schedule(steps, log_every, 0, checkpoint_every, 2, limit),
        parallel=parallel,
        state=jax.device_get(TrainState.create({"w": jnp.zeros(())}, optax.sgd(0.1))),
        step=parallel.wrap(train_step, donate=True),
        batches=lambda start: RowLoader(corpus, BATCH, seed=3, start=start),
        whole_batch=loader.whole_batch,
        evaluate=lambda params: {"loss": 1.0},
    )


def batches_with(corpus, row, steps):
    loader = RowLoader(corpus, BATCH, seed=3)
    return [step for step in range(steps) if row in loader.whole_batch(step)["input_ids"][:, 1]]


def test_skipped_steps_are_counted_and_named(tmp_path, corpus, caplog):
    bad = batches_with(corpus, 13, 10)
    assert len(bad) == 2  # 5 batches an epoch
    with caplog.at_level("WARNING", "distiljax"):
        outcome = run_on_poison(tmp_path, corpus, [13], limit=2)
    assert outcome.finished and outcome.skipped == 2
    lines = [r.getMessage() for r in caplog.records if "is skipped" in r.getMessage()]
    loader = RowLoader(corpus, BATCH, seed=3)
    for line, step in zip(lines, bad, strict=True):
        assert f"step {step + 1}: loss nan, gradient norm nan" in line and "(1 of at most 2 in a row)" in line
        assert ", ".join(map(str, loader.whole_batch(step)["rows"])) in line
    train = read_metrics(tmp_path)["train"]
    assert sum(value for _, value in train["skipped"]) == 2
    # The means are of the steps that counted.
    assert {value for _, value in train["loss"]} == {1.0}
    assert not list(tmp_path.glob("nonfinite*"))


def test_too_many_skipped_steps_in_a_row_end_the_run_and_leave_the_batch(tmp_path, corpus):
    every = list(range(40))
    with pytest.raises(
        Failed, match=r"loss nan, gradient norm nan at step 3, as at 2 steps before it"
    ) as raised:
        run_on_poison(tmp_path, corpus, every, limit=3, log_every=100)
    (path,) = tmp_path.glob("nonfinite_step_3.npz")
    assert str(path) in str(raised.value) and "learning" not in str(raised.value)
    expected = RowLoader(corpus, BATCH, seed=3).whole_batch(2)
    with np.load(path, allow_pickle=False) as kept:
        assert kept["step"] == 3
        for name, value in expected.items():
            np.testing.assert_array_equal(kept[name], value)
    # Row n of the corpus is the example [1000, n, 1001].
    np.testing.assert_array_equal(expected["rows"], expected["input_ids"][:, 1])
    # What was saved before is there, and the run goes on from it: the same way, into the same batches.
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["2"]
    outcome = run_on_poison(tmp_path, corpus, [], limit=3)
    assert outcome.finished and outcome.skipped == 2
