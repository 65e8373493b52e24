from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distiljax.train.format import human_bytes, human_count, human_number, human_percent, human_seconds


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (950, "950"),
        (999.4, "999"),
        (1_000, "1.00 k"),
        (1_234, "1.23 k"),
        (999_499, "999 k"),
        (999_500, "1.00 M"),
        (66_985_530, "67.0 M"),
        (109_514_298, "110 M"),
        (8.39e9, "8.39 G"),
        (3.3e15, "3,300 T"),
    ],
)
def test_human_count(value, text):
    assert human_count(value) == text


def test_human_bytes():
    assert human_bytes(267_942_120) == "268 MB"
    assert human_bytes(12) == "12 B"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"),
        (0.0021, "2.10 ms"),
        (0.25, "250 ms"),
        (0.99999, "1 s"),
        (2.54, "2.5 s"),
        (42, "42 s"),
        (59.7, "1 min"),
        (125, "2 min 5 s"),
        (3599.8, "1 h"),
        (3600, "1 h"),
        (3725, "1 h 2 min"),
        (86_400 + 3_600, "1 d 1 h"),
        (-5, "-5 s"),
    ],
)
def test_human_seconds(value, text):
    assert human_seconds(value) == text


def test_human_number():
    assert [human_number(v) for v in (3.2, 12.345, 9.996, 99.97, 123.4, 6003, 0.0513, 5e-5, -2.5)] == [
        "3.20",
        "12.3",
        "10.0",
        "100",
        "123",
        "6,003",
        "0.0513",
        "5.00e-05",
        "-2.50",
    ]


@pytest.mark.parametrize("show", [human_number, human_count, human_bytes, human_seconds, human_percent])
@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_what_is_not_a_number_is_a_dash(show, value):
    assert show(value) == "–"


@given(st.floats(min_value=1.0, max_value=9e14))
def test_human_count_keeps_three_digits(value):
    number, _, unit = human_count(value).partition(" ")
    shown = float(number) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[unit]
    assert shown == pytest.approx(value, rel=0.00501)
    assert float(number) < 1000


@given(st.floats(min_value=10, max_value=1e8))
def test_human_seconds_is_off_by_less_than_its_last_unit(value):
    sizes = {"s": 1, "min": 60, "h": 3600, "d": 86_400}
    words = human_seconds(value).split()
    shown = sum(int(n) * sizes[unit] for n, unit in zip(words[::2], words[1::2], strict=True))
    resolution = 1 if value < 3600 else 60 if value < 86_400 else 3600
    assert abs(shown - value) <= resolution
