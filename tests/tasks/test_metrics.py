"""The metrics against scikit-learn, scipy, seqeval, and SQuAD's official definition."""

from __future__ import annotations

import itertools
import string
import warnings

import numpy as np
import pytest
import scipy.stats
import seqeval.metrics
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from distiljax.tasks import metrics
from distiljax.tasks.metrics import METRICS, entities, normalise_answer

# --- classes -----------------------------------------------------------------------------------------------

REFERENCE = {
    "accuracy": sklearn.metrics.accuracy_score,
    "f1": lambda wanted, found: sklearn.metrics.f1_score(wanted, found, pos_label=1, zero_division=0),
    "macro_f1": lambda wanted, found: sklearn.metrics.f1_score(
        wanted, found, average="macro", zero_division=0
    ),
    "matthews": sklearn.metrics.matthews_corrcoef,
}


def same_as_sklearn(name, found, wanted):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A single label was found", UserWarning)
        expected = REFERENCE[name](wanted, found)
    assert METRICS[name](found, wanted) == pytest.approx(expected, abs=1e-12)


CLASS_CASES = {
    "one class": ([0, 0, 0], [0, 0, 0]),
    "one class, the positive": ([1, 1], [1, 1]),
    "all wrong": ([1, 0, 1, 0], [0, 1, 0, 1]),
    "constant predictions": ([1, 1, 1, 1], [0, 1, 0, 1]),
    "never the positive": ([0, 0, 0, 0], [0, 1, 0, 1]),
    "no positive to find": ([0, 1, 0, 0], [0, 0, 0, 0]),
    "one example": ([1], [0]),
    "perfect": ([0, 1, 1], [0, 1, 1]),
}


@pytest.mark.parametrize("name", REFERENCE)
@pytest.mark.parametrize("found, wanted", CLASS_CASES.values(), ids=CLASS_CASES)
def test_classes(name, found, wanted):
    same_as_sklearn(name, found, wanted)


@pytest.mark.parametrize("name", REFERENCE)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_random_classes(name, seed, count):
    rng = np.random.default_rng(seed)
    classes = 2 if name == "f1" else rng.integers(1, 6)
    same_as_sklearn(name, *rng.integers(0, classes, (2, count)))


@pytest.mark.parametrize("name", ["accuracy", "macro_f1", "matthews"])
def test_classes_may_be_texts(name):
    same_as_sklearn(name, ["DET", "NOUN", "NOUN", "X"], ["DET", "NOUN", "VERB", "VERB"])


@pytest.mark.parametrize("name", ["macro_f1", "matthews"])
def test_a_class_that_is_only_predicted_counts(name):
    same_as_sklearn(name, [0, 1, 7, 7], [0, 1, 1, 0])


def test_f1_of_more_classes_is_of_class_1():
    found, wanted = [0, 1, 2, 1, 1], [0, 1, 1, 2, 1]
    expected = sklearn.metrics.f1_score(wanted, found, average=None)[1]
    assert metrics.f1(found, wanted) == pytest.approx(expected)


def test_many_examples_do_not_overflow():
    rng = np.random.default_rng(0)
    wanted = rng.integers(0, 2, 400_000, dtype=np.int32)
    same_as_sklearn("matthews", np.where(rng.random(len(wanted)) < 0.9, wanted, 1 - wanted), wanted)


@pytest.mark.parametrize("name", METRICS)
def test_nothing_to_score_is_0(name):
    assert METRICS[name]([], []) == 0.0


@pytest.mark.parametrize("name", METRICS)
def test_counts_must_agree(name):
    texts, tags = ["a"], [["O"]]
    one = tags if name in metrics.ENTITY_METRICS else texts if name in metrics.ANSWER_METRICS else [1]
    with pytest.raises(ValueError):
        METRICS[name](one * 3, one * 2)


# --- correlations ------------------------------------------------------------------------------------------

CORRELATIONS = {"pearson": scipy.stats.pearsonr, "spearman": scipy.stats.spearmanr}
CORRELATION_CASES = {
    "ties": ([1, 1, 2, 2, 3, 3], [1, 2, 2, 3, 3, 3]),
    "ties in one": ([5, 5, 5, 0], [1, 2, 3, 4]),
    "opposite": ([3.0, 2.0, 1.0], [1.0, 2.0, 3.0]),
    "two": ([0.1, 0.2], [5.0, 3.0]),
    "an outlier": ([1, 2, 3, 4, 1e6], [1, 2, 3, 4, 0]),
    "large and near each other": ([1e8, 1e8 + 1, 1e8 + 3], [1.0, 3.0, 2.0]),
    "tiny": ([1e-200, 2e-200, 4e-200], [1.0, 3.0, 2.0]),
    "huge": ([1e200, 2e200, 4e200], [1.0, 3.0, 2.0]),
}


def same_as_scipy(name, found, wanted):
    expected = CORRELATIONS[name](found, wanted).statistic
    assert METRICS[name](found, wanted) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", CORRELATIONS)
@pytest.mark.parametrize("found, wanted", CORRELATION_CASES.values(), ids=CORRELATION_CASES)
def test_correlations(name, found, wanted):
    same_as_scipy(name, found, wanted)


@pytest.mark.parametrize("name", CORRELATIONS)
@given(st.integers(0, 2**32 - 1), st.integers(3, 40), st.booleans())
def test_random_correlations(name, seed, count, rounded):
    found, wanted = np.random.default_rng(seed).normal(0, 2, (2, count))
    found[0], wanted[0] = 9.0, 9.0  # never constant
    same_as_scipy(name, found.round() if rounded else found, wanted.round() if rounded else wanted)


@pytest.mark.parametrize("name", [*CORRELATIONS, "pearson_spearman"])
@pytest.mark.parametrize(
    "found, wanted",
    [
        ([0.1] * 10, range(10)),  # their mean is not 0.1, and so their deviations not 0
        (range(3), [2, 2, 2]),
        ([4.0, 4.0], [4.0, 4.0]),
        ([1.0], [2.0]),
        ([1.0, float("nan"), 2.0], [1.0, 2.0, 3.0]),
        ([1.0, 3.0, 2.0], [1.0, float("nan"), 3.0]),
    ],
)
def test_an_undefined_correlation_is_0(name, found, wanted):
    assert METRICS[name](list(found), list(wanted)) == 0.0


def test_mean_of_the_correlations():
    found, wanted = [1.0, 2.0, 9.0, 3.0], [1.0, 3.0, 4.0, 2.0]
    both = [CORRELATIONS[name](found, wanted).statistic for name in CORRELATIONS]
    assert metrics.pearson_spearman(found, wanted) == pytest.approx(np.mean(both))


# --- entities ----------------------------------------------------------------------------------------------

TAG_CASES = [
    "O",
    "B-X I-X O B-Y",
    "O I-X I-X O",  # begins with I-
    "I-X",
    "B-X I-Y I-Y",  # another type
    "B-Y I-X B-X",
    "B-X B-X I-X",  # one beside the other
    "B-X I-X I-X",  # ends with the sentence
    "O O B-X",
    "B-X O I-X",
    "I-X I-Y I-X B-X",
    "B-X-Y I-X-Y I-X B-X-",  # hyphens in types
    "B I O I",  # no types
    "PER PER LOC O PER",  # no prefixes
    "B-PER PER LOC O I-LOC",
    "DET NOUN NOUN VERB",
    "S-X E-X I-X E-X O E-X S-X S-X B-X E-X I-X",
    "B-X S-X E-X",
    "O-X I-X O-X",
]


@pytest.mark.filterwarnings("ignore:.* seems not to be NE tag:UserWarning")
@pytest.mark.parametrize("tags", TAG_CASES)
def test_entities(tags):
    tags = tags.split()
    assert list(entities(tags)) == seqeval.metrics.sequence_labeling.get_entities(tags)


def test_entities_of_every_short_sentence():
    kinds = ["O", "B-X", "I-X", "B-Y", "I-Y"]
    for length in range(1, 6):
        for tags in itertools.product(kinds, repeat=length):
            assert list(entities(tags)) == seqeval.metrics.sequence_labeling.get_entities(list(tags)), tags


def test_entities_by_hand():
    assert list(entities(["I-X", "I-X", "B-X", "O", "B-Y", "I-X"])) == [
        ("X", 0, 1),
        ("X", 2, 2),
        ("Y", 4, 4),
        ("X", 5, 5),
    ]
    assert list(entities([])) == []


def same_as_seqeval(found, wanted):
    for name, reference in [
        ("entity_f1", seqeval.metrics.f1_score),
        ("entity_precision", seqeval.metrics.precision_score),
        ("entity_recall", seqeval.metrics.recall_score),
    ]:
        expected = reference(wanted, found, zero_division=0)
        assert METRICS[name](found, wanted) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "found, wanted",
    [
        ([["O", "O"]], [["O", "O"]]),
        ([["O", "O"]], [["B-X", "I-X"]]),
        ([["B-X", "I-X"]], [["O", "O"]]),
        ([["I-X", "I-X"]], [["B-X", "I-X"]]),  # equal, though not strictly IOB2
        ([["B-X", "I-X"]], [["B-X", "O"]]),  # the type alone does not do
        ([["B-X"], ["I-X"]], [["B-X"], ["B-X"]]),  # a sentence ends what is in it
        ([["B-X", "O"], ["O"]], [["O", "O"], ["B-X"]]),
        ([["B-X"], []], [["B-X"], []]),
    ],
)
def test_entity_scores(found, wanted):
    same_as_seqeval(found, wanted)


@given(st.integers(0, 2**32 - 1))
def test_random_entity_scores(seed):
    rng = np.random.default_rng(seed)
    kinds = ["O", "O", "B-X", "I-X", "B-Y", "I-Y"]
    wanted = [list(rng.choice(kinds, rng.integers(1, 12))) for _ in range(rng.integers(1, 6))]
    found = [[str(rng.choice(kinds)) if rng.random() < 0.3 else tag for tag in tags] for tags in wanted]
    same_as_seqeval(found, wanted)


def test_tags_of_another_count_are_refused():
    with pytest.raises(ValueError, match="2 predicted tags for 1 words"):
        metrics.entity_f1([["O", "O"]], [["O"]])


# --- answers -----------------------------------------------------------------------------------------------


def official_words(text):
    """SQuAD's normalisation, spelled out: lower case, no ASCII punctuation, then no articles, then words."""
    text = "".join(character for character in text.lower() if character not in set(string.punctuation))
    runs = itertools.groupby(text, key=lambda character: character.isalnum() or character == "_")
    pieces = ["".join(run) for _, run in runs]
    return "".join(" " if piece in ("a", "an", "the") else piece for piece in pieces).split()


def official_scores(found, right, version):
    """(exact match, F1) of one question as the published evaluation of SQuAD `version` is described."""
    if version == 2:
        # Right answers that normalise to nothing do not count; without any, no answer is the right one.
        right = [text for text in right if official_words(text)] or [""]
    exact = f1 = 0.0
    for text in right:
        one, other = official_words(found), official_words(text)
        exact = max(exact, float(one == other))
        left, common = list(other), 0
        for word in one:
            if word in left:
                left.remove(word)
                common += 1
        if version == 2 and (not one or not other):
            f1 = max(f1, float(one == other))
        elif common:
            precision, recall = common / len(one), common / len(other)
            f1 = max(f1, 2 * precision * recall / (precision + recall))
    return exact, f1


def scores(found, right, version):
    return tuple(
        METRICS[name]([found], [right], no_answer=version == 2) for name in ("exact_match", "squad_f1")
    )


NORMALISED = {
    "The  Cat": "cat",
    "a an the": "",
    "an   apple a day": "apple day",
    "theatre of the-sea": "theatre of thesea",  # punctuation goes before the articles
    "U.S.A.": "usa",
    "the.": "",
    "“the” end": "“ ” end",  # no ASCII punctuation, but a border of words
    "ÉCOLE": "école",
    "$1,000.50": "100050",
    "don't": "dont",
    "a_b the_x": "ab thex",
    "tab\tnew\nline\u00a0wide\u3000wider": "tab new line wide wider",
    "—": "—",
    "": "",
    "...": "",
    "the\u0301 cat": "\u0301 cat",  # an accent of its own is no letter to Python, and so ends the word
}


@pytest.mark.parametrize("text, normal", NORMALISED.items())
def test_normalisation(text, normal):
    assert normalise_answer(text) == normal
    assert official_words(text) == normal.split()


# found, right answers, (exact match, F1) of 1.1, and of 2.0
ANSWER_CASES = [
    ("The cat.", ["cat"], (1, 1), (1, 1)),
    ("black cat", ["a cat"], (0, 2 / 3), (0, 2 / 3)),
    ("cat cat dog", ["cat dog dog"], (0, 2 / 3), (0, 2 / 3)),  # words count as often as they occur
    ("dog", ["cat"], (0, 0), (0, 0)),
    ("dog", ["cat", "big dog", "dog"], (1, 1), (1, 1)),  # the best right answer
    ("big dog", ["big", "the dog house"], (0, 2 / 3), (0, 2 / 3)),
    ("", ["cat"], (0, 0), (0, 0)),
    ("the", ["a"], (1, 0), (1, 1)),  # nothing is left of both
    ("the", ["a", "cat"], (1, 0), (0, 0)),  # 2.0 drops the right answer of which nothing is left
    ("cat", ["."], (0, 0), (0, 0)),
]


@pytest.mark.parametrize("found, right, first, second", ANSWER_CASES)
def test_answers(found, right, first, second):
    for version, expected in ((1, first), (2, second)):
        assert official_scores(found, right, version) == pytest.approx(expected)
        assert scores(found, right, version) == pytest.approx(expected)


@pytest.mark.parametrize(
    "found, right, expected", [("", [], (1, 1)), ("cat", [], (0, 0)), ("an", [], (1, 1)), ("", [""], (1, 1))]
)
def test_questions_without_an_answer(found, right, expected):
    assert official_scores(found, right, 2) == pytest.approx(expected)
    assert scores(found, right, 2) == pytest.approx(expected)


def test_answers_are_averaged():
    found, right = ["the cat", "dog", ""], [["cat"], ["cat", "mouse"], []]
    assert metrics.exact_match(found, right, no_answer=True) == pytest.approx(2 / 3)
    assert metrics.squad_f1(found, right, no_answer=True) == pytest.approx(2 / 3)
    assert metrics.exact_match(found[:2], right[:2]) == 0.5


TEXTS = st.lists(
    st.sampled_from(
        ["the", "a", "An", "cat", "Cat,", "dog", "“dog”", ".", "naïve", "\u2028", "a.n", "the-cat"]
    ),
    max_size=5,
).map(" ".join)


@pytest.mark.parametrize("version", [1, 2])
@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_random_answers(version, found, right):
    assert scores(found, right, version) == pytest.approx(official_scores(found, right, version))


@given(st.text(max_size=20))
def test_any_text_is_normalised_as_spelled_out(text):
    assert normalise_answer(text).split() == official_words(text)
