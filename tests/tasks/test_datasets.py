import json
import logging

import datasets
import ml_collections
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distiljax.errors import UserError
from distiljax.tasks.datasets import holds_out, label_names, load_task
from distiljax.tasks.presets import find_task
from distiljax.tasks.sources import Hub, hub_name, open_source

ROWS = [
    {"sentence": "a fine film", "label": 1},
    {"sentence": "a bad film, they say", "label": 0},
    {"sentence": 'no "film" \'at all', "label": 0},
    {"sentence": "naïve 映画 🎬", "label": 1},
]


def write(path, rows):
    """Rows in the format that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        tab = path.suffix == ".tsv"
        lines = [("\t" if tab else ",").join(rows[0])]
        for row in rows:
            cells = [str(cell) for cell in row.values()]
            quoted = cells if tab else ['"' + cell.replace('"', '""') + '"' for cell in cells]
            lines.append(("\t" if tab else ",").join(quoted))
        path.write_bytes("\r\n".join(lines).encode() + b"\r\n")
    return path


def load(name, required=("train",), splits=None, **data):
    return load_task(find_task(name), ml_collections.ConfigDict(data), splits=splits, required=required)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json", "csv", "tsv"])
def test_every_format_gives_the_same_examples(tmp_path, suffix):
    write(tmp_path / f"train.{suffix}", ROWS)
    write(tmp_path / f"dev.{suffix}", ROWS[:2])
    splits = load("sst2", ("train", "validation"), source=str(tmp_path))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 4, "validation": 2}
    assert splits["train"]["text"][:] == [row["sentence"] for row in ROWS]
    assert splits["train"]["label"][:] == [1, 0, 0, 1]
    assert label_names(find_task("sst2"), splits) == ("negative", "positive")


@pytest.mark.parametrize(
    "name",
    [
        "train-00000-of-00001.parquet",
        "data/train-00000-of-00001.parquet",
        "train/part.parquet",
        "my_train.parquet",
        "all.parquet",
    ],
)
def test_a_directory_is_read_as_the_hub_lays_it_out(tmp_path, name):
    write(tmp_path / name, ROWS)
    (tmp_path / "README.md").write_text("notes")
    assert len(load("sst2", source=str(tmp_path))["train"]) == 4


def test_mnli_keeps_its_two_validation_splits_apart(tmp_path):
    rows = [{"premise": "it rains", "hypothesis": "it is wet", "label": 0}]
    for number, name in enumerate(("train", "validation_matched", "validation_mismatched"), 1):
        write(tmp_path / f"{name}.parquet", rows * number)
    splits = load("mnli", source=str(tmp_path))
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 1,
        "validation": 2,
        "validation_mismatched": 3,
    }
    assert splits["train"][0] == {"text": "it rains", "text_pair": "it is wet", "label": 0}


def test_imdb_validates_on_its_test_split(tmp_path):
    rows = [{"text": "good", "label": 1}, {"text": "bad", "label": 0}]
    write(tmp_path / "train.parquet", rows)
    write(tmp_path / "test.parquet", rows * 2)
    assert {name: len(split) for name, split in load("imdb", source=str(tmp_path)).items()} == {
        "train": 2,
        "validation": 4,
    }


def test_a_glob_and_files_of_their_own(tmp_path):
    write(tmp_path / "a.csv", ROWS[:2])
    write(tmp_path / "b.csv", ROWS[2:])
    checked = write(tmp_path / "checked" / "x.jsonl", ROWS[:3])
    splits = load("sst2", source=str(tmp_path / "*.csv"), validation=str(checked))
    assert len(splits["train"]) == 4 and len(splits["validation"]) == 3
    # Files alone: the preset's own source, which is on the hub, is not asked.
    splits = load("sst2", train=str(tmp_path / "a.csv"), validation=str(checked))
    assert len(splits["train"]) == 2 and len(splits["validation"]) == 3


def test_a_compressed_table(tmp_path):
    plain = write(tmp_path / "rows.jsonl", ROWS)
    with pa.output_stream(tmp_path / "train.jsonl.gz") as file:
        file.write(plain.read_bytes())
    plain.unlink()
    assert len(load("sst2", source=str(tmp_path))["train"]) == 4


def test_columns_by_name_and_classes_from_the_data(tmp_path):
    rows = [{"a": "x", "b": "y", "topic": topic} for topic in ("sports", "arts", "sports", "news")]
    path = write(tmp_path / "rows.csv", rows)
    splits = load("sequence_classification", source=str(path), text="a", text_pair="b", label="topic")
    assert splits["train"][0] == {"text": "x", "text_pair": "y", "label": 2}
    assert label_names(find_task("sequence_classification"), splits) == ("arts", "news", "sports")


@pytest.mark.parametrize("values", [[1, 10, 2, 1], ["1", "10", "2", "1"], [1.0, 10.0, 2.0, 1.0]])
def test_numbers_as_classes_are_sorted_as_numbers(tmp_path, values):
    path = write(tmp_path / "rows.parquet", [{"text": "x", "label": value} for value in values])
    splits = load("sequence_classification", source=str(path))
    assert label_names(find_task("sequence_classification"), splits) == ("1", "2", "10")
    assert splits["train"]["label"][:] == [0, 2, 1, 0]


@pytest.mark.parametrize("values", [["negative", "positive"], ["0", "1"], [False, True], [0.0, 1.0]])
def test_classes_of_a_preset_by_name_or_id(tmp_path, values):
    path = write(tmp_path / "rows.parquet", [{"sentence": "x", "label": value} for value in values])
    assert load("sst2", source=str(path))["train"]["label"][:] == [0, 1]


def with_names(path, names, ids, column="label", text="sentence"):
    features = datasets.Features({text: datasets.Value("string"), column: datasets.ClassLabel(names=names)})
    rows = {text: ["x"] * len(ids), column: ids}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))


def test_names_in_a_parquet_file_go_before_the_order_of_its_ids(tmp_path):
    with_names(tmp_path / "train.parquet", ["positive", "negative"], [0, 1, 1])
    splits = load("sst2", source=str(tmp_path))
    assert splits["train"]["label"][:] == [1, 0, 0]
    assert label_names(find_task("sst2"), splits) == ("negative", "positive")


def test_a_data_set_with_other_names_than_the_presets_keeps_its_own(tmp_path):
    with_names(tmp_path / "train.parquet", ["bad", "so-so", "good"], [0, 2, 1])
    splits = load("sst2", source=str(tmp_path))
    assert splits["train"]["label"][:] == [0, 2, 1]
    assert label_names(find_task("sst2"), splits) == ("bad", "so-so", "good")


def test_splits_whose_ids_are_named_in_another_order(tmp_path):
    with_names(tmp_path / "train.parquet", ["no", "yes"], [0, 1], text="text")
    with_names(tmp_path / "validation.parquet", ["yes", "no"], [0, 1], text="text")
    splits = load("sequence_classification", source=str(tmp_path))
    assert splits["validation"]["label"][:] == [1, 0]


def test_numbers_for_regression(tmp_path):
    path = write(tmp_path / "rows.csv", [{"text": "x", "label": "3.5"}, {"text": "y", "label": "-1e2"}])
    splits = load("regression", source=str(path))
    assert splits["train"]["label"][:] == [3.5, -100.0]
    assert label_names(find_task("regression"), splits) == ("score",)


def test_empty_texts_are_texts(tmp_path):
    rows = [{"text": "", "pair": None, "label": 0}, {"text": " \t", "pair": "", "label": 1}]
    path = write(tmp_path / "rows.jsonl", rows)
    splits = load("sequence_classification", source=str(path), text_pair="pair")
    assert splits["train"]["text"][:] == ["", " \t"]
    assert splits["train"]["text_pair"][:] == ["", ""]


def test_text_of_a_csv_stays_as_it_is(tmp_path):
    path = write(tmp_path / "rows.csv", [{"text": text, "label": 1} for text in ("007", "null", "1.0")])
    path.write_bytes(path.read_bytes() + b'"two\r\nlines",0\r\n')
    assert load("sequence_classification", source=str(path))["train"]["text"][:] == [
        "007",
        "null",
        "1.0",
        "two\r\nlines",
    ]


TAGGED = [
    {"tokens": ["Ann", "met", "Bob"], "ner_tags": [9, 0, 9]},
    {"tokens": [], "ner_tags": []},
    {"tokens": ["Rome"], "ner_tags": [7]},
]


def test_tags_without_names_take_the_presets(tmp_path):
    write(tmp_path / "train.parquet", TAGGED)
    splits = load("wnut17", source=str(tmp_path))
    assert splits["train"]["tokens"][:] == [row["tokens"] for row in TAGGED]
    assert splits["train"]["tags"][:] == [[9, 0, 9], [], [7]]
    assert label_names(find_task("wnut17"), splits)[9] == "B-person"


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_tags_as_words(tmp_path, suffix):
    rows = [
        {"words": ["Ann", "sleeps"], "ner": ["B-PER", "O"]},
        {"words": ["in", "New", "York"], "ner": ["O", "B-LOC", "I-LOC"]},
    ]
    if suffix == "csv":
        rows = [{name: " ".join(items) for name, items in row.items()} for row in rows]
    path = write(tmp_path / f"rows.{suffix}", rows)
    splits = load("token_classification", source=str(path), tokens="words", tags="ner")
    assert label_names(find_task("token_classification"), splits) == ("B-LOC", "B-PER", "I-LOC", "O")
    assert splits["train"]["tags"][:] == [[1, 3], [3, 0, 2]]
    assert splits["train"]["tokens"][1] == ["in", "New", "York"]


CONTEXT = "Ann lives in Rome. Bob lives in Oslo."
ANSWERS = {"text": ["Rome", "Oslo"], "answer_start": [13, 32]}


def question(id_, answers=ANSWERS, context=CONTEXT):
    return {"id": id_, "question": "Where?", "context": context, "answers": answers}


@pytest.mark.parametrize("form", ["columns", "objects", "text", "squad"])
def test_answers_in_every_form(tmp_path, form):
    objects = [{"text": t, "answer_start": s} for t, s in zip(*ANSWERS.values(), strict=True)]
    path = tmp_path / "train.json"
    if form == "squad":
        asked = {"id": "q1", "question": "Where?", "answers": objects}
        articles = [{"title": "T", "paragraphs": [{"context": CONTEXT, "qas": [asked]}]}]
        path.write_text(json.dumps({"version": "1.1", "data": articles}))
    else:
        forms = {"columns": ANSWERS, "objects": objects, "text": json.dumps(ANSWERS)}
        write(path, [question("q1", forms[form])])
    assert load("squad", source=str(tmp_path))["train"][0] == question("q1")


def test_questions_without_ids_are_numbered(tmp_path):
    rows = [question(""), question("")]
    for row in rows:
        del row["id"]
    write(tmp_path / "train.parquet", rows)
    assert load("squad", source=str(tmp_path))["train"]["id"][:] == ["1", "2"]


def test_answers_that_stand_elsewhere_are_counted_and_not_trained_on(tmp_path, caplog):
    wrong = {"text": ["Rome"], "answer_start": [12]}
    partly = {"text": ["Rome", "Oslo"], "answer_start": [-4, 32]}
    rows = [question("good"), question("wrong", wrong), question("partly", partly)]
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "validation.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        splits = load("squad", source=str(tmp_path))
    assert splits["train"]["id"][:] == ["good", "partly"]
    assert splits["train"][1]["answers"] == {"text": ["Oslo"], "answer_start": [32]}
    assert splits["validation"]["id"][:] == ["good", "wrong", "partly"]
    assert (
        "2 of 3 examples have answers that do not stand at their answer_start (id wrong, partly)"
        in caplog.text
    )


def test_questions_without_an_answer_belong_to_squad_2(tmp_path):
    none = {"text": [], "answer_start": []}
    write(tmp_path / "train.jsonl", [question("q1"), question("q2", none)])
    with pytest.raises(UserError, match=r"1 questions without an answer \(id q2\); take task squad_v2"):
        load("squad", source=str(tmp_path))
    assert load("squad_v2", source=str(tmp_path))["train"][1]["answers"] == none


def test_a_share_of_the_training_split_is_held_out_once(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": f"text {i}", "label": i % 2} for i in range(50)])
    first, again, other = (
        load("sequence_classification", ("train", "validation"), source=str(path), holdout=0.2, seed=seed)
        for seed in (1, 1, 2)
    )
    parts = [set(first[name]["text"][:]) for name in ("train", "validation")]
    assert [len(part) for part in parts] == [40, 10] and not parts[0] & parts[1]
    assert first["validation"]["text"][:] == again["validation"]["text"][:]
    assert first["validation"]["text"][:] != other["validation"]["text"][:]


def test_samples_are_random_and_the_same_for_everyone(tmp_path):
    write(tmp_path / "train.jsonl", [{"text": f"text {i}", "label": i // 50} for i in range(100)])
    write(tmp_path / "validation.jsonl", [{"text": f"text {i}", "label": i // 50} for i in range(100)])
    data = {"source": str(tmp_path), "max_train_examples": 20, "max_eval_examples": 30, "seed": 3}
    first, again = (load("sequence_classification", **data) for _ in range(2))
    assert {name: len(split) for name, split in first.items()} == {"train": 20, "validation": 30}
    assert first["train"]["text"][:] == again["train"]["text"][:]
    assert set(first["train"]["label"][:]) == {0, 1}


def test_a_test_split_without_labels_is_left_out_unless_asked_for(tmp_path):
    rows = [{"text": "x", "label": 0}, {"text": "y", "label": 1}]
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "test.jsonl", [{"text": "x", "label": -1}])
    assert list(load("sequence_classification", source=str(tmp_path))) == ["train"]
    with pytest.raises(UserError, match=r"split test of .* has no labels \(all of 'label' are -1 or empty\)"):
        load("sequence_classification", source=str(tmp_path), test="test")
    with pytest.raises(UserError, match=r"has no labels .*; name a split that has labels as data.validation"):
        load("sequence_classification", source=str(tmp_path), validation="test")
    write(tmp_path / "test.jsonl", [{"text": "x"}])
    assert list(load("sequence_classification", source=str(tmp_path))) == ["train"]
    with pytest.raises(UserError, match="has no column 'label'"):
        load("sequence_classification", source=str(tmp_path), test="test")


def test_only_the_splits_that_are_asked_for_are_read(tmp_path):
    rows = [{"text": "x", "label": 0}, {"text": "y", "label": 1}]
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.jsonl", rows)
    (tmp_path / "test.jsonl").write_text("no JSON")
    source = {"source": str(tmp_path)}
    assert list(load("sequence_classification", splits=("train", "validation"), **source)) == [
        "train",
        "validation",
    ]
    assert list(load("sequence_classification", (), splits=("validation",), **source)) == ["validation"]
    with pytest.raises(UserError, match="test.jsonl line 1 is no JSON"):
        load("sequence_classification", splits=("train", "test"), **source)
    write(tmp_path / "test.jsonl", [{"text": "x", "label": -1}])
    with pytest.raises(UserError, match="split test of .* has no labels"):  # it is asked for
        load("sequence_classification", (), splits=("test",), **source)


def test_what_is_held_out_is_held_out_of_every_split_that_is_read(tmp_path, caplog):
    path = write(tmp_path / "rows.jsonl", [{"text": f"text {i}", "label": i % 2} for i in range(50)])
    data = {"source": str(path), "holdout": 0.2}
    both = load("sequence_classification", splits=("train", "validation"), **data)
    for split in both:
        with caplog.at_level(logging.INFO):
            (alone,) = load("sequence_classification", (), splits=(split,), **data).items()
        assert alone[0] == split and alone[1]["text"][:] == both[split]["text"][:]
        assert f"10 of the 50 examples of {path} are held out for validation" in caplog.text
    assert holds_out(find_task("sequence_classification"), data)
    assert not holds_out(find_task("sequence_classification"), {**data, "validation": str(path)})
    # A validation split that is there is none of the training split's, read or not.
    load("sequence_classification", (), splits=("train",), validation=str(path), **data)
    assert (
        len(load("sequence_classification", splits=("train",), validation=str(path), **data)["train"]) == 50
    )


def test_a_file_that_is_only_scored_may_be_of_one_class(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": "x", "label": "b"}])
    splits = load("sequence_classification", (), splits=("validation",), validation=str(path))
    assert label_names(find_task("sequence_classification"), splits) == ("b",)


def test_tags_that_only_the_validation_split_has_are_classes(tmp_path):
    write(tmp_path / "train.jsonl", [{"tokens": ["a", "b"], "tags": ["O", "B-X"]}])
    write(tmp_path / "validation.jsonl", [{"tokens": ["a", "b"], "tags": ["B-Y", "O"]}])
    splits = load("token_classification", source=str(tmp_path))
    assert label_names(find_task("token_classification"), splits) == ("B-X", "B-Y", "O")
    assert [splits[name]["tags"][:] for name in ("train", "validation")] == [[[2, 0]], [[1, 2]]]


def test_a_directory_of_several_splits_is_no_file_of_one(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", ROWS)
    with pytest.raises(UserError, match="data.validation is .* which has the splits test, train; name one"):
        load("sst2", source=str(tmp_path), validation=str(tmp_path))


def refused(tmp_path, rows, message, name="sequence_classification", suffix="jsonl", **data):
    path = write(tmp_path / f"rows.{suffix}", rows)
    with pytest.raises(UserError, match=message) as caught:
        load(name, source=str(path), **data)
    assert "\n" not in str(caught.value)


def test_columns_that_do_not_exist_are_answered_with_those_that_do(tmp_path):
    refused(tmp_path, ROWS, r"rows.jsonl has no column 'text' \(data.text\); it has 'sentence', 'label'")
    refused(tmp_path, ROWS, "no column 'stars' .*it has 'sentence', 'label'", name="sst2", label="stars")
    refused(
        tmp_path, ROWS, "data.tokens is 'x', but sst2 has no such column; expected text", "sst2", tokens="x"
    )


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (
            2,
            "rows.jsonl row 3: 'label' is 2, which is no class; expected 0 to 1, or one of negative, positive",
        ),
        (-1, "row 3: 'label' is -1, which is no class"),
        (0.5, "row 3: 'label' is 0.5, which is no class"),
        (None, r"row 3 has no 'label' \(1 such rows\); expected a label in each"),
        ([1], "not all of one type"),
        ("positive", "not all of one type"),
    ],
)
def test_labels_that_are_no_class(tmp_path, label, message):
    rows = [{"sentence": "x", "label": value} for value in (0, 1, label)]
    refused(tmp_path, rows, message, name="sst2")


def test_labels_of_a_wrong_type(tmp_path):
    refused(
        tmp_path,
        [{"text": "x", "label": [1]}],
        "'label' of .* holds list.*; expected labels: text or numbers",
    )
    refused(tmp_path, [{"text": "x", "label": 0.5}], "holds 0.5, which is no class; take task regression")
    refused(tmp_path, [{"text": "x", "label": "a"}], "nothing but 'a'; expected two classes or more")
    refused(
        tmp_path,
        [{"text": 3, "label": "a"}, {"text": 4, "label": "b"}],
        "'text' of .* holds int64; expected text",
    )
    for value in ("high", "nan", "inf"):
        rows = [{"text": "x", "label": "1"}, {"text": "x", "label": value}]
        refused(tmp_path, rows, f"row 2: 'label' is '{value}'; expected a number", name="regression")


def test_labels_that_training_never_saw_are_named(tmp_path):
    write(tmp_path / "train.jsonl", [{"text": "x", "label": name} for name in ("a", "b")])
    write(tmp_path / "validation.jsonl", [{"text": "x", "label": name} for name in ("a", "c", "d", "c")])
    with pytest.raises(
        UserError, match=r"validation .* row 2: 'label' is 'c', .*\(so are 'd'\); .*one of a, b"
    ):
        load("sequence_classification", source=str(tmp_path))


def test_tags_that_do_not_fit(tmp_path):
    short = [*TAGGED[:2], {"tokens": ["a", "b"], "ner_tags": [0]}]
    refused(tmp_path, short, "row 3 has 2 tokens and 1 tags; expected as many", name="wnut17")
    outside = [*TAGGED[:2], {"tokens": ["a", "b"], "ner_tags": [0, 13]}]
    refused(tmp_path, outside, "row 3: 'ner_tags' is 13, which is no class; expected 0 to 12", name="wnut17")
    refused(
        tmp_path, [{"tokens": ["a"], "ner_tags": None}, TAGGED[0]], "row 1 has no 'ner_tags'", name="wnut17"
    )
    refused(
        tmp_path,
        [{"tokens": ["a"], "ner_tags": 1}],
        "'ner_tags' .* holds int64; expected lists",
        name="wnut17",
    )


def test_answers_that_cannot_be_used(tmp_path):
    refused(tmp_path, [question("q", "Rome")], "row 1: 'answers' is 'Rome'; expected", name="squad")
    lone = {"text": ["Rome"], "answer_start": []}
    refused(tmp_path, [question("q", lone)], "row 1: 'answers' is ", name="squad")
    wrong = {"text": ["Rome"], "answer_start": [0]}
    path = write(tmp_path / "train.jsonl", [question("q", wrong)])
    with pytest.raises(UserError, match="no answer at its answer_start, .* first id q"):
        load("squad", source=str(path))


def test_sources_that_are_not_there(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("text")
    for source, message in {
        str(tmp_path / "none.csv"): "does not exist",
        str(tmp_path / "none"): "does not exist",
        str(tmp_path / "*.csv"): "does not exist",
        str(tmp_path / "empty"): "holds no .csv, .tsv, .jsonl, .json, .parquet file",
        str(tmp_path / "notes.txt"): "notes.txt is no table",
        "gs://bucket/rows": "is remote; copy it",
        "nobody/nothing": "is no file or directory here, and the hub gives no such data set",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            load("sst2", source=source)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="data.source is empty and regression has no data of its own"):
        load("regression")


def test_splits_that_are_not_there(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(
        UserError, match=r"has no validation split: .* has the splits train; .*data.holdout=0.1"
    ):
        load("sst2", ("train", "validation"), source=str(tmp_path))
    with pytest.raises(UserError, match=r"data.validation is 'dev'; .* has the splits train"):
        load("sst2", source=str(tmp_path), validation="dev")
    with pytest.raises(UserError, match="data.holdout is 1.5; expected a share"):
        load("sst2", source=str(tmp_path), holdout=1.5)
    with pytest.raises(UserError, match="leaves nothing of 4 training examples"):
        load("sst2", source=str(tmp_path), holdout=0.9)
    with pytest.raises(UserError, match="data.max_train_examples is -1"):
        load("sst2", source=str(tmp_path), max_train_examples=-1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.jsonl", b'{"sentence": "x", "label": 1}\n{"sentence"', "line 2 is no JSON"),
        ("train.jsonl", b"[1, 2]\n", "line 1 holds '\\[1, 2\\]'; expected an object"),
        ("train.jsonl", b'{"sentence": "\xff", "label": 1}\n', "line 1 is no JSON"),
        ("train.csv", b"sentence,label\nx\xff,1\n", "train.csv cannot be read"),
        ("train.csv", b"sentence,label\nx,1,2\n", "train.csv cannot be read"),
        ("train.csv", b"", "train.csv cannot be read"),
        ("train.csv", b"label,sentence,label\n0,x,1\n", "has the column 'label' twice"),
        ("train.csv", b"sentence,label\n", "has no rows"),
        ("train.parquet", b"PAR1 not really", "train.parquet cannot be read"),
    ],
)
def test_damaged_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load("sst2", source=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_names_on_the_hub():
    assert hub_name("squad") == ("squad", None)
    assert hub_name("stanfordnlp/imdb") == ("stanfordnlp/imdb", None)
    assert hub_name("nyu-mll/glue/sst2") == hub_name("glue/sst2") == ("nyu-mll/glue", "sst2")
    assert hub_name("hf:user/name/config") == ("user/name", "config")


def test_the_hubs_reader_gives_what_the_files_give(tmp_path, monkeypatch):
    # A directory beside which the name is that of a data set: `datasets` reads it instead of asking the network.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "user" / "name").mkdir(parents=True)
    with_names(tmp_path / "user" / "name" / "train.parquet", ["no", "yes"], [0, 1, 1])
    hub, files = Hub("user/name"), open_source("user/name")
    assert hub.splits == files.splits == ("train",)
    assert hub.columns("train") == files.columns("train") == ["sentence", "label"]
    read = [source.read("train", ["label"]) for source in (hub, files)]
    assert read[0].features == read[1].features
    assert read[0].to_dict() == read[1].to_dict() == {"label": [0, 1, 1]}


def test_a_large_table_is_loaded_quickly_and_exactly(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 100_000)
    table = pa.table({"premise": ["p"] * 100_000, "hypothesis": ["h"] * 100_000, "label": labels})
    pq.write_table(table, tmp_path / "train.parquet")
    splits = load("mnli", source=str(tmp_path))
    assert np.array_equal(splits["train"]["label"][:], labels)
