from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from distiljax.errors import UserError
from distiljax.train import run, storage
from tests.gcs import bucket, gcs, objects  # noqa: F401, fixtures


def config(**changes):
    values = {"data": {"source": "docstrings", "seq_len": 32}, "batch_size": 8, "log_every": 10, "seed": 0}
    return ConfigDict(values | changes)


@pytest.fixture(params=["local", "remote"])
def workdir(request, tmp_path):
    """A run directory that is not there yet, as a name."""
    return str(tmp_path / "run") if request.param == "local" else request.getfixturevalue("bucket")


def finish(path):
    run.write_json(path / run.RESULT, {"steps": 1})


def test_a_new_directory_keeps_its_config(workdir):
    with run.open_run(workdir, config(), "distill") as path:
        assert path == storage.as_path(workdir) and os.fspath(path) == workdir
        assert run.read_json(path / run.CONFIG) == {"kind": "distill", **config().to_dict()}
        assert run.read_json(path / run.RESULT) is None


def test_reopening_with_free_settings(workdir):
    with run.open_run(workdir, config(), "distill") as path:
        finish(path)
    with run.open_run(workdir, config(log_every=5), "distill") as path:
        assert run.read_json(path / run.CONFIG)["log_every"] == 5


def test_another_config_or_kind_is_refused(workdir):
    with run.open_run(workdir, config(), "distill") as path:
        finish(path)
    with (
        pytest.raises(
            UserError, match=f"workdir {workdir} holds a run of another config: batch_size was 8 and is"
        ),
        run.open_run(workdir, config(batch_size=16), "distill"),
    ):
        pass
    with pytest.raises(UserError, match="holds a distill run, this is a pretrain run"):
        run.open_run(workdir, config(), "pretrain").__enter__()


def test_a_start_that_came_to_nothing_leaves_no_data(workdir):
    with run.open_run(workdir, config(), "distill") as path:
        with storage.writing(path / "data" / "train") as directory:
            (directory / "metadata.json").write_text("{}")
        storage.write_text(path / "data" / "mine.txt", "of the user's")
        storage.write_text(path / "other", "kept")
    with run.open_run(workdir, config(batch_size=16), "distill"):
        assert sorted(storage.names(path / "data")) == ["mine.txt", "train"]
    with run.open_run(workdir, config(data={"source": "docstrings", "seq_len": 64}), "distill"):
        assert storage.names(path / "data") == ["mine.txt"] and (path / "other").exists()


def test_damaged_json_is_named(workdir):
    path = storage.as_path(workdir)
    with run.open_run(workdir, config(), "distill"):
        pass
    for text, reason in (("{", "cannot be read as JSON"), ("[1]", "a list, not an object")):
        storage.write_text(path / run.CONFIG, text)
        with pytest.raises(UserError, match=reason) as error:
            run.read_json(path / run.CONFIG)
        assert f"{workdir}/config.json" in str(error.value)


def test_json_has_no_infinity(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        run.write_json(tmp_path / "x.json", {"loss": float("inf")})
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_goes_with_the_run(workdir, tokenizer):
    from distiljax.train.load import is_run, load_tokenizer

    assert not is_run(workdir)
    with run.open_run(workdir, config(), "distill") as path:
        run.write_tokenizer(path, tokenizer)
        run.write_model(path, kind="distill")
    assert is_run(workdir) and "tokenizer.json" in storage.names(path / run.TOKENIZER)
    loaded = load_tokenizer(workdir)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.name_or_path == f"{workdir}/tokenizer"


def test_one_process_at_a_time(tmp_path):
    code = (
        "import sys; from pathlib import Path; from distiljax.train.run import hold\n"
        "with hold(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="is in use by another process"):
            run.open_run(tmp_path, config(), "distill").__enter__()
        other.stdin.close()
    with run.open_run(tmp_path, config(), "distill"):
        pass


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to workdir .*file/run: Not a directory"):
        run.open_run(tmp_path / "file" / "run", config(), "distill").__enter__()


def test_a_full_disk_is_named(tmp_path):
    code = (
        "import resource, sys; from pathlib import Path; from distiljax.errors import UserError\n"
        "from distiljax.train.run import write_json\n"
        "path = Path(sys.argv[1]); write_json(path, {'old': 1})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "try: write_json(path, {'new': 'x' * 100})\n"
        "except UserError as error: print(error)"
    )
    path = tmp_path / "result.json"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == f"{path} cannot be written: File too large; mend that and try again\n"
    assert json.loads(path.read_text()) == {"old": 1} and os.listdir(tmp_path) == ["result.json"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ftp://host/run", "unknown scheme ftp://"),
        ("gs://nobody-has-this/run", "gs://nobody-has-this/run/config.json: no such bucket or object"),
    ],
)
def test_remotes_that_cannot_be(gcs, name, message):  # noqa: F811
    with pytest.raises(UserError, match=message):
        run.open_run(name, config(), "distill").__enter__()


def test_a_path_object_of_a_remote_name(bucket):  # noqa: F811
    with run.open_run(Path(bucket), config(), "distill"):
        pass
    assert objects(bucket) == ["config.json"]
