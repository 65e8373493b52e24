"""The best answers against all pairs of tokens, one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distiljax.tasks.spans import Span, best_spans

CONTEXT = "".join(f"w{number} " for number in range(100))
WORDS = [
    (CONTEXT.index(f"w{number} "), CONTEXT.index(f"w{number} ") + len(f"w{number}")) for number in range(100)
]


def window(logits, first, count, question=2):
    """[CLS] question [SEP] `count` words of the context from `first` [SEP]."""
    outside = [(-1, -1)]
    offsets = [*outside * (question + 2), *WORDS[first : first + count], *outside]
    assert len(logits) == len(offsets)
    return np.asarray(logits, np.float32), np.array(offsets, np.int32)


def every_pair(windows, n_best, longest, no_answer):
    """(text, score, start, end): the definition, without thought for the time."""
    found, null = {}, np.inf
    for logits, offsets in windows:
        null = min(null, float(logits[0, 0]) + float(logits[0, 1]))
        for first in range(len(logits)):
            for last in range(first, len(logits)):
                if offsets[first][0] < 0 or offsets[last][0] < 0 or last - first + 1 > longest:
                    continue
                place = (int(offsets[first][0]), int(offsets[last][1]))
                logit = float(logits[first, 0]) + float(logits[last, 1])
                found[place] = max(logit, found.get(place, -np.inf))
    ranked = sorted((-logit, False, place) for place, logit in found.items())[:n_best]
    if no_answer:
        ranked = sorted([*ranked, (-null, True, (0, 0))])
    weights = [np.exp(ranked[0][0] - logit) for logit, _, _ in ranked]
    return [
        (CONTEXT[start:end], weight / sum(weights), start, end)
        for (_, _, (start, end)), weight in zip(ranked, weights, strict=True)
    ]


def same(spans, expected):
    assert [(span.text, span.start, span.end) for span in spans] == [(t, s, e) for t, _, s, e in expected]
    assert [span.score for span in spans] == pytest.approx([score for _, score, _, _ in expected])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 4),
    st.integers(1, 25),
    st.integers(1, 35),
    st.booleans(),
    st.booleans(),
)
def test_random_logits(seed, count, n_best, longest, no_answer, ties):
    rng = np.random.default_rng(seed)
    windows = []
    for number in range(count):
        words = int(rng.integers(1, 40))
        logits = rng.integers(-2, 3, (words + 5, 2)) if ties else rng.normal(0, 3, (words + 5, 2))
        windows.append(window(logits, 7 * number, words))
    spans = best_spans(CONTEXT, windows, n_best=n_best, max_answer_length=longest, no_answer=no_answer)
    same(spans, every_pair(windows, n_best, longest, no_answer))
    assert sum(span.score for span in spans) == pytest.approx(1)


def peaked(words, start, end, logit, null=0.0):
    """Logits that say: from the word `start` to the word `end` of the window."""
    logits = np.full((words + 5, 2), -5.0)
    logits[0] = null / 2
    logits[4 + start, 0] = logits[4 + end, 1] = logit / 2
    return logits


def test_the_best_of_two_windows():
    windows = [window(peaked(10, 2, 4, 6.0), 0, 10), window(peaked(10, 1, 2, 8.0), 5, 10)]
    best = best_spans(CONTEXT, windows)
    assert (best[0].text, best[1].text) == ("w6 w7", "w2 w3 w4")
    assert CONTEXT[best[0].start : best[0].end] == "w6 w7"
    assert best[0].score / best[1].score == pytest.approx(np.exp(2))
    assert len(best) == 20


def test_an_answer_that_two_windows_see_counts_once():
    windows = [window(peaked(10, 5, 6, 6.0), 0, 10), window(peaked(10, 0, 1, 4.0), 5, 10)]
    best = best_spans(CONTEXT, windows)
    assert [span.text for span in best].count("w5 w6") == 1
    assert best[0].text == "w5 w6"
    same(best, every_pair(windows, 20, 30, False))


def test_neither_question_nor_special_tokens_nor_backwards():
    logits = peaked(5, 1, 2, 2.0)
    logits[[0, 1, 2, 3, -1]] = 100.0
    logits[4, 1] = 50.0  # ends before it begins
    assert best_spans(CONTEXT, [window(logits, 0, 5)])[0].text == "w0"
    logits[4, 1] = -5.0
    assert best_spans(CONTEXT, [window(logits, 0, 5)])[0].text == "w1 w2"


@pytest.mark.parametrize("length, text", [(30, True), (31, False)])
def test_the_longest_answer_has_30_tokens(length, text):
    best = best_spans(CONTEXT, [window(peaked(60, 3, 3 + length - 1, 20.0), 0, 60)])[0]
    assert (best.text.split() == [f"w{number}" for number in range(3, 3 + length)]) is text


def test_no_answer_is_of_the_window_that_doubts_it_most():
    sure, doubting = (window(peaked(5, 1, 2, 4.0, null), 0, 5) for null in (9.0, 3.0))
    assert best_spans(CONTEXT, [sure], no_answer=True)[0] == Span("", pytest.approx(0.99, abs=0.01), 0, 0)
    best = best_spans(CONTEXT, [sure, doubting], no_answer=True)
    assert [span.text for span in best[:2]] == ["w1 w2", ""]
    assert best_spans(CONTEXT, [sure])[0].text == "w1 w2"


def test_an_answer_wins_against_none_of_the_same_logit():
    best = best_spans(CONTEXT, [window(peaked(5, 1, 2, 4.0, null=4.0), 0, 5)], no_answer=True)
    assert [span.text for span in best[:2]] == ["w1 w2", ""]
    assert best[0].score == pytest.approx(best[1].score)


@pytest.mark.parametrize("no_answer", [True, False])
def test_without_a_token_of_the_context_there_is_no_answer(no_answer):
    assert best_spans("", [window(np.zeros((5, 2)), 0, 0)], no_answer=no_answer) == [Span("", 1.0, 0, 0)]


@pytest.mark.parametrize("place", [0, 2, 4])
def test_tokens_without_characters_are_no_border_of_an_answer(place):
    logits, offsets = window(peaked(5, place, place, 9.0), 0, 5)
    offsets[4 + place] = offsets[3 + place] if place else (0, 0)
    offsets[4 + place, 0] = offsets[4 + place, 1]
    spans = best_spans(CONTEXT, [(logits, offsets)])
    others = [word for number, word in enumerate(WORDS[:5]) if number != place]
    assert {span.start for span in spans} == {start for start, _ in others}
    assert {span.end for span in spans} == {end for _, end in others}


def test_large_logits():
    best = best_spans(CONTEXT, [window(1e4 * peaked(5, 1, 2, 4.0), 0, 5)])
    assert best[0] == Span("w1 w2", 1.0, *(WORDS[1][0], WORDS[2][1]))
