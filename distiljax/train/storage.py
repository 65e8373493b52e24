"""Directories that are local or in an object store (gs://), by one name.

An object store has whole objects and no directories: nothing is renamed or appended to there, an object is there or
not. What needs a file that grows or a library that wants a local directory goes through a local copy.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import importlib.util
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from distiljax.errors import Failed, UserError

log = logging.getLogger(__name__)

# Scheme → the package that reads it, and the extra of this package that installs it. Orbax knows no other scheme.
SCHEMES = {"gs": ("gcsfs", "gcs")}
THREADS = 8  # copies at a time
MIRROR_SECONDS = 30.0

_COLLAPSED = re.compile(r"^([a-z][a-z0-9+.-]+):/(?!/)")  # what pathlib makes of scheme://
_DENIED = re.compile(
    r"forbidden|anonymous|credential|access denied|permission|unauthori[sz]ed|\b40[13]\b", re.I
)


def is_remote(name: str | os.PathLike[str]) -> bool:
    """Whether a name is one of an object store, such as gs://bucket/runs/a."""
    return "://" in _text(name)


def absolute(name: str | os.PathLike[str]) -> str:
    """The name that means the same from every working directory; a remote one as it is."""
    text = _text(name)
    return text.rstrip("/") if "://" in text else os.path.abspath(text)


def as_path(name: str | os.PathLike[str]) -> Path:
    """A path object: `/`, `exists`, `read_text`, … work on both kinds.

    Of a remote name it is an `etils.epath.Path`, which has pathlib's methods but is no local path: libraries that
    know object stores get `absolute(path)`, and `pathlib.Path(path)` must not be made of it.

    Raises:
      UserError: a scheme that is not known, or one whose package is not installed.
    """
    text = _text(name)
    if "://" not in text:
        return Path(text)
    scheme, _, rest = text.partition("://")
    if scheme not in SCHEMES:
        known = ", ".join(f"{known}://" for known in SCHEMES)
        raise UserError(f"{text}: unknown scheme {scheme}://; expected a local directory or one on {known}")
    if not rest.strip("/"):
        raise UserError(f"{text} names no bucket; expected {scheme}://BUCKET/DIRECTORY")
    package, extra = SCHEMES[scheme]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{text} needs {package}; install it with: pip install 'distiljax[{extra}]'")
    _configure(scheme, package)
    from etils import epath

    return cast(Path, epath.Path(text))


@contextlib.contextmanager
def errors(name: str | os.PathLike[str]) -> Iterator[None]:
    """Turns whatever an object store and its client raise into one line; errors of local paths and disks pass.

    Raises:
      UserError: the remote is not there or may not be used.
      Failed: it cannot be reached now.
    """
    try:
        yield
    except (UserError, Failed):
        raise
    except Exception as error:  # every client has kinds of its own, which share no base class
        if not is_remote(name) or _is_full(error):
            raise
        raise _explained(os.fspath(name), error) from error


def _explained(name: str, error: Exception) -> Exception:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    if isinstance(error, FileNotFoundError):
        return UserError(f"{name}: no such bucket or object ({line}); check the name")
    if isinstance(error, PermissionError) or _DENIED.search(f"{type(error).__module__} {line}"):
        return UserError(
            f"{name}: access is denied ({line}); check that the bucket is there, log in (gcloud auth "
            "application-default login), or give this machine's account access to the bucket"
        )
    return Failed(f"{name} cannot be reached ({line}); try the same command again")


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def room(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Turns a full local disk into one line.

    Raises:
      UserError: there is no room in `directory`.
    """
    try:
        yield
    except OSError as error:
        if not _is_full(error):
            raise
        raise UserError(f"{directory} cannot be written: {error.strerror}; make room on that disk") from error


def names(directory: str | os.PathLike[str]) -> list[str]:
    """The names of the entries of a directory, sorted; [] where there is none."""
    path = as_path(directory)
    with errors(directory):
        try:
            found = [entry.name for entry in path.iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        # An object store may hold an object for the directory itself.
        return sorted(name for name in found if name and not (is_remote(path) and name == path.name))


def files(directory: str | os.PathLike[str]) -> dict[str, int]:
    """The files under a directory: relative name → bytes; {} where there is none."""
    if not is_remote(directory):
        root = Path(directory)
        return {
            path.relative_to(root).as_posix(): path.stat().st_size
            for path in sorted(root.rglob("*"))
            if path.is_file()
        }
    with errors(directory):
        store, root_name = _store(directory)
        try:
            found = store.find(root_name, detail=True)
        except FileNotFoundError:
            return {}
    start = len(root_name.rstrip("/")) + 1
    return {
        name[start:]: facts["size"]
        for name, facts in sorted(found.items())
        if not name.endswith("/") and name[start:]
    }


def download(remote: str | os.PathLike[str], local: Path, wanted: Sequence[str]) -> None:
    """Copy files, by their names relative to `remote`, into a local directory.

    Raises:
      UserError: as `errors`.
      OSError: the local disk is full.
    """
    with errors(remote):
        store, root = _store(remote)

        def get(name: str) -> None:
            (local / name).parent.mkdir(parents=True, exist_ok=True)
            store.get_file(f"{root}/{name}", str(local / name))

        in_parallel(get, wanted)


def download_file(remote: str | os.PathLike[str], local: str | os.PathLike[str]) -> None:
    """Copy one file here.

    Raises:
      UserError: as `errors`.
      OSError: the local disk is full.
    """
    with errors(remote):
        store, name = _store(remote)
        store.get_file(name, os.fspath(local))


def upload(local: Path, remote: str | os.PathLike[str], wanted: Sequence[str]) -> None:
    """Copy local files to `remote`; what is there under their names is replaced.

    Raises:
      UserError: as `errors`.
    """
    with errors(remote):
        store, root = _store(remote)
        in_parallel(lambda name: store.put_file(str(local / name), f"{root}/{name}"), wanted)


def remove(directory: str | os.PathLike[str], unwanted: Sequence[str]) -> None:
    """Remove files, by their names relative to a remote directory."""
    with errors(directory):
        store, root = _store(directory)
        in_parallel(lambda name: store.rm_file(f"{root}/{name}"), unwanted)


def remove_tree(directory: str | os.PathLike[str]) -> None:
    """Remove a directory with all that is in it, if it is there."""
    if is_remote(directory):
        remove(directory, list(files(directory)))
    else:
        shutil.rmtree(directory, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file whole or not at all.

    Raises:
      UserError: it cannot be written.
    """
    if is_remote(path):
        with errors(path):
            as_path(path).write_text(text)
        return
    target = Path(path)
    temporary = target.with_name(f"{target.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{target} cannot be written: {error.strerror}; mend that and try again") from error


@contextlib.contextmanager
def writing(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A local directory to write to: `directory` itself, or one that is copied to the remote `directory` at the end.

    Nothing is copied if the body raises.
    """
    if not is_remote(directory):
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    as_path(directory)  # refuses what cannot be written to before anything is made
    with _temporary(directory) as temporary:
        yield temporary
        upload(temporary, directory, list(files(temporary)))


@contextlib.contextmanager
def local_copy(directory: str | os.PathLike[str], patterns: Sequence[str] = ("*",)) -> Iterator[Path]:
    """A local directory to read: `directory` itself, or a temporary copy of the remote one.

    Args:
      directory: local or remote.
      patterns: which files of a remote directory are copied, by name; those in directories below are not.

    Raises:
      UserError: as `errors`; one that the body raises has the remote name in place of the copy's.
    """
    if not is_remote(directory):
        yield Path(directory)
        return
    as_path(directory)
    with _temporary(directory) as temporary:
        found = [name for name in files(directory) if "/" not in name]
        wanted = [name for name in found if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
        download(directory, temporary, wanted)
        yield temporary


@contextlib.contextmanager
def _temporary(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary directory that errors call by the name of the remote one that it stands for."""
    with room(tempfile.gettempdir()), tempfile.TemporaryDirectory(prefix="distiljax-") as temporary:
        try:
            yield Path(temporary)
        except UserError as error:
            raise UserError(str(error).replace(temporary, absolute(directory))) from error


class Mirror:
    """Copies a local directory of small files that grow to a remote one, every now and then and at the end.

    It does so in a thread and never raises: a remote that is away is warned about once, and tried again.

    Args:
      local: the directory.
      remote: where to.
      seconds: how often.
    """

    def __init__(self, local: Path, remote: str | os.PathLike[str], seconds: float = MIRROR_SECONDS) -> None:
        self._local, self._remote, self._seconds = local, as_path(remote), seconds
        self._copied: dict[str, int] = {}
        self._failing = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closing.wait(self._seconds):
            self._copy()

    def _copy(self) -> None:
        try:
            for name, size in files(self._local).items():
                if self._copied.get(name) != size:
                    # Read at once: what is appended meanwhile must not end up in half.
                    data = (self._local / name).read_bytes()
                    (self._remote / name).write_bytes(data)
                    self._copied[name] = len(data)
        except Exception as error:  # as in `errors`; a log must never end a run
            if not self._failing:
                reason = _explained(os.fspath(self._remote), error)
                log.warning(
                    "the log cannot be copied: %s; the run goes on, and copying is tried again", reason
                )
            self._failing = True
        else:
            if self._failing:
                log.warning("the log is copied to %s again", self._remote)
            self._failing = False

    def close(self) -> bool:
        """Copy for the last time; whether everything is there now."""
        self._closing.set()
        self._thread.join()
        self._copy()
        return not self._failing


def in_parallel(do: Callable[[str], Any], what: Sequence[str]) -> None:
    """`do` each, a few at a time; the first error ends it."""
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for _ in pool.map(do, what):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _text(name: str | os.PathLike[str]) -> str:
    text = os.path.expanduser(os.fspath(name))
    match = _COLLAPSED.match(text)
    return f"{match[1]}://{text[match.end() :]}" if match else text


def _store(name: str | os.PathLike[str]) -> tuple[Any, str]:
    """The file system of a remote name, and the name without its scheme."""
    import fsspec

    as_path(name)
    store, path = fsspec.url_to_fs(absolute(name))
    return store, str(path)


def _configure(scheme: str, package: str) -> None:
    import fsspec

    # Other processes write there too: what was listed a minute ago says nothing about now.
    settings: Mapping[str, Any] = {"use_listings_cache": False, **fsspec.config.conf.get(scheme, {})}
    fsspec.config.conf[scheme] = dict(settings)
    # Whatever they log with a traceback they also raise, and it is reported in one line.
    client = logging.getLogger(package)
    if client.level == logging.NOTSET:
        client.setLevel(logging.CRITICAL)
