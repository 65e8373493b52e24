from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distiljax.data.sources import ReadOptions
from distiljax.data.sources.base import cut, record_documents
from distiljax.errors import UserError

BLANKS = "".join(chr(code) for code in range(0x11000) if chr(code).isspace())


def sentences(text, language="en"):
    return [part for part in cut(text, ReadOptions(unit="sentence", language=language)) if part]


def test_sentences():
    text = "Dr. Smith met Mr. Jones at 3.5 p.m. today. They\nspoke. \n\nA new paragraph! Was it?"
    assert sentences(text) == [
        "Dr. Smith met Mr. Jones at 3.5 p.m. today.",
        "They\nspoke.",
        "A new paragraph!",
        "Was it?",
    ]
    assert sentences("你好。我是。", "zh") == ["你好。", "我是。"]
    assert sentences("One.\u00a0 Two.\u3000Three.") == ["One.", "Two.", "Three."]


@given(
    st.lists(
        st.one_of(
            st.sampled_from([*".!?。 A\n\"'", "Dr.", "[1]"]),
            st.sampled_from(BLANKS),
            st.characters(codec="utf-8"),
        )
    ),
    st.sampled_from(["en", "de", "zh", "hi", "ar"]),
)
def test_sentences_lose_nothing_but_blanks(characters, language):
    text = "".join(characters)
    assert "".join("".join(sentences(text, language)).split()) == "".join(text.split())


@pytest.mark.parametrize("language", ["xx", "english", "EN", "", "e"])
def test_an_unknown_language_is_refused(language):
    with pytest.raises(UserError, match=f"data.language is '{language}'; expected an ISO 639-1 code"):
        ReadOptions(unit="sentence", language=language)
    ReadOptions(unit="line", language=language)


def test_the_documents_of_a_record_are_one_group():
    text = "a\n\n \nb\nc"
    found = list(record_documents(text, ReadOptions(unit="paragraph"), str, pytest.fail))
    assert found == [("a", text), ("b\nc", text)]
    assert list(record_documents(b"\xc3\xa9", ReadOptions(), str, pytest.fail, group="g")) == [("é", "g")]
    assert list(record_documents(None, ReadOptions(), str, pytest.fail)) == []


def test_what_is_no_text_is_said():
    said = []
    for value in (b"caf\xe9", 3, ["a"]):
        assert not list(record_documents(value, ReadOptions(), lambda: "a.parquet record 7", said.append))
    assert said == [
        "a.parquet record 7 is not UTF-8 (byte 0xe9); convert the text to UTF-8",
        "a.parquet record 7: the text is of type int, expected a string",
        "a.parquet record 7: the text is of type list, expected a string",
    ]
