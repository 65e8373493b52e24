"""Checkpoints on a disk that fails, and what is left of them."""

import contextlib
import resource

import jax
import numpy as np
import pytest

from distiljax.train.checkpoint import Checkpointer, checkpoint_step, restore_params

# Orbax leaves writers of its own behind when a save fails.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")

RECORD = {"step": 1, "loss": 2.0}


def tree(value):
    # Random, so that it does not compress to nothing: 400 kB.
    noise = np.random.default_rng(value).normal(size=(100_000,)).astype(np.float32)
    return jax.device_put({"params": {"w": noise}, "step": np.int32(value)})


@contextlib.contextmanager
def quota(size):
    """No file may grow beyond so many bytes: what a full disk does, without the right to mount one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def checkpointer(tmp_path):
    with contextlib.closing(Checkpointer(tmp_path, 2)) as opened:
        yield opened


def test_a_save_that_fails_leaves_the_ones_before_and_the_next_one_works(tmp_path, checkpointer, caplog):
    checkpointer.save(1, tree(1), {"step": 1})
    assert checkpointer.settle()
    with quota(50_000):
        checkpointer.save(2, tree(2), {"step": 2})
        assert not checkpointer.settle()
    (warning,) = [r.getMessage() for r in caplog.records if r.name.startswith("distiljax")]
    assert "CHECKPOINT 2 COULD NOT BE SAVED" in warning and "the disk is full" in warning
    assert "training goes on" in warning and "still that of step 1" in warning
    # The half of it does not fill the disk further.
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]
    assert checkpoint_step(tmp_path, "last") == 1
    checkpointer.save(3, tree(3), {"step": 3})
    assert checkpointer.settle()
    state, facts = checkpointer.restore(tree(0))
    assert facts == {"step": 3}
    np.testing.assert_array_equal(state["params"]["w"], tree(3)["params"]["w"])


def test_a_save_that_is_found_to_have_failed_at_the_next_record_is_warned_of_once(checkpointer, caplog):
    with quota(50_000):
        checkpointer.save(1, tree(1), {"step": 1})
        while checkpointer._last.manager.is_saving_in_progress():
            pass
        checkpointer.check()
        checkpointer.check()
        assert not checkpointer.settle()
    warnings = [r.getMessage() for r in caplog.records if r.name.startswith("distiljax")]
    assert len(warnings) == 1 and "none yet" in warnings[0]


def test_the_best_parameters_are_those_on_the_disk(tmp_path, checkpointer):
    assert checkpointer.settle_best() == {}
    checkpointer.save_best(1, tree(1)["params"], RECORD)
    assert checkpointer.settle_best() == RECORD
    with quota(50_000):
        checkpointer.save_best(2, tree(2)["params"], {"step": 2, "loss": 1.0})
        assert checkpointer.settle_best() == RECORD
    params, step = restore_params(tmp_path, tree(0)["params"])
    assert step == 1
    np.testing.assert_array_equal(params["w"], tree(1)["params"]["w"])


def test_of_damaged_checkpoints_the_newest_whole_one_counts(tmp_path, checkpointer, caplog):
    for step in (1, 2):
        checkpointer.save(step, tree(step), {"step": step})
        assert checkpointer.settle()
    for file in (tmp_path / "checkpoints" / "2").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    state, facts = checkpointer.restore(tree(0))
    assert facts == {"step": 1} and state["step"] == 1
    (warning,) = [r.getMessage() for r in caplog.records if r.name.startswith("distiljax")]
    assert "checkpoint 2 of" in warning and "going on from checkpoint 1" in warning
