from __future__ import annotations

import bz2
import functools
import gzip
import http.server
import json
import lzma
import os
import threading

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from distiljax.data.sources import ReadOptions, documents, open_source
from distiljax.errors import UserError

TEXTS = ["First text.", "Second text, é 中.", "Third\ntext.\n\nSecond paragraph."]


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def send_header(self, keyword, value):
        if not (keyword == "Content-Length" and self.path.startswith("/unknown/")):
            super().send_header(keyword, value)

    def translate_path(self, path):
        return super().translate_path(path.removeprefix("/unknown"))

    def log_message(self, format, *args):
        pass


def write_parquet(path, texts, field="text", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": list(range(len(texts))), field: texts}), path, **options)
    return str(path)


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def compressed(data, ending):
    if ending == ".zst":
        sink = pa.BufferOutputStream()
        with pa.output_stream(sink, compression="zstd") as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()
    return {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, "": bytes}[ending](data)


@pytest.mark.parametrize("ending", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_text_and_jsonl_also_compressed(tmp_path, texts, ending):
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(compressed("\ufeffFirst text.\r\n\n \nSecond text, é 中.".encode(), ending))
    assert texts(str(path)) == TEXTS[:2]
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(compressed("\n".join(json.dumps({"text": text}) for text in TEXTS).encode(), ending))
    assert texts(str(path)) == TEXTS


def test_parquet_with_another_column_and_nulls(tmp_path, texts):
    path = write_parquet(tmp_path / "a.parquet", [*TEXTS, None, "", " "], field="body")
    assert texts(path, field="body") == TEXTS
    assert texts(f"{path}?field=body") == TEXTS
    binary = write_parquet(tmp_path / "b.parquet", [text.encode() for text in TEXTS])
    assert texts(binary) == TEXTS


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("document", TEXTS),
        ("line", [*TEXTS[:2], "Third", "text.", "Second paragraph."]),
        ("paragraph", [*TEXTS[:2], "Third\ntext.", "Second paragraph."]),
        ("sentence", [*TEXTS[:2], "Third\ntext.", "Second paragraph."]),
    ],
)
def test_units_of_records(tmp_path, texts, unit, expected):
    assert texts(write_parquet(tmp_path / "a.parquet", TEXTS), unit=unit) == expected
    assert texts(write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS]), unit=unit) == expected


def test_units_of_a_text_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("One. Still one.\nstill one\n\n\n \ntwo\n\nthree")
    path = str(path)
    assert [*documents(path, unit="paragraph")] == [
        (text, text) for text in ("One. Still one.\nstill one", "two", "three")
    ]
    lines = ["One. Still one.", "still one", "two", "three"]
    assert [*documents(path)] == [*documents(path, unit="line")] == [(line, line) for line in lines]
    assert [*documents(path, unit="sentence")] == [
        ("One.", lines[0]),
        ("Still one.", lines[0]),
        *((line, line) for line in lines[1:]),
    ]


def test_globs_are_sorted(tmp_path, texts):
    for name, text in [("b.txt", "b"), ("a.txt", "a"), ("c.jsonl", '{"text": "c"}')]:
        (tmp_path / name).write_text(text)
    assert texts(f"{tmp_path}/*.txt") == ["a", "b"]
    assert texts(f"{tmp_path}/?.*") == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        ("train.parquet", "validation.parquet"),
        ("data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"),
        ("train/0.parquet", "dev/0.parquet"),
        ("my_train_set.parquet", "train-data/val.parquet"),
    ],
)
def test_directories_in_the_hub_layout(tmp_path, texts, refused, train, validation):
    write_parquet(tmp_path / train, ["t0", "t1"])
    write_parquet(tmp_path / validation, ["v"])
    source = str(tmp_path)
    assert open_source(source).splits() == ("train", "validation")
    assert texts(source, "train") == ["t0", "t1"]
    assert texts(f"{source}?split=validation") == ["v"]
    assert texts(source) == ["t0", "t1", "v"]
    assert refused(source, "test") == f"{source} has no split 'test'; it has train, validation"


def test_shards_of_any_name_are_splits(tmp_path, texts):
    write_parquet(tmp_path / "unsupervised-00000-of-00002.parquet", ["u0"])
    write_parquet(tmp_path / "unsupervised-00001-of-00002.parquet", ["u1"])
    write_parquet(tmp_path / "test.parquet", ["t"])
    assert open_source(str(tmp_path)).splits() == ("test", "unsupervised")
    assert texts(str(tmp_path), "unsupervised") == ["u0", "u1"]


def test_a_directory_without_split_names_is_not_divided(tmp_path, texts, refused):
    write_parquet(tmp_path / "b.parquet", ["b"])
    write_parquet(tmp_path / ".cache" / "hidden.parquet", ["hidden"])
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "README.md").write_text("about")
    assert open_source(str(tmp_path)).splits() == ()
    assert texts(str(tmp_path)) == ["a", "b"]
    assert refused(str(tmp_path), "test") == (
        f"{tmp_path} has no split 'test'; it is not divided into splits"
    )


def test_pieces_of_many_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x\n" * 500)
    (tmp_path / "b.txt").write_bytes(b"x\n" * 2)
    (tmp_path / "c.jsonl.gz").write_bytes(os.urandom(2000))
    write_parquet(tmp_path / "d.parquet", ["x"])
    write_parquet(tmp_path / "e.parquet", [str(n) * 10 for n in range(100_000)], row_group_size=5000)
    source = open_source(str(tmp_path))
    pieces = source.pieces(None, 300)
    names = [os.path.basename(piece.name) for piece in pieces]
    assert names == sorted(names)
    assert {name: names.count(name) for name in names} == {
        "a.txt": 4,  # 1000 bytes
        "b.txt": 1,
        "c.jsonl.gz": 8,  # 3 times 2000 bytes are 20, but each part unpacks all of it
        "d.parquet": 8,
        "e.parquet": 8,
    }
    assert [(piece.part, piece.parts, piece.size) for piece in pieces[:4]] == [(n, 4, 250) for n in range(4)]
    assert source.size(None) == 1004 + 6000 + 3 * sum(
        (tmp_path / name).stat().st_size for name in ("d.parquet", "e.parquet")
    )


@pytest.mark.parametrize(
    ("size", "name", "parts"),
    [
        (100, "a.jsonl.zst", 8),
        (100 << 30, "a.txt.gz", 32),
        (100 << 30, "a.jsonl.bz2", 8),
        (100 << 30, "a.jsonl.xz", 16),
        (100 << 30, "a.jsonl.zst", 64),
        (1 << 30, "a.jsonl.zst", 12),  # 3 GB of text
        (1 << 30, "a.parquet", 12),
    ],
)
def test_parts_grow_with_the_file_as_far_as_unpacking_is_worth_it(tmp_path, size, name, parts):
    path = tmp_path / name
    with open(path, "wb") as file:
        file.truncate(size)  # takes no space
    pieces = open_source(str(path)).pieces(None, 20)
    assert [(piece.part, piece.parts) for piece in pieces] == [(part, parts) for part in range(parts)]


@pytest.mark.parametrize(
    ("spelling", "names"),
    [
        ("", ["a[1].txt", "sub/b.txt"]),
        ("/", ["a[1].txt", "sub/b.txt"]),
        ("/./", ["a[1].txt", "sub/b.txt"]),
        ("//sub", ["b.txt"]),
        ("/sub/b.txt", ["b.txt"]),
        ("/a[1].txt", ["a[1].txt"]),
        ("/**/*.txt", ["a[1].txt", "sub/b.txt"]),
        ("/s?b/*.txt", ["sub/b.txt"]),
        ("/sub/../sub/[a-c].txt", ["b.txt"]),
    ],
)
@pytest.mark.parametrize("protocol", ["", "file://"])
def test_names_of_pieces_are_the_same_wherever_the_files_are(
    tmp_path, monkeypatch, protocol, spelling, names
):
    found = []
    for root in (tmp_path / "here", tmp_path / "over" / "there.txt"):
        (root / "sub").mkdir(parents=True)
        (root / "a[1].txt").write_text("a")
        (root / "sub" / "b.txt").write_text("b")
        source = open_source(f"{protocol}{root}{spelling}")
        pieces = source.pieces(None, 100)
        texts = [
            document.text
            for piece in pieces
            for document in source.read(None, piece, ReadOptions(), pytest.fail)
        ]
        assert texts == [os.path.basename(name)[0] for name in names]
        found.append(pieces)
        if not protocol:
            monkeypatch.chdir(root.parent)
            assert open_source(f"{root.name}{spelling}").pieces(None, 100) == pieces
    assert [piece.name for piece in found[0]] == names
    # A directory that is called like a file is in the names.
    assert [piece.name.removeprefix("there.txt/") for piece in found[1]] == names


def test_other_file_systems(texts, refused):
    files = fsspec.filesystem("memory")
    files.pipe("/bucket/train/a.txt", b"a\nb\n" * 100)
    files.pipe("/bucket/train/b.txt.gz", gzip.compress(b"c\n"))
    files.pipe("/bucket/test/c.jsonl", b'{"text": 1}')
    assert open_source("memory://bucket").splits() == ("test", "train")
    assert texts("memory://bucket", "train") == ["a", "b"] * 100 + ["c"]
    source = open_source("memory://bucket/train/*.txt")
    pieces = source.pieces(None, 90)
    assert len(pieces) == 5
    assert sum(len([*source.read(None, piece, ReadOptions(), pytest.fail)]) for piece in pieces) == 200
    assert refused("memory://bucket", "test").startswith(
        "memory:///bucket/test/c.jsonl line 1: the text is of type"
    )


class UnsizedFiles(MemoryFileSystem):
    """Files of which nobody knows the size before they are read, as of some web servers."""

    protocol = "unsized"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("unsized:/"))

    def info(self, path, **options):
        return super().info(path, **options) | {"size": None}


def test_files_of_unknown_size_are_a_unit_each():
    fsspec.register_implementation("unsized", UnsizedFiles, clobber=True)
    fsspec.filesystem("memory").pipe("/bucket/a.txt", b"text\n")
    source = open_source("unsized://bucket/a.txt")
    assert source.size(None) == 0
    [piece] = source.pieces(None, 1000)
    assert piece.size == 1000
    assert [document.text for document in source.read(None, piece, ReadOptions(), pytest.fail)] == ["text"]


def test_files_of_a_web_server(tmp_path, texts):
    """One that gives whole files only: they are not cut."""
    pytest.importorskip("aiohttp")  # what fsspec reads http with, an extra
    for name, data in (("a.jsonl", b'{"text": "x"}\n' * 500), ("b.txt.gz", gzip.compress(b"y\n" * 500))):
        (tmp_path / name).write_bytes(data)
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            assert texts(f"{address}/a.jsonl?download=true") == ["x"] * 500
            assert texts(f"{address}/b.txt.gz") == ["y"] * 500
            assert len(open_source(f"{address}/a.jsonl").pieces(None, 100)) == 1
            [piece] = open_source(f"{address}/unknown/a.jsonl").pieces(None, 100)
            assert piece.size == 100
        finally:
            server.shutdown()


def test_readers_hold_little(tmp_path):
    """The first document comes before the last line is looked at."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\n" * 10_000 + b"\xff\n")
    stream = documents(str(path))
    assert next(stream).text == "fine"
    with pytest.raises(UserError, match="line 10001 is not UTF-8"):
        list(stream)


def test_a_pipe_is_refused_rather_than_waited_for(tmp_path, refused):
    os.mkfifo(tmp_path / "pipe.txt")
    assert "pipe.txt is no regular file" in refused(f"{tmp_path}/pipe.txt")


def test_missing_sources_are_refused(tmp_path, refused):
    assert f"data source {tmp_path}/*.txt matches no file" in refused(f"{tmp_path}/*.txt")
    assert f"data source {tmp_path}/none does not exist" in refused(f"{tmp_path}/none")
    assert f"directory {tmp_path} has no .txt, .jsonl, .parquet file" in refused(str(tmp_path))
    assert "cannot be opened" in refused("nosuchscheme://bucket/file.txt")
    (tmp_path / "a.csv").write_text("text\n")
    assert f"{tmp_path}/a.csv is not a text source; expected .txt, .jsonl, .parquet" in refused(
        f"{tmp_path}/a.csv"
    )
    path = tmp_path / "gone.txt"
    path.write_text("text")
    source = open_source(str(path))
    pieces = source.pieces(None, 100)
    path.unlink()
    with pytest.raises(UserError, match="gone.txt cannot be read"):
        list(source.read(None, pieces[0], ReadOptions(), lambda message: None))
