"""A run that is killed and started again ends as if nothing had happened."""

import json
import re
import resource
import signal
import time

import numpy as np
import pytest
from flax import traverse_util

import distiljax
from distiljax.cli import main
from distiljax.train.checkpoint import checkpoint_step


def wait_for_step(workdir, step, process, seconds=120):
    """Until the log says that `step` steps are done."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        log = workdir / "metrics.jsonl"
        if log.exists():
            lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
            if any(r["split"] == "train" and r["step"] >= step for r in map(json.loads, lines)):
                return
        if process.poll() is not None:
            pytest.fail(f"ended early: {finish(process)}")
        time.sleep(0.02)
    pytest.fail(f"step {step} was not reached in {seconds} s")


def finish(process):
    """The exit status and what was said on standard error."""
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def final_params(workdir):
    _, params = distiljax.from_pretrained(workdir, checkpoint="last")
    return traverse_util.flatten_dict(params)


@pytest.fixture(scope="module")
def command(teacher, flags):
    # Steps long enough for the signals to fall where they are meant to.
    changes = flags(
        steps=40, log_every=1, eval__every=15, checkpoint__every=6, batch_size=64, micro_batch_size=8
    )
    return ["distill", f"--config.teacher={teacher}", *changes]


@pytest.fixture(scope="module")
def unbroken(command, start, tmp_path_factory):
    path = tmp_path_factory.mktemp("unbroken") / "run"
    assert finish(start(*command, f"--workdir={path}"))[0] == 0
    return path


def assert_same_parameters(path, expected):
    expected, ours = final_params(expected), final_params(path)
    for name, value in expected.items():
        np.testing.assert_array_equal(ours[name], value, err_msg="/".join(name))


def test_a_killed_and_a_terminated_run_end_bit_identical_to_an_unbroken_one(
    tmp_path, command, start, unbroken
):
    broken = tmp_path / "broken"
    process = start(*command, f"--workdir={broken}")
    wait_for_step(broken, 20, process)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    assert not (broken / "result.json").exists()

    process = start(*command, f"--workdir={broken}")
    wait_for_step(broken, 30, process)
    process.send_signal(signal.SIGTERM)
    status, errors = finish(process)
    assert status == 0 and "the same command goes on" in errors
    assert not (broken / "result.json").exists()

    assert finish(start(*command, f"--workdir={broken}"))[0] == 0

    assert_same_parameters(broken, unbroken)
    results = [json.loads((path / "result.json").read_text()) for path in (unbroken, broken)]
    assert results[0]["validation"] == results[1]["validation"]
    assert results[0]["best"] == results[1]["best"]
    assert results[0]["tokens"] == results[1]["tokens"]
    # Every step is in the log once, with the same losses.
    logs = [
        list(map(json.loads, (path / "metrics.jsonl").read_text().splitlines()))
        for path in (unbroken, broken)
    ]
    losses = [[(r["step"], r["split"], r["loss"]) for r in log] for log in logs]
    assert losses[0] == losses[1]


def test_a_disk_that_is_full_ends_no_step_and_loses_no_checkpoint(tmp_path, command, start, unbroken):
    run = tmp_path / "run"
    process = start(*command, f"--workdir={run}")
    wait_for_step(run, 6, process)
    while checkpoint_step(run, "last") is None:  # written while the steps go on
        time.sleep(0.01)
    # No file of the process may grow beyond 30 kB any more; a checkpoint is larger, the log is not.
    _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (30_000, hard))
    status, errors = finish(process)
    assert status == 1 and "Traceback" not in errors
    kept = checkpoint_step(run, "last")
    assert re.search(rf"CHECKPOINT {kept + 6} COULD NOT BE SAVED .* still that of step {kept}", errors), (
        errors
    )
    assert "the state of step 40 could not be saved" in errors.splitlines()[-1]
    assert not list((run / "checkpoints").glob("*tmp*"))
    assert not (run / "result.json").exists()

    status, errors = finish(start(*command, f"--workdir={run}"))
    assert status == 0 and f"going on from step {kept}" in errors
    assert_same_parameters(run, unbroken)


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, teacher, flags, capfd):
    run = tmp_path / "run"
    command = ["distill", f"--config.teacher={teacher}", *flags(checkpoint__every=2), f"--workdir={run}"]
    assert main(command) == 0
    expected = final_params(run)
    (run / "result.json").unlink()
    for file in (run / "checkpoints" / "8").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert main(command) == 0
    errors = capfd.readouterr().err
    assert "checkpoint 8 of" in errors and "going on from checkpoint 6" in errors
    for path, value in final_params(run).items():
        np.testing.assert_array_equal(value, expected[path], err_msg="/".join(path))


def test_being_told_to_stop_while_preparing_text(tmp_path, teacher, flags, start):
    run = tmp_path / "run"
    process = start(
        "distill", f"--config.teacher={teacher}", *flags(data__source="docstrings"), f"--workdir={run}"
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (run / "data" / ".prepare" / "job.json").exists():
        assert process.poll() is None, finish(process)
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    status, errors = finish(process)
    assert status == 0 and "stopped while preparing" in errors and "Traceback" not in errors
    assert not list((run / "data").glob("*/metadata.json"))
