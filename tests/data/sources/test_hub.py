"""A local directory goes through the same calls of `datasets` as a name on the hub."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distiljax.data.sources import ReadOptions, open_source

TEXTS = ["First text.", "Second text, é 中.", "Third\ntext.\n\nSecond paragraph."]


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def directory(tmp_path):
    """Three shards of train, and test."""
    root = tmp_path / "set"
    root.mkdir()
    for shard in range(3):
        table = pa.table({"id": list(range(100)), "text": [f"{shard} {n}" for n in range(100)]})
        pq.write_table(table, root / f"train-{shard:05d}-of-00003.parquet", row_group_size=10)
    pq.write_table(pa.table({"id": [0, 1, 2], "text": TEXTS}), root / "test-00000-of-00001.parquet")
    return root


@pytest.mark.parametrize("suffix", ["", "?streaming=1"])
def test_splits_and_documents(directory, texts, refused, capfd, suffix):
    source = f"hf:{directory}{suffix}"
    assert open_source(source).splits() == ("test", "train")
    assert open_source(source).expensive == bool(suffix)
    assert texts(source, "test") == TEXTS
    assert texts(source, "test", unit="paragraph") == [*TEXTS[:2], "Third\ntext.", "Second paragraph."]
    assert texts(source, "train") == [f"{shard} {n}" for shard in range(3) for n in range(100)]
    assert refused(source, "dev") == f"hf:{directory} has no split 'dev'; it has test, train"
    assert refused(source, "test", field="body") == (
        f"hf:{directory} has no field 'body'; it has id, text: set data.text_field or ?field="
    )
    assert refused(source, "test", field="id").endswith(
        "record 1: the text is of type int, expected a string"
    )
    assert capfd.readouterr().err == ""


def test_pieces_on_disk_are_rows(directory):
    source = open_source(f"hf:{directory}")
    size = source.size("train")
    assert 300 * 3 < size < 300 * 20
    pieces = source.pieces("train", size // 7 + 1)
    assert [(piece.part, piece.parts) for piece in pieces] == [(part, 7) for part in range(7)]
    found = [[*source.read("train", piece, ReadOptions(), pytest.fail)] for piece in pieces]
    assert {len(part) for part in found} == {42, 43}
    assert [document.text for part in found for document in part] == [
        f"{shard} {n}" for shard in range(3) for n in range(100)
    ]


def test_pieces_of_a_stream_are_its_shards(directory):
    source = open_source(f"hf:{directory}?streaming=1")
    pieces = source.pieces("train", 1 << 30)
    assert [(piece.part, piece.parts) for piece in pieces] == [(part, 3) for part in range(3)]
    for shard, piece in enumerate(pieces):
        read = [document.text for document in source.read("train", piece, ReadOptions(), pytest.fail)]
        assert read == [f"{shard} {n}" for n in range(100)]


def test_shards_of_unknown_size_are_a_unit_each(directory):
    source = open_source(f"hf:{directory}?streaming=1")
    assert source.size("train") == 0
    assert [piece.size for piece in source.pieces("train", 1000)] == [1000] * 3


def test_the_size_is_the_text_s_whatever_the_column_is_called(tmp_path):
    sizes = []
    for field in ("text", "body"):
        root = tmp_path / field
        root.mkdir()
        table = pa.table({"id": list(range(100)), "name": ["x"] * 100, field: ["y" * 50] * 100})
        pq.write_table(table, root / "train.parquet")
        sizes.append(open_source(f"hf:{root}").size("train"))
    assert sizes[0] == sizes[1] and 5000 <= sizes[0] < 6000


def test_jsonl_in_the_hub_layout(tmp_path, texts):
    root = tmp_path / "lines"
    root.mkdir()
    for split in ("train", "validation"):
        (root / f"{split}.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    assert texts(f"hf:{root}?field=body&split=validation") == TEXTS
    assert texts(f"hf:{root}?field=body&split=validation&streaming=1") == TEXTS


def test_a_record_that_is_not_utf8_is_the_only_one_that_is_lost(tmp_path):
    root = tmp_path / "latin"
    root.mkdir()
    values = pa.array([*(f"text {n}".encode() for n in range(70)), b"caf\xe9", b"end"], pa.binary())
    column = pa.Array.from_buffers(pa.string(), len(values), values.buffers())
    pq.write_table(pa.table({"text": column}), root / "train.parquet")
    source = open_source(f"hf:{root}")
    said = []
    read = [
        document.text
        for piece in source.pieces("train", 1 << 20)
        for document in source.read("train", piece, ReadOptions(), said.append)
    ]
    assert len(read) == 71 and read[-1] == "end"
    assert said == [f"hf:{root} record 71 is not UTF-8 (byte 0xe9); convert the text to UTF-8"]


def test_what_is_not_there_is_refused(tmp_path, refused):
    assert refused("hf:") == "data source hf: names no data set; expected hf:USER/NAME or hf:USER/NAME/CONFIG"
    assert "cannot be opened" in refused(f"hf:{tmp_path}/other")
    assert "cannot be opened" in refused("hf:nobody/nothing")
