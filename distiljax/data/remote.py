"""Prepared corpora in an object store: a local copy for each machine, as ArrayRecord reads local files only."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from distiljax.data.files import replacing
from distiljax.data.metadata import METADATA_FILE, Metadata
from distiljax.errors import UserError
from distiljax.train import storage
from distiljax.train.format import human_bytes

log = logging.getLogger(__name__)

CACHE_VARIABLE = "DISTILJAX_CACHE"


def cache_dir(url: str | os.PathLike[str]) -> Path:
    """Where the copy of a remote corpus is kept: under $DISTILJAX_CACHE, or ~/.cache/distiljax."""
    name = storage.absolute(url)
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(name.split("/")[-2:])).strip("-.")[:60]
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    root = os.environ.get(CACHE_VARIABLE) or os.path.join("~", ".cache", "distiljax")
    return Path(os.path.expanduser(root)).absolute() / "corpora" / f"{readable}-{digest}"


@contextlib.contextmanager
def preparing(place: str | os.PathLike[str]) -> Iterator[Path]:
    """The local directory in which a corpus is to be prepared that belongs at `place`.

    It is `place` itself, or, of a remote one, the copy of what is there already; it is published at the end.

    Raises:
      UserError: as `fetch` and `publish`.
    """
    if not storage.is_remote(place):
        yield Path(place)
        return
    fetch(place)
    directory = cache_dir(place)
    yield directory
    publish(directory, place)


def local(place: str | os.PathLike[str]) -> Path:
    """The local directory with the finished corpus at `place`: itself, or the copy of a remote one, fetched now.

    Raises:
      UserError: as `fetch`; or there is none.
    """
    if not storage.is_remote(place):
        return Path(place)
    if (directory := fetch(place)) is None:
        raise UserError(f"{storage.absolute(place)} holds no prepared corpus; prepare it first")
    return directory


def fetch(url: str | os.PathLike[str]) -> Path | None:
    """The local copy of a remote corpus, made or brought up to date now; None if no finished corpus is there.

    Several processes of a machine may call this at the same time: one copies, the others wait. A file counts as copied
    when its size and hash are those in the corpus's metadata; what is whole already is not copied again. The copy of
    what is no longer there is removed.

    Args:
      url: the directory that `publish` made, with a directory for each split in it.

    Raises:
      UserError: the remote cannot be read, what is there is damaged, or the local disk is full.
    """
    directory = cache_dir(url)
    found = {split: text for split in storage.names(url) if (text := _metadata(url, split)) is not None}
    with _alone(directory):
        if _mark(directory).exists():  # else what is here is being prepared, and not published yet
            gone = [
                path.parent for path in directory.glob(f"*/{METADATA_FILE}") if path.parent.name not in found
            ]
            for path in gone if found else [directory]:
                shutil.rmtree(path, ignore_errors=True)
        if not found:
            _mark(directory).unlink(missing_ok=True)
            return None
        _mark(directory).touch()
        for split, text in found.items():
            if not _is_copied(directory / split, text):
                _copy(f"{storage.absolute(url)}/{split}", directory / split, text)
    return directory


def publish(local: str | os.PathLike[str], url: str | os.PathLike[str]) -> None:
    """Copies a prepared corpus to an object store, in the place of another one that may be there.

    A reader never sees half of it: the splits' metadata is taken away first and written last. Nothing is done for
    splits that are there already.

    Raises:
      UserError: `local` holds no finished corpus, or the remote cannot be written to.
    """
    splits = [path.parent for path in sorted(Path(local).glob(f"*/{METADATA_FILE}"))]
    if not splits:
        raise UserError(f"{os.fspath(local)} holds no prepared corpus; prepare it first")
    changed = []
    for split in splits:
        Metadata.load(split)
        target = storage.as_path(url) / split.name
        there = _metadata(url, split.name)
        if there == (split / METADATA_FILE).read_text(encoding="utf-8"):
            continue
        changed.append(split)
        new = [name for name in storage.files(split) if name != METADATA_FILE]
        storage.remove(target, [METADATA_FILE] if there is not None else [])
        storage.remove(target, [name for name in storage.files(target) if name not in new])
        log.info("copying %d files of %s to %s", len(new), split, target)
        storage.upload(split, target, new)
    for split in changed:
        storage.upload(split, storage.as_path(url) / split.name, [METADATA_FILE])
    if Path(local) == cache_dir(url):
        _mark(cache_dir(url)).touch()


def _mark(directory: Path) -> Path:
    """The file that says that a directory of the cache is a copy of what is, or was, in the object store."""
    return directory.with_name(f"{directory.name}.copy")


def _metadata(url: str | os.PathLike[str], split: str) -> str | None:
    path = storage.as_path(url) / split / METADATA_FILE
    with storage.errors(path):
        try:
            return path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None


def _is_copied(directory: Path, text: str) -> bool:
    """Whether the copy is that of the corpus whose metadata is `text`, with every shard in its full size."""
    try:
        if (directory / METADATA_FILE).read_text(encoding="utf-8") != text:
            return False
        Metadata.load(directory)
    except (OSError, UserError):
        return False
    return True


def _copy(url: str, directory: Path, text: str) -> None:
    try:
        shards = {str(shard["name"]): shard for shard in json.loads(text)["shards"]}
        sizes = {name: int(shard["bytes"]) for name, shard in shards.items()}
        hashes = {name: str(shard["sha256"]) for name, shard in shards.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{url}/{METADATA_FILE} is damaged ({error}); publish the corpus again") from error
    others = {
        name: size for name, size in storage.files(url).items() if name != METADATA_FILE and name not in sizes
    }
    directory.mkdir(parents=True, exist_ok=True)
    # From here on this is no corpus until it is that of `text`.
    (directory / METADATA_FILE).unlink(missing_ok=True)
    for name in storage.files(directory):
        if name not in sizes and name not in others:  # of an older corpus, or of a copy that was cut short
            (directory / name).unlink()
    missing = [name for name in sizes if not _is_whole(directory / name, sizes[name], hashes[name])]
    need, free = sum(sizes[name] for name in missing), shutil.disk_usage(directory).free
    if need > free:
        raise UserError(
            f"{url} needs {human_bytes(need)}, {directory} has {human_bytes(free)} free; make room, or give another "
            f"directory in ${CACHE_VARIABLE}"
        )
    log.info(
        "copying %d files, %s, of %s to %s", len(missing) + len(others), human_bytes(need), url, directory
    )

    def get(name: str) -> None:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        with replacing(directory / name) as temporary:
            storage.download_file(f"{url}/{name}", temporary)
            if name in sizes and not _is_whole(Path(temporary), sizes[name], hashes[name]):
                raise UserError(
                    f"{url}/{name} is damaged: {os.path.getsize(temporary):,} bytes, expected {sizes[name]:,} with "
                    f"sha256 {hashes[name][:12]}…; publish the corpus again"
                )

    storage.in_parallel(get, [*missing, *others])
    with replacing(directory / METADATA_FILE) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


def _is_whole(path: Path, size: int, sha256: str) -> bool:
    try:
        if path.stat().st_size != size:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Keeps the other processes of this machine out of a copy."""
    lock = directory.with_name(f"{directory.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("a")
    except OSError as error:
        raise UserError(
            f"{lock.parent} cannot be written: {error.strerror}; give another directory in ${CACHE_VARIABLE}"
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
