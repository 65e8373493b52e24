from __future__ import annotations

import itertools
import sys
import textwrap

import pytest

from distiljax.data.sources import ReadOptions, docstrings, open_source, parse


def write(root, name, text):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text), encoding="utf-8")


def read(*roots, parts=None, **options):
    """The documents of the parts, one after the other."""
    source = docstrings.Docstrings(parse("docstrings"), [str(root) for root in roots])
    pieces = source.pieces(None, 1)
    chosen = pieces if parts is None else [pieces[part] for part in parts]
    return [
        document
        for piece in chosen
        for document in source.read(None, piece, ReadOptions(**options), pytest.fail)
    ]


SENTENCE = "This sentence is long enough to be kept as a docstring of the corpus, number {}."


def test_module_class_and_function_docstrings_are_read_without_importing(tmp_path):
    write(
        tmp_path,
        "package/module.py",
        f'''
        """{SENTENCE.format("one")}"""
        raise SystemExit("imported")
        class A:
            """{SENTENCE.format("two")}"""
            async def f(self):
                """{SENTENCE.format("three")}

                >>> 1 + 1
                2
                """
        try:
            def g():
                """{SENTENCE.format("four")}"""
        except ImportError:
            def g():
                """Short."""
        ''',
    )
    found = read(tmp_path)
    assert [document.text for document in found] == [
        SENTENCE.format(number) for number in ("one", "two", "three", "four")
    ]
    assert {document.group for document in found} == {"package/module.py"}
    assert "package.module" not in sys.modules


def test_unreadable_files_and_tests_are_skipped(tmp_path, recwarn):
    write(tmp_path, "a.py", f'"""{SENTENCE.format("one")}"""\nx = "\\d"\n')
    write(tmp_path, "c.py", f'"""{SENTENCE.format("two")}"""\nthis is no python')
    write(tmp_path, "d/tests/t.py", f'"""{SENTENCE.format("three")}"""')
    half = SENTENCE.format("half a character: \\ud800")
    write(tmp_path, "f.py", f'"""{half}"""')
    (tmp_path / "e.py").write_bytes(b'"""\xff\xfe is not UTF-8, and there is no coding line in this file."""')
    assert [document.text for document in read(tmp_path)] == [SENTENCE.format("one")]
    assert not recwarn.list


def test_packages_take_turns_and_stop_at_their_share(tmp_path, monkeypatch):
    monkeypatch.setattr(docstrings, "PACKAGE_CHARACTERS", 800)
    monkeypatch.setattr(docstrings, "PARTS", 1)
    for number in range(50):
        write(tmp_path, f"huge/m{number}.py", f'"""{SENTENCE.format(number)}"""')
    for number in range(3):
        write(tmp_path, f"small/m{number}.py", f'"""{SENTENCE.format(number + 100)}"""')
    found = read(tmp_path)
    turns = [document.group.split("/")[0] for document in found[:6]]
    assert turns in (["huge", "small"] * 3, ["small", "huge"] * 3)
    huge = [len(document.text) for document in found if document.group.startswith("huge")]
    assert sum(huge[:-1]) < 800 <= sum(huge)


def test_parts_share_the_packages(tmp_path, monkeypatch):
    for number in range(50):
        write(tmp_path, f"p{number}/m.py", f'"""{SENTENCE.format(number)}"""')
    parts = [read(tmp_path, parts=[part]) for part in range(docstrings.PARTS)]
    assert {len(part) for part in parts} == {50 // docstrings.PARTS, 50 // docstrings.PARTS + 1}
    monkeypatch.setattr(docstrings, "PARTS", 1)
    assert sorted(read(tmp_path)) == sorted(document for part in parts for document in part)


def test_the_order_does_not_depend_on_where_the_packages_are(tmp_path):
    for root in ("first", "second"):
        for name in ("b/x.py", "a/y.py", "a/z.py", "c.py"):
            write(tmp_path / root, name, f'"""{SENTENCE.format(name)}"""')
    first, second = read(tmp_path / "first"), read(tmp_path / "second")
    assert first == second
    assert len(first) == 4


def test_documents_of_a_smaller_unit_keep_their_file(tmp_path):
    write(tmp_path, "a.py", f'"""{SENTENCE.format("one")} Here comes another sentence."""')
    assert read(tmp_path, unit="sentence") == [
        (SENTENCE.format("one"), "a.py"),
        ("Here comes another sentence.", "a.py"),
    ]


def test_prose_keeps_sentences_and_drops_code_and_tables():
    text = """
    Return the roots of the polynomial.

        for root in roots(p):
            print(root.real, f(x) == 0)

    ====  =====
    name  value
    ====  =====

    Every root is given as often as its multiplicity says.

    Notes
    -----
    The method is the one that the reference describes in detail.
    """
    assert docstrings.prose(text) == (
        "Return the roots of the polynomial.\n\nEvery root is given as often as its multiplicity says.\n\n"
        "Notes\nThe method is the one that the reference describes in detail."
    )


def test_this_installation_has_a_corpus():
    source = open_source("docstrings")
    assert source.expensive and source.splits() == ()
    pieces = source.pieces(None, 1)
    assert [piece.part for piece in pieces] == list(range(docstrings.PARTS))
    assert source.size(None) == sum(piece.size for piece in pieces) > 1_000_000
    found = list(itertools.islice(source.read(None, pieces[3], ReadOptions(), pytest.fail), 300))
    assert len(found) == 300
    assert len({document.group.split("/")[0] for document in found}) > 10
