"""Records that cannot be used: one line that says which, and what is read if they are skipped."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distiljax.data.sources import Piece, ReadOptions, documents, open_source
from distiljax.errors import UserError


def refuse(message, repeated=False):
    raise UserError(message)


def skipping(path, **options):
    """The texts that are read, and what is said about the rest."""
    said = []
    read = [document.text for document in documents(str(path), bad=said.append, **options)]
    assert not any("\n" in line for line in said)
    return read, said


def test_lines_that_are_not_utf8(tmp_path, refused):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"fine\ncaf\xe9\n\nfine too\n")
    said = f"{path} line 2 is not UTF-8 (byte 0xe9); convert the file to UTF-8"
    assert refused(str(path)) == said
    assert skipping(path) == (["fine", "fine too"], [said])
    assert skipping(path, unit="paragraph") == (["fine too"], [said])


def test_jsonl(tmp_path, refused):
    path = tmp_path / "a.jsonl"
    lines = [
        ('{"text": "fine"}', None),
        ('{"text": ', f"{path} line 2 is not JSON: "),
        (
            '{"body": "x", "id\\n": 1}',
            f"{path} line 3 has no field 'text'; it has body, id: set data.text_field or ?field=",
        ),
        ('{"\\ud800": "x"}', f"{path} line 4 has no field 'text'; it has \\ud800: set"),
        ('["text"]', f"{path} line 5 is a JSON list, expected an object with the key 'text'"),
        ('{"text": 3}', f"{path} line 6: the text is of type int, expected a string"),
        ("[" * 100_000, f"{path} line 7 is not JSON: "),
        (
            '{"text": "half \\ud83d"}',
            f"{path} line 8: the text has half a character (\\ud83d); expected valid Unicode",
        ),
        ('{"text": "whole \\ud83d\\ude00"}', None),
        ('{"text": null}', None),
        ('{"id": ' + "1" * 5000 + "}", f"{path} line 11 is not JSON: "),
        ('{"text": "fine too"}', None),
    ]
    path.write_text("".join(line + "\n" for line, _ in lines))
    read, said = skipping(path)
    assert read == ["fine", "whole 😀", "fine too"]
    expected = [message for _, message in lines if message]
    assert len(said) == len(expected)
    for message, start in zip(said, expected, strict=True):
        assert message.startswith(start)
    assert refused(str(path)) == said[0]


def test_a_part_in_the_middle_knows_its_lines(tmp_path, said):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' * 900 + "{\n" + '{"text": "fine"}\n' * 99)
    source = open_source(str(path))
    for part in range(10):
        list(source.read(None, Piece(path.name, part, 10, 0), ReadOptions(), said))
    assert len(said) == 1 and said[0].startswith(f"{path} line 901 is not JSON: ")


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("parts", [1, 4])
def test_files_that_are_cut_short_are_read_up_to_there(tmp_path, said, ending, parts):
    lines = [json.dumps({"text": f"{n} {n * 2654435761 % 2**32}"}) for n in range(120_000)]
    data = "\n".join(lines).encode()
    if ending == ".zst":
        sink = pa.BufferOutputStream()
        with pa.output_stream(sink, compression="zstd") as stream:
            stream.write(data)
        data = sink.getvalue().to_pybytes()
    else:
        data = {".gz": gzip, ".bz2": bz2, ".xz": lzma}[ending].compress(data)
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(data[: len(data) // 2])
    source, read = open_source(str(path)), []
    pieces = [Piece(path.name, part, parts, 0) for part in range(parts)]
    for piece in pieces:
        read += source.read(None, piece, ReadOptions(), said)
        with pytest.raises(UserError, match="is damaged or cut short after line"):
            list(source.read(None, piece, ReadOptions(), refuse))
    assert 20_000 < len(read) < 90_000
    assert said.repeated == parts - 1
    assert len(said) == 1 and said[0].startswith(f"{path} is damaged or cut short after line ")
    assert {document.text for document in read} == {json.loads(line)["text"] for line in lines[: len(read)]}
    path.write_bytes(b"not compressed at all")
    read, said = skipping(path)
    assert (
        not read and len(said) == 1 and said[0].startswith(f"{path} is damaged or cut short after line 0: ")
    )


def test_parquet(tmp_path, refused):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"not parquet at all")
    assert refused(str(path)).startswith(f"{path} cannot be read: ")
    assert len(skipping(path)[1]) == 1
    pq.write_table(pa.table({"body": ["x"]}), path)
    assert refused(str(path)) == f"{path} has no field 'text'; it has body: set data.text_field or ?field="
    pq.write_table(pa.table({"text": [["a", "b"]]}), path)
    assert refused(str(path)) == f"{path} record 1: the text is of type list, expected a string"


@pytest.mark.parametrize("parts", [1, 3, 9])
@pytest.mark.parametrize("damage", ["footer", "field", "first row group"])
def test_every_part_of_a_damaged_parquet_file_says_so(tmp_path, said, damage, parts):
    path = tmp_path / "a.parquet"
    field = "body" if damage == "field" else "text"
    pq.write_table(pa.table({field: ["x" * 50 + str(n) for n in range(8)]}), path)
    data = bytearray(path.read_bytes())
    place = pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
    if damage != "field":
        place = len(data) - 20 if damage == "footer" else place
        data[place : place + 20] = b"\xff" * 20
    path.write_bytes(data)
    source = open_source(str(path))
    raised = 0
    for part in range(parts):
        piece = Piece(path.name, part, parts, 0)
        assert not list(source.read(None, piece, ReadOptions(), said))
        try:
            list(source.read(None, piece, ReadOptions(), refuse))
        except UserError:
            raised += 1
    # Of nine parts of eight rows one has no row to read.
    assert raised == parts - (damage == "first row group" and parts == 9)
    assert len(said) == 1 and said.repeated == raised - 1


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_a_parquet_record_that_is_not_utf8(tmp_path, kind):
    values = [f"text {n}".encode() for n in range(100)]
    values[70] = b"caf\xe9"
    if pa.types.is_dictionary(kind):
        column = pa.DictionaryArray.from_arrays(
            pa.array(range(100), pa.int32()), strings(values, pa.string())
        )
    else:
        column = strings(values, kind)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": column}), path)
    read, said = skipping(path)
    assert read == [f"text {n}" for n in range(100) if n != 70]
    assert said == [f"{path} record 71 is not UTF-8 (byte 0xe9); convert the text to UTF-8"]


def strings(values, kind):
    """Bytes as strings that nobody checked."""
    array = pa.array(values, pa.large_binary() if kind == pa.large_string() else pa.binary())
    return pa.Array.from_buffers(kind, len(array), array.buffers())
