from __future__ import annotations

import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from distiljax.errors import UserError
from distiljax.report import (
    _smooth,
    print_retention_table,
    read_evaluation,
    read_run,
    retention_markdown,
    retention_table,
    write_report,
)
from distiljax.train.metrics import MetricWriter

EVALUATION = {
    "data": {"source": "wikipedia-held-out", "rows": 200, "tokens": 100_000, "masked_tokens": 10_000},
    "machine": "2-core CPU",
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


def make_run(directory, kind="distill", steps=100, finished=True, every=2):
    """A run directory with a log of falling losses."""
    with MetricWriter(directory) as writer:
        for step in range(0, steps + 1, every):
            fall = math.exp(-5 * step / steps)
            values = {"loss": 2 + 8 * fall, "loss_mlm": 2 + 8 * fall, "mlm_accuracy": 0.57 * (1 - fall)}
            if kind == "distill":
                values |= {
                    "loss_ce": 1 + 30 * fall,
                    "loss_cos": 0.05 + fall,
                    "teacher_agreement": 0.7 * (1 - fall),
                }
            if step % (10 * every) == 0:
                writer.write(step, "validation", values)
            if step:
                rates = {
                    "grad_norm": 1 + fall,
                    "learning_rate": 5e-4,
                    "tokens_per_second": 1e4,
                    "data_wait": 0.01,
                }
                writer.write(step, "train", values | rates | {"seconds": 2.0 * step})
    config = {
        ("teacher" if kind == "distill" else "model"): "bert-base-uncased",
        "steps": steps,
        "data": {"train": {"source": "wiki|pedia"}, "seq_len": 128},
    }
    (directory / "config.json").write_text(json.dumps(config))
    if finished:
        result = {
            "kind": kind,
            "steps": steps,
            "tokens": 12_000_000,
            "seconds": 3725.0,
            "best_step": 80,
            "validation": {"mlm_accuracy": 0.565, "loss": 2.1},
            "machine": "2-core CPU",
            "parameters": 66_985_530,
            "teacher_parameters": 109_514_298,
        }
        (directory / "result.json").write_text(json.dumps(result))
    return directory


def images(report):
    """The images that a report shows, each decoded; every one has to be there and none may be left over."""
    names = re.findall(r"!\[[^]]+\]\(([^)]+)\)\n\n\*[^*]+\.\*", report.read_text())
    assert sorted(names) == sorted(str(p.relative_to(report.parent)) for p in report.parent.glob("plots/*"))
    for name in names:
        with Image.open(report.parent / name) as image:
            image.load()
            assert image.format == "PNG" and image.width >= 1200 and image.info["dpi"][0] >= 150
            assert len(image.convert("RGB").getcolors(1 << 24)) > 5
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


@pytest.mark.parametrize("accuracy", [0.0, None, float("nan"), "high", True])
def test_a_reference_without_a_usable_accuracy_gives_no_share(accuracy):
    models = [{"name": "teacher", "mlm_accuracy": accuracy}, {"name": "student", "mlm_accuracy": 0.5}]
    assert retention_table({"models": models})[1].share_kept is None


@pytest.mark.parametrize("evaluation", [{}, {"models": []}, {"models": {}}, {"models": [{"path": "x"}]}])
def test_an_evaluation_without_models_is_refused(evaluation):
    with pytest.raises(UserError, match="models"):
        retention_table(evaluation)


def test_the_terminal_table():
    console = Console(width=100, record=True, file=None, quiet=False)
    with console.capture() as capture:
        print_retention_table(EVALUATION, console)
    text = capture.get()
    header, student = (
        next(line for line in text.splitlines() if start in line) for start in ("Share", " student ")
    )
    assert header.split("  ")[0].strip() == "Model"
    for column in ("Parameters", "Size", "Speed (× teacher)", "Masked-LM accuracy", "Share kept"):
        assert column in header
    assert student.split() == ["student", "67.0", "M", "268", "MB", "1.90", "×", "57.0", "%", "95.0", "%"]


def test_the_markdown_table():
    lines = retention_markdown(EVALUATION).splitlines()
    assert lines[2:] == [
        "| teacher | 110 M | 438 MB | 1.00 × | 60.0 % | 100.0 % |",
        "| student | 67.0 M | 268 MB | 1.90 × | 57.0 % | 95.0 % |",
        "| student before distillation | – | – | – | 3.0 % | 5.0 % |",
    ]
    assert {line.count("|") for line in lines} == {7}


def test_report_of_a_finished_distillation(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "evaluation.json").write_text(json.dumps(EVALUATION))
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
    assert "10,000 masked tokens of `wikipedia-held-out` (2-core CPU)" in text and "± 1.0 points" in text
    for fact in (
        "| Teacher | `bert-base-uncased` |",
        "| Training text | `wiki\\|pedia` |",
        "| Optimiser steps | 100 |",
        "| Tokens | 12.0 M |",
        "| Wall time | 1 h 2 min |",
        "| Mean speed | 3.22 k tokens/s |",
        "| Machine | 2-core CPU |",
    ):
        assert fact in text
    assert not list(run.glob("**/*.tmp"))


def test_report_without_an_evaluation(tmp_path):
    report = write_report([make_run(tmp_path / "run")], tmp_path / "out")
    assert "quality" not in images(report)
    assert (
        "A student, 67.0 M parameters against 110 M (39 % smaller), was distilled from "
        "`bert-base-uncased` for 100 steps and reached 56.5 % masked-LM accuracy on held-out text."
    ) in report.read_text()


def test_report_of_an_unfinished_run(tmp_path):
    run = make_run(tmp_path / "run", finished=False)
    (run / "config.json").unlink()
    report = write_report([run], tmp_path / "out")
    assert images(report) == ["losses", "accuracy", "agreement", "optimisation", "throughput"]
    assert "has not finished; what follows is as of step 100" in report.read_text()


def test_report_of_a_run_that_has_logged_nothing(tmp_path):
    (tmp_path / "config.json").write_text('{"teacher": "bert-base-uncased"}')
    report = write_report([tmp_path], tmp_path / "out")
    assert images(report) == []
    assert "Nothing has been logged yet." in report.read_text()


def test_report_of_a_few_logged_points(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, "train", {"loss": float("nan"), "loss_mlm": 10.0, "grad_norm": 0.0})
    assert images(write_report([tmp_path], tmp_path / "out")) == ["losses", "optimisation"]


def test_a_pretraining_run_has_no_agreement_and_one_loss(tmp_path):
    report = write_report([make_run(tmp_path / "teacher", "pretrain")], tmp_path / "out", EVALUATION)
    assert images(report) == ["quality", "losses", "accuracy", "optimisation", "throughput"]
    assert "| Started from | `bert-base-uncased` |" in report.read_text()


def test_several_runs_have_a_section_each_and_a_comparison(tmp_path):
    runs = [
        make_run(tmp_path / "teacher", "pretrain"),
        make_run(tmp_path / "a" / "student"),
        make_run(tmp_path / "b" / "student", finished=False),
    ]
    report = write_report(runs, tmp_path / "out", EVALUATION)
    shown = images(report)
    assert len(shown) == 1 + 4 + 5 + 5 + 1 and shown[-1] == "compare-distill"
    headings = [line for line in report.read_text().splitlines() if line.startswith("## ")]
    assert [heading.split("/")[-1] for heading in headings[1:3]] == ["student", "student"]
    assert headings[1] != headings[2] and headings[3] == "## Distillation runs compared"


def test_report_again_over_an_old_one(tmp_path):
    run = make_run(tmp_path / "run", finished=False)
    first = write_report([run], run).read_text()
    assert write_report([run], run).read_text() == first


def test_an_evaluation_alone(tmp_path):
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(EVALUATION))
    report = write_report([], tmp_path / "out", path)
    assert images(report) == ["quality"]
    assert report.read_text().startswith("# Evaluation report\n\nThe student has 67.0 M parameters")


def test_bad_input_is_one_line(tmp_path):
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    (broken / "config.json").write_text("{")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        write_report([], tmp_path / "file", EVALUATION)
    for runs, evaluation, message in (
        ([], None, "nothing to report on"),
        ([tmp_path / "none"], None, "does not exist"),
        ([empty], None, "is not a run directory"),
        ([broken], None, "is not JSON"),
        ([], tmp_path / "none.json", "cannot read"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            write_report(runs, tmp_path / "out", evaluation)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_evaluation_file_that_is_a_list_is_refused(tmp_path):
    (tmp_path / "evaluation.json").write_text("[]")
    with pytest.raises(UserError, match="a JSON list, expected an object"):
        read_evaluation(tmp_path / "evaluation.json")


def test_the_kind_of_an_unfinished_run(tmp_path):
    assert read_run(make_run(tmp_path / "a", "distill", finished=False)).kind == "distill"
    assert read_run(make_run(tmp_path / "b", "pretrain", finished=False)).kind == "pretrain"
    (tmp_path / "config.json").write_text('{"teacher": {"path": "bert"}}')
    assert read_run(tmp_path).kind == "distill"


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=300))
def test_smoothing_stays_between_the_extremes(values):
    smoothed = _smooth(list(enumerate(values)))
    assert [step for step, _ in smoothed] == list(range(len(values)))
    assert min(values) - 1e-6 <= min(v for _, v in smoothed)
    assert max(v for _, v in smoothed) <= max(values) + 1e-6


def test_smoothing_keeps_a_line():
    values = [3.0 * step for step in range(400)]
    smoothed = [value for _, value in _smooth(list(enumerate(values)))]
    whole_windows = slice(0, 400 - 400 // 80)
    assert smoothed[whole_windows] == pytest.approx(values[whole_windows])
