from __future__ import annotations

import csv
import json
import logging
import re

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import distiljax
from distiljax.comparison import summarise
from distiljax.errors import UserError
from distiljax.hub import vocabulary_size
from distiljax.nn import HeadConfig
from distiljax.tasks import evaluate_task as evaluating
from distiljax.tasks.compare import DISTILLED, compare, model_paths, plan_fits
from distiljax.tasks.config import compare_config, finetune_data_config
from distiljax.tasks.datasets import load_task
from distiljax.tasks.evaluate_task import TaskScores, data_settings, evaluate_task
from distiljax.tasks.label_order import label_order
from distiljax.tasks.presets import find_task
from distiljax.train.run import read_json
from tests import compiling

SEEDS = (0, 1)


@pytest.fixture(scope="module", autouse=True)
def compiled_in_haste():
    with compiling.in_haste():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
    """Two small models that were never trained."""
    paths = {}
    for seed, name in enumerate(("teacher", "student")):
        config = distiljax.EncoderConfig(
            vocab_size=vocabulary_size(tokenizer),
            hidden_size=16,
            num_layers=1,
            num_heads=2,
            intermediate_size=32,
            max_positions=64,
            initializer_range=0.2,
        )
        module = distiljax.MaskedLM(config)
        params = jax.device_get(
            jax.jit(module.init)(jax.random.key(seed), np.zeros((1, 4), np.int32))["params"]
        )
        paths[name] = tmp_path_factory.mktemp("models") / name
        distiljax.save_pretrained(module, params, paths[name], tokenizer=tokenizer)
    return paths


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    """A folder `sst2`: what is "positive" has the word "river"."""
    root = tmp_path_factory.mktemp("data")
    (root / "sst2").mkdir()
    for split, count in (("train", 64), ("validation", 24)):
        lines = [
            {"sentence": f"{'the river' if i % 2 else 'an'} {'was with him ' * (i % 5)}", "label": i % 2}
            for i in range(count)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (root / "sst2" / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def config(models, data_root):
    config = compare_config()
    config.models = ",".join(f"{name}={path}" for name, path in models.items())
    config.tasks, config.seeds = ("sst2",), SEEDS
    config.task_teacher = "teacher"
    config.data_root = str(data_root)
    config.finetune.update({"batch_size": 8, "steps": 12, "dtype": "float32", "log_every": 6})
    config.finetune.update({f"{place}_dropout": 0.0 for place in ("hidden", "attention", "head")})
    config.finetune.optimizer.peak_lr = 1e-2
    config.finetune.data.update({"max_length": 24, "stride": 4, "shapes": 1})
    config.overrides.sst2 = ConfigDict({"steps": 10})
    return config


@pytest.fixture(scope="module")
def compared(config, tmp_path_factory):
    """A finished comparison: its directory and what it gave."""
    workdir = tmp_path_factory.mktemp("compared")
    result = compare(config, workdir)
    assert result.finished
    return workdir, result.facts


def test_of_a_finished_run_the_best_parameters_stay(compared):
    workdir, _ = compared
    runs = [path.parent for path in workdir.rglob("result.json")]
    assert runs and not [run for run in runs if (run / "checkpoints").exists()]
    assert all(any((run / "best").iterdir()) for run in runs)


def test_a_split_that_is_not_there_is_noticed_before_the_first_run(config, tmp_path):
    other = config.copy_and_resolve_references()
    other.split = "test"
    with pytest.raises(UserError, match="sst2 has no test split"):
        compare(other, tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_model_is_fine_tuned_with_every_seed(compared):
    workdir, _ = compared
    runs = {path.parent.relative_to(workdir).as_posix() for path in workdir.rglob("result.json")}
    folders = ("teacher", "student", "student-task-distillation")
    assert runs == {f"sst2/{folder}/seed-{seed}" for folder in folders for seed in SEEDS}
    for seed in SEEDS:
        run = read_json(workdir / f"sst2/student-task-distillation/seed-{seed}/config.json")
        assert run["seed"] == seed and run["steps"] == 10
        assert run["teacher"] == str(workdir / f"sst2/teacher/seed-{seed}")


def test_the_scores_are_those_of_the_runs(compared):
    workdir, facts = compared
    assert [model["name"] for model in facts["models"]] == ["teacher", "student", DISTILLED.format("student")]
    found = {
        model["name"]: {
            "sst2": [read_json(workdir / f"sst2/{folder}/seed-{seed}/result.json")["best"] for seed in SEEDS]
        }
        for model, folder in zip(
            facts["models"], ("teacher", "student", "student-task-distillation"), strict=True
        )
    }
    for name, summary in summarise(facts["tasks"], found).items():
        (model,) = (model for model in facts["models"] if model["name"] == name)
        assert {key: model[key] for key in summary} == summary
    _, params = distiljax.from_pretrained(workdir / "sst2/student/seed-0", head="any")
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert {(model["parameters"], model["bytes"]) for model in facts["models"]} == {(size, 4 * size)}
    assert all(model["latency_ms"] > 0 and model["tokens_per_second"] > 0 for model in facts["models"])
    assert facts["speed"]["seq_len"] == 64  # the models have no more positions
    stored = read_json(workdir / "comparison.json")
    assert stored["models"] == json.loads(json.dumps(facts["models"]))
    assert re.search(r"\| student \|.*%", (workdir / "comparison.md").read_text())
    assert (workdir / "plots" / "quality_speed.png").stat().st_size


def test_a_finished_comparison_repeats_no_run_and_a_new_seed_adds_one(compared, config):
    workdir, facts = compared
    results = {path: path.stat().st_mtime_ns for path in workdir.rglob("result.json")}
    more = config.copy_and_resolve_references()
    more.models, more.task_teacher, more.seeds = (
        f"teacher={model_paths(config.models)['teacher']}",
        "",
        (0, 1, 2),
    )
    again = compare(more, workdir).facts
    assert all(path.stat().st_mtime_ns == time for path, time in results.items())
    assert {path for path in workdir.rglob("result.json")} - results.keys() == {
        workdir / "sst2/teacher/seed-2/result.json"
    }
    values = [made["models"][0]["scores"]["sst2"]["accuracy"]["values"] for made in (again, facts)]
    assert values[0][:2] == values[1] and len(values[0]) == 3


def test_models_that_are_fine_tuned_get_the_same_scores(compared, data_root, tmp_path):
    workdir, facts = compared
    data = finetune_data_config()
    data.source, data.max_length = str(data_root / "sst2"), 0
    runs = [workdir / f"sst2/student/seed-{seed}" for seed in SEEDS]
    exported = tmp_path / "hf"
    distiljax.export(runs[0], exported)
    evaluation = evaluate_task("sst2", {"run": runs, "hf": [exported]}, data, speed=False)
    run, hf = (model["scores"]["sst2"]["accuracy"]["values"] for model in evaluation["models"])
    assert run == facts["models"][1]["scores"]["sst2"]["accuracy"]["values"]
    assert hf == run[:1]
    (small,) = evaluate_task("sst2", {"hf": [exported]}, data, dtype="int8", speed=False)["models"]
    assert small["scores"]["sst2"]["accuracy"]["values"] == [accuracy_in_int8(exported, data_root)]
    assert evaluation["tasks"][0]["examples"] == 24 and evaluation["speed"] is None


def accuracy_in_int8(directory, data_root):
    """What share of the held-out sentences a classifier with int8 kernels has right."""
    module, params = distiljax.from_pretrained(directory, head="any")
    lines = (data_root / "sst2" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    examples = [json.loads(line) for line in lines]
    sentences = [example["sentence"] for example in examples]
    said = distiljax.predict(
        module, distiljax.quantize(params), distiljax.load_tokenizer(directory), sentences
    )
    found = [module.head.labels.index(one["labels"][0]["label"]) for one in said]
    return pytest.approx(np.mean([a == example["label"] for a, example in zip(found, examples, strict=True)]))


def test_another_split_is_scored_from_the_finished_runs(compared, config, data_root):
    workdir, _ = compared
    other = config.copy_and_resolve_references()
    other.models, other.task_teacher, other.split = (
        f"student={model_paths(config.models)['student']}",
        "",
        "train",
    )
    (model,) = compare(other, workdir).facts["models"]
    data = ConfigDict(config.finetune.data)
    data.source = str(data_root / "sst2")
    runs = [workdir / f"sst2/student/seed-{seed}" for seed in SEEDS]
    (alone,) = evaluate_task("sst2", {"run": runs}, data, split="train", speed=False)["models"]
    assert model["scores"] == alone["scores"]


def test_a_model_of_another_kind_or_without_a_head_is_one_line(compared, models, data_root, tmp_path):
    workdir, _ = compared
    run, data = workdir / "sst2/teacher/seed-0", finetune_data_config()
    data.source = str(data_root / "sst2")
    with pytest.raises(UserError, match="has no test split: .* has the splits train, validation; .*--split"):
        evaluate_task("sst2", {"run": [run]}, data, split="test", speed=False)
    with pytest.raises(UserError, match="distiljax finetune") as caught:
        evaluate_task("sst2", {"student": [models["student"]]}, data, speed=False)
    assert "\n" not in str(caught.value)
    numbers = tmp_path / "numbers.jsonl"
    numbers.write_text('{"text": "the river", "label": 0.5}\n{"text": "a river", "label": 1.5}\n')
    data.source, data.validation = str(numbers), str(numbers)
    with pytest.raises(UserError, match="sequence_classification.*regression"):
        evaluate_task("regression", {"run": [run]}, data, speed=False)
    with pytest.raises(UserError, match="at least one"):
        evaluate_task("sst2", {}, data)


def test_models_of_one_shape_share_rows_and_programs(compared, data_root, monkeypatch):
    workdir, _ = compared
    data = finetune_data_config()
    data.source, data.max_length = str(data_root / "sst2"), 0
    tokenised, compiled = [], []
    make, forward = evaluating.task_features, evaluating.Forward
    monkeypatch.setattr(evaluating, "task_features", lambda *a: tokenised.append(a) or make(*a))
    monkeypatch.setattr(evaluating, "Forward", lambda *a: compiled.append(a) or forward(*a))
    scores = TaskScores(find_task("sst2"), data, "validation", "float32")
    for folder in ("teacher", "student"):
        for seed in SEEDS:
            run = workdir / f"sst2/{folder}/seed-{seed}"
            assert scores(run) == pytest.approx(
                {"accuracy": read_json(run / "result.json")["best"]["accuracy"]}, abs=0
            )
    assert len(tokenised) == len(compiled) == 1
    # No row is longer than the models were fine-tuned on, though lengths are multiples of 8.
    data.max_length = 13
    TaskScores(find_task("sst2"), data, "validation", "float32")(run)
    assert max(compiled[-1][-1]) == 13


# --- the data of an evaluation ---


@pytest.fixture(scope="module")
def own(tmp_path_factory, models, compared):
    """A run on a user's own file, of which it held out a part by a seed; and a second file."""
    root = tmp_path_factory.mktemp("own")
    for name, count in (("all.csv", 40), ("va.csv", 30)):
        with open(root / name, "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["review", "mood"])
            rows.writerows([f"the river {'was ' * (i % 7)}{i}", ("bad", "good")[i % 2]] for i in range(count))
    config = ConfigDict(
        read_json(compared[0] / "sst2/student/seed-0/config.json")
    )  # its programs are compiled
    del config["kind"]
    config.task = "sequence_classification"
    settings = {"source": str(root / "all.csv"), "text": "review", "label": "mood", "holdout": 0.3, "seed": 1}
    config.data.update(settings)
    assert distiljax.finetune(config, root / "run").finished
    return root, config


COLUMNS = {"text": "review", "label": "mood"}


def examples(models, **settings):
    """The texts that are scored."""
    task = find_task("sequence_classification")
    split = settings.get("split", "validation")
    scores = TaskScores(task, data_settings(task, models, **settings), split, "float32")
    return scores, scores._dataset["text"][:]


def test_the_data_are_those_of_the_fine_tuning(own, caplog):
    root, config = own
    held_out = load_task(find_task(config.task), config.data)["validation"]["text"][:]
    with caplog.at_level(logging.INFO):
        scores, texts = examples({"a": [root / "run"]})
    assert texts == held_out and len(texts) == 12
    assert re.search(r"12 of the 40 examples of .*all.csv are held out .*data.seed=1", caplog.text)
    best = read_json(root / "run" / "result.json")["best"]
    assert scores(root / "run")["accuracy"] == best["accuracy"]
    evaluation = evaluate_task(config.task, {"a": [root / "run"]}, speed=False)
    assert evaluation["models"][0]["scores"][config.task]["accuracy"]["values"] == [best["accuracy"]]


@pytest.mark.parametrize("split", ["validation", "train", "test"])
def test_a_file_is_scored_whole(own, split, caplog):
    root, _ = own
    with caplog.at_level(logging.INFO):
        scores, texts = examples(
            {"a": [root / "run"]}, source=str(root / "va.csv"), columns=COLUMNS, split=split
        )
    assert len(texts) == scores.facts["examples"] == 30
    assert "held out" not in caplog.text


def test_a_split_may_be_a_file_or_one_of_another_name(own, tmp_path):
    root, _ = own
    scores, texts = examples({"a": [root / "run"]}, split=str(root / "va.csv"))
    assert len(texts) == 30 and scores.facts["source"] == str(root / "va.csv")
    assert 0 <= scores(root / "run")["accuracy"] <= 1
    for name in ("train", "validation_matched"):
        (tmp_path / f"{name}.csv").write_text((root / "va.csv").read_text())
    _, texts = examples({}, source=str(tmp_path), columns=COLUMNS, split="validation_matched")
    assert len(texts) == 30
    with pytest.raises(UserError, match="is 'dev'; .* has the splits train, validation_matched"):
        examples({}, source=str(tmp_path), columns=COLUMNS, split="dev")
    with pytest.raises(UserError, match="has no validation split"):  # nothing is held out of files with names
        examples({}, source=str(tmp_path), columns=COLUMNS)


def test_runs_that_held_out_other_examples_are_one_line(own, tmp_path):
    root, config = own

    def another(name, **changes):
        run = tmp_path / name
        run.mkdir()
        for file in ("model.json", "config.json"):
            (run / file).write_text((root / "run" / file).read_text())
        stored = read_json(run / "config.json")
        stored["data"].update(changes)
        (run / "config.json").write_text(json.dumps(stored))
        return run

    def settings(*runs, **changes):
        return data_settings(find_task(config.task), {"a": runs[:1], "b": runs[1:]}, **changes)

    first = root / "run"
    assert settings(first, another("same")).seed == 1
    other = another("other", seed=2)
    with pytest.raises(UserError, match="hold out different examples: data.seed is 1 and 2; name data"):
        settings(first, other)
    assert settings(first, other, split="test").holdout == 0.3
    assert settings(first, other, source=str(root / "va.csv"), columns=COLUMNS).holdout == 0
    with pytest.raises(UserError, match="data.validation is '' and "):
        settings(first, another("file", validation=str(root / "va.csv")))
    # With validation examples of their own nothing is held out, and the draws' seed says nothing.
    pair = [another(f"fixed-{seed}", validation=str(root / "va.csv"), seed=seed) for seed in (3, 4)]
    assert settings(*pair).validation == str(root / "va.csv")


def test_a_longer_row_takes_the_stride_that_goes_with_it(own):
    root, config = own
    data = data_settings(find_task(config.task), {"a": [root / "run"]}, max_length=48)
    assert (data.max_length, data.stride) == (48, finetune_data_config().stride)


# --- labels ---


@pytest.mark.parametrize(
    ("model", "data", "order"),
    [
        ("neg,pos", "neg,pos", None),
        ("POSITIVE,NEGATIVE", "negative,positive", [1, 0]),
        ("NEGATIVE,POSITIVE", "negative,positive", None),
        ("b-x,B-X,O", "O,B-X", [2, 1]),
        ("neg,neutral,pos", "neg,pos", [0, 2]),
        ("neg,neutral,pos", "pos", [2]),
        ("LABEL_0,LABEL_1", "neg,pos", None),
        ("LABEL_0,LABEL_1,LABEL_2", "0,2", [0, 2]),
        ("LABEL_0,LABEL_1,LABEL_2", "1,2,3", None),
        ("neg,neutral,pos", "0,2", [0, 2]),
        ("0,1,2", "1,2", [1, 2]),
    ],
)
def test_labels_are_the_same_by_name(model, data, order):
    assert label_order(model.split(","), data.split(","), "m") == order


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ("neg,pos", "pos,spam"),
        ("neg,pos", "neg,neutral,pos"),
        ("neg,pos", "1,2"),
        ("0,1,2", "1,2,3"),
        ("1,2,3", "0,1,2"),
        ("0,1", "neg,pos"),
        ("LABEL_0,LABEL_1,LABEL_2", "neg,pos"),
        ("LABEL_1,LABEL_0", "neg,pos"),
    ],
)
def test_other_labels_are_one_line_with_both(model, data):
    model, data = model.split(","), data.split(",")
    with pytest.raises(UserError) as caught:
        label_order(model, data, "teacher m")
    assert f"teacher m has the labels {', '.join(model)}, the data {', '.join(data)};" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def save(models, tokenizer):
    """Saves a model with some labels and a head whose outputs are always as large as said."""

    def save(path, kind, labels, outputs):
        head = HeadConfig(kind, tuple(labels))
        module, params = distiljax.from_pretrained(models["student"], head, init_head=True)
        last = params["head"]["classifier"]
        last |= {"kernel": np.zeros_like(last["kernel"]), "bias": np.float32(outputs)}
        distiljax.save_pretrained(module, params, path, tokenizer=tokenizer)
        return path

    return save


def scored(path, rows, tmp_path, kind="sequence_classification"):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = find_task(kind)
    return TaskScores(
        task, data_settings(task, {}, source=str(file), max_length=24), "validation", "float32"
    )(path)


def test_a_file_without_some_of_the_classes_is_scored_over_all_of_the_models(save, tmp_path):
    model = save(tmp_path / "m", "sequence_classification", ("pos", "neutral", "neg"), [3, 2, 1])
    rows = [{"text": "the river", "label": label} for label in ("neg", "pos", "pos", "neg")]
    assert scored(model, rows, tmp_path)["accuracy"] == 0.5
    assert scored(model, rows[1:3], tmp_path)["accuracy"] == 1  # all of one class
    other = save(tmp_path / "n", "sequence_classification", ("pos", "neutral", "neg"), [1, 3, 2])
    assert scored(other, rows, tmp_path)["accuracy"] == 0  # the best output is a class that does not occur
    with pytest.raises(UserError, match="n has the labels pos, neutral, neg, the data pos, spam"):
        scored(other, [*rows[1:3], {"text": "a", "label": "spam"}], tmp_path)


def test_unnamed_labels_take_the_names_of_the_datas(save, tmp_path):
    model = save(tmp_path / "m", "token_classification", [f"LABEL_{i}" for i in range(3)], [1, 3, 2])
    rows = [
        {"tokens": ["the", "river", "was"], "tags": ["B-X", "I-X", "O"]},
        {"tokens": ["a"], "tags": ["I-X"]},
    ]
    # Sorted: B-X, I-X, O; every word is said to be I-X.
    found = scored(model, rows, tmp_path, "token_classification")
    assert found["entity_precision"] == found["entity_recall"] == 0.5 and found["accuracy"] == 0.5


def test_models_are_named_in_a_text_or_a_mapping():
    expected = {"teacher": "bert", "student": "runs/a=b"}
    assert model_paths("teacher=bert, student=runs/a=b") == expected
    assert model_paths(("teacher=bert", "student=runs/a=b")) == expected
    assert model_paths(expected) == model_paths(ConfigDict(expected)) == expected


@pytest.mark.parametrize("models", ["", "teacher", "teacher=", "a=x,a=y", "../a=x", "a/b=x"])
def test_models_that_are_not_named_well_are_one_line(models):
    with pytest.raises(UserError, match="NAME=PATH,NAME=PATH"):
        model_paths(models)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ()}, "tasks is empty"),
        ({"tasks": ("sst2,sst2",)}, "each once"),
        ({"tasks": ("sst3",)}, "task is 'sst3'; expected one of cola"),
        ({"tasks": ("sst2,rte",)}, "has no folder 'rte'; it has sst2"),
        ({"seeds": ()}, "seeds is ()"),
        ({"seeds": ("a",)}, "seeds is ('a',)"),
        ({"seeds": (True,)}, "seeds is (True,)"),
        ({"seeds": (0, 0)}, "each once"),
        ({"task_teacher": "bert"}, "task_teacher is 'bert'; expected one of teacher, student"),
        ({"overrides.sst": ConfigDict()}, "overrides has 'sst'; expected a task, such as sst2"),
        ({"overrides.sst2.step": 3}, "overrides.sst2 has 'step'; expected one of"),
        ({"overrides.sst2.model": "x"}, "overrides.sst2 has 'model'"),
        ({"overrides.sst2.epochs": "many"}, "overrides.sst2.epochs is 'many'"),
        ({"models": "a b=x,a-b=y"}, "the same directory"),
    ],
)
def test_bad_settings_are_one_line_before_any_run(changes, message, data_root, tmp_path):
    config = compare_config()
    config.models, config.tasks, config.data_root = "teacher=x,student=y", ("sst2",), str(data_root)
    config.overrides.sst2 = ConfigDict()
    for key, value in changes.items():
        *path, last = key.split(".")
        node = config
        for part in path:
            node = node[part]
        node[last] = value
    with pytest.raises(UserError) as caught:
        plan_fits(config, model_paths(config.models), tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_runs_go_task_by_task_and_seed_by_seed(data_root, tmp_path):
    config = compare_config()
    config.tasks, config.seeds, config.task_teacher = ("rte,sst2",), (5, 3), "a"
    config.finetune.epochs = 2.0
    config.overrides.rte = ConfigDict({"epochs": 7.0, "optimizer": {"peak_lr": 1e-4}})
    config.overrides.mrpc = ConfigDict({"epochs": 5.0})  # of a task that is not run
    fits = plan_fits(config, {"a": "x", "b": "y"}, tmp_path)
    assert [(fit.task.name, fit.seed, fit.model) for fit in fits[:4]] == [
        ("rte", 5, "a"),
        ("rte", 5, "b"),
        ("rte", 5, "b + task distillation"),
        ("rte", 3, "a"),
    ]
    assert len({fit.path for fit in fits}) == len(fits) == 12
    assert [fit.config.epochs for fit in fits] == [7.0] * 6 + [2.0] * 6
    assert {fit.config.optimizer.peak_lr for fit in fits[:6]} == {1e-4}
    assert [fit.config.teacher for fit in fits[:3]] == ["", "", str(tmp_path / "rte" / "a" / "seed-5")]
    # The teacher of a run is finished before it begins.
    done = set()
    for fit in fits:
        assert not fit.config.teacher or fit.config.teacher in done
        done.add(str(fit.path))
