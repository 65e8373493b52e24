"""Several processes as one run: how they find one another, what they tell each other, and how they end together.

Arrays cross between processes in compiled programs only (`train/parallel.py`). What is said here are short texts, over
the key-value store of JAX's coordination service, which process 0 holds.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax

from distiljax.errors import Failed, Stopped, UserError
from distiljax.train import storage
from distiljax.train.signals import stop_signals

log = logging.getLogger(__name__)

T = TypeVar("T")

LOST_AFTER = 60.0
"""Seconds of silence after which a process counts as lost."""
JOIN_WITHIN = 300.0
"""Seconds that the processes of a run have to find one another."""

TOKEN = ".processes"
_PREFIX = "distiljax"
_PAUSE = 0.1  # seconds between two looks at what others do
_PULSE = 1.0  # seconds between two heartbeats, at most
_SLICE = 1.0  # seconds that a wait for another process goes on before it looks for signals
_GRACE = 3.0  # seconds that a process has to end by itself once another one has


@dataclasses.dataclass
class _Session:
    """This process among the others."""

    index: int
    count: int
    lost_after: float
    coordinator: str
    names: dict[int, str] = dataclasses.field(default_factory=dict)
    ended: threading.Event = dataclasses.field(default_factory=threading.Event)
    abort_handler: Any = None  # C must not lose it


_session: _Session | None = None


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    lost_after: float = LOST_AFTER,
    join_within: float = JOIN_WITHIN,
) -> None:
    """Join the other processes of the run; to be called before any device is touched.

    Without arguments JAX finds the others on Cloud TPU, Slurm, Kubernetes and Open MPI; on a machine that is none of
    these, and with `num_processes=1`, the process is alone.

    Args:
      coordinator_address: HOST:PORT of process 0.
      num_processes: how many there are.
      process_id: this one's number, from 0.
      lost_after: seconds of silence after which a process counts as lost and the others end, with status 1.
      join_within: seconds that all have to get here; after that this process ends, with status 1.

    Raises:
      UserError: arguments that do not fit together, or a cluster that JAX cannot make out.
      Failed: the others cannot be reached.
    """
    _check(coordinator_address, num_processes, process_id, lost_after, join_within)
    if num_processes == 1 or (coordinator_address is None and _alone()):
        return
    arguments: dict[str, Any] = {}
    if coordinator_address is not None:
        arguments = {
            "coordinator_address": coordinator_address,
            "num_processes": num_processes,
            "process_id": process_id,
            "cluster_detection_method": "deactivate",
        }
    # JAX's preemption service knows no other notice than SIGTERM, and takes the signal away from Python; the loop
    # agrees on a step by itself (`train/loop.py`).
    with contextlib.suppress(AttributeError):
        jax.config.update("jax_enable_preemption_service", False)
    alarm = threading.Timer(join_within, _not_joined, (coordinator_address, join_within))
    alarm.daemon = True
    alarm.start()
    try:
        # JAX, too, ends processes when one is silent, with less to say; it gets the last word only.
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=int(join_within) + 30,
            heartbeat_timeout_seconds=int(max(100, 3 * lost_after)),
        )
    except ValueError as error:
        if "should be defined" in str(error):
            return  # no cluster
        raise UserError(f"the other processes were not found: {_line(error)}; {_ADVICE}") from error
    except Exception as error:  # what JAX asks a cluster for can fail in ways of the cluster's own
        if coordinator_address is None and "must be called before" in str(error):
            return  # a program that has been using JAX: it is alone, or has joined the others by itself
        where = f" at {coordinator_address}" if coordinator_address else ""
        raise Failed(f"the other processes{where} cannot be reached: {_line(error)}; {_ADVICE}") from error
    finally:
        alarm.cancel()
    if jax.process_count() > 1:
        _begin(lost_after)


_ADVICE = (
    "give --coordinator_address=HOST:PORT --num_processes=N --process_id=I, or --num_processes=1 to run alone"
)


def _not_joined(address: str | None, seconds: float) -> None:
    where = "" if address is None else f" (process 0 at {address})"
    line = f"the other processes{where} have not all come within {seconds:g} s; see what became of them, and start all"
    os.write(2, f"distiljax: failed: {line} again\n".encode())
    os._exit(1)  # JAX would end it by abort()


def _check(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    lost_after: float,
    join_within: float,
) -> None:
    for name, seconds in {"lost_after": lost_after, "join_within": join_within}.items():
        if not 1 <= seconds < 1e6:
            raise UserError(f"--{name}={seconds}; expected at least 1 second")
    if num_processes is not None and num_processes < 1:
        raise UserError(f"--num_processes={num_processes}; expected at least 1")
    if num_processes == 1:
        return
    given = (coordinator_address, num_processes, process_id)
    if given == (None, None, None):
        return
    if None in given:
        raise UserError(
            f"--coordinator_address={coordinator_address} --num_processes={num_processes} "
            f"--process_id={process_id}; give all three, or none where JAX finds the cluster"
        )
    assert coordinator_address is not None and num_processes is not None and process_id is not None
    host, _, port = coordinator_address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator_address={coordinator_address}; expected HOST:PORT of process 0")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process_id={process_id}; expected 0 to {num_processes - 1} (--num_processes)")


def _alone() -> bool:
    """Whether a scheduler started this process only: JAX would show it a single one of its GPUs."""
    return "1" in (os.environ.get("SLURM_NTASKS"), os.environ.get("OMPI_COMM_WORLD_SIZE"))


def _begin(lost_after: float) -> None:
    global _session
    from jax._src import distributed  # the address has no public name

    session = _Session(
        jax.process_index(),
        jax.process_count(),
        lost_after,
        distributed.global_state.coordinator_address or "",
    )
    _set(f"host/{session.index}", socket.gethostname())
    _client().wait_at_barrier(f"{_PREFIX}/started", 300_000)
    session.names = {int(i): f"process {i} ({host})" for i, host in _all("host").items()}
    if session.index:
        session.abort_handler = _explain_aborts(session)
    _session = session
    threading.Thread(target=_watch, args=(session,), name="watch", daemon=True).start()


def joined() -> bool:
    """Whether this process has joined others."""
    return _session is not None


def name() -> str:
    """This process for a person: `process 3 (host)`."""
    assert _session is not None
    return _session.names[_session.index]


def first() -> bool:
    """Whether this is process 0, the one that writes logs, reports and prepared text."""
    return jax.process_index() == 0


def from_first(work: Callable[[], T]) -> T:
    """What `work` returns in process 0, which alone does it; JSON. The others wait, however long it takes.

    Every process must call it, in the same order. If `work` raises anything but what is named here, process 0 ends, and
    the others with it.

    Raises:
      UserError, Failed: what `work` raised.
      Stopped: a signal came while this process waited.
    """
    if jax.process_count() == 1:
        return work()
    key = f"told/{next(_numbers)}"
    if first():
        try:
            result = work()
        except (UserError, Failed) as error:
            kind = "error" if isinstance(error, UserError) else "failed"
            _set(key, json.dumps({kind: str(error)}))
            raise
        _set(key, json.dumps({"result": result}))
        return result
    said = json.loads(_wait_for(key))
    if "error" in said:
        raise UserError(said["error"])
    if "failed" in said:
        raise Failed(said["failed"])
    return said["result"]


def leave_token(directory: Path) -> str:
    """Leave a word in a run directory, in process 0, by which the others see that it is theirs, too."""
    token = uuid.uuid4().hex
    if jax.process_count() > 1:
        storage.write_text(directory / TOKEN, token)
    return token


def check_token(directory: Path, token: str, seconds: float = 30.0) -> None:
    """Check that `directory` is the one in which process 0 has left the token, and remove it when all have seen it.

    Args:
      directory: the run directory, as this process sees it.
      token: of `leave_token`.
      seconds: that a network file system may take to show a new file.

    Raises:
      UserError: it is another directory.
    """
    if jax.process_count() == 1:
        return
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError), storage.errors(directory):
            if (directory / TOKEN).read_text() == token:
                break
        if time.monotonic() > deadline:
            raise UserError(
                f"workdir {directory} on {socket.gethostname()} is not the directory that process 0 sees under that "
                "name; give one that all hosts share, such as gs://BUCKET/RUN or a network file system"
            )
        time.sleep(0.2)
    wait_for_all()
    if first():
        with storage.errors(directory):
            (directory / TOKEN).unlink(missing_ok=True)


def wait_for_all() -> None:
    """Wait until every process is here, however long that takes; the loss of one ends the wait, and this process.

    Raises:
      Stopped: a signal came while this process waited.
    """
    if jax.process_count() == 1:
        return
    place = f"here/{next(_numbers)}"
    _set(f"{place}/{jax.process_index()}", "")
    with stop_signals("leaving") as received:
        while len(_all(place)) < jax.process_count():
            _heed(received)
            time.sleep(_PAUSE)


def end(status: int, line: str = "", *, together: bool = False) -> None:
    """End this process's part in the run; returns only if it was the only process, or all have come to their end.

    Args:
      status: the exit status.
      line: what there is to say, already printed here.
      together: whether the others come to the same end by themselves; if not, they are told, and end too.
    """
    session = _session
    if session is None:
        return
    if together:
        # The others may be at work still, and watch: this one goes on to show that it lives.
        wait_for_all()
        session.ended.set()
        jax.distributed.shutdown()
        return
    session.ended.set()
    _tell_end(session, status, line)
    _leave(status)


def _tell_end(session: _Session, status: int, line: str, *, silent: int = 0) -> None:
    """Say why this process ends; process 0, which takes the key-value store with it, stays until the others know.

    Those that are known to be silent, so many, it does not wait for.
    """
    with contextlib.suppress(Exception):
        _set(f"ended/{session.index}", json.dumps({"status": status, "line": line}))
        deadline = time.monotonic() + 2 * _GRACE + 2 * _PULSE
        while (
            session.index == 0 and len(_all("ended")) < session.count - silent and time.monotonic() < deadline
        ):
            time.sleep(_PAUSE)


def said_by_first(line: str) -> bool:
    """Whether process 0 ends for the same reason, and so prints the line; asked by another one before it does."""
    session = _session
    if session is None or session.index == 0:
        return False
    deadline = time.monotonic() + _GRACE
    while time.monotonic() < deadline:
        with contextlib.suppress(Exception):
            if (said := _all("ended").get("0")) is not None:
                return json.loads(said)["line"] == line
        time.sleep(0.1)
    return False


def may_be_a_loss(error: BaseException) -> bool:
    """Whether an error may be how the loss of another process shows."""
    return isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)


def await_verdict() -> None:
    """After an error that another process's loss may have caused: wait until the watch has found out.

    It does not return if that is what it was.
    """
    if _session is not None and not _session.ended.is_set():
        print("distiljax: waiting to see whether another process was lost", file=sys.stderr)
        time.sleep(_session.lost_after + 2 * _GRACE)


# The watch.


def _watch(session: _Session) -> None:
    """Says that this process lives, and ends it when another one does not."""
    pause = min(_PULSE, session.lost_after / 6)
    now = time.monotonic()
    heard = dict.fromkeys(range(session.count), now)
    beats: dict[int, str] = {}
    reached = now
    count = 0
    while not session.ended.wait(pause):
        count += 1
        try:
            _set(f"beat/{session.index}", str(count))
            seen = {int(i): beat for i, beat in _all("beat").items()}
            ended = _all("ended")
            reached = time.monotonic()
        except Exception as error:  # JAX has its own kinds for a store that cannot be reached
            log.debug("the key-value store cannot be reached: %s", error)
            if time.monotonic() - reached > session.lost_after:
                _give_up(session, 0, f"has not been reached for {session.lost_after:g} s", store_is_gone=True)
            continue
        for other, said in ended.items():
            # This one may be about to come to the same end.
            if int(other) != session.index and not session.ended.wait(_GRACE):
                facts = json.loads(said)
                line = facts["line"].removeprefix("distiljax: ")
                _give_up(session, int(other), f"has ended: {line}", facts["status"])
        for index in heard:
            if seen.get(index) != beats.get(index):
                heard[index] = reached
            elif index != session.index and reached - heard[index] > session.lost_after:
                _give_up(session, index, f"has not been heard of for {session.lost_after:g} s", silent=True)
        beats = seen


def _give_up(
    session: _Session,
    index: int,
    what: str,
    status: int = 1,
    *,
    silent: bool = False,
    store_is_gone: bool = False,
) -> None:
    if session.ended.is_set():
        return
    lost = session.names.get(index, f"process {index}")
    # os.write: the main thread may hold whatever lock there is on sys.stderr.
    line = f"distiljax: {lost} {what}; {session.names.get(session.index)} ends with it"
    advice = "" if status == 0 else "; start all processes again, and the same command goes on"
    os.write(2, f"{line}{advice}\n".encode())
    if not store_is_gone:
        _tell_end(session, status, f"{lost} {what}", silent=int(silent))
    os._exit(status)


def _explain_aborts(session: _Session) -> Any:
    """A C handler of SIGABRT that says which process was lost, where that is why.

    JAX's runtime ends a process by abort() in the moment that it loses the connection to process 0.
    """

    def handler(number: int) -> None:
        if _reachable(session.coordinator):
            libc.signal(signal.SIGABRT, None)  # something else; abort() goes on when this returns
            return
        _give_up(session, 0, "is gone, which coordinates the run", store_is_gone=True)

    libc = ctypes.CDLL(None)
    wrapped = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
    libc.signal(signal.SIGABRT, wrapped)
    return wrapped


def _reachable(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2):
            return True
    except (OSError, ValueError):
        return False


# The key-value store.


def _client() -> Any:
    from jax._src import distributed  # has no public name; Orbax takes it from here, too

    return distributed.global_state.client


def _set(key: str, value: str) -> None:
    _client().key_value_set(f"{_PREFIX}/{key}", value, allow_overwrite=True)


def _all(directory: str) -> dict[str, str]:
    entries = _client().key_value_dir_get(f"{_PREFIX}/{directory}/")
    return {key.rsplit("/", 1)[1]: value for key, value in entries}


_numbers = itertools.count()  # of what is told and waited for; every process counts alike


def _wait_for(key: str) -> str:
    with stop_signals("leaving") as received:
        while True:
            try:
                return _client().blocking_key_value_get(f"{_PREFIX}/{key}", int(1000 * _SLICE))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
            _heed(received)


def _heed(received: list[int]) -> None:
    if received:
        raise Stopped(received[0], "stopped before the first step; the same command starts again")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _leave(status: int) -> None:
    """End at once: neither JAX's exit hooks nor Orbax's may wait for processes that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
