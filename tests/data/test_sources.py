from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distiljax.data import documents
from distiljax.data.metadata import Statistics
from distiljax.data.sources import splits
from distiljax.errors import UserError

TEXTS = ["First text.", "Second text, é 中.", "Third\ntext.\n\nSecond paragraph."]


def write_parquet(path, texts, field="text", **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": list(range(len(texts))), field: texts, **columns}), path)
    return str(path)


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def write_compressed(path, data):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    elif path.suffix == ".zst":
        with pa.output_stream(str(path), compression="zstd") as stream:
            stream.write(data)
    else:
        path.write_bytes(data)
    return str(path)


def refused(*args, **options):
    """The one line with which a source is refused."""
    with pytest.raises(UserError) as caught:
        list(documents(*args, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_text_and_jsonl_also_compressed(tmp_path, ending):
    text = write_compressed(
        tmp_path / f"a.txt{ending}", "\ufeffFirst text.\r\n\n \nSecond text, é 中.".encode()
    )
    assert list(documents(text)) == TEXTS[:2]
    records = "\n".join(json.dumps({"text": text}) for text in TEXTS).encode()
    assert list(documents(write_compressed(tmp_path / f"a.jsonl{ending}", records))) == TEXTS


def test_parquet_with_another_column_and_nulls(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [*TEXTS, None, "", " "], field="body")
    assert list(documents(path, text_field="body")) == TEXTS


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("document", TEXTS),
        ("line", [*TEXTS[:2], "Third", "text.", "Second paragraph."]),
        ("paragraph", [*TEXTS[:2], "Third\ntext.", "Second paragraph."]),
    ],
)
def test_units_of_records(tmp_path, unit, expected):
    assert list(documents(write_parquet(tmp_path / "a.parquet", TEXTS), unit=unit)) == expected


def test_paragraphs_of_a_text_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\nstill one\n\n\n \ntwo\n\nthree")
    assert list(documents(str(path), unit="paragraph")) == ["one\nstill one", "two", "three"]
    assert list(documents(str(path), unit="document")) == ["one", "still one", "two", "three"]


def test_globs_are_sorted_and_several_sources_follow_each_other(tmp_path):
    for name, text in [("b.txt", "b"), ("a.txt", "a"), ("c.jsonl", '{"text": "c"}')]:
        (tmp_path / name).write_text(text)
    assert list(documents(f"{tmp_path}/*.txt")) == ["a", "b"]
    assert list(documents((f"{tmp_path}/c.jsonl", f"{tmp_path}/*.txt"))) == ["c", "a", "b"]
    assert list(documents((f"{tmp_path}/c.jsonl", f"{tmp_path}/*.txt"), max_documents=2)) == ["c", "a"]


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        ("train.parquet", "validation.parquet"),
        ("data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"),
        ("train/0.parquet", "dev/0.parquet"),
        ("my_train_set.parquet", "train-data/val.parquet"),
    ],
)
def test_directories_in_the_hub_layout(tmp_path, train, validation):
    write_parquet(tmp_path / train, ["t0", "t1"])
    write_parquet(tmp_path / validation, ["v"])
    source = str(tmp_path)
    assert splits(source) == ("train", "validation")
    assert list(documents(source)) == ["t0", "t1"]
    # The validation split is used, whatever the holdout, and nothing is taken from train for it.
    assert list(documents(source, "validation", holdout=0.5)) == ["v"]
    assert list(documents(source, holdout=0.5)) == ["t0", "t1"]
    assert refused(source, "test") == f"{source} has no split 'test'; it has train, validation"


def test_train_may_be_another_split_and_shards_of_any_name_are_splits(tmp_path):
    write_parquet(tmp_path / "unsupervised-00000-of-00002.parquet", ["u0"])
    write_parquet(tmp_path / "unsupervised-00001-of-00002.parquet", ["u1"])
    write_parquet(tmp_path / "test.parquet", ["t"])
    assert splits(str(tmp_path)) == ("test", "unsupervised")
    assert list(documents(str(tmp_path), train_split="unsupervised")) == ["u0", "u1"]
    assert list(documents(str(tmp_path), "test")) == ["t"]
    assert "no split 'train'; it has test, unsupervised" in refused(str(tmp_path))


def test_a_directory_without_split_names_is_all_training_text(tmp_path):
    write_parquet(tmp_path / "b.parquet", ["b"])
    (tmp_path / "a.txt").write_text("a")
    assert splits(str(tmp_path)) == ()
    assert list(documents(str(tmp_path))) == ["a", "b"]


def test_the_hub_reader_streams_and_knows_splits(tmp_path, monkeypatch):
    """A local directory goes through the same `datasets` calls as a hub name."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_parquet(tmp_path / "set" / "train.parquet", TEXTS)
    write_parquet(tmp_path / "set" / "test.parquet", ["t"])
    source = f"hf:{tmp_path}/set"
    assert splits(source) == ("test", "train")
    assert list(documents(source)) == TEXTS
    assert list(documents(source, "test")) == ["t"]
    assert refused(source, text_field="body").endswith(
        "has no field 'body'; it has id, text: set data.text_field"
    )
    assert refused("hf:") == "data source hf: names no data set; expected hf:USER/NAME or hf:USER/NAME/CONFIG"
    assert "cannot be opened" in refused(f"hf:{tmp_path}/other")


def test_holdout_parts_the_documents_in_two_that_never_change_sides(tmp_path):
    path = tmp_path / "a.txt"
    texts = [f"document {number}" for number in range(2000)]
    path.write_text("\n".join(texts))
    train = list(documents(str(path), holdout=0.1))
    held_out = list(documents(str(path), "validation", holdout=0.1))
    assert sorted(train + held_out) == sorted(texts)
    assert 150 < len(held_out) < 250

    path.write_text("\n".join(texts[1000:] + ["more", "text"]))
    assert set(documents(str(path), "validation", holdout=0.1)) - {"more", "text"} == set(held_out) & set(
        texts[1000:]
    )


def test_paragraphs_of_one_record_are_held_out_together(tmp_path):
    texts = [f"{number} a\n\n{number} b\n\n{number} c" for number in range(200)]
    path = write_parquet(tmp_path / "a.parquet", texts)
    held_out = list(documents(path, "validation", holdout=0.2, unit="paragraph"))
    assert held_out and len(held_out) % 3 == 0
    assert [text[-1] for text in held_out] == ["a", "b", "c"] * (len(held_out) // 3)


def test_holdout_is_asked_for_where_there_is_no_validation_split(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("text")
    assert "has no validation split; set data.holdout" in refused(str(path), "validation")
    assert "has no validation split; set data.holdout" in refused("docstrings", "validation")
    assert "it has no splits: only train" in refused("docstrings", "test")


def test_docstrings_hold_out_whole_files(monkeypatch, tmp_path):
    from distiljax.data import docstrings
    from distiljax.data.document import Document

    corpus = [Document(f"text {n}", f"file {n // 10}") for n in range(1000)]
    monkeypatch.setattr(docstrings, "read", lambda: iter(corpus))
    groups = {document.text: document.group for document in corpus}
    train = {groups[text] for text in documents("docstrings", holdout=0.2)}
    held_out = {groups[text] for text in documents("docstrings", "validation", holdout=0.2)}
    assert train and held_out and not train & held_out
    assert len(train | held_out) == 100


def test_duplicates_are_dropped_and_counted(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a\nb\na\na\nc\n")
    statistics = Statistics()
    assert list(documents(str(path), statistics=statistics)) == ["a", "b", "c"]
    assert statistics == Statistics(documents_read=5, dropped_duplicate=2, documents=3)
    assert list(documents(str(path), deduplicate=False)) == ["a", "b", "a", "a", "c"]


def test_readers_hold_little(tmp_path):
    """The first document comes before the last line is looked at."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\n" * 10_000 + b"\xff\n")
    stream = documents(str(path), deduplicate=False)
    assert next(stream) == "fine"
    with pytest.raises(UserError, match="line 10001 is not UTF-8"):
        list(stream)


def test_bad_files_are_refused_with_file_and_line(tmp_path):
    bad = tmp_path / "latin.txt"
    bad.write_bytes(b"fine\ncaf\xe9\n")
    assert refused(str(bad)) == f"{bad} line 2 is not UTF-8 (byte 0xe9); convert the file to UTF-8"

    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": \n')
    assert refused(str(path)).startswith(f"{path} line 2 is not JSON: ")
    write_jsonl(path, [{"text": "fine"}, {"body": "x", "id": 1}])
    assert refused(str(path)) == f"{path} line 2 has no field 'text'; it has body, id: set data.text_field"
    write_jsonl(path, [["text"]])
    assert "line 1 is a JSON list, expected an object" in refused(str(path))
    write_jsonl(path, [{"text": 3}])
    assert refused(str(path)) == f"{path} line 1: the text is of type int, expected a string"


def test_bad_binary_files_are_refused(tmp_path):
    parquet = tmp_path / "a.parquet"
    parquet.write_bytes(b"not parquet at all")
    assert refused(str(parquet)).startswith(f"{parquet} cannot be read: ")
    write_parquet(parquet, ["x"], field="body")
    assert refused(str(parquet)) == f"{parquet} has no field 'text'; it has id, body: set data.text_field"
    write_parquet(parquet, [["a", "b"]])
    assert refused(str(parquet)) == f"{parquet} record 1: the text is of type list, expected a string"
    cut = tmp_path / "a.txt.gz"
    cut.write_bytes(gzip.compress(b"text\n" * 1000)[:-20])
    assert refused(str(cut)).startswith(f"{cut} cannot be read: ")
    cut = tmp_path / "a.txt.zst"
    cut.write_bytes(b"not zstd")
    assert refused(str(cut)).startswith(f"{cut} cannot be read: ")


def test_missing_sources_are_refused(tmp_path):
    assert f"data source {tmp_path}/*.txt matches no file" in refused(f"{tmp_path}/*.txt")
    assert f"data source {tmp_path}/none does not exist" in refused(f"{tmp_path}/none")
    assert f"directory {tmp_path} has no .txt, .jsonl, .parquet file" in refused(str(tmp_path))
    assert "cannot be opened" in refused("nosuchscheme://bucket/file.txt")
    (tmp_path / "a.csv").write_text("text\n")
    assert f"{tmp_path}/a.csv is not a text source; expected .txt, .jsonl, .parquet" in refused(
        f"{tmp_path}/a.csv"
    )
