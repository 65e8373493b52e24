"""The best answers in a context, from the logits of the overlapping windows that cover it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

N_BEST = 20
MAX_ANSWER_LENGTH = 30  # tokens


@dataclasses.dataclass(frozen=True)
class Span:
    """An answer.

    Attributes:
      text: what stands in the context there; "" says that there is no answer.
      score: its probability among the answers that it was returned with.
      start, end: characters of the context, end excluded; 0, 0 for no answer.
    """

    text: str
    score: float
    start: int
    end: int


def best_spans(
    context: str,
    windows: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    n_best: int = N_BEST,
    max_answer_length: int = MAX_ANSWER_LENGTH,
    no_answer: bool = False,
) -> list[Span]:
    """The best answers to one question, best first.

    As `run_qa.py` of transformers does it: an answer's logit is its start's plus its end's; that of no answer is the
    sum of the two logits of [CLS], of the window where this is lowest; the scores are a softmax over what is returned.
    But all pairs of a start and an end count, not only those of the best starts and ends of a window, and an answer
    that several windows see counts once, with its highest logit.

    Args:
      context: the text.
      windows: of each window, the logits float [S, 2] of start and end, [CLS] first, and the character offsets
        int [S, 2] of its tokens, (-1, -1) for those that are not of the context.
      n_best: how many answers, besides no answer.
      max_answer_length: how many tokens the longest answer has.
      no_answer: whether there may be none (SQuAD 2.0).

    Returns:
      Up to `n_best` answers, and no answer at its place among them if `no_answer`; equal ones in the order of the
      context, no answer last. No answer alone where no token is of the context.
    """
    found: dict[tuple[int, int], float] = {}
    null = np.inf
    for logits, offsets in windows:
        logits = np.asarray(logits, np.float64)
        null = min(null, logits[0].sum())
        for logit, start, end in _window_spans(logits, np.asarray(offsets), n_best, max_answer_length):
            found[start, end] = max(found.get((start, end), -np.inf), logit)

    best = sorted(found.items(), key=lambda item: (-item[1], item[0]))[:n_best]
    if no_answer or not best:
        best = sorted([*best, ((0, 0), null)], key=lambda item: -item[1])
    probabilities = _softmax(np.array([logit for _, logit in best]))
    return [
        Span(context[start:end], float(score), start, end)
        for ((start, end), _), score in zip(best, probabilities, strict=True)
    ]


def _window_spans(
    logits: np.ndarray, offsets: np.ndarray, n_best: int, max_answer_length: int
) -> list[tuple[float, int, int]]:
    """(logit, start, end) of the best answers in one window; equal ones in the order of the context."""
    (inside,) = np.nonzero(offsets[:, 1] > offsets[:, 0])
    if not len(inside):
        return []
    tokens = slice(inside[0], inside[-1] + 1)
    usable = (offsets[tokens, 1] > offsets[tokens, 0])[:, None]
    logits, offsets = np.where(usable, logits[tokens], -np.inf), offsets[tokens]

    longest = min(max_answer_length, len(logits))
    ends = np.append(logits[:, 1], np.full(longest - 1, -np.inf))
    # [start token, tokens after it]
    sums = logits[:, :1] + np.lib.stride_tricks.sliding_window_view(ends, longest)
    flat = sums.ravel()
    count = min(n_best, int(np.count_nonzero(flat > -np.inf)))
    if not count:
        return []
    # Without a sort of all: those above the last that counts, and of its equals the first ones.
    (places,) = np.nonzero(flat >= np.partition(flat, -count)[-count])
    places = places[np.argsort(-flat[places], kind="stable")][:count]
    first, more = np.divmod(places, longest)
    return list(
        zip(flat[places].tolist(), offsets[first, 0].tolist(), offsets[first + more, 1].tolist(), strict=True)
    )


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()
