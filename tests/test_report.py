from __future__ import annotations

import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from distiljax.distill.config import distill_config, pretrain_config
from distiljax.errors import UserError
from distiljax.report import (
    print_retention_table,
    read_run,
    retention_markdown,
    retention_table,
    write_report,
)
from distiljax.train.metrics import MetricWriter

EVALUATION = {
    "data": {
        "source": "notes/*.txt",
        "rows": 200,
        "tokens": 100_000,
        "seq_len": 128,
        "masked_tokens": 10_000,
    },
    "machine": "1 CPU device, 2 cores",
    "dtype": "float32",
    "models": [
        {
            "name": "teacher",
            "path": "bert-base-uncased",
            "parameters": 109_514_298,
            "bytes": 438_057_192,
            "mlm_accuracy": 0.60,
            "mlm_loss": 1.8,
            "perplexity": 6.05,
            "tokens_per_second": 1000.0,
            "latency_ms": 40.0,
        },
        {
            "name": "student",
            "path": "student",
            "parameters": 66_985_530,
            "bytes": 267_942_120,
            "mlm_accuracy": 0.57,
            "mlm_loss": 2.0,
            "perplexity": 7.39,
            "tokens_per_second": 1900.0,
            "latency_ms": 21.0,
        },
        {"name": "student before distillation", "mlm_accuracy": 0.03, "tokens_per_second": None},
    ],
}


def make_run(directory, kind="distill", steps=100, finished=True, evaluated=False):
    """A run directory with a log of falling losses; held-out text is at its best at step 80."""
    directory.mkdir(parents=True)
    config = distill_config() if kind == "distill" else pretrain_config()
    config.data.source = ("wiki|pedia", "docstrings")
    config.batch_size = 64
    config.steps = steps
    (directory / "config.json").write_text(json.dumps({"kind": kind, **json.loads(config.to_json())}))
    validations = []
    with MetricWriter(directory) as writer:
        for step in range(0, steps + 1, 2):
            fall = math.exp(-5 * step / steps)
            values = {"loss_mlm": 2 + 8 * fall, "mlm_accuracy": 0.57 * (1 - fall)}
            if kind == "distill":
                values |= {
                    "loss_ce": 1 + 30 * fall,
                    "loss_cos": 0.05 + fall,
                    "teacher_agreement": 0.7 * (1 - fall),
                }
            values["loss"] = 2 + 8 * fall
            if step % 20 == 0:
                overfitting = {"loss": values["loss"] + (step > 80)}
                writer.write(step, "validation", values | overfitting)
                validations.append({"step": step} | values | overfitting)
            if step:
                rates = {"tokens_per_second": 1e4, "data_wait": 0.01, "seconds": 2.0 * step}
                writer.write(step, "train", values | rates | {"grad_norm": 1 + fall, "learning_rate": 5e-4})
    if finished:
        result = {
            "kind": kind,
            "steps": steps,
            "tokens": 12_000_000.0,
            "seconds": 3725.0,
            "best_step": 80,
            "start": validations[0],
            "validation": validations[-1],
            "best": validations[4],
            "machine": "1 CPU device, 2 cores",
            "parameters": 66_985_530,
        }
        if kind == "distill":
            result["teacher_parameters"] = 109_514_298
        (directory / "result.json").write_text(json.dumps(result))
    if evaluated:
        (directory / "evaluation.json").write_text(json.dumps(EVALUATION))
    return directory


def images(report):
    """The images that a report shows, each decoded; every one has to be there and none may be left over."""
    names = re.findall(r"!\[[^]]+\]\(([^)]+)\)\n\n\*[^*]+\.\*", report.read_text())
    assert sorted(names) == sorted(str(p.relative_to(report.parent)) for p in report.parent.glob("plots/*"))
    for name in names:
        with Image.open(report.parent / name) as image:
            image.load()
            assert image.format == "PNG" and image.width >= 1200 and image.info["dpi"][0] >= 150
    return [name.removeprefix("plots/").removesuffix(".png") for name in names]


def test_retention_is_against_the_first_model():
    teacher, student, initial = retention_table(EVALUATION)
    assert (teacher.share_kept, teacher.speed_ratio) == (1.0, 1.0)
    assert student.share_kept == pytest.approx(0.95)
    assert student.speed_ratio == pytest.approx(1.9)
    assert initial.share_kept == pytest.approx(0.05)
    assert initial.speed_ratio is None and initial.parameters is None


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5))
def test_shares_kept_rank_as_the_accuracies(accuracies):
    models = [{"name": str(i), "mlm_accuracy": a} for i, a in enumerate(accuracies)]
    rows = retention_table({"models": models})
    assert rows[0].share_kept == 1.0
    assert [r.share_kept * accuracies[0] for r in rows] == pytest.approx(accuracies)


@pytest.mark.parametrize("accuracy", [0.0, None, float("nan")])
def test_a_reference_without_a_usable_accuracy_gives_no_share(accuracy):
    models = [{"name": "teacher", "mlm_accuracy": accuracy}, {"name": "student", "mlm_accuracy": 0.5}]
    assert retention_table({"models": models})[1].share_kept is None


@pytest.mark.parametrize("width", [80, 100])
def test_the_terminal_table(width):
    console = Console(width=width)
    with console.capture() as capture:
        print_retention_table(EVALUATION, console)
    text = capture.get()
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    header, student = text.split("─")[0], next(line for line in text.splitlines() if " student  " in line)
    for word in ("Model", "Params", "Size", "Speed", "(× teacher)", "Masked-LM", "accuracy", "Share", "kept"):
        assert word in header
    assert student.split() == ["student", "67.0", "M", "268", "MB", "1.90", "×", "57.0", "%", "95.0", "%"]
    assert "student before distillation" in text


def test_the_markdown_table():
    lines = retention_markdown(EVALUATION).splitlines()
    assert lines[2:] == [
        "| teacher | 110 M | 438 MB | 1.00 × | 60.0 % | 100.0 % |",
        "| student | 67.0 M | 268 MB | 1.90 × | 57.0 % | 95.0 % |",
        "| student before distillation | – | – | – | 3.0 % | 5.0 % |",
    ]
    assert {line.count("|") for line in lines} == {7}


def test_the_speed_column_names_the_reference():
    evaluation = {"models": [{"name": "bert", "tokens_per_second": 2.0}]}
    assert "| Speed (× bert) |" in retention_markdown(evaluation)


def test_report_of_a_finished_and_evaluated_distillation(tmp_path):
    run = make_run(tmp_path / "run", evaluated=True)
    report = write_report([run], run)
    assert report == run / "report.md"
    assert images(report) == ["quality", "losses", "accuracy", "agreement", "optimisation", "throughput"]
    text = report.read_text()
    assert (
        "The student distilled from `bert-base-uncased` has 67.0 M parameters against 110 M (39 % smaller), "
        "runs at 1.90 × the teacher's speed and keeps **95.0 %** of the teacher's masked-LM accuracy "
        "(57.0 % against 60.0 %)."
    ) in text
    assert retention_markdown(EVALUATION) in text
    # 1.96 · sqrt(0.6 · 0.4 / 10,000) = 0.0096
    assert "on 10,000 masked tokens of held-out text from `notes/*.txt`" in text and "± 1.0 points" in text
    assert "on rows of 128 tokens; latency: of one such row. Machine: 1 CPU device, 2 cores." in text
    # 0.57 · (1 - exp(-4)) = 0.5596
    held_out = "masked-LM accuracy 56.0 %, agreement with the teacher 68.7 %, loss 2.15"
    for fact in (
        "| Teacher | `bert-base-uncased` |",
        "| Text | `wiki\\|pedia, docstrings` |",
        "| Sequence length | 512 |",
        "| Rows a step | 64 |",
        "| Optimiser steps | 100 |",
        f"| On held-out text, best step (80) | {held_out} |",
        "| Parameters | 67.0 M (teacher 110 M) |",
        "| Tokens | 12.0 M |",
        "| Wall time | 1 h 2 min |",
        "| Training speed (median) | 10.0 k tokens/s |",
        "| Machine | 1 CPU device, 2 cores |",
    ):
        assert fact in text
    assert not list(run.glob("**/*.tmp"))


def test_report_without_an_evaluation(tmp_path):
    report = write_report([make_run(tmp_path / "run")], tmp_path / "out")
    assert "quality" not in images(report)
    assert (
        "A student, 67.0 M parameters against 110 M (39 % smaller), was distilled from "
        "`bert-base-uncased` for 100 steps and reached 56.0 % masked-LM accuracy on held-out text."
    ) in report.read_text()


def test_report_of_an_unfinished_run(tmp_path):
    run = make_run(tmp_path / "run", finished=False)
    config = json.loads((run / "config.json").read_text()) | {"steps": 1000}
    (run / "config.json").write_text(json.dumps(config))
    report = write_report([run], tmp_path / "out")
    assert images(report) == ["losses", "accuracy", "agreement", "optimisation", "throughput"]
    text = report.read_text()
    assert "has not finished; what follows is as of step 100" in text
    assert "for 100 of 1,000 steps and reached 56.0 % masked-LM accuracy" in text


def test_the_best_validation_is_the_same_before_and_after_the_end(tmp_path):
    finished, unfinished = (
        read_run(make_run(tmp_path / str(done), finished=done)).best for done in (True, False)
    )
    assert finished == unfinished and finished["step"] == 80


def test_report_of_a_run_that_has_logged_nothing(tmp_path):
    run = make_run(tmp_path / "run", finished=False)
    (run / "metrics.jsonl").unlink()
    report = write_report([run], tmp_path / "out")
    assert images(report) == []
    assert "Nothing has been logged yet." in report.read_text()


def test_report_of_one_logged_step(tmp_path):
    run = make_run(tmp_path / "run", finished=False)
    with MetricWriter(run) as writer:
        writer.write(
            1, "train", {"loss": float("nan"), "loss_mlm": 10.0, "grad_norm": 0.0, "learning_rate": 0.0}
        )
    assert images(write_report([run], tmp_path / "out")) == ["losses", "optimisation"]


def test_a_pretraining_run_has_no_agreement_and_one_loss(tmp_path):
    report = write_report([make_run(tmp_path / "teacher", "pretrain")], tmp_path / "out")
    assert images(report) == ["losses", "accuracy", "optimisation", "throughput"]
    text = report.read_text()
    assert "| Started from | `bert-base-uncased` |" in text
    assert (
        "`bert-base-uncased` was trained by masked language modelling for 100 steps and reached 56.0 %"
        in text
    )


def test_several_runs_have_a_section_each_and_a_comparison(tmp_path):
    runs = [
        make_run(tmp_path / "teacher", "pretrain"),
        make_run(tmp_path / "a" / "student", finished=False),
        make_run(tmp_path / "b" / "student", evaluated=True),
    ]
    report = write_report(runs, tmp_path / "out")
    shown = images(report)
    assert shown[0] == "3-quality" and shown[-1] == "compare-distillation"
    assert [sum(name.startswith(f"{number}-") for name in shown) for number in (1, 2, 3)] == [4, 5, 6]
    headings = [line for line in report.read_text().splitlines() if line.startswith("## ")]
    assert headings == [
        f"## Evaluation: {runs[2]}",
        f"## Masked-LM training: {runs[0]}",
        f"## Distillation: {runs[1]}",
        f"## Distillation: {runs[2]}",
        "## Distillation runs compared",
    ]


def test_report_again_over_an_old_one(tmp_path):
    run = make_run(tmp_path / "run", finished=False)
    first = write_report([run], run).read_text()
    assert write_report([run], run).read_text() == first


def test_bad_input_is_one_line(tmp_path):
    empty, broken, file = tmp_path / "empty", tmp_path / "broken", tmp_path / "file"
    empty.mkdir()
    broken.mkdir()
    (broken / "config.json").write_text("{")
    file.write_text("")
    run = make_run(tmp_path / "run")
    for runs, out, message in (
        ([], tmp_path / "out", "no run to report on"),
        ([tmp_path / "none"], tmp_path / "out", "is no run directory"),
        ([empty], tmp_path / "out", "is no run directory"),
        ([broken], tmp_path / "out", "cannot be read as JSON"),
        ([run], file, "cannot write to"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            write_report(runs, out)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
