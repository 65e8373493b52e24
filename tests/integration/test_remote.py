"""Runs and corpora on gs://, through a server on the loopback interface: gcsfs and TensorStore are the real ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from flax import traverse_util

import distiljax
from distiljax.cli import main
from distiljax.errors import UserError
from distiljax.train import storage
from tests import commands
from tests.gcs import bucket, gcs, objects  # noqa: F401, fixtures

# gcsfs hands aiohttp its chunks as bytes, which aiohttp finds large.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def params(workdir, checkpoint="best"):
    return traverse_util.flatten_dict(distiljax.from_pretrained(workdir, checkpoint=checkpoint)[1])


def assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(ours[path], value, err_msg="/".join(path))


def test_a_remote_run_and_what_is_made_of_it(bucket, teacher, flags, distilled, tmp_path, capsys):  # noqa: F811
    run = f"{bucket}/run"
    assert main(["distill", f"--config.teacher={teacher}", *flags(), f"--workdir={run}"]) == 0
    assert not (tmp_path / "gs:").exists() and not os.path.exists("gs:")
    held = objects(run)
    for name in ("config.json", "model.json", "result.json", "metrics.jsonl", "tokenizer/tokenizer.json"):
        assert name in held
    assert "data/train/metadata.json" in held and "checkpoints/8/commit_success.txt" in held
    assert any(name.startswith("tensorboard/events.out.tfevents.") for name in held)
    # The same as a local run.
    for checkpoint in ("best", "last"):
        assert_same(params(run, checkpoint), params(distilled, checkpoint))
    for log in (run, distilled):
        loss = distiljax.train.metrics.read_metrics(log)["train"]["loss"]
        assert [step for step, _ in loss] == [2, 4, 6, 8]

    capsys.readouterr()
    assert main(["distill", f"--config.teacher={teacher}", *flags(), f"--workdir={run}"]) == 0
    assert "finished at step 8; best on held-out text at step" in capsys.readouterr().out

    assert main(["evaluate", f"--workdir={run}", "--rows=16"]) == 0
    assert [
        m["name"] for m in json.loads((storage.as_path(run) / "evaluation.json").read_text())["models"]
    ] == [
        "teacher",
        "student",
        "student before distillation",
    ]
    assert main(["report", f"--workdir={run}"]) == 0
    report = (storage.as_path(run) / "report.md").read_text()
    assert report.startswith("# Distillation report") and "plots/quality.png" in objects(run)
    assert main(["predict", f"--model={run}", "the [MASK] of a name"]) == 0

    out = f"{bucket}/model"
    assert main(["export", f"--workdir={run}", f"--out={out}"]) == 0
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(objects(out))
    assert_same(params(out), params(run))
    assert distiljax.load_tokenizer(out).get_vocab() == distiljax.load_tokenizer(run).get_vocab()
    capsys.readouterr()
    assert main(["export", f"--workdir={run}", f"--out={out}"]) == 2
    assert f"{out} is not empty" in capsys.readouterr().err
    assert main(["export", f"--workdir={run}", f"--out={out}", "--overwrite"]) == 0
    assert main(["export", f"--workdir={run}", f"--out={run}", "--overwrite"]) == 2
    assert "holds a run, which an export would destroy" in capsys.readouterr().err
    assert main(["export", f"--workdir={run}", f"--out={tmp_path / 'model'}"]) == 0
    assert_same(params(tmp_path / "model"), params(run))


def test_a_corpus_that_is_remote(bucket, teacher, flags, distilled, corpus, cache):  # noqa: F811
    rows = f"{bucket}/rows"
    prepare = ["prepare", f"--tokenizer={teacher}", f"--out={rows}", "--workers=1"]
    prepare += [flag for flag in flags() if flag.startswith("--config.data.")]
    assert main(prepare) == 0
    assert {"train/metadata.json", "validation/metadata.json"} <= set(objects(rows))
    assert main(prepare) == 0  # finds it
    run = f"{bucket}/run"
    assert main(["distill", f"--config.teacher={teacher}", *flags(data_dir=rows), f"--workdir={run}"]) == 0
    assert not [name for name in objects(run) if name.startswith("data/")]
    assert_same(params(run, "last"), params(distilled, "last"))


def test_a_remote_run_that_is_killed_ends_bit_identical(bucket, teacher, flags, distilled, gcs):  # noqa: F811
    run = f"{bucket}/run"
    command = ["distill", f"--config.teacher={teacher}", *flags(), f"--workdir={run}"]
    killed = [sys.executable, "-m", "distiljax", *command]
    with subprocess.Popen(killed, env=commands.environment(), stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 200
        while "checkpoints/4/commit_success.txt" not in objects(run):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        # So that it comes no further before the signal does.
        gcs.refused = {"match": "/", "methods": ("GET", "POST", "DELETE"), "status": 503}
        process.kill()
        process.communicate()
    gcs.refused = None
    assert not {"result.json", "checkpoints/8/commit_success.txt"} & set(objects(run))
    assert main(command) == 0
    assert_same(params(run, "last"), params(distilled, "last"))
    assert_same(params(run), params(distilled))


def test_a_bucket_that_is_not_there(gcs, teacher, flags, capsys):  # noqa: F811
    command = ["distill", f"--config.teacher={teacher}", *flags(), "--workdir=gs://nobody-has-this/run"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "gs://nobody-has-this/run" in error and "no such bucket" in error and "Traceback" not in error


def test_names_that_hold_nothing(bucket, capsys):  # noqa: F811
    with pytest.raises(UserError, match=f"{bucket} holds no model and no tokenizer"):
        distiljax.from_pretrained(bucket)
    with pytest.raises(UserError, match=f"{bucket} holds no model and no tokenizer"):
        distiljax.load_tokenizer(bucket)
    for command in ("export", "report", "evaluate"):
        assert main([command, f"--workdir={bucket}", *(["--out=x"] if command == "export" else [])]) == 2
        assert f"{bucket} is no run directory" in capsys.readouterr().err


def test_a_damaged_remote_model_is_called_by_its_name(bucket):  # noqa: F811
    storage.write_text(storage.as_path(bucket) / "config.json", "{")
    with pytest.raises(UserError, match=f"^{bucket}/config.json cannot be read as JSON"):
        distiljax.from_pretrained(bucket)
