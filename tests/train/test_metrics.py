from __future__ import annotations

import json
import math
import struct
import subprocess
import sys

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from distiljax.errors import UserError
from distiljax.train.metrics import MetricWriter, read_metrics


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
