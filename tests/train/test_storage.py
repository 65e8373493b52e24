from __future__ import annotations

import errno
import importlib.util
import logging
import os
import time
from pathlib import Path

import pytest

from distiljax.errors import UserError
from distiljax.train import storage
from tests.gcs import bucket, gcs, objects  # noqa: F401, fixtures

# gcsfs hands aiohttp its chunks as bytes, which aiohttp finds large.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")


def test_names_of_both_kinds():
    assert storage.is_remote("gs://b/run") and not storage.is_remote("runs/a")
    assert storage.is_remote(Path("gs://b/run"))  # pathlib has made gs:/b/run of it
    assert storage.absolute("gs://b/run/") == "gs://b/run"
    assert storage.absolute(Path("gs://b/run")) == "gs://b/run"
    assert storage.absolute("runs/a") == os.path.join(os.getcwd(), "runs/a")
    assert storage.as_path("~/a") == Path.home() / "a"
    path = storage.as_path("gs://b/run/") / "config.json"
    assert os.fspath(path) == str(path) == "gs://b/run/config.json" and path.name == "config.json"
    assert storage.as_path(path) == path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ftp://host/run", r"unknown scheme ftp://; expected a local directory or one on gs://$"),
        ("gs://", "names no bucket; expected gs://BUCKET/DIRECTORY"),
    ],
)
def test_names_that_cannot_be(name, message):
    with pytest.raises(UserError, match=message):
        storage.as_path(name)


def test_a_missing_package_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gcsfs" else find(name))
    with pytest.raises(
        UserError, match=r"gs://b/run needs gcsfs; install it with: pip install 'distiljax\[gcs\]'"
    ):
        storage.as_path("gs://b/run")


def test_files_go_up_and_come_down(bucket, tmp_path):  # noqa: F811
    source, copy = tmp_path / "source", tmp_path / "copy"
    (source / "below").mkdir(parents=True)
    (source / "a.json").write_text("{}")
    (source / "below" / "b").write_bytes(bytes(range(256)) * 40_000)  # in more than one request
    (source / "empty").write_text("")
    wanted = {"a.json": 2, "below/b": 10_240_000, "empty": 0}
    assert storage.files(source) == wanted
    assert storage.files(bucket) == {} and storage.names(bucket) == []
    storage.upload(source, bucket, list(wanted))
    assert storage.files(bucket) == wanted and objects(bucket) == sorted(wanted)
    assert storage.names(bucket) == storage.names(source) == ["a.json", "below", "empty"]
    storage.download(bucket, copy, list(wanted))
    assert storage.files(copy) == wanted
    assert (copy / "below" / "b").read_bytes() == (source / "below" / "b").read_bytes()
    storage.remove(bucket, ["a.json"])
    assert objects(bucket) == ["below/b", "empty"]
    storage.remove_tree(bucket)
    assert objects(bucket) == []
    storage.remove_tree(bucket)


def test_what_another_client_writes_is_seen(bucket):  # noqa: F811
    import gcsfs

    path = storage.as_path(bucket)
    assert storage.names(path) == [] and not (path / "x").exists()
    other = gcsfs.GCSFileSystem(token="anon", skip_instance_cache=True)
    other.pipe_file(f"{bucket}/x", b"one")
    assert storage.names(path) == ["x"] and (path / "x").read_text() == "one"
    other.pipe_file(f"{bucket}/x", b"another")
    assert (path / "x").read_text() == "another" and storage.files(path) == {"x": 7}


def test_write_text_replaces(bucket, tmp_path):  # noqa: F811
    for directory in (tmp_path, storage.as_path(bucket)):
        for text in ("one", "é"):
            storage.write_text(directory / "file", text)
            assert (directory / "file").read_bytes() == text.encode()
        assert storage.names(directory) == ["file"]


def test_write_text_that_fails_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "file.tmp").mkdir()
    with pytest.raises(UserError, match=r"file cannot be written: Is a directory"):
        storage.write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"


def test_writing_and_reading_a_directory(bucket, tmp_path):  # noqa: F811
    for directory in (tmp_path / "d", storage.as_path(bucket)):
        with storage.writing(directory) as local:
            (local / "below").mkdir()
            (local / "a.txt").write_text("a")
            (local / "b.bin").write_text("b")
            (local / "below" / "c.txt").write_text("c")
        assert list(storage.files(directory)) == ["a.txt", "b.bin", "below/c.txt"]
        with storage.local_copy(directory, ("*.txt",)) as local:
            assert (local / "a.txt").read_text() == "a"
            assert directory == local or storage.names(local) == ["a.txt"]
    assert not local.exists()  # the copy, not the directory itself


def test_nothing_goes_up_if_the_body_fails(bucket):  # noqa: F811
    with pytest.raises(ZeroDivisionError), storage.writing(bucket) as local:
        (local / "a").write_text("a")
        raise ZeroDivisionError
    assert objects(bucket) == []


def test_an_error_names_the_remote_in_place_of_its_copy(bucket):  # noqa: F811
    with pytest.raises(UserError, match=f"^{bucket}/a is no good$"), storage.local_copy(bucket) as local:
        raise UserError(f"{local}/a is no good")


def test_a_bucket_that_is_not_there(gcs):  # noqa: F811
    path = storage.as_path("gs://nobody-has-this/run")
    with pytest.raises(UserError, match=r"gs://nobody-has-this/run/x: no such bucket or object"):
        storage.write_text(path / "x", "text")


def test_a_bucket_that_may_not_be_used(gcs, bucket):  # noqa: F811
    gcs.refused = {"match": "secret", "methods": ("GET", "POST"), "status": 403}
    path = storage.as_path(bucket) / "secret"
    for do in (
        lambda: storage.write_text(path, "text"),
        lambda: storage.names(path),
        lambda: storage.files(path),
    ):
        with pytest.raises(UserError, match="secret: access is denied") as error:
            do()
        assert "\n" not in str(error.value)


def test_local_errors_pass():
    with pytest.raises(FileNotFoundError), storage.errors("runs/a"):
        raise FileNotFoundError(errno.ENOENT, "no such file")
    with pytest.raises(UserError, match="disk"), storage.room("d"), storage.errors("gs://b/a"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_mirror_copies_what_has_grown(bucket, tmp_path, gcs, caplog):  # noqa: F811
    (tmp_path / "log").write_text("one\n")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "events").write_text("e")

    def warnings():
        return [record.getMessage() for record in caplog.records if record.name == storage.__name__]

    mirror = storage.Mirror(tmp_path, bucket, seconds=0.05)
    path = storage.as_path(bucket)
    wait(lambda: objects(bucket) == ["below/events", "log"])
    with (tmp_path / "log").open("a") as file:
        file.write("two\n")
    wait(lambda: (path / "log").read_text() == "one\ntwo\n")
    with caplog.at_level(logging.WARNING, storage.__name__):
        gcs.refused = {"match": "/o", "methods": ("POST",), "status": 403}
        with (tmp_path / "log").open("a") as file:
            file.write("three\n")
        wait(warnings)
        time.sleep(0.3)
        assert len(warnings()) == 1 and "access is denied" in warnings()[0]  # once
        gcs.refused = None
        wait(lambda: (path / "log").read_text() == "one\ntwo\nthree\n")
    wait(lambda: len(warnings()) == 2)
    assert "again" in warnings()[1]
    (tmp_path / "last").write_text("")
    assert mirror.close()
    assert objects(bucket) == ["below/events", "last", "log"]


def wait(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
