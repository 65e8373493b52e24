"""Predictions of every head: against transformers' pipelines, over odd inputs, and from the command line."""

import copy
import dataclasses
import io
import itertools
import json
import logging
import os
import random
import re
import sys
import threading

import jax
import numpy as np
import pytest
import torch
import transformers
from tokenizers.processors import BertProcessing

import distiljax
from distiljax.cli import main
from distiljax.errors import UserError
from distiljax.nn import EncoderConfig, HeadConfig, MaskedLM, TaskModel
from distiljax.tasks import predict as prediction
from distiljax.tasks import stream
from distiljax.tasks.features import Pieces
from distiljax.tasks.inputs import split_words
from distiljax.tasks.predict import predict
from distiljax.tasks.show import print_results
from distiljax.train.checkpoint import Checkpointer
from distiljax.train.run import write_model, write_tokenizer

WORDS = re.findall(
    r"\w+",
    "the a of and to in is was for on that with he it as his by at from her an are were which this river",
)
HEADS = {
    "labels": HeadConfig("sequence_classification", ("bad", "middling", "good")),
    "number": HeadConfig("sequence_classification", ("score",), regression=True),
    "entities": HeadConfig("token_classification", ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")),
    "answers": HeadConfig("question_answering"),
}
POSITIONS = 64


@pytest.fixture(scope="module")
def small(tokenizer):
    """The tests' tokenizer, so that it adds [CLS] and [SEP] for transformers' pipelines."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = BertProcessing(
        ("[SEP]", tokenizer.sep_token_id), ("[CLS]", tokenizer.cls_token_id)
    )
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=POSITIONS, **special
    )


@pytest.fixture(scope="module")
def models(small, tmp_path_factory):
    """A random model of each head: module, parameters, Hugging Face directory."""
    made = {}
    for seed, (name, head) in enumerate(HEADS.items()):
        config = EncoderConfig(
            vocab_size=max(small.get_vocab().values()) + 1,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            intermediate_size=64,
            max_positions=POSITIONS,
            type_vocab_size=0 if name == "entities" else 2,
            initializer_range=0.3,  # so that the predictions differ from one another
        )
        module = TaskModel(head.encoder_config(config), head)
        params = module.init(jax.random.key(seed), np.zeros((1, 8), np.int32))["params"]
        params = jax.device_get(params)
        directory = tmp_path_factory.mktemp(name) / "model"
        distiljax.save_pretrained(module, params, directory, tokenizer=small)
        made[name] = module, params, directory
    return made


@pytest.fixture(scope="module")
def ask(models, small):
    """Predictions of one of the models."""

    def ask(name, inputs, **options):
        module, params, _ = models[name]
        return list(predict(module, params, small, inputs, **{"batch_size": 4, **options}))

    return ask


@pytest.fixture(scope="module")
def torch_model(models):
    def load(name):
        directory = str(models[name][2])
        kind = transformers.AutoConfig.from_pretrained(directory).architectures[0]
        return getattr(transformers, kind).from_pretrained(directory).eval()

    return load


@pytest.fixture(scope="module")
def pipeline(torch_model, small):
    def make(name, task, **options):
        model = torch_model(name)
        tokenizer = copy.copy(small)
        types = ["token_type_ids"] if model.config.model_type == "bert" else []
        tokenizer.model_input_names = ["input_ids", "attention_mask", *types]
        return transformers.pipeline(task, model=model, tokenizer=tokenizer, **options)

    return make


@pytest.fixture(autouse=True)
def few_lengths(monkeypatch):
    """Every length is a program to compile."""
    monkeypatch.setattr(stream, "LENGTHS", (POSITIONS,))


def sentences(count, seed=0, longest=40):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for _ in range(count)]


# Against transformers. ----------------------------------------------------------------------------------------------


def test_labels_and_scores_are_those_of_the_pipeline(ask, pipeline):
    texts = [*sentences(30), "", "Xyzzy, unbelievable rivers!", " ".join(["river"] * 200)]
    ours = ask("labels", texts, top_k=3)
    theirs = pipeline("labels", "text-classification", top_k=3, truncation=True)(texts)
    assert [result["text"] for result in ours] == texts
    for one, other in zip(ours, theirs, strict=True):
        assert [label["label"] for label in one["labels"]] == [label["label"] for label in other]
        np.testing.assert_allclose(
            [label["score"] for label in one["labels"]], [label["score"] for label in other], atol=1e-5
        )
    assert len({result["labels"][0]["label"] for result in ours}) > 1


def test_pairs_and_single_texts_in_one_stream(ask, pipeline):
    first, second = sentences(12, seed=1, longest=20), sentences(12, seed=2, longest=20)
    pairs = [{"id": n, "text": a, "text_pair": b} for n, (a, b) in enumerate(zip(first, second, strict=True))]
    theirs = pipeline("labels", "text-classification")(
        [{"text": a, "text_pair": b} for a, b in zip(first, second, strict=True)]
    )
    alone = pipeline("labels", "text-classification")(first)
    mixed = list(itertools.chain.from_iterable(zip(pairs, first, strict=True)))
    ours = ask("labels", mixed)
    assert [result["id"] for result in ours[::2]] == list(range(12))
    for one, other in [*zip(ours[::2], theirs, strict=True), *zip(ours[1::2], alone, strict=True)]:
        assert one["labels"][0]["label"] == other["label"]
        assert one["labels"][0]["score"] == pytest.approx(other["score"], abs=1e-5)


def test_a_regression_gives_the_logit(ask, pipeline):
    texts = sentences(10, seed=3)
    theirs = pipeline("number", "text-classification", function_to_apply="none")(texts)
    ours = ask("number", texts)
    np.testing.assert_allclose([r["score"] for r in ours], [r["score"] for r in theirs], atol=1e-5)
    assert all("labels" not in result for result in ours)


def test_entities_and_their_offsets_are_those_of_the_pipeline(ask, pipeline):
    # Words of one piece each, where the pipeline's "simple" grouping of pieces is a grouping of words.
    texts = [text.replace(" of ", " , ") for text in sentences(30, seed=4)]
    ours = ask("entities", texts)
    theirs = pipeline("entities", "token-classification", aggregation_strategy="simple")(texts)
    assert sum(map(len, theirs)) > 30
    for text, one, other in zip(texts, ours, theirs, strict=True):
        places = [(e["label"], e["start"], e["end"]) for e in one["entities"]]
        assert places == [(e["entity_group"], e["start"], e["end"]) for e in other]
        assert [e["text"] for e in one["entities"]] == [text[start:end] for _, start, end in places]
        np.testing.assert_allclose(
            [e["score"] for e in one["entities"]], [e["score"] for e in other], atol=1e-5
        )


def reference_answer(model, tokenizer, question, context, stride):
    """Start and end characters of the span with the highest sum of logits over transformers' own windows."""
    batch = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=POSITIONS,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=True,
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        fields = ("input_ids", "attention_mask", "token_type_ids")
        output = model(**{field: batch[field] for field in fields})
    best = (-np.inf, 0, 0)
    for row, offsets in enumerate(batch["offset_mapping"].tolist()):
        (places,) = np.nonzero(np.array(batch.sequence_ids(row)) == 1)
        starts, ends = output.start_logits[row].tolist(), output.end_logits[row].tolist()
        for first in places:
            for last in range(first, min(first + 30, places[-1] + 1)):
                best = max(best, (starts[first] + ends[last], offsets[first][0], offsets[last][1]))
    return best[1:]


def test_answers_are_those_of_the_same_model_in_pytorch(ask, torch_model, small):
    # The last two contexts are several windows long.
    contexts = [*sentences(8, seed=5), *(" ".join(sentences(6, seed)) for seed in (7, 8))]
    questions = sentences(10, seed=6, longest=6)
    items = [
        {"id": f"q{n}", "question": question, "context": context, "title": "left out"}
        for n, (question, context) in enumerate(zip(questions, contexts, strict=True))
    ]
    model = torch_model("answers")
    for item, result in zip(items, ask("answers", items), strict=True):
        start, end = reference_answer(model, small, item["question"], item["context"], POSITIONS // 4)
        (answer,) = result["answers"]
        assert (answer["start"], answer["end"]) == (start, end)
        assert answer["text"] == item["context"][start:end] and 0 < answer["score"] <= 1
        assert result.keys() == {"id", "question", "answers"} and result["id"] == item["id"]


def test_no_answer_where_its_logit_is_higher_by_the_threshold(ask):
    item = {"question": "is it", "context": "the river was by the name"}
    (always,) = ask("answers", [item], top_k=3)
    (never,) = ask("answers", [item], top_k=3, no_answer=-1e9)
    (same,) = ask("answers", [item], top_k=3, no_answer=1e9)
    assert len(always["answers"]) == 3 and all(answer["text"] for answer in always["answers"])
    texts = [answer["text"] for answer in always["answers"]]
    assert [answer["text"] for answer in never["answers"]] == ["", *texts[:2]]
    assert [answer["text"] for answer in same["answers"]] == texts


# Long, empty and odd inputs. ----------------------------------------------------------------------------------------


def test_texts_of_a_hundred_thousand_characters(ask, caplog, monkeypatch):
    text = " ".join(sentences(1400, seed=9))[:100_000]
    assert len(text) == 100_000
    (found,) = ask("entities", [text])
    ends = [entity["end"] for entity in found["entities"]]
    assert max(ends) > 99_000 and all(e["text"] == text[e["start"] : e["end"]] for e in found["entities"])
    (answered,) = ask("answers", [{"question": "who is it", "context": text}])
    (answer,) = answered["answers"]
    assert answer["text"] == text[answer["start"] : answer["end"]] != ""

    monkeypatch.setattr(logging.getLogger("distiljax"), "propagate", True)
    with caplog.at_level("WARNING", logger="distiljax"):
        cut, whole = ask("labels", [text, "the river"])
    assert f"1 of 2 texts are longer than {POSITIONS} tokens" in caplog.text
    (beginning,) = ask("labels", [text[:2000]])
    assert cut["labels"][0]["label"] == beginning["labels"][0]["label"] and cut["text"] == text
    assert cut["labels"][0]["score"] == pytest.approx(beginning["labels"][0]["score"], abs=1e-5)


@pytest.mark.parametrize("text", ["", "  ", "\x00", "\u200b\ufeff"])
def test_texts_of_zero_tokens(ask, text):
    assert ask("labels", [text, {"text": text, "text_pair": text}])[0]["labels"][0]["score"] > 0
    assert ask("answers", [{"question": text, "context": text}])[0]["answers"] == [
        {"text": "", "score": 1.0, "start": 0, "end": 0}
    ]
    found, words = ask("entities", [text, {"tokens": [text, text]}])
    assert found["entities"] == [] and words["labels"] == ["O", "O"]
    assert ask("entities", [{"tokens": []}])[0]["entities"] == []


def test_words_that_are_given_have_labels_and_offsets_in_their_text(ask):
    words = sentences(1, seed=11, longest=60)[0].split()
    (given,) = ask("entities", [{"id": 7, "tokens": words}])
    (plain,) = ask("entities", [" ".join(words)])
    assert given["id"] == 7 and given["tokens"] == words and len(given["labels"]) == len(words)
    assert given["text"] == plain["text"] and given["entities"] == plain["entities"] != []


def test_labels_without_prefixes_join_neighbours(models, small):
    module, params, _ = models["entities"]
    head = HeadConfig("token_classification", ("O", "NOUN", "VERB", "X", "Y"))
    (result,) = predict(module.clone(head=head), params, small, [sentences(1, seed=12)[0]])
    labels = [entity["label"] for entity in result["entities"]]
    assert labels and set(labels) <= {"NOUN", "VERB", "X", "Y"}
    gaps = [(a["end"], b["start"]) for a, b in itertools.pairwise(result["entities"])]
    assert all(
        label != after or end + 1 < start
        for label, after, (end, start) in zip(labels, labels[1:], gaps, strict=False)
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "Angela Merkel's visit (to the U.S.) cost $1,000...",
            "Angela Merkel 's visit ( to the U.S. ) cost $ 1,000 ...",
        ),
        ("@user loves #Berlin! http://x.org/a,b.", "@user loves #Berlin ! http://x.org/a,b ."),
        (
            "AT&T o'clock Smith-Jones well--then Paris,London",
            "AT&T o'clock Smith-Jones well -- then Paris , London",
        ),
        ("“Bonjour”, dit-il… 'quoted'", "“ Bonjour ” , dit-il … ' quoted '"),
        ("नमस्ते दुनिया। 北京 is", "नमस्ते दुनिया । 北 京 is"),
        (" \t\n ", ""),
    ],
)
def test_words_of_plain_text(text, words):
    places = split_words(text)
    assert [text[begin:end] for begin, end in places] == words.split()
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(places))


# Streaming. ---------------------------------------------------------------------------------------------------------


def test_an_endless_stream_is_answered_in_order_by_few_programs(models, small, monkeypatch):
    monkeypatch.setattr(stream, "WINDOW", 64)
    monkeypatch.setattr(stream, "LENGTHS", (24, POSITIONS))
    module, params, _ = models["labels"]
    texts, read = sentences(500, seed=13, longest=60), []

    def endless():
        for number in itertools.count():
            read.append(number)
            yield {"id": number, "text": texts[number % 500]}

    before = prediction._outputs._cache_size()
    results = predict(module, params, small, endless(), batch_size=16)
    first = list(itertools.islice(results, 400))
    results.close()
    assert [result["id"] for result in first] == list(range(400))
    # A window is answered, one waits, one is being tokenised.
    assert len(read) <= 400 + 4 * 64
    assert prediction._outputs._cache_size() - before <= len(stream.LENGTHS)
    alone = [next(predict(module, params, small, [result["text"]])) for result in first[::150]]
    for one, other in zip(first[::150], alone, strict=True):
        assert one["labels"][0]["score"] == pytest.approx(other["labels"][0]["score"], abs=1e-5)


@pytest.fixture
def tokenised(monkeypatch):
    """What `make_features` was called with: the tokenizer or its pieces, and the number of examples."""
    calls, make = [], prediction.make_features

    def noted(kind, dataset, tokenizer, **options):
        calls.append((tokenizer, len(next(iter(dataset.values())))))
        return make(kind, dataset, tokenizer, **options)

    monkeypatch.setattr(prediction, "make_features", noted)
    return calls


def test_pairs_among_single_texts_are_tokenised_together(ask, tokenised):
    texts = sentences(64, seed=15, longest=20)
    inputs = [
        {"text": a, "text_pair": b} if n % 3 else a for n, (a, b) in enumerate(itertools.pairwise(texts))
    ]
    results = ask("labels", inputs, batch_size=16)
    assert [count for _, count in tokenised] == [42, 21]
    assert len({id(pieces) for pieces, _ in tokenised}) == 1 and isinstance(tokenised[0][0], Pieces)
    for given, result in list(zip(inputs, results, strict=True))[::20]:
        (alone,) = ask("labels", [given])
        assert alone["labels"][0]["label"] == result["labels"][0]["label"]
        assert alone["labels"][0]["score"] == pytest.approx(result["labels"][0]["score"], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "inputs", "words"),
    [
        ("labels", ["a", {"txt": "b"}], ("input 2", "no 'text'", "'txt'")),
        ("labels", ["a", {"text": 5}], ("input 2", "'text' is 5", "string")),
        ("labels", ["a", 5], ("input 2", "number")),
        ("entities", ["a", {"tokens": "words"}], ("input 2", "list of strings")),
        ("answers", [{"question": "a", "context": "b"}, "what"], ("input 2", "--context")),
        ("answers", [{"question": "a", "context": "b"}, {"question": "a"}], ("input 2", "no 'context'")),
        (
            "answers",
            [{"question": "a", "context": "b"}, {"id": "long", "question": "a " * 99, "context": "b"}],
            ("long", "max_length"),
        ),
    ],
)
def test_a_bad_input_is_named_after_those_before_it_are_answered(models, small, name, inputs, words):
    module, params, _ = models[name]
    results = predict(module, params, small, inputs)
    next(results)
    with pytest.raises(UserError) as error:
        next(results)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 4}, "top_k is 4; expected 1 to 3"),
        ({"max_length": 65}, "64 positions"),
        ({"batch_size": 0}, "is 0"),
    ],
)
def test_settings_outside_their_range(ask, options, words):
    with pytest.raises(UserError, match=words):
        ask("labels", ["a"], **options)


def test_a_reader_that_leaves_ends_the_stream(models, small, monkeypatch):
    module, params, _ = models["labels"]
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        results = predict(module, params, small, itertools.repeat("the river"), batch_size=8)
        with pytest.raises(BrokenPipeError):
            print_results(results, as_json=True, file=None, bar=True)
        monkeypatch.undo()
        results.close()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


# The command. -------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(models, monkeypatch, capsys):
    """Runs `predict` on some bytes of standard input; its status, JSON or lines, and errors."""

    def run(name, *arguments, stdin=b"", status=0):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        assert main(["predict", f"--model={models[name][2]}", *arguments]) == status
        captured = capsys.readouterr()
        lines = captured.out.splitlines()
        return [json.loads(line) for line in lines] if "--json" in arguments else lines, captured.err

    return run


def test_lines_before_one_that_is_no_utf8_are_answered(command):
    results, errors = command(
        "labels", "--json", stdin=b"\xef\xbb\xbfthe river\r\n\n  \nit was\nc\xe9\nhis", status=2
    )
    assert [result["text"] for result in results] == ["the river", "it was"]
    assert "line 5 of standard input is not UTF-8 (byte 2" in errors and len(errors.splitlines()) == 1


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (b'{"text": "a"}\n{"text": "b"', ("line 2", "no JSON")),
        (b'{"text": "a"}\n["b"]', ("line 2", "JSON list", "object")),
        (b'{"text": "a"}\n{"tokens": ["b"]}', ("line 2", "no 'text'", "'tokens'", "expected")),
        (b'{"text": "a"}\n' + b"[" * 100_000, ("line 2", "nested too deeply")),
    ],
)
def test_bad_json_lines_are_named(command, lines, words):
    results, errors = command("labels", "--json", stdin=lines, status=2)
    assert len(results) == 1
    assert all(word in errors for word in words) and len(errors.splitlines()) == 1


def test_int8_says_nearly_the_same(command):
    (exact,), (found,) = (
        command("labels", "--json", "--top_k=2", f"--dtype={dtype}", "the river")[0]
        for dtype in ("float32", "int8")
    )
    scores = [{one["label"]: one["score"] for one in result["labels"]} for result in (exact, found)]
    assert scores[1] == {label: pytest.approx(score, abs=0.05) for label, score in scores[0].items()}
    assert scores[1] != scores[0]


def test_json_lines_are_found_out_and_ids_come_back(command, tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_text('{"id": "x", "text": "the river", "label": 1}\n{"id": null, "text": "\\ud800 was"}\n')
    results, _ = command("labels", "--json", f"--file={file}", "--dtype=bfloat16")
    assert [result["id"] for result in results] == ["x", None] and results[1]["text"] == "? was"
    as_text, _ = command("labels", "--json", f"--file={file}", "--format=text")
    assert [result["text"] for result in as_text] == file.read_text().splitlines()
    assert "either as arguments" in command("labels", "a", f"--file={file}", status=2)[1]


def test_questions_of_a_file_and_contexts_of_a_question(command, tmp_path):
    context = "he was by the river, which is this"
    (tmp_path / "context.txt").write_text(context, encoding="utf-8")
    asked, _ = command(
        "answers", "--json", f"--context={tmp_path / 'context.txt'}", "who is it", "where was he"
    )
    given, _ = command("answers", "--json", "--question=who is it", context)
    assert [result["question"] for result in asked] == ["who is it", "where was he"]
    (one,), (other,) = asked[0]["answers"], given[0]["answers"]
    assert one == {**other, "score": pytest.approx(other["score"], rel=1e-5)} and one["text"] in context
    assert "--context" in command("answers", "who is it", status=2)[1]
    assert "one of" in command("answers", "--question=a", "--text_pair=b", "c", status=2)[1]


def test_what_a_person_sees(command):
    lines, _ = command("labels", "--top_k=3", "--text_pair=of it", "the river")
    assert (
        lines[:2] == ["the river", "of it"]
        and len(lines) == 5
        and lines[2].split()[1] in HEADS["labels"].labels
    )
    lines, _ = command("number", stdin=b'{"id": 3, "text": "the\\nriver"}')
    assert lines[0] == "3: the river" and float(lines[1])
    text = sentences(1, seed=11)[0]
    lines, _ = command("entities", text)
    assert (
        lines[0] == text and all(line.split()[1] in ("PER", "LOC") for line in lines[1:]) and len(lines) > 1
    )
    lines, _ = command("answers", "--question=who", "--no_answer=-1000000", "the river")
    assert lines[0] == "who" and "(no answer)" in lines[1]


def test_a_run_on_questions_without_answers_may_give_none(models, small, tmp_path, capsys):
    module, params, _ = models["answers"]
    write_tokenizer(tmp_path, small)
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save_best(1, params, {})
    checkpoints.close()
    contexts = sentences(40, seed=16, longest=2)

    def texts(task, *flags):
        head, encoder = dataclasses.asdict(module.head), dataclasses.asdict(module.config)
        write_model(tmp_path, kind="finetune", task=task, head=head, encoder=encoder)
        assert main(["predict", f"--model={tmp_path}", "--json", "--question=who", *flags, *contexts]) == 0
        lines = capsys.readouterr().out.splitlines()
        return [json.loads(line)["answers"][0]["text"] for line in lines]

    answers = texts("squad")
    assert all(answers)
    maybe = texts("squad_v2")
    assert maybe == texts("squad", "--no_answer=0") and 0 < sum(map(bool, maybe)) < len(maybe)
    assert texts("squad_v2", "--no_answer=inf") == answers


@pytest.mark.parametrize("flag", ["--question=who", "--text_pair=the river"])
def test_a_model_without_the_needed_head(command, flag):
    _, errors = command("entities", flag, "the river", status=2)
    assert (
        "distiljax finetune" in errors and "token classification" in errors and len(errors.splitlines()) == 1
    )


def test_masks_are_filled_in_the_same_stream(small):
    config = EncoderConfig(
        vocab_size=max(small.get_vocab().values()) + 1,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        intermediate_size=16,
        max_positions=POSITIONS,
    )
    module = MaskedLM(config)
    params = module.init(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
    items = [{"id": 1, "text": "the [MASK] of [MASK]"}, "a [MASK]", "it was"]
    results = predict(module, params, small, items, top_k=2)
    first, second = next(results), next(results)
    assert first["id"] == 1 and [len(choices) for choices in first["masks"]] == [2, 2]
    assert second["masks"][0][0]["filled"].startswith("a ")
    with pytest.raises(UserError, match="no \\[MASK\\]"):
        next(results)
