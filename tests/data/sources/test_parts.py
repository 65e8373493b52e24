"""The parts of a file are the whole of it, however it is cut."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distiljax.data.sources import Piece, ReadOptions, documents, open_source

UNITS = ["document", "line", "paragraph", "sentence"]
LINES = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "",
                " ",
                "\t",
                "\u3000",
                "\x1c",
                "a",
                "b. C d. ",
                "é 中。文",
                "long " * 50,
                "\ufeff",
                "\r",
                "x\u2028y",
            ]
        ),
        st.characters(codec="utf-8"),
    ),
    max_size=30,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("parts")


def parts_of(path, parts, options):
    """The documents and the messages of every part."""
    found = []
    for part in range(parts):
        said = []
        piece = Piece(path.name, part, parts, 0)
        read = [*open_source(str(path)).read(None, piece, options, said.append)]
        assert read == [*open_source(str(path)).read(None, piece, options, lambda message: None)]
        found.append((read, said))
    return found


def flat(parts):
    return [document for read, _ in parts for document in read], [line for _, said in parts for line in said]


@settings(max_examples=300)
@given(
    lines=LINES,
    newline=st.sampled_from(["\n", "\r\n"]),
    final=st.booleans(),
    bom=st.booleans(),
    parts=st.integers(1, 12),
    unit=st.sampled_from(UNITS),
)
def test_parts_of_a_text_file(directory, lines, newline, final, bom, parts, unit):
    path = directory / "a.txt"
    data = ("\ufeff" if bom else "") + newline.join(lines) + (newline if final else "")
    path.write_bytes(data.encode())
    whole = [*documents(str(path), unit=unit)]
    assert flat(parts_of(path, parts, ReadOptions(unit=unit))) == (whole, [])
    if unit == "line":
        assert [document.text for document in whole] == [
            text
            for text in (line.rstrip("\r\n") for line in data.removeprefix("\ufeff").split("\n"))
            if text and not text.isspace()
        ]


@settings(max_examples=150)
@given(
    lines=st.lists(
        st.sampled_from([b"", b" ", b"fine", b"\xff", b"caf\xe9 " * 9, b"{", b'{"text": "x"}', b"3"]),
        max_size=20,
    ),
    parts=st.integers(1, 9),
    name=st.sampled_from(["a.txt", "a.jsonl"]),
    unit=st.sampled_from(UNITS),
)
def test_parts_of_a_bad_file_say_the_same_as_the_whole(directory, lines, parts, name, unit):
    path = directory / name
    path.write_bytes(b"\n".join(lines))
    options = ReadOptions(unit=unit)
    assert flat(parts_of(path, parts, options)) == flat(parts_of(path, 1, options))


@given(LINES, st.sampled_from(["\n", "\r\n"]))
def test_lines_of_a_record_are_those_of_a_text_file(directory, lines, newline):
    text = newline.join(lines).removeprefix("\ufeff")
    (directory / "a.txt").write_bytes(text.encode())
    (directory / "a.jsonl").write_text(json.dumps({"text": text}))
    pq.write_table(pa.table({"text": [text]}), directory / "a.parquet")
    found = [
        [document.text for document in documents(str(directory / name), unit="line")]
        for name in ("a.txt", "a.jsonl", "a.parquet")
    ]
    assert found[0] == found[1] == found[2]


@settings(max_examples=50)
@given(
    st.lists(st.text(st.characters(codec="utf-8"), max_size=40), max_size=30),
    st.integers(1, 9),
    st.sampled_from(UNITS),
)
def test_parts_of_jsonl(directory, texts, parts, unit):
    path = directory / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), newline="\n"
    )
    whole = [*documents(str(path), unit=unit)]
    assert flat(parts_of(path, parts, ReadOptions(unit=unit))) == (whole, [])
    if unit == "document":
        assert [document.text for document in whole] == [
            text for text in texts if text and not text.isspace()
        ]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("parts", [1, 2, 7, 8])
def test_parts_of_a_compressed_file(directory, parts, unit):
    path = directory / "a.txt.zst"
    with pa.output_stream(str(path), compression="zstd") as stream:
        stream.write("".join(f"Line {n}. É.\n" + "\n" * (n % 3 == 0) for n in range(5000)).encode())
    whole = [*documents(str(path), unit=unit)]
    found = parts_of(path, parts, ReadOptions(unit=unit))
    read, said = flat(found)
    assert not said and sorted(read) == sorted(whole) and len(set(read)) == len(read)
    order = {document: number for number, document in enumerate(whole)}
    for part, _ in found:
        numbers = [order[document] for document in part]
        assert numbers == sorted(numbers)
        assert 0.5 < len(part) * parts / len(whole) < 2


@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 1000])
@pytest.mark.parametrize("row_group_size", [10, 64, 1000])
def test_parts_of_a_parquet_file(directory, rows, row_group_size):
    path = directory / "a.parquet"
    texts = [f"Row {n}.\nLine." for n in range(rows)]
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, row_group_size=row_group_size)
    whole = [*documents(str(path), unit="line")]
    assert len(whole) == 2 * rows
    for parts in (1, 2, 7, 64):
        assert flat(parts_of(path, parts, ReadOptions(unit="line"))) == (whole, [])


def test_parts_of_a_parquet_file_read_only_their_row_groups(directory):
    path = directory / "b.parquet"
    texts = [f"{n} " * 2000 for n in range(400)]
    pq.write_table(
        pa.table({"text": texts}), path, row_group_size=100, compression=None, use_dictionary=False
    )
    # The second row group is destroyed: only the part that it belongs to says so.
    metadata = pq.ParquetFile(path).metadata
    begin = metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[begin : begin + 5000] = b"\xff" * 5000
    path.write_bytes(data)
    found = parts_of(path, 4, ReadOptions())
    assert [len(read) for read, _ in found] == [100, 0, 100, 100]
    assert [len(said) for _, said in found] == [0, 1, 0, 0]
    assert found[1][1][0].startswith(f"{path} cannot be read after record 100: ")
