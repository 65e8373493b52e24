"""`distiljax finetune`: each kind of task by its command, resume, invariance, distillation on the task, hand-over."""

import csv
import json
import os
import re
import signal
import threading
import time

import numpy as np
import pytest
from flax import traverse_util

import distiljax
from distiljax.cli import main
from tests.integration.processes import finish_processes, start_processes

QUICK = {
    "batch_size": 16,
    "steps": 6,
    "log_every": 2,
    "checkpoint.every": 100,
    "dtype": "float32",
    "optimizer.peak_lr": 3e-3,
    "data.max_length": 32,
    "data.stride": 8,
    "data.shapes": 1,
    "eval.batch_size": 64,
    "eval.every": 100,  # at the start and at the end
}


@pytest.fixture(scope="module")
def words(corpus):
    return [word for word in re.findall(r"[a-z]{2,6}", corpus.read_text().lower()) if word != "mask"][:20_000]


def some(words, rng, least=3, most=9):
    start = rng.integers(0, len(words) - 20)
    return words[start : start + rng.integers(least, most)]


@pytest.fixture(scope="module")
def reviews(words, tmp_path_factory):
    """Texts that are about one of two words; columns with names of their own."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["opinion", "stars"])
        for _ in range(300):
            label = rng.integers(2)
            word = "the" if label else "if"
            text = [word if rng.random() < 0.5 else other for other in some(words, rng)]
            writer.writerow([" ".join([word, *text]), "good" if label else "bad"])
    return path


@pytest.fixture(scope="module")
def finetune(teacher):
    """Runs the command on CSV or JSONL data and gives its result.json."""

    def run(workdir, task, *arguments, model=teacher, **changes):
        settings = {**QUICK, **{key.replace("__", "."): value for key, value in changes.items()}}
        flags = [f"--config.{key}={value}" for key, value in settings.items()]
        what = [f"--config.task={task}", f"--config.model={model}"]
        assert main(["finetune", *what, *flags, *arguments, f"--workdir={workdir}"]) == 0
        return json.loads((workdir / "result.json").read_text())

    return run


@pytest.fixture(scope="module")
def columns(reviews):
    return {"data__source": reviews, "data__text": "opinion", "data__label": "stars"}


@pytest.fixture(scope="module")
def classified(finetune, columns, tmp_path_factory):
    path = tmp_path_factory.mktemp("classified") / "run"
    return path, finetune(path, "sequence_classification", **columns, steps=30)


def parameters(workdir, checkpoint="last"):
    _, params = distiljax.from_pretrained(workdir, head="any", checkpoint=checkpoint)
    return traverse_util.flatten_dict(params, sep="/")


def assert_close(one, other, tolerance):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=0, atol=tolerance, err_msg=name)


def test_a_classifier_learns_and_is_handed_over(classified, tmp_path, capsys):
    path, result = classified
    assert result["best"]["accuracy"] > 0.9 and result["metric"] == "accuracy"
    assert result["start"]["accuracy"] < 0.8 and result["examples"] == 270
    assert main(["export", f"--workdir={path}", f"--out={tmp_path / 'out'}"]) == 0
    assert "AutoModelForSequenceClassification" in capsys.readouterr().out

    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert model.config.id2label == {0: "bad", 1: "good"}
    tokenizer = distiljax.load_tokenizer(path)
    ids = np.array(
        [tokenizer("the end of it")["input_ids"], tokenizer("if end of it")["input_ids"]], np.int32
    )
    module, params = distiljax.from_pretrained(path, head="any")
    ours = np.asarray(module.apply({"params": params}, ids))
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids).long()).logits.numpy()
    assert np.abs(ours - theirs).max() < 1e-5
    assert ours.argmax(1).tolist() == [1, 0]
    assert "text-classification" in (tmp_path / "out" / "README.md").read_text()


def test_the_report_of_a_fine_tuning(classified, tmp_path, capsys):
    path, result = classified
    assert main(["report", f"--workdir={path}", f"--out={tmp_path / 'report'}"]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert f"accuracy {100 * result['best']['accuracy']:.1f} %" in text and "Fine-tuning" in text
    assert (tmp_path / "report" / "plots" / "task-accuracy.png").stat().st_size > 1000
    assert "Masked" not in text


def test_a_finished_run_is_left_as_it_is(classified, finetune, columns):
    path, result = classified
    before = (path / "result.json").stat().st_mtime_ns
    assert finetune(path, "sequence_classification", **columns, steps=30) == result
    assert (path / "result.json").stat().st_mtime_ns == before


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(finetune, columns, teacher, tmp_path):
    settings = dict(columns, steps=12, log_every=1, checkpoint__every=4, data__max_train_examples=60)
    finetune(tmp_path / "unbroken", "sequence_classification", **settings)

    def stop():
        log = tmp_path / "broken" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (log.exists() and '"step": 5' in log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    flags = [f"--config.{k.replace('__', '.')}={v}" for k, v in {**QUICK, **settings}.items()]
    flags += ["--config.task=sequence_classification", f"--config.model={teacher}"]
    assert main(["finetune", *flags, f"--workdir={tmp_path / 'broken'}"]) == 0
    thread.join()
    assert not (tmp_path / "broken" / "result.json").exists()
    finetune(tmp_path / "broken", "sequence_classification", **settings)
    assert_close(parameters(tmp_path / "broken"), parameters(tmp_path / "unbroken"), 0)


def test_the_update_does_not_depend_on_how_the_batch_is_split(finetune, columns, tmp_path):
    dropless = dict(columns, hidden_dropout=0.1, steps=4)
    finetune(tmp_path / "whole", "sequence_classification", **dropless)
    expected = parameters(tmp_path / "whole")
    changes = {"parallel__mode": "pmap", "micro_batch_size": 1}
    finetune(tmp_path / "split", "sequence_classification", **dropless, **changes)
    assert_close(parameters(tmp_path / "split"), expected, 1e-5)


def test_a_teacher_of_the_task_is_learnt_from(classified, finetune, columns, tmp_path):
    teacher, _ = classified
    settings = dict(columns, steps=4, teacher=teacher)
    live = finetune(tmp_path / "live", "sequence_classification", **settings, cache_teacher=False)
    cached = finetune(tmp_path / "cached", "sequence_classification", **settings)
    assert (tmp_path / "cached" / "teacher_logits.npz").exists()
    assert not (tmp_path / "live" / "teacher_logits.npz").exists()
    assert_close(parameters(tmp_path / "cached"), parameters(tmp_path / "live"), 1e-5)
    assert live["best"]["loss"] == pytest.approx(cached["best"]["loss"], rel=1e-4)
    log = [json.loads(line) for line in (tmp_path / "cached" / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in log if record["split"] == "train"]
    assert trained
    # Both terms are learnt from, each with its weight of one.
    for record in trained:
        assert record["loss_soft"] > 0 and record["loss_label"] > 0
        assert record["loss"] == pytest.approx(record["loss_soft"] + record["loss_label"], rel=1e-5)


def test_two_processes_make_the_run_of_one(classified, finetune, columns, teacher, tmp_path):
    settings = {**QUICK, **{key.replace("__", "."): value for key, value in columns.items()}, "steps": 4}
    settings |= {"task": "sequence_classification", "model": teacher, "teacher": classified[0]}
    command = ["finetune", *(f"--config.{key}={value}" for key, value in settings.items())]
    ends = finish_processes(start_processes([*command, f"--workdir={tmp_path / 'two'}"], 2))
    assert [status for status, _ in ends] == [0, 0], ends
    assert main([*command, f"--workdir={tmp_path / 'one'}"]) == 0
    assert_close(parameters(tmp_path / "two"), parameters(tmp_path / "one"), 1e-5)
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert two["best"]["accuracy"] == one["best"]["accuracy"]
    assert two["best"]["loss"] == pytest.approx(one["best"]["loss"], rel=1e-4)


def test_pairs_and_numbers(finetune, words, tmp_path):
    """How much of the second text stands in the first."""
    rng = np.random.default_rng(1)
    rows = []
    for _ in range(120):
        first = some(words, rng, 4, 8)
        second = [word if rng.random() < 0.5 else "if" for word in first]
        rows.append({"text": " ".join(first), "text_pair": " ".join(second), "label": float(rng.normal())})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = finetune(tmp_path / "run", "regression", data__source=path, data__text_pair="text_pair")
    assert -1 <= result["best"]["pearson"] <= 1 and result["best"]["loss"] < result["start"]["loss"]
    module, _ = distiljax.from_pretrained(tmp_path / "run", head="any")
    assert module.head.regression


def test_tokens(finetune, words, tmp_path):
    """The words behind "the" are things; one text is longer than a window."""
    rng = np.random.default_rng(2)
    rows = []
    for index in range(150):
        tokens = [word for word in some(words, rng, 5, 12) if word != "the"] * (9 if index == 0 else 1)
        for at in range(1, len(tokens), 3):
            tokens[at - 1] = "the"
        tags = ["B-thing" if at and tokens[at - 1] == "the" else "O" for at in range(len(tokens))]
        rows.append({"words": tokens, "what": tags})
    path = tmp_path / "tokens.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"data__source": path, "data__tokens": "words", "data__tags": "what", "steps": 30}
    result = finetune(tmp_path / "run", "token_classification", **settings)
    assert result["best"]["entity_f1"] > 0.6 > result["start"]["entity_f1"]


def test_answers(finetune, words, tmp_path):
    """The answer is the word that the question names; some contexts are longer than a window."""
    rng = np.random.default_rng(3)
    rows = []
    for index in range(150):
        context = " ".join(some(words, rng, 6, 12) * (6 if index % 50 == 0 else 1))
        answer = next((word for word in context.split()[1:] if len(word) > 3), "")
        if not answer:
            continue
        answers = {"text": [answer], "answer_start": [context.index(f" {answer}") + 1]}
        rows.append(
            {"id": str(index), "question": f"where is {answer}", "context": context, "answers": answers}
        )
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = finetune(tmp_path / "run", "question_answering", data__source=path, steps=20)
    assert result["best"]["loss"] < result["start"]["loss"]
    assert 0 <= result["best"]["exact_match"] <= result["best"]["squad_f1"] <= 1


def test_what_the_data_must_not_do_to_a_run(finetune, columns, teacher, reviews, tmp_path, capsys):
    """The user's files are not removed, and a run that has begun keeps its labels."""
    data = tmp_path / "run" / "data"
    data.mkdir(parents=True)
    (data / "train.csv").write_bytes(reviews.read_bytes())
    settings = {**columns, "data__source": data / "train.csv", "steps": 2, "data__holdout": 0.2}
    flags = [f"--config.{key.replace('__', '.')}={value}" for key, value in {**QUICK, **settings}.items()]
    command = ["finetune", "--config.task=sequence_classification", f"--config.model={teacher}", *flags]
    assert main([*command, "--config.data.text=review", f"--workdir={tmp_path / 'run'}"]) == 2
    assert "no column 'review'" in capsys.readouterr().err
    assert main([*command, f"--workdir={tmp_path / 'run'}"]) == 0
    assert (data / "train.csv").exists()

    (tmp_path / "run" / "result.json").unlink()
    before = (tmp_path / "run" / "model.json").read_text()
    (data / "train.csv").write_text(reviews.read_text().replace(",bad", ",poor"))
    assert main([*command, f"--workdir={tmp_path / 'run'}"]) == 2
    assert "was started with the head bad, good" in capsys.readouterr().err
    assert (tmp_path / "run" / "model.json").read_text() == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data.max_length": 4}, ("data.max_length is 4", "64")),
        ({"data.seed": -1}, ("data.seed is -1",)),
        ({"hidden_dropout": -0.5}, ("hidden_dropout is -0.5",)),
        ({"loss.soft": -1.0}, ("soft -1.0",)),
        ({"loss.label": 0.0}, ("no teacher",)),
        ({"task": "sst3"}, ("sst3", "sst2", "token_classification")),
        ({"data.text": "opinions"}, ("opinions", "opinion", "stars")),
        ({"data.source": "nowhere.csv"}, ("nowhere.csv",)),
        ({"steps": 0, "epochs": 1e300}, ("epochs is 1e+300",)),
    ],
)
def test_bad_settings(changes, named, columns, teacher, tmp_path, capsys):
    settings = {**QUICK, **{key.replace("__", "."): value for key, value in columns.items()}}
    settings |= {"task": "sequence_classification", "model": teacher, **changes}
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    assert main(["finetune", *flags, f"--workdir={tmp_path / 'run'}"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert all(word in line for word in named), line
    assert not (tmp_path / "run" / "model.json").exists() or "epochs" in named[0]
