from __future__ import annotations

import pytest

from distiljax.data.sources import SourceSpec, open_source, parse
from distiljax.errors import UserError


@pytest.mark.parametrize(
    "text",
    [
        "docstrings",
        "hf:user/name/config",
        "tfds:name/config:1.0.0",
        "a.txt",
        "part-?.txt",
        "part-?[0-9]*.jsonl",
    ]
    + ["gs://bucket/x=1/part-?.parquet", "https://host/a.jsonl?download=true", "x?y=1/*.txt", "C=1?.txt"],
)
def test_a_location_without_settings(text):
    assert parse(text) == SourceSpec(text, text)


def test_settings_follow_a_question_mark():
    text = "part-?.txt?split=dev&field=body text&weight=0.25"
    assert parse(text) == SourceSpec(text, "part-?.txt", "dev", "body text", 0.25)
    assert parse("hf:a/b?streaming=1").streaming
    assert not parse("hf:a/b?streaming=false").streaming
    assert parse("tfds:a?data_dir=/x/y").data_dir == "/x/y"
    assert parse("docstrings?weight=2").weight == 2.0
    assert (
        parse("https://host/a.jsonl?download=true?field=x").location == "https://host/a.jsonl?download=true"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "a.txt?splt=dev",
            "'splt' is not a setting; expected one of split, field, weight, streaming, data_dir",
        ),
        ("a.txt?split=dev&feild=x", "'feild' is not a setting"),
        ("hf:a/b?stream", "'stream' is not a setting"),
        ("hf:a/b?split", "split has no value; expected split=VALUE"),
        ("a.txt?split=", "split has no value"),
        ("a.txt?split=a&split=b", "split is given twice"),
        ("?split=a", "names no text"),
        ("a.txt?streaming=1", "streaming is for hf:NAME only"),
        ("a.txt?data_dir=/x", "data_dir is for tfds:NAME only"),
        ("hf:a/b?streaming=yes", "streaming is 'yes'; expected 1 or 0"),
        *(
            (f"a.txt?weight={value}", f"the weight is '{value}'; expected a number above 0")
            for value in ("0", "-1", "nan", "inf", "much")
        ),
    ],
)
def test_wrong_settings_are_refused(text, said):
    with pytest.raises(UserError) as caught:
        open_source(text)
    assert said in str(caught.value) and text in str(caught.value) and "\n" not in str(caught.value)
