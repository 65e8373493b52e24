from __future__ import annotations

import collections
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

from distiljax.data import Metadata, remote
from distiljax.errors import UserError
from distiljax.train import storage
from tests.data.corpora import numbered_rows, write_corpus
from tests.gcs import bucket, gcs, objects  # noqa: F401, fixtures


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make(directory, first=0, shards=3):
    """A corpus of two splits; `first` tells corpora apart that are otherwise alike."""
    for split, count in (("train", shards), ("validation", 1)):
        rows = numbered_rows(range(first, first + 20 * count))
        write_corpus(directory / split, [rows[20 * i : 20 * i + 20] for i in range(count)], seq_len=16)
    (directory / "train" / "tokenizer").mkdir()
    (directory / "train" / "tokenizer" / "tokenizer.json").write_text("{}")
    return directory


def content(directory):
    return {name: (Path(directory) / name).read_bytes() for name in storage.files(directory)}


@pytest.fixture
def downloads(monkeypatch):
    """The names of the files that are copied from the remote."""
    names = collections.Counter()
    copy = storage.download_file

    def counted(url, local):
        names[str(url).rpartition("/")[2]] += 1
        copy(url, local)

    monkeypatch.setattr(storage, "download_file", counted)
    return names


def test_cache_names(cache):
    directory = remote.cache_dir("gs://bucket/data/wiki rows/")
    assert directory.parent == cache / "corpora" and directory.name.startswith("data-wiki-rows-")
    assert directory == remote.cache_dir("gs://bucket/data/wiki rows")
    assert directory != remote.cache_dir("gs://other/data/wiki rows")


def test_the_cache_is_in_the_home_directory_by_default(monkeypatch):
    monkeypatch.delenv("DISTILJAX_CACHE")
    assert remote.cache_dir("gs://b/rows").parent == Path.home() / ".cache" / "distiljax" / "corpora"


def test_publish_and_fetch(bucket, tmp_path, downloads):  # noqa: F811
    corpus = make(tmp_path / "rows")
    assert remote.fetch(bucket) is None
    remote.publish(corpus, bucket)
    assert objects(bucket) == sorted(storage.files(corpus))
    copy = remote.fetch(bucket)
    assert copy == remote.cache_dir(bucket) and content(copy) == content(corpus)
    assert Metadata.load(copy / "train").num_rows == 60
    downloads.clear()
    assert remote.fetch(bucket) == copy and not downloads


def test_publishing_the_same_again_writes_nothing(bucket, tmp_path, gcs):  # noqa: F811
    corpus = make(tmp_path / "rows")
    remote.publish(corpus, bucket)
    gcs.refused = {"match": "/o", "methods": ("POST", "PUT", "DELETE"), "status": 403}
    remote.publish(corpus, bucket)


def test_half_a_corpus_is_none(bucket, tmp_path, gcs):  # noqa: F811
    corpus = make(tmp_path / "rows")
    gcs.refused = {"match": "/upload/", "methods": ("POST",), "status": 403, "after": 2}
    with pytest.raises(UserError, match="access is denied"):
        remote.publish(corpus, bucket)
    gcs.refused = None
    left = objects(bucket)
    assert len(left) == 2 and "train/metadata.json" not in left
    assert remote.fetch(bucket) is None
    remote.publish(corpus, bucket)
    copy = remote.fetch(bucket)
    storage.remove(bucket, ["validation/metadata.json"])
    assert remote.fetch(bucket) == copy and storage.names(copy) == ["train"]


def test_a_changed_corpus_replaces_the_copy(bucket, tmp_path):  # noqa: F811
    old, new = make(tmp_path / "old", shards=3), make(tmp_path / "new", first=500, shards=2)
    shard = "train/rows-00001.array_record"
    assert storage.files(old)[shard] == storage.files(new)[shard]  # the size alone does not tell
    remote.publish(old, bucket)
    copy = remote.fetch(bucket)
    assert content(copy) == content(old)
    remote.publish(new, bucket)
    assert objects(bucket) == sorted(storage.files(new))
    assert content(remote.fetch(bucket)) == content(new)


def test_preparing_in_the_place_of_the_remote(bucket, tmp_path, downloads):  # noqa: F811
    with remote.preparing(tmp_path / "here") as directory:
        assert directory == tmp_path / "here"
    with remote.preparing(bucket) as directory:
        corpus = content(make(directory))
    assert sorted(corpus) == objects(bucket)
    shutil.rmtree(directory)
    with remote.preparing(bucket) as directory:
        assert content(directory) == corpus
    with pytest.raises(ZeroDivisionError), remote.preparing(f"{bucket}/other") as directory:
        make(directory)
        raise ZeroDivisionError
    assert storage.names(f"{bucket}/other") == []


def test_the_copy_of_a_corpus_that_is_gone_is_removed(bucket, tmp_path):  # noqa: F811
    corpus = make(tmp_path / "rows")
    remote.publish(corpus, bucket)
    copy = remote.fetch(bucket)
    storage.remove_tree(bucket)
    assert remote.fetch(bucket) is None and not copy.exists()


def test_what_is_prepared_in_the_cache_stays_until_it_is_published(bucket):  # noqa: F811
    directory = remote.cache_dir(bucket)
    assert remote.fetch(bucket) is None
    make(directory)
    assert remote.fetch(bucket) is None and (directory / "train").is_dir()
    remote.publish(directory, bucket)
    assert remote.fetch(bucket) == directory
    storage.remove_tree(bucket)
    assert remote.fetch(bucket) is None and not directory.exists()


@pytest.mark.parametrize("damage", ["missing", "cut", "other bytes", "no metadata"])
def test_a_copy_that_was_cut_short_is_completed(bucket, tmp_path, downloads, damage):  # noqa: F811
    corpus = make(tmp_path / "rows")
    remote.publish(corpus, bucket)
    copy = remote.fetch(bucket)
    downloads.clear()
    shard = copy / "train" / "rows-00001.array_record"
    size = shard.stat().st_size
    if damage == "missing":
        shard.unlink()
    elif damage == "cut":
        os.truncate(shard, size // 2)
    else:
        (copy / "train" / "metadata.json").unlink()
    if damage == "other bytes":
        shard.write_bytes(bytes(size))
    (copy / "train" / f"{shard.name}.host-1-abc.tmp").write_bytes(b"left by a kill")
    assert content(remote.fetch(bucket)) == content(corpus)
    copied = {name for name in downloads if name.startswith("rows-")}
    assert copied == (set() if damage == "no metadata" else {shard.name})


def test_a_damaged_remote_is_refused(bucket, tmp_path):  # noqa: F811
    corpus = make(tmp_path / "rows")
    remote.publish(corpus, bucket)
    shard = storage.as_path(bucket) / "train" / "rows-00001.array_record"
    whole = shard.read_bytes()
    for damaged in (whole[:-10], bytes(len(whole))):
        shard.write_bytes(damaged)
        with pytest.raises(
            UserError, match=r"rows-00001.array_record is damaged: .* bytes, expected"
        ) as error:
            remote.fetch(bucket)
        assert "\n" not in str(error.value)
        assert not (remote.cache_dir(bucket) / "train" / "metadata.json").exists()
    shard.write_bytes(whole)
    assert content(remote.fetch(bucket)) == content(corpus)


def test_a_full_disk_is_named(bucket, tmp_path, monkeypatch):  # noqa: F811
    remote.publish(make(tmp_path / "rows"), bucket)
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        UserError, match=r"train needs .* kB, .* has 100 B free; .* directory in \$DISTILJAX_CACHE"
    ):
        remote.fetch(bucket)


def test_publishing_nothing(bucket, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match="holds no prepared corpus"):
        remote.publish(tmp_path, bucket)


def fetch_in_a_process(url, start, results):
    start.wait()
    seen = []
    copy = storage.download_file
    storage.download_file = lambda *names: (seen.append(names), copy(*names))
    remote.fetch(url)
    results.put((len(seen), Metadata.load(remote.cache_dir(url) / "train").num_rows))


def test_of_several_processes_one_copies(bucket, tmp_path):  # noqa: F811
    corpus = make(tmp_path / "rows")
    remote.publish(corpus, bucket)
    context = multiprocessing.get_context("spawn")
    start, results = context.Event(), context.Queue()
    processes = [context.Process(target=fetch_in_a_process, args=(bucket, start, results)) for _ in range(3)]
    for process in processes:
        process.start()
    start.set()
    seen = sorted(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    files = len(storage.files(corpus)) - 2  # metadata.json is read, not copied
    assert seen == [(0, 60), (0, 60), (files, 60)]
    assert content(remote.cache_dir(bucket)) == content(corpus)
