"""Several processes as one run: the same result as one process, and what happens when one of them goes."""

import json
import re
import signal
import time

import numpy as np
import pytest

from distiljax.train.checkpoint import checkpoint_step
from distiljax.train.metrics import read_metrics
from tests.integration.processes import finish_processes, start_processes
from tests.integration.test_resume import final_params

STEPS = 24
LOST_AFTER = 8


@pytest.fixture(scope="module")
def run(tmp_path_factory, teacher, flags):
    """Runs one command in so many processes, to its end or to a signal; returns the run directory and the ends."""
    base = tmp_path_factory.mktemp("processes")
    prepared = base / "rows"

    def go(name, count, devices=1, meanwhile=None, **changes):
        changes = {
            "steps": STEPS,
            "log_every": 1,
            "checkpoint__every": 6,
            "eval__every": STEPS // 2,
            "optimizer__peak_lr": 5e-4,
            "data_dir": prepared,
        } | changes
        command = ["distill", f"--config.teacher={teacher}", *flags(**changes), f"--workdir={base / name}"]
        processes = start_processes(command, count, devices, LOST_AFTER)
        if meanwhile is not None:
            meanwhile(base / name, processes)
        return base / name, finish_processes(processes)

    return go


@pytest.fixture(scope="module")
def alone(run):
    """The run in one process on one device."""
    path, ends = run("alone", 1)
    assert ends[0][0] == 0, ends[0][1]
    return path


@pytest.fixture(scope="module")
def pair(run, alone):
    """The unbroken run in two processes of two devices, after the rows have been prepared."""
    path, ends = run("pair", 2, 2)
    assert [status for status, _ in ends] == [0, 0], ends
    return path


def assert_same_run(path, expected, tolerance):
    ours, theirs = final_params(path), final_params(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=tolerance, err_msg="/".join(name))
    # The same rows, with the same masks, in the same order.
    for split, names in {"train": ("loss", "mlm_accuracy"), "validation": ("loss",)}.items():
        for name in names:
            a, b = (read_metrics(p)[split].get(name, []) for p in (path, expected))
            assert [step for step, _ in a] == [step for step, _ in b]
            np.testing.assert_allclose([v for _, v in a], [v for _, v in b], rtol=1e-4, atol=1e-6)


def test_two_processes_make_the_run_of_one(pair, alone):
    assert_same_run(pair, alone, 1e-5)
    result = json.loads((pair / "result.json").read_text())
    assert result["steps"] == STEPS and "2 processes" in result["machine"]


@pytest.mark.parametrize(
    ("name", "count", "devices", "changes"),
    [
        ("pmap", 2, 1, {"parallel__mode": "pmap"}),
        ("spread", 2, 2, {"parallel__model": 2}),
    ],
)
def test_other_topologies_make_it_too(run, alone, name, count, devices, changes):
    path, ends = run(name, count, devices, **changes)
    assert [status for status, _ in ends] == [0] * count, ends
    assert_same_run(path, alone, 1e-5)


def wait_for(workdir, step, processes, seconds=240):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        logged = read_metrics(workdir).get("train", {}).get("loss", [])
        if any(at >= step for at, _ in logged):
            return
        for process in processes:
            if process.poll() is not None:
                pytest.fail(f"ended early: {process.communicate()[1]}")
        time.sleep(0.05)
    pytest.fail(f"step {step} was not reached in {seconds} s")


def test_a_signal_to_one_process_stops_all_at_one_step_and_the_run_goes_on_elsewhere(run, alone):
    def stop_one(workdir, processes):
        wait_for(workdir, 2, processes)
        processes[1].send_signal(signal.SIGTERM)

    # Learning rates depend on the length: all three are as long, and stopped.
    changes = {"steps": 4000, "checkpoint__every": 0, "eval__every": 0}
    path, ends = run("stopped", 2, 1, stop_one, **changes)
    assert [status for status, _ in ends] == [0, 0], ends
    assert "the same command goes on" in ends[0][1]
    assert "process 1" in ends[1][1] and "SIGTERM" in ends[1][1] and "Traceback" not in ends[1][1]
    (stopped_at,) = (int(p.name) for p in (path / "checkpoints").iterdir())
    assert stopped_at == max(step for step, _ in read_metrics(path)["train"]["loss"])
    assert not (path / "result.json").exists()

    # On one process, from there; told to stop again, and compared with one process that was never two.
    until = stopped_at + 5

    def stop_alone(workdir, processes):
        wait_for(workdir, until, processes)
        processes[0].send_signal(signal.SIGTERM)

    path, ends = run("stopped", 1, 2, stop_alone, **changes)
    assert ends[0][0] == 0 and f"going on from step {stopped_at}" in ends[0][1], ends
    other, ends = run("never two", 1, 1, stop_alone, **changes)
    assert ends[0][0] == 0
    ours, theirs = (dict(read_metrics(p)["train"]["loss"]) for p in (path, other))
    common = sorted(ours.keys() & theirs.keys())
    assert common[0] == 1 and common[-1] >= until
    np.testing.assert_allclose([ours[s] for s in common], [theirs[s] for s in common], rtol=1e-4)


@pytest.mark.parametrize("victim", [1, 0])
def test_the_loss_of_a_process_ends_the_others_and_the_same_command_goes_on(run, pair, victim):
    ended = {}

    def kill_one(workdir, processes):
        wait_for(workdir, 5, processes)
        while checkpoint_step(workdir, "last") is None:  # written while the steps go on
            time.sleep(0.01)
        processes[victim].kill()
        killed = time.monotonic()
        processes[1 - victim].wait(timeout=120)
        ended["after"] = time.monotonic() - killed

    name = f"killed {victim}"
    path, ends = run(name, 2, 2, kill_one)
    status, errors = ends[1 - victim]
    if (path / "result.json").exists():
        pytest.fail("the kill came too late to say anything")
    assert status == 1, errors
    last_line = errors.strip().splitlines()[-1]
    assert f"process {victim} (" in last_line and "the same command goes on" in last_line
    assert ended["after"] < LOST_AFTER + 10

    path, ends = run(name, 2, 2)
    assert [status for status, _ in ends] == [0, 0], ends
    assert "going on from step" in ends[0][1]
    for parameter, value in final_params(pair).items():
        np.testing.assert_array_equal(final_params(path)[parameter], value, err_msg="/".join(parameter))


def test_evaluate_and_export_run_on_several_processes(pair, tmp_path):
    exported, out = tmp_path / "exported", tmp_path / "evaluation.json"
    ends = finish_processes(start_processes(["export", f"--workdir={pair}", f"--out={exported}"], 2))
    assert [status for status, _ in ends] == [0, 0], ends
    assert (exported / "model.safetensors").is_file()
    command = ["evaluate", f"--model=a={exported}", f"--data={pair.parent / 'rows' / 'validation'}"]
    together = finish_processes(start_processes([*command, f"--out={out}", "--rows=32"], 2))
    assert [status for status, _ in together] == [0, 0], together
    result = json.loads(out.read_text())["models"][0]
    expected = json.loads((pair / "result.json").read_text())["best"]
    assert result["mlm_loss"] == pytest.approx(expected["loss_mlm"], rel=1e-5)


def test_bad_input_is_said_once_by_all_processes_together(tmp_path, teacher, flags):
    command = [
        "distill",
        f"--config.teacher={teacher}",
        *flags(batch_size=15),
        f"--workdir={tmp_path / 'run'}",
    ]
    # With the default time: who is told of an end must not wait until the other one counts as lost.
    ends = finish_processes(start_processes(command, 2, lost_after=60))
    assert [status for status, _ in ends] == [2, 2], ends
    assert "batch_size 15 does not divide by 2 devices" in ends[0][1]
    assert "batch_size 15" not in ends[1][1] and "Traceback" not in ends[0][1] + ends[1][1]


def test_a_run_with_a_spread_teacher_is_evaluated_with_it_spread(run, pair, tmp_path):
    path = pair.with_name("spread")  # of the topologies above
    assert path.is_dir()
    ends = finish_processes(start_processes(["evaluate", f"--workdir={path}", "--rows=32"], 1, 2))
    assert ends[0][0] == 0, ends
    models = {m["name"]: m for m in json.loads((path / "evaluation.json").read_text())["models"]}
    expected = json.loads((path / "result.json").read_text())["best"]
    assert models["student"]["mlm_loss"] == pytest.approx(expected["loss_mlm"], rel=1e-5)
    assert "tokens_per_second" not in models["teacher"]


def test_a_signal_while_text_is_prepared_ends_all(tmp_path, teacher, flags):
    changes = flags(data__source="docstrings")
    processes = start_processes(
        ["distill", f"--config.teacher={teacher}", *changes, f"--workdir={tmp_path}"], 2, lost_after=60
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (tmp_path / "data" / ".prepare" / "job.json").exists():
        time.sleep(0.05)
    processes[0].send_signal(signal.SIGTERM)
    (first, said), (second, also_said) = finish_processes(processes)
    assert (first, second) == (0, 0), (said, also_said)
    assert "stopped while preparing text" in said
    assert "process 0" in also_said and "stopped while preparing text" in also_said


def test_a_process_that_never_comes_is_waited_for_so_long_and_no_longer(tmp_path, teacher, flags):
    processes = start_processes(
        ["distill", f"--config.teacher={teacher}", *flags(), f"--workdir={tmp_path}", "--join_within=3"], 2
    )
    processes[1].kill()
    status, errors = finish_processes(processes)[0]
    assert status == 1
    assert re.search(r"process 0 at 127\.0\.0\.1:\d+\) have not all come within 3 s", errors.splitlines()[-1])


def test_a_run_directory_that_only_one_process_sees_is_refused(tmp_path, teacher, flags):
    # Two directories stand for two machines that share no disk.
    processes = start_processes(
        ["distill", f"--config.teacher={teacher}", *flags(steps=2)],
        2,
        each=lambda index: [f"--workdir={tmp_path / str(index)}"],
    )
    ends = finish_processes(processes)
    assert [status for status, _ in ends] == [2, 2], ends
    assert f"workdir {tmp_path / '1'}" in ends[1][1] and "all hosts share" in ends[1][1]
