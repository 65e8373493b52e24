"""Data and inputs that are wrong: each ends in one line with the place, the value and the fix, or is put right."""

import io
import json
import logging
import os
import sys

import jax
import ml_collections
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distiljax.errors import UserError
from distiljax.nn import EncoderConfig, HeadConfig, MaskedLM, TaskModel
from distiljax.tasks.datasets import label_names, load_task
from distiljax.tasks.inputs import as_input, read_inputs
from distiljax.tasks.predict import predict
from distiljax.tasks.presets import find_task
from distiljax.tasks.show import print_results

CLASSES, NUMBERS, ANSWERS = "sequence_classification", "regression", "squad"


def load(task, path, **data):
    config = ml_collections.ConfigDict({"source": str(path), **data})
    return load_task(find_task(task), config, required=("train",))["train"]


def csv(tmp_path, labels, name="rows.csv"):
    lines = ["text,label", *(f"text {row},{label}" for row, label in enumerate(labels, 1))]
    (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path / name


def jsonl(tmp_path, rows, name="rows.jsonl"):
    """Rows, or lines as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return tmp_path / name


def labelled(*labels):
    return [{"text": f"text {row}", "label": label} for row, label in enumerate(labels)]


def parquet(tmp_path, **columns):
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


def refused(task, path, *words, **data):
    with pytest.raises(UserError) as caught:
        load(task, path, **data)
    message = str(caught.value)
    assert message.isprintable(), message
    assert all(word in message for word in words), message
    return message


# Labels. ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["", "  ", "nan", "NaN"])
def test_a_missing_label_of_a_csv_is_no_class(tmp_path, missing):
    path = csv(tmp_path, ["good", "bad", missing, "bad", missing])
    refused(CLASSES, path, "rows.csv row 3 has no 'label' (2 such rows)", "remove these rows")


@pytest.mark.parametrize("placeholder", [-1, -100, "-1", -1.0])
def test_a_label_that_stands_for_none_is_no_class(tmp_path, placeholder):
    kind = type(placeholder)
    path = jsonl(tmp_path, labelled(kind(0), kind(1), placeholder, kind(1)))
    refused(CLASSES, path, "row 3: 'label' is -1", "usually means not labelled; remove those rows")
    refused(CLASSES, csv(tmp_path, [0, 1, placeholder]), "row 3: 'label' is -1", "not labelled")


@pytest.mark.parametrize(("labels", "names"), [((-1, 1), ("-1", "1")), ((-2, -1, 0), ("-2", "-1", "0"))])
def test_negative_numbers_that_are_classes(tmp_path, labels, names):
    rows = load(CLASSES, jsonl(tmp_path, labelled(*labels)))
    assert label_names(find_task(CLASSES), {"train": rows}) == names
    assert rows["label"][:] == list(range(len(labels)))


def test_fractions_are_no_classes_in_any_format(tmp_path):
    words = ("'label'", "holds 0.5, which is no class; take task regression")
    refused(CLASSES, csv(tmp_path, ["0.5", "1.0", "0.5"]), *words)
    refused(CLASSES, jsonl(tmp_path, labelled(0.5, 1.0)), *words)
    refused(CLASSES, jsonl(tmp_path, labelled(1.0, float("inf"))), "holds inf, which is no class")
    # Of words they are, and a whole number is one however it is written.
    rows = load(CLASSES, csv(tmp_path, ["v", "0.5", "v"]))
    assert label_names(find_task(CLASSES), {"train": rows}) == ("0.5", "v")
    rows = load(CLASSES, csv(tmp_path, ["1.0", "0.0", "1"]))
    assert label_names(find_task(CLASSES), {"train": rows}) == ("0", "1")
    assert rows["label"][:] == [1, 0, 1]


def test_as_many_classes_as_rows_are_another_column(tmp_path):
    refused(CLASSES, csv(tmp_path, range(60)), "'label'", "60 different values in 60 labels", "regression")
    assert len(set(load(CLASSES, csv(tmp_path, [*range(60)] * 2))["label"])) == 60
    assert len(set(load(CLASSES, csv(tmp_path, range(40)))["label"])) == 40


@pytest.mark.parametrize("value", ["1e39", "-1e39", "1e400", "", "nan"])
def test_a_number_that_float32_does_not_hold(tmp_path, value):
    refused(NUMBERS, csv(tmp_path, ["0.5", value]), "row 2: 'label' is", "expected a number")


def test_labels_of_types_that_are_none(tmp_path):
    texts = ["a", "b", "c"]
    days = pa.array([1, 2, 3], pa.date32())
    refused(NUMBERS, parquet(tmp_path, text=texts, label=days), "row 1: 'label' is datetime.date(")
    halves = pa.array(np.array([0, 1, 1], np.float16))
    assert load(CLASSES, parquet(tmp_path, text=texts, label=halves))["label"][:] == [0, 1, 1]
    assert load(NUMBERS, parquet(tmp_path, text=texts, label=halves))["label"][:] == [0.0, 1.0, 1.0]
    refused(
        CLASSES, jsonl(tmp_path, labelled(0, 2**70)), "row 2: 'label' is 1180591620717411303424", "too large"
    )
    empty = [{"tokens": [], "tags": []}] * 2
    refused("token_classification", jsonl(tmp_path, empty), "'tags'", "holds no labels")


def test_messages_list_few_names_and_cut_long_ones(tmp_path):
    rows = [{f"column {n} " + 50 * "x": "a" for n in range(30)}]
    message = refused(CLASSES, jsonl(tmp_path, rows), "it has 'column 0 xx", "…")
    assert len(message) < 700 and "column 9" in message and "column 10" not in message
    jsonl(tmp_path, labelled(*(f"class {n % 20:02}\n" + 50 * "x" for n in range(60))), "train.jsonl")
    jsonl(tmp_path, labelled("other\n"), "validation.jsonl")
    message = refused(CLASSES, tmp_path, "row 1: 'label' is 'other\\n'", "class 09", "…")
    assert len(message) < 700 and "class 10" not in message


# Texts and answers. -------------------------------------------------------------------------------------------------


def test_missing_texts_are_said(tmp_path, caplog):
    rows = labelled(0, 1, 0)
    del rows[1]["text"]
    rows[2]["text"] = None
    assert load(CLASSES, jsonl(tmp_path, rows))["text"][:] == ["text 0", "", ""]
    assert "2 of 3 'text' are missing; they are taken as empty" in caplog.text
    for row in rows:
        row["text"] = None
    refused(CLASSES, jsonl(tmp_path, rows), "'text'", "holds no text", "name another")


def asked(**changed):
    answers = {"text": ["Oslo"], "answer_start": [0]}
    return {"id": "q", "question": "where", "context": "Oslo it is", "answers": answers, **changed}


@pytest.mark.parametrize("start", ["Infinity", "NaN", str(2**63), str(2**70), "1e400"])
@pytest.mark.parametrize("as_text", [False, True])
def test_answers_at_no_place(tmp_path, start, as_text):
    answers = f'{{"text": ["Oslo"], "answer_start": [{start}]}}'
    row = json.dumps(asked(answers="ANSWERS"))
    row = row.replace('"ANSWERS"', json.dumps(answers) if as_text else answers)
    refused(ANSWERS, jsonl(tmp_path, [asked(), row]), "row 2: 'answers' is")


def test_ids_of_every_kind(tmp_path, caplog):
    off = {"text": ["Oslo"], "answer_start": [3]}
    path = jsonl(tmp_path, [asked(id=None, answers=off), asked(id="a\nb" + 90 * "c", answers=off), asked()])
    assert load(ANSWERS, path)["id"][:] == ["q"]
    (line,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert line.isprintable() and "(id 1, 'a\\nbccc" in line and "…" in line and 50 * "c" not in line
    for id_ in (["q"], {"q": 1}):
        refused(ANSWERS, jsonl(tmp_path, [asked(id=id_)]), "'id'", "expected text or numbers")


@pytest.mark.parametrize(
    ("article", "words"),
    [
        ({"paragraphs": 3}, ("article 2 has no 'paragraphs'", "a list")),
        ({"title": "x"}, ("article 2 has no 'paragraphs'",)),
        ({"paragraphs": [{"context": "x"}]}, ("paragraph 1 of article 2 has no 'qas'",)),
        ({"paragraphs": [{"qas": [{"id": "q", "question": "?"}]}]}, ("no 'context'", "a text")),
        (
            {"paragraphs": [{"context": "x", "qas": [{"question": "?"}]}]},
            ("question 1 of paragraph 1", "no 'id'"),
        ),
        ({"paragraphs": [{"context": "x", "qas": [7]}]}, ("question 1 of paragraph 1", "no 'id'")),
    ],
)
def test_a_squad_file_that_lacks_a_part(tmp_path, article, words):
    whole = {"data": [{"paragraphs": []}, article]}
    refused(ANSWERS, jsonl(tmp_path, [whole], "train.json"), "train.json: ", *words)


# Files. -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "rows.csv",
            b"text,label\na,1\nb, c,0\n",
            ("row 2", "Expected 2 columns", "put double quotes around"),
        ),
        ("rows.csv", b"text,label\na,1\nb\xff,0\n", ("row 2", "convert it to UTF-8")),
        ("rows.csv", b"", ("expected a line of column names",)),
        ("rows.tsv", b"text\tlabel\na\t1\tx\n", ("row 1", "tabs")),
        ("rows.parquet", b"PAR1 not really", ("a whole .parquet file",)),
        ("rows.jsonl", b"", ("rows.jsonl is empty; expected one JSON object a line",)),
        ("rows.jsonl", b" \n\n", ("rows.jsonl is empty",)),
        ("rows.jsonl", b'{\n "text": "a"\n}\n', ("line 1 is no JSON", "expected one object a line")),
        (
            "rows.json",
            b'{\n "text": ["a"],\n "label": [1]\n}\n',
            ("holds one object; expected a list of objects",),
        ),
        ("rows.jsonl", b"[" * 100_000, ("line 1 is no JSON: nested too deeply",)),
        ("rows.json", b'{"a":' * 100_000, ("line 1 is no JSON: nested too deeply",)),
        (
            "rows.jsonl",
            b'{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n{"text": 5, "label": 1}\n',
            ("row 3: 'text' is 5", "not all of one type"),
        ),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    refused(CLASSES, tmp_path / name, name, *words)


def test_a_path_that_is_no_file():
    refused(CLASSES, os.devnull, "is no regular file; expected a file")


def test_half_a_character_is_replaced(tmp_path):
    lines = ['{"text": "a \\ud800 b", "label": 0}', '{"text": "é", "label": 1}']
    assert load(CLASSES, jsonl(tmp_path, lines))["text"][:] == ["a ? b", "é"]


@pytest.mark.parametrize("metadata", [b"{", b"[]", b'{"info": {"features": {"other": {"_type": "Gone"}}}}'])
def test_damaged_metadata_are_left_out(tmp_path, caplog, metadata):
    table = pa.table({"text": ["a", "b"], "label": [0, 1]})
    pq.write_table(table.replace_schema_metadata({b"huggingface": metadata}), tmp_path / "train.parquet")
    assert load(CLASSES, tmp_path)["label"][:] == [0, 1]
    assert "the metadata cannot be read, and are left out" in caplog.text


# Prediction. --------------------------------------------------------------------------------------------------------


def standard_input(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    return read_inputs(None)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": NaN, "text": "a"}', "JSON compliant"),
        (b'{"id": [1e400], "text": "a"}', "JSON compliant"),
        (b'{"id": ' + b"7" * 5000 + b"}", "a number of too many digits"),
        (b'{"id": ' + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_lines_that_are_no_json(monkeypatch, line, reason):
    inputs = standard_input(monkeypatch, b'{"id": 1, "text": "a"}\n' + line)
    assert next(inputs)[1] == {"id": 1, "text": "a"}
    with pytest.raises(
        UserError, match=f"line 2 of standard input is no JSON .*{reason}.*; expected one object"
    ):
        next(inputs)


def test_a_null_and_a_closed_input(monkeypatch):
    with pytest.raises(UserError, match=r"line 1: 'text' is null; expected a string"):
        as_input({"text": None}, CLASSES, "line 1")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="no text; give it as an argument"):
        read_inputs(None)


def test_every_id_is_printed_in_every_encoding(monkeypatch):
    results = [{"id": "\ud800", "text": "café 🎬", "score": 1.0}, {"id": "a\nb", "text": "x", "score": 0.5}]
    for encoding in ("utf-8", "ascii", "latin-1"):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
        print_results(results, as_json=True, file=None, bar=False)
        assert [json.loads(line) for line in written.getvalue().splitlines()] == results
        print_results(results, as_json=False, file=None, bar=False)
        assert b"\na b: x\n  0.5000\n" in written.getvalue()
        monkeypatch.undo()


def test_nothing_to_predict_is_said(monkeypatch, caplog, capsys):
    print_results(standard_input(monkeypatch, b"\n"), as_json=True, file=None, bar=True)
    assert "standard input has no text" in caplog.text and not capsys.readouterr().out


@pytest.mark.parametrize(
    ("head", "settings", "message"),
    [
        (
            HeadConfig(CLASSES, ("a", "b")),
            {"no_answer": 0.0},
            "no_answer is 0.0, which a model for sequence class",
        ),
        (
            HeadConfig("token_classification", ("O", "I-X")),
            {"top_k": 2},
            "top_k is 2, which a model for token",
        ),
        (
            None,
            {"max_length": 16},
            "max_length is 16, which a model for masked lm has no use for; leave it out",
        ),
        (
            HeadConfig(CLASSES, ("a", "b")),
            {"max_length": -5},
            "max_length is -5; expected 8 to the model's 32 pos",
        ),
        (
            HeadConfig("question_answering"),
            {},
            "question of example 'q.n' has 40 tokens, .*expected at most 28: shorten the question",
        ),
    ],
)
def test_settings_that_a_head_has_no_use_for(tokenizer, head, settings, message):
    config = EncoderConfig(
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        hidden_size=8,
        num_layers=1,
        num_heads=1,
        intermediate_size=8,
        max_positions=32,
    )
    module = MaskedLM(config) if head is None else TaskModel(config, head)
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    item = {"id": "q\n", "question": "a " * 40, "context": "b", "text": "b"}
    with pytest.raises(UserError, match=message):
        next(predict(module, params, tokenizer, [item], **settings))
