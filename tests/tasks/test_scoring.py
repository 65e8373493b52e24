"""From logits to a task's metrics, over rows that are windows of examples."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import seqeval.metrics

from distiljax.errors import UserError
from distiljax.nn.heads import HeadConfig
from distiljax.tasks.features import make_features
from distiljax.tasks.presets import PRESETS, find_task
from distiljax.tasks.scoring import Scorer

TAGS = PRESETS["conll2003"].labels
TOKENS = HeadConfig("token_classification", TAGS)
ANSWERS = HeadConfig("question_answering")


def one_hot(labels, count, height=1.0):
    """float32 [..., count]: `height` at the label, 0 elsewhere."""
    return (height * np.eye(count)[labels]).astype(np.float32)


# --- sequences ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentences(tokenizer):
    dataset = {"text": ["the river", "", "that was her", "a"], "label": [0, 1, 1, 0]}
    return make_features("sequence_classification", dataset, tokenizer, max_length=16), dataset


def test_classes(sentences):
    task = PRESETS["mrpc"]
    score = Scorer(task, HeadConfig("sequence_classification", task.labels), *sentences)
    assert score(list(one_hot([0, 1, 1, 0], 2))) == {"f1": 1.0, "accuracy": 1.0}
    assert list(score(list(one_hot([0, 1, 0, 1], 2)))) == ["f1", "accuracy"]  # the first decides
    assert score(list(one_hot([0, 1, 0, 1], 2) - 9)) == {"f1": 0.5, "accuracy": 0.5}


def test_numbers(tokenizer):
    task = PRESETS["stsb"]
    dataset = {"text": ["a", "the", "of"], "text_pair": ["a", "a", "a"], "label": [0.5, 4.0, 2.25]}
    features = make_features("sequence_classification", dataset, tokenizer, max_length=16, regression=True)
    score = Scorer(
        task, HeadConfig("sequence_classification", ("score",), regression=True), features, dataset
    )
    assert score([np.float32([3.0]), np.float32([10.0]), np.float32([6.5])]) == {
        "pearson_spearman": pytest.approx(1),
        "pearson": pytest.approx(1),
        "spearman": pytest.approx(1),
    }
    assert score([np.float32([1.0])] * 3) == {"pearson_spearman": 0, "pearson": 0, "spearman": 0}


def test_a_split_without_labels_is_refused(tokenizer):
    dataset = {"text": ["a"]}
    features = make_features("sequence_classification", dataset, tokenizer, max_length=16, labelled=False)
    with pytest.raises(UserError, match="the split to score for sst2 has no labels"):
        Scorer(PRESETS["sst2"], HeadConfig("sequence_classification", ("a", "b")), features, dataset)


def test_logits_of_other_rows_are_refused(sentences):
    score = Scorer(PRESETS["sst2"], HeadConfig("sequence_classification", ("a", "b")), *sentences)
    with pytest.raises(ValueError, match="logits of 3 rows; expected 4"):
        score(list(one_hot([0, 1, 1], 2)))


# --- words -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tagged(tokenizer):
    """Sentences of 1 to 40 words of one to three pieces in windows of 16; one word has no piece."""
    rng = np.random.default_rng(0)
    words = ["the", "river", "unbelievable", "unable", "which", "x1", "7.5"]
    lengths = [1, 40, 3, 25, 12, 13, 14]
    dataset = {
        "tokens": [list(rng.choice(words, length)) for length in lengths],
        "tags": [rng.integers(0, len(TAGS), length).tolist() for length in lengths],
    }
    dataset["tokens"][2][1] = "\x7f"
    dataset["tags"][2][1] = TAGS.index("O")
    return make_features("token_classification", dataset, tokenizer, max_length=16, stride=6), dataset


def logits_of(features, dataset, tags, rng):
    """For each row: at the words it is scored for, their tags; anywhere else, whatever."""
    rows = []
    for row in range(len(features)):
        words = features.words[features.starts[row] : features.starts[row + 1]]
        logits = rng.normal(0, 9, (len(words), len(TAGS)))
        for place in np.flatnonzero(words >= 0):
            logits[place] = one_hot(tags[features.examples[row]][words[place]], len(TAGS))
        rows.append(logits.astype(np.float32))
    return rows


def test_right_tags(tagged):
    features, dataset = tagged
    assert len(features) > len(dataset["tags"])
    score = Scorer(PRESETS["conll2003"], TOKENS, *tagged)
    logits = logits_of(features, dataset, dataset["tags"], np.random.default_rng(1))
    assert score(logits) == {"entity_f1": 1.0, "entity_precision": 1.0, "entity_recall": 1.0}


def test_any_tags(tagged):
    """The scores are those of the tags themselves, however windows cut the sentences."""
    features, dataset = tagged
    rng = np.random.default_rng(2)
    tags = [
        [int(rng.integers(len(TAGS))) if rng.random() < 0.3 else tag for tag in example]
        for example in dataset["tags"]
    ]
    tags[2][1] = TAGS.index("O")  # what a word without pieces counts as
    task = dataclasses.replace(
        PRESETS["conll2003"],
        metrics=("entity_f1", "entity_precision", "entity_recall", "accuracy", "macro_f1"),
    )
    found = Scorer(task, TOKENS, *tagged)(logits_of(features, dataset, tags, rng))
    named, wanted = ([[TAGS[tag] for tag in example] for example in one] for one in (tags, dataset["tags"]))
    assert found["entity_f1"] == pytest.approx(seqeval.metrics.f1_score(wanted, named))
    assert found["entity_precision"] == pytest.approx(seqeval.metrics.precision_score(wanted, named))
    assert found["entity_recall"] == pytest.approx(seqeval.metrics.recall_score(wanted, named))
    assert found["accuracy"] == pytest.approx(seqeval.metrics.accuracy_score(wanted, named))
    assert 0 < found["macro_f1"] < found["accuracy"]


# --- answers -----------------------------------------------------------------------------------------------

LONG = "the river was that which " * 12


@pytest.fixture(scope="module")
def asked(tokenizer):
    """A long context of several windows, a short one, one without an answer, one with two."""
    dataset = {
        "id": ["long", "short", "none", "two"],
        "question": ["which river", "a", "was it", "of her"],
        "context": [LONG + "unbelievable. " + LONG, "it is believ7", LONG, "from him and for her"],
        "answers": [
            {"text": ["unbelievable."], "answer_start": [len(LONG)]},
            {"text": ["believ7"], "answer_start": [6]},
            {"text": [], "answer_start": []},
            {"text": ["and for", "for her"], "answer_start": [9, 13]},
        ],
    }
    return make_features("question_answering", dataset, tokenizer, max_length=32, stride=8), dataset


def pointed(features, labels):
    """Logits that point to the tokens [N, 2]."""
    rows = [np.zeros((length, 2), np.float32) for length in features.lengths]
    for logits, (start, end) in zip(rows, labels, strict=True):
        logits[start, 0] = logits[end, 1] = 9.0 if start else 4.0
    return rows


def test_right_answers(asked):
    features, _ = asked
    assert len(features) > len(asked[1]["id"]) and features.labels[:, 0].any()
    score = Scorer(PRESETS["squad_v2"], ANSWERS, *asked)
    logits = pointed(features, features.labels)
    assert score(logits) == {"squad_f1": 1.0, "exact_match": 1.0}
    assert score.predictions(logits) == ["unbelievable.", "believ7", "", "and for"]
    assert Scorer(PRESETS["squad"], ANSWERS, *asked).predictions(logits)[2] != ""  # there is no such choice


def test_answers_that_fit_in_part(asked):
    features, _ = asked
    labels = features.labels.copy()
    (row,) = np.flatnonzero(features.examples == 3)
    labels[row] += [1, 1]  # "for her", the second right answer
    score = Scorer(PRESETS["squad_v2"], ANSWERS, *asked)
    assert score.predictions(pointed(features, labels))[3] == "for her"
    assert score(pointed(features, labels)) == {"squad_f1": 1.0, "exact_match": 1.0}
    labels[row] -= [2, 0]  # "him and for her": 2 of its 4 words are in a right answer of 2
    assert score(pointed(features, labels)) == {
        "squad_f1": pytest.approx((3 + 2 / 3) / 4),
        "exact_match": 0.75,
    }


def test_saying_that_there_is_no_answer(asked):
    features, _ = asked
    score = Scorer(PRESETS["squad_v2"], ANSWERS, *asked)
    assert score(pointed(features, np.zeros((len(features), 2), int))) == {
        "squad_f1": 0.25,
        "exact_match": 0.25,
    }


def test_a_users_own_task_is_scored(asked):
    task = find_task("question_answering")
    assert set(Scorer(task, ANSWERS, *asked)(pointed(asked[0], asked[0].labels))) == set(task.metrics)
