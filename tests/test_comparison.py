from __future__ import annotations

import json
import re
import statistics

import pytest
from PIL import Image
from rich.console import Console

from distiljax import comparison, plots
from distiljax.errors import UserError

TASKS = [
    {"name": "sst2", "metrics": ["accuracy"], "split": "validation", "source": "sst2"},
    {"name": "squad", "metrics": ["squad_f1", "exact_match"], "split": "validation", "source": "squad"},
]
# By model and task, the scores of three seeds.
RUNS = {
    "teacher": {
        "sst2": [{"accuracy": value} for value in (0.92, 0.90, 0.94)],
        "squad": [{"squad_f1": value, "exact_match": value - 0.1} for value in (0.88, 0.87, 0.86)],
    },
    "student": {
        "sst2": [{"accuracy": value} for value in (0.91, 0.89, 0.88)],
        "squad": [{"squad_f1": value, "exact_match": value - 0.1} for value in (0.84, 0.83, 0.85)],
    },
}
FACTS = {
    "teacher": {
        "parameters": 109_483_778,
        "bytes": 437_935_112,
        "latency_ms": 40.0,
        "tokens_per_second": 1000.0,
    },
    "student": {
        "parameters": 66_955_010,
        "bytes": 267_820_040,
        "latency_ms": 21.0,
        "tokens_per_second": 1900.0,
    },
}


def made(tasks=TASKS, runs=RUNS):
    summary = comparison.summarise(tasks, runs)
    models = [{"name": name, "path": name, **FACTS.get(name, {}), **summary[name]} for name in runs]
    speed = {"batch_size": 32, "seq_len": 128, "dtype": "float32"}
    return {"tasks": tasks, "models": models, "speed": speed, "machine": "1 CPU device, 2 cores"}


def words(line):
    return " ".join(line.split())


def printed(compared, width=80):
    console = Console(width=width)
    with console.capture() as capture:
        comparison.print_comparison(compared, console)
    return capture.get()


def test_scores_are_medians_with_the_range_over_seeds_and_the_share_of_the_first_model():
    teacher, student = comparison.summarise(TASKS, RUNS).values()
    assert student["scores"]["sst2"]["accuracy"] == {
        "values": [0.91, 0.89, 0.88],
        "median": 0.89,
        "min": 0.88,
        "max": 0.91,
        "share_kept": pytest.approx(0.89 / 0.92),
    }
    assert student["scores"]["squad"]["exact_match"]["median"] == pytest.approx(0.74)
    # The mean is over the tasks' first metrics, its range over the means of each seed.
    assert teacher["mean"] == pytest.approx((0.92 + 0.87) / 2) and teacher["share_kept"] == 1
    assert student["mean"] == pytest.approx((0.89 + 0.84) / 2)
    assert student["share_kept"] == pytest.approx(student["mean"] / teacher["mean"])
    assert (student["mean_min"], student["mean_max"]) == (pytest.approx(0.86), pytest.approx(0.875))


def test_a_model_that_lacks_a_task_has_no_mean():
    summary = comparison.summarise(TASKS, {**RUNS, "part": {"sst2": [{"accuracy": 0.5}]}})
    assert summary["part"]["mean"] is None and summary["part"]["share_kept"] is None
    assert summary["part"]["scores"]["sst2"]["accuracy"]["share_kept"] == pytest.approx(0.5 / 0.92)


def test_of_a_reference_that_is_worth_nothing_no_share_is_kept():
    tasks = [{"name": "cola", "metrics": ["matthews"]}]
    runs = {"teacher": {"cola": [{"matthews": 0.0}]}, "student": {"cola": [{"matthews": 0.1}]}}
    assert comparison.summarise(tasks, runs)["student"]["share_kept"] is None


def test_runs_of_different_number_give_no_range_of_the_mean():
    runs = {"teacher": {"sst2": RUNS["teacher"]["sst2"], "squad": RUNS["teacher"]["squad"][:2]}}
    (teacher,) = comparison.summarise(TASKS, runs).values()
    assert teacher["mean"] is not None and teacher["mean_min"] is None


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_tables(width):
    text = printed(made(), width)
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    student = next(line for line in text.splitlines() if line.strip().startswith("student"))
    assert words(student) == "student 67.0 M 268 MB 21.0 ms 1.90 × 86.5 86.0–87.5 96.6 %"
    rows = list(map(words, text.splitlines()))
    assert "SST-2 accuracy teacher 92.0 90.0–94.0 100.0 %" in rows
    assert "student 89.0 88.0–91.0 96.7 %" in rows
    assert "exact match teacher 77.0 76.0–78.0 100.0 %" in rows


def test_one_task_and_one_seed_need_no_range_and_no_second_table():
    runs = {name: {"sst2": by_task["sst2"][:1]} for name, by_task in RUNS.items()}
    text = printed(made(TASKS[:1], runs)).partition("BERT-base")[0]
    assert "Range" not in text and "Task" not in text and "SST-2" in text
    assert "91.0" in text and "98.9 %" in text


def test_the_papers_table_averages_to_the_papers_averages():
    averages = [statistics.fmean(scores.values()) for scores in comparison.PAPER.values()]
    assert averages == [pytest.approx(79.5, abs=0.05), pytest.approx(77.0, abs=0.05)]


def test_the_papers_table_has_dashes_where_nothing_was_measured():
    columns, rows = comparison.paper_cells(made())
    assert columns[:2] == ["Model", "Avg"] and len(columns) == 11
    student = dict(zip(columns, rows[-1], strict=True))
    assert student.pop("Model") == "student" and student.pop("SST-2") == "89.0"
    assert set(student.values()) == {"–"}
    assert comparison.paper_cells(made(TASKS[1:])) is None


def test_with_all_nine_tasks_the_papers_table_has_an_average():
    tasks = [{"name": name, "metrics": ["accuracy"]} for name in comparison.GLUE]
    runs = {"model": {name: [{"accuracy": index / 10}] for index, name in enumerate(comparison.GLUE)}}
    *_, row = comparison.paper_cells(made(tasks, runs))[1]
    assert row == ["model", "40.0", *(f"{10 * index:.1f}" for index in range(9))]


def test_a_comparison_as_files(tmp_path):
    path = comparison.write_comparison(made(), tmp_path / "out")
    text = path.read_text()
    assert path == tmp_path / "out" / "comparison.md"
    assert (
        "- student has 67.0 M parameters against 109 M (39 % smaller), runs at 1.90 × the teacher's speed and keeps "
        "**96.6 %** of the teacher's mean of 2 tasks (86.5 against 89.5)"
    ) in text
    assert "| student | 67.0 M | 268 MB | 21.0 ms | 1.90 × | 86.5 | 86.0–87.5 | 96.6 % |" in text
    assert "| SST-2 | accuracy | 92.0 (90.0–94.0) | 89.0 (88.0–91.0) | 96.7 % |" in text
    assert "|  | exact match | 77.0 (76.0–78.0) | 74.0 (73.0–75.0) | 96.1 % |" in text
    # 91.3 of 92.7
    assert "On the 1 measured task its student keeps 98.5 % of BERT-base's score." in text
    for name in re.findall(r"\]\((.*)\)", text):
        with Image.open(path.parent / name) as image:
            assert image.width > 1000
    assert sorted(p.name for p in (path.parent / "plots").iterdir()) == ["quality_speed.png", "tasks.png"]
    stored = json.loads((path.parent / "comparison.json").read_text())
    assert stored == json.loads(json.dumps(made()))
    before = text
    assert comparison.write_comparison(stored, tmp_path / "out").read_text() == before
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_file_in_the_place_of_the_directory_is_one_line(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        comparison.write_comparison(made(), tmp_path / "out")


def test_quality_is_drawn_with_its_range_over_seeds():
    figure = plots.quality(
        {"a": 0.8, "b": 0.6}, {"Speed": {"a": 1.0, "b": 2.0}}, "Mean (%)", {"a": (0.7, 0.85)}
    )
    (ax,) = figure.axes
    assert ax.get_ylabel() == "Mean (%)"
    (bar,) = ax.containers
    (ends,) = bar.lines[2][0].get_segments()
    assert ends.tolist() == [[1.0, pytest.approx(70)], [1.0, pytest.approx(85)]]


def test_tasks_have_a_column_each_and_a_marker_a_model():
    scores = {"a": {"SST-2": (0.9, 0.8, 0.95), "RTE": (0.6, 0.6, 0.6)}, "b": {"RTE": (0.5, 0.4, 0.6)}}
    (ax,) = plots.tasks(scores, "Score").axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["SST-2", "RTE"]
    assert len(ax.collections) == 3 + 2 and len(ax.containers) == 2  # markers and bars
    assert plots.tasks({}, "Score") is None
