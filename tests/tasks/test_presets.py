import dataclasses

import pytest

from distiljax.errors import UserError
from distiljax.tasks.metrics import METRICS
from distiljax.tasks.presets import COLUMNS, KINDS, PRESETS, TARGET, find_task

# The metrics of the GLUE benchmark (Wang et al. 2019, table 1).
GLUE = {
    "cola": {"matthews"},
    "sst2": {"accuracy"},
    "mrpc": {"accuracy", "f1"},
    "stsb": {"pearson", "spearman"},
    "qqp": {"accuracy", "f1"},
    "mnli": {"accuracy"},
    "qnli": {"accuracy"},
    "rte": {"accuracy"},
    "wnli": {"accuracy"},
}


def test_there_are_the_presets_that_are_promised():
    assert set(PRESETS) == {*GLUE, "imdb", "squad", "squad_v2", "conll2003", "wnut17"}
    assert set(KINDS) == {
        "sequence_classification",
        "regression",
        "token_classification",
        "question_answering",
    }


@pytest.mark.parametrize("name", GLUE)
def test_glue_has_its_official_metrics_and_no_test_split(name):
    task = find_task(name)
    assert GLUE[name] <= set(task.metrics)
    assert task.source == f"nyu-mll/glue/{name}"
    assert "test" not in task.splits
    assert ("text_pair" in task.columns) == (name not in ("cola", "sst2"))
    assert task.regression == (name == "stsb")


@pytest.mark.parametrize("task", [*PRESETS.values(), *KINDS.values()], ids=lambda task: task.name)
def test_every_task_is_complete(task):
    assert set(task.metrics) <= set(METRICS)
    assert set(COLUMNS[task.kind]) <= {*task.columns, "id"}
    assert TARGET[task.kind] in task.columns
    assert {"train", "validation"} <= set(task.splits)
    assert task.labels is None or len(set(task.labels)) == len(task.labels)


def test_mnli_validates_on_the_matched_genres_and_keeps_the_others():
    assert find_task("mnli").splits == {
        "train": "train",
        "validation": "validation_matched",
        "validation_mismatched": "validation_mismatched",
    }


def test_entity_labels_begin_with_o_and_go_by_pairs():
    labels = find_task("wnut17").labels
    assert labels[:4] == ("O", "B-corporation", "I-corporation", "B-creative-work")
    assert len(labels) == 13
    assert find_task("conll2003").labels[:3] == ("O", "B-PER", "I-PER")


def test_only_squad_2_has_questions_without_answers():
    assert [name for name, task in PRESETS.items() if task.no_answer] == ["squad_v2"]


def test_an_unknown_task_is_answered_with_the_list():
    with pytest.raises(UserError, match=r"task is 'sst-2'; expected one of cola, sst2, .*question_answering"):
        find_task("sst-2")


def test_presets_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        find_task("sst2").source = "other"
    with pytest.raises(TypeError):
        PRESETS["mine"] = find_task("sst2")
