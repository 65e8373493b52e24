"""Metrics of the tasks, as scikit-learn, scipy, seqeval and SQuAD's official script define them.

All are shares of 1, higher is better. A metric that is undefined (nothing to score, a correlation with constants) is 0,
so that it compares like any other number.
"""

from __future__ import annotations

import operator
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Tags = Sequence[Sequence[str]]  # one sequence a sentence

# Ends of words are those of Unicode, but only ASCII's punctuation goes: so the official script.
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def accuracy(predictions: Any, references: Any) -> float:
    """Share of equal values (`sklearn.metrics.accuracy_score`); any values, [N] each."""
    predictions, references = _same_length(predictions, references)
    return float(np.mean(predictions == references)) if len(references) else 0.0


def f1(predictions: Any, references: Any) -> float:
    """F1 of class 1 against all others (`sklearn.metrics.f1_score` of two classes); class ids, [N] each."""
    predictions, references = _same_length(predictions, references)
    both = np.sum((predictions == 1) & (references == 1))
    return _ratio(2 * both, np.sum(predictions == 1) + np.sum(references == 1))


def macro_f1(predictions: Any, references: Any) -> float:
    """Mean of every class' F1, of the classes that occur (`f1_score(average="macro")`); any values, [N] each."""
    table = _confusions(predictions, references)
    if not table.size:
        return 0.0
    return float(np.mean(2 * np.diag(table) / (table.sum(axis=0) + table.sum(axis=1))))


def matthews(predictions: Any, references: Any) -> float:
    """Matthews' correlation, of any number of classes (Gorodkin 2004; `matthews_corrcoef`); any values, [N] each.

    0 where the predictions or the references are all of one class.
    """
    table = _confusions(predictions, references)
    predicted, wanted, total = table.sum(axis=0), table.sum(axis=1), table.sum()
    covariance = np.trace(table) * total - predicted @ wanted
    variances = (total**2 - predicted @ predicted) * (total**2 - wanted @ wanted)
    return float(covariance / np.sqrt(variances)) if variances > 0 else 0.0


def pearson(predictions: Any, references: Any) -> float:
    """Pearson's correlation of numbers, [N] each (`scipy.stats.pearsonr`).

    0 where scipy gives NaN: for constant predictions or references, fewer than two numbers, or a NaN among them.
    """
    predictions, references = _same_length(predictions, references)
    deviations = []
    for values in (predictions.astype(np.float64), references.astype(np.float64)):
        # Not by the variance, which rounding can make more than 0.
        if len(values) < 2 or np.all(values == values[0]) or not np.isfinite(values).all():
            return 0.0
        centred = values - values.mean()
        centred /= np.abs(centred).max()  # so that the squares neither overflow nor vanish
        deviations.append(centred / np.linalg.norm(centred))
    return float(np.clip(deviations[0] @ deviations[1], -1, 1))


def spearman(predictions: Any, references: Any) -> float:
    """Pearson's correlation of the ranks, equal numbers sharing their mean rank (`scipy.stats.spearmanr`)."""
    predictions, references = _same_length(predictions, references)
    if np.isnan(predictions.astype(np.float64)).any() or np.isnan(references.astype(np.float64)).any():
        return 0.0
    return pearson(_ranks(predictions), _ranks(references))


def pearson_spearman(predictions: Any, references: Any) -> float:
    """Mean of the two correlations, STS-B's score in GLUE."""
    return (pearson(predictions, references) + spearman(predictions, references)) / 2


def entities(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(type, first word, last word) of each entity of one sentence, as conlleval and seqeval's default mode read tags.

    Tags are B-TYPE, I-TYPE (E-TYPE, S-TYPE) or O. An I- after O, or after another type, begins an entity. A tag
    without a prefix, as in data that is not of entities, is read as one letter of prefix and the rest.
    """
    start, last, last_type = 0, "O", ""
    for place, tag in enumerate([*tags, "O"]):
        prefix, rest = "O" if tag[:1] in ("", ".") else tag[0], tag[1:]
        entity_type = (rest.partition("-")[2] if "-" in rest else rest) or "_"
        changes = entity_type != last_type or prefix in "BSO" or last in "ESO"
        if changes and last != "O":
            yield last_type, start, place - 1
        if changes:
            start = place
        last, last_type = prefix, entity_type


def entity_precision(predictions: Tags, references: Tags) -> float:
    """Share of the predicted entities whose type and borders are right (seqeval, micro average)."""
    right, predicted, _ = _count_entities(predictions, references)
    return _ratio(right, predicted)


def entity_recall(predictions: Tags, references: Tags) -> float:
    """Share of the entities that are found with their type and borders (seqeval, micro average)."""
    right, _, wanted = _count_entities(predictions, references)
    return _ratio(right, wanted)


def entity_f1(predictions: Tags, references: Tags) -> float:
    """Harmonic mean of entity precision and recall (`seqeval.metrics.f1_score`); CoNLL's score."""
    right, predicted, wanted = _count_entities(predictions, references)
    return _ratio(2 * right, predicted + wanted)


def exact_match(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, no_answer: bool = False
) -> float:
    """Share of answers that equal one of the right ones after `normalise_answer`.

    Args:
      predictions: one text a question; "" says that there is no answer.
      references: the right answers of each question; none where there is no answer.
      no_answer: score as SQuAD 2.0 does, where a right answer without a word does not count.
    """
    return _mean_of_best(operator.eq, predictions, references, no_answer)


def squad_f1(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, no_answer: bool = False
) -> float:
    """Mean F1 of each answer's words with those of the right answer that it fits best (Rajpurkar et al. 2016, 2018).

    The arguments are those of `exact_match`. Where one side has no words, it is 1 if both have none and 0 otherwise;
    but SQuAD 1.1 gives 0 for both.
    """

    def overlap(one: list[str], other: list[str]) -> float:
        if not one and not other:
            return float(no_answer)
        return 2 * (Counter(one) & Counter(other)).total() / (len(one) + len(other))

    return _mean_of_best(overlap, predictions, references, no_answer)


def normalise_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and the articles a, an, the; single spaces between words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


# (predictions, references) → share; those of `ANSWER_METRICS` also take no_answer=….
METRICS: Mapping[str, Callable[..., float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
    "pearson_spearman": pearson_spearman,
    "entity_f1": entity_f1,
    "entity_precision": entity_precision,
    "entity_recall": entity_recall,
    "exact_match": exact_match,
    "squad_f1": squad_f1,
}
ENTITY_METRICS = ("entity_f1", "entity_precision", "entity_recall")
ANSWER_METRICS = ("exact_match", "squad_f1")


def _same_length(predictions: Any, references: Any) -> tuple[np.ndarray, np.ndarray]:
    predictions, references = np.asarray(predictions), np.asarray(references)
    if predictions.shape != references.shape or predictions.ndim != 1:
        raise ValueError(
            f"predictions are {list(predictions.shape)} and references {list(references.shape)}; expected [N]"
        )
    return predictions, references


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


def _confusions(predictions: Any, references: Any) -> np.ndarray:
    """float64 [reference, prediction]: how often; of the values that occur."""
    predictions, references = _same_length(predictions, references)
    values, ids = np.unique(np.concatenate([references, predictions]), return_inverse=True)
    count = len(values)
    pairs = ids[: len(references)] * count + ids[len(references) :]
    return np.bincount(pairs, minlength=count * count).reshape(count, count).astype(np.float64)


def _ranks(values: np.ndarray) -> np.ndarray:
    """The place of each number among all in ascending order; equal numbers get the mean of their places."""
    _, ids, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[ids]


def _count_entities(predictions: Tags, references: Tags) -> tuple[int, int, int]:
    """How many entities are right, predicted, wanted."""
    right = predicted = wanted = 0
    for found, there in zip(predictions, references, strict=True):
        if len(found) != len(there):
            raise ValueError(f"{len(found)} predicted tags for {len(there)} words")
        one, other = set(entities(found)), set(entities(there))
        right, predicted, wanted = right + len(one & other), predicted + len(one), wanted + len(other)
    return right, predicted, wanted


def _mean_of_best(
    score: Callable[[list[str], list[str]], float],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    no_answer: bool,
) -> float:
    """Mean over the questions of the highest `score` of the words of the prediction and a right answer."""
    total = 0.0
    for prediction, answers in zip(predictions, references, strict=True):
        right = [normalise_answer(answer).split() for answer in answers]
        if no_answer:
            right = [words for words in right if words]
        words = normalise_answer(prediction).split()
        total += max(score(words, other) for other in right or [[]])
    return _ratio(total, len(predictions))
