from __future__ import annotations

import json
import logging
import math
import shutil
import struct
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from distiljax.errors import UserError
from distiljax.train import storage
from distiljax.train.metrics import MetricWriter, read_metrics
from tests.gcs import bucket, gcs, objects  # noqa: F401, fixtures


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir):
    """The events of all TensorBoard files, in the files' order (TFRecord: length, crc, content, crc)."""
    found = []
    for path in sorted((workdir / "tensorboard").glob("events.*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            found.append(Event.FromString(content[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return found


def test_one_flushed_line_a_record(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(10, "train", {"loss": np.float32(2.5), "tokens": 4096})
        assert lines(tmp_path) == [{"step": 10, "split": "train", "loss": 2.5, "tokens": 4096}]
        writer.write(10, "validation", {"loss": 2.25})
    assert read_metrics(tmp_path) == {
        "train": {"loss": [(10, 2.5)], "tokens": [(10, 4096.0)]},
        "validation": {"loss": [(10, 2.25)]},
    }


def test_tensorboard_has_the_values_under_split_and_name(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(10, "train", {"loss_ce": 2.5})
        writer.write(20, "validation", {"loss_ce": 1.5})
    scalars = [(e.step, v.tag, v.simple_value) for e in events(tmp_path) for v in e.summary.value]
    assert scalars == [(10, "train/loss_ce", 2.5), (20, "validation/loss_ce", 1.5)]


def test_resume_has_each_step_once(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in (10, 20, 30, 40):
            writer.write(step, "train", {"loss": float(step)})
        writer.write(20, "validation", {"loss": 0.5})
        writer.write(40, "validation", {"loss": 0.25})
    with MetricWriter(tmp_path, start_step=20) as writer:
        assert read_metrics(tmp_path) == {
            "train": {"loss": [(10, 10.0), (20, 20.0)]},
            "validation": {"loss": [(20, 0.5)]},
        }
        writer.write(30, "train", {"loss": -30.0})
    assert [record["step"] for record in lines(tmp_path)] == [10, 20, 20, 30]
    assert read_metrics(tmp_path)["train"]["loss"] == [(10, 10.0), (20, 20.0), (30, -30.0)]
    # TensorBoard drops the events of earlier files from the step of a START on.
    starts = [e.step for e in events(tmp_path) if e.session_log.status == 1]
    assert starts == [0, 21]
    assert not (tmp_path / "metrics.jsonl.tmp").exists()


def test_a_start_without_a_checkpoint_empties_the_log(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(0, "validation", {"loss": 10.0})
        writer.write(5, "train", {"loss": 9.0})
    with MetricWriter(tmp_path) as writer:
        writer.write(0, "validation", {"loss": 10.5})
    assert lines(tmp_path) == [{"step": 0, "split": "validation", "loss": 10.5}]


@pytest.mark.parametrize("cut", [1, 5, 20, 38])
def test_a_torn_last_line_is_dropped(tmp_path, cut):
    with MetricWriter(tmp_path) as writer:
        writer.write(10, "train", {"loss": 3.0})
        writer.write(20, "train", {"loss": 2.0})
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(whole[0] + whole[1][:cut])
    assert read_metrics(tmp_path) == {"train": {"loss": [(10, 3.0)]}}
    with MetricWriter(tmp_path, start_step=15) as writer:
        writer.write(20, "train", {"loss": 2.5})
    assert read_metrics(tmp_path) == {"train": {"loss": [(10, 3.0), (20, 2.5)]}}


def test_a_last_line_without_its_newline_is_whole(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 2.0}')
    with MetricWriter(tmp_path, start_step=1) as writer:
        writer.write(2, "train", {"loss": 1.0})
    assert read_metrics(tmp_path)["train"]["loss"] == [(1, 2.0), (2, 1.0)]


def test_a_foreign_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "split": "train"}\nhello\n{"step": 2, "split": "train"}\n'
    )
    with pytest.raises(UserError, match="line 2: 'hello'"):
        read_metrics(tmp_path)


def test_not_finite_is_null_in_strict_json_and_nan_when_read(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, "train", {"loss": math.nan, "grad_norm": math.inf, "ok": 1.0})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert record == {"step": 1, "split": "train", "loss": None, "grad_norm": None, "ok": 1.0}
    train = read_metrics(tmp_path)["train"]
    assert math.isnan(train["loss"][0][1]) and math.isnan(train["grad_norm"][0][1])


def test_the_later_record_of_a_step_counts(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(2, "validation", {"loss": 2.0})
        writer.write(1, "validation", {"loss": 3.0})
        writer.write(2, "validation", {"loss": 1.0})
    assert read_metrics(tmp_path) == {"validation": {"loss": [(1, 3.0), (2, 1.0)]}}


def test_wrong_names_raise(tmp_path):
    with MetricWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match="split 'test'"):
            writer.write(1, "test", {"loss": 1.0})
        with pytest.raises(ValueError, match="reserved"):
            writer.write(1, "train", {"step": 1.0})
    assert lines(tmp_path) == []


def test_no_log_reads_as_empty(tmp_path):
    assert read_metrics(tmp_path) == {}


def test_close_twice(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.write(1, "train", {"loss": 1.0})


def test_tensorflow_is_not_imported(tmp_path):
    code = (
        "import sys; from distiljax.train.metrics import MetricWriter; "
        f"MetricWriter({str(tmp_path)!r}).close(); assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_all_scalars_of_a_record_are_one_event(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(10, "train", {"loss": 2.5, "seconds": 0.5})
    (event,) = (e for e in events(tmp_path) if e.summary.value)
    assert [v.tag for v in event.summary.value] == ["train/loss", "train/seconds"]


# What a run does when its disk fills up and is emptied again; it tells on standard output what was logged when.
FULL_DISK = textwrap.dedent(
    """
    import json, logging, sys
    from pathlib import Path
    from distiljax.train.metrics import MetricWriter

    logging.basicConfig(format="%(message)s")
    workdir = Path(sys.argv[1])
    {fill}
    with MetricWriter(workdir) as writer:
        for step in range(1, 201):
            writer.write(step, "train", {{"loss": step / 3, "grad_norm": step / 7}})
            if step == 100:
                print(json.dumps((workdir / "metrics.jsonl").read_text()))
                {empty}
    """
)
LIMIT = (
    "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.RLIM_INFINITY))",
    "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))",
)
BALLAST = (  # leaves 12 kB of 64
    "(workdir / 'ballast').write_bytes(bytes(52 * 1024))",
    "(workdir / 'ballast').unlink()",
)
# A small disk for one process and its children; it ends with them, so its files are copied out.
SMALL_DISK = (
    'mount -t tmpfs -o size=64k none "$1" && { (shift 2; "$@"); status=$?; cp -r "$1/." "$2"; exit $status; }'
)


def run_out_of_space(workdir, fill, empty, *prefix):
    """The log's text when the disk is full, and what was said on standard error."""
    code = FULL_DISK.format(fill=fill, empty=empty)
    command = [*prefix, sys.executable, "-c", code, str(workdir)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def check_full_disk(workdir, full, said, reason):
    # At the time there were whole lines only, and fewer than were logged.
    assert full.endswith("\n") and 0 < len(full.splitlines()) < 100
    assert [json.loads(line)["step"] for line in full.splitlines()] == [*range(1, full.count("\n") + 1)]
    # In the end there is all of it, once.
    assert [record["step"] for record in lines(workdir)] == [*range(1, 201)]
    scalars = [(e.step, len(e.summary.value)) for e in events(workdir) if e.summary.value]
    assert scalars == [(step, 2) for step in range(1, 201)]
    # One warning for each file when it is full, and one when it is not.
    messages = said.splitlines()
    assert sum(f"cannot be written ({reason}); the run goes on" in message for message in messages) == 2
    assert sum("is written again" in message for message in messages) == 2 and len(messages) == 4


def test_a_file_that_may_not_grow_does_not_end_a_run(tmp_path):
    full, said = run_out_of_space(tmp_path, *LIMIT)
    check_full_disk(tmp_path, full, said, "File too large")


def test_a_full_disk_does_not_end_a_run(tmp_path):
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    copy.mkdir()
    own = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*own, f"mount -t tmpfs none {disk}"], check=False).returncode
    ):
        pytest.skip("no right to mount a tmpfs, not even in a name space of one's own")
    full, said = run_out_of_space(disk, *BALLAST, *own, SMALL_DISK, "sh", str(disk), str(copy))
    check_full_disk(copy, full, said, "No space left on device")


def test_records_that_never_got_room_are_counted(tmp_path):
    full, said = run_out_of_space(tmp_path, LIMIT[0], "pass")
    kept = len(full.splitlines())
    assert [record["step"] for record in lines(tmp_path)] == [*range(1, kept + 1)]
    assert f"metrics.jsonl: the last {200 - kept} records could not be written and are lost" in said
    assert len(said.splitlines()) == 4


def test_an_unreachable_directory_does_not_end_a_run(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file in the way")
    with MetricWriter(tmp_path) as writer:
        writer.write(1, "train", {"loss": 1.0})
        assert "cannot be written" in caplog.text and "tensorboard" in caplog.text
        (tmp_path / "tensorboard").unlink()
        writer.write(2, "train", {"loss": 2.0})
    assert [record["step"] for record in lines(tmp_path)] == [1, 2]
    assert [e.step for e in events(tmp_path) if e.summary.value] == [1, 2]


def test_a_log_on_a_full_disk_can_be_gone_on_with(tmp_path):
    """Dropping the records of steps that are run again needs no room."""
    with MetricWriter(tmp_path) as writer:
        for step in range(1, 11):
            writer.write(step, "train", {"loss": float(step)})
    code = (
        "import resource, sys; from distiljax.train.metrics import MetricWriter; import tensorboardX.summary; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); MetricWriter(sys.argv[1], 5).close()"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True)
    assert [record["step"] for record in lines(tmp_path)] == [1, 2, 3, 4, 5]
    assert not (tmp_path / "metrics.jsonl.tmp").exists()


def test_a_remote_log_is_kept_up_to_date_and_gone_on_with(bucket, monkeypatch):  # noqa: F811
    monkeypatch.setattr(storage.Mirror.__init__, "__defaults__", (0.05,))
    path = storage.as_path(bucket) / "metrics.jsonl"
    with MetricWriter(bucket) as writer:
        for step in (10, 20, 30):
            writer.write(step, "train", {"loss": float(step)})
        deadline = time.monotonic() + 20
        while not path.exists() or path.read_text().count("\n") < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert read_metrics(bucket) == {"train": {"loss": [(10, 10.0), (20, 20.0), (30, 30.0)]}}
    with MetricWriter(bucket, start_step=20) as writer:
        scratch = writer._directory
        writer.write(30, "train", {"loss": -30.0})
    assert not scratch.exists()
    assert read_metrics(bucket) == {"train": {"loss": [(10, 10.0), (20, 20.0), (30, -30.0)]}}
    tensorboard = [name for name in objects(bucket) if name.startswith("tensorboard/events.out.tfevents.")]
    assert len(tensorboard) == 2
    with MetricWriter(bucket):
        pass
    assert read_metrics(bucket) == {}


def test_a_remote_that_is_away_does_not_end_a_run(bucket, gcs, monkeypatch, caplog):  # noqa: F811
    monkeypatch.setattr(storage.Mirror.__init__, "__defaults__", (0.05,))
    gcs.refused = {"match": "upload", "methods": ("POST",), "status": 403}
    with caplog.at_level(logging.WARNING, "distiljax"), MetricWriter(bucket) as writer:
        for step in (1, 2, 3):
            writer.write(step, "train", {"loss": 1.0})
            time.sleep(0.1)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("distiljax")]
    assert len(messages) == 2 and "access is denied" in messages[0]
    assert f"the log of {bucket} is left in {writer._directory}" in messages[1]
    assert len(lines(writer._directory)) == 3
    shutil.rmtree(writer._directory)
