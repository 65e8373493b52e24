"""The ablation program: its table, its plot, and the whole of it at a small size."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

import distiljax
from distiljax.comparison import summarise
from distiljax.data import default_data_config, prepare
from distiljax.hub import vocabulary_size
from tests import compiling

SCRIPT = Path(__file__).parents[2] / "scripts" / "ablation.py"


@pytest.fixture(scope="module")
def ablation():
    return runpy.run_path(str(SCRIPT), run_name="ablation")


def compared(runs):
    """A comparison of two tasks from variant → task → scores by seed."""
    tasks = [{"name": name, "metrics": ["accuracy"]} for name in ("sst2", "rte")]
    found = summarise(
        tasks,
        {
            name: {task: [{"accuracy": value} for value in values] for task, values in by_task.items()}
            for name, by_task in runs.items()
        },
    )
    models = [{"name": name, **found[name]} for name in runs]
    return {"tasks": tasks, "seeds": [0, 1, 2], "models": models, "machine": "1 CPU device, 2 cores"}


RUNS = {
    "the recipe": {"sst2": [0.90, 0.92, 0.91], "rte": [0.60, 0.62, 0.64]},
    "no L_ce": {"sst2": [0.88, 0.89, 0.90], "rte": [0.58, 0.62, 0.60]},
    "no frequency weighting": {"sst2": [0.91, 0.91, 0.91], "rte": [0.61, 0.62, 0.66]},
}


def test_changes_are_taken_seed_by_seed(ablation):
    found = ablation["changes"](compared(RUNS), list(RUNS))
    # -2, -3, -1 on SST-2 and -2, 0, -4 on RTE: means of -2, -1.5 and -2.5.
    assert found["no L_ce"] == {
        "median": pytest.approx(-2),
        "min": pytest.approx(-2.5),
        "max": pytest.approx(-1.5),
        "tasks": {"sst2": pytest.approx(-2), "rte": pytest.approx(-2)},
    }
    assert found["no frequency weighting"]["median"] == pytest.approx(1)
    assert "the recipe" not in found


def test_the_table_stands_beside_the_papers(ablation):
    found = ablation["changes"](compared(RUNS), list(RUNS))
    students = {name: {"mlm_accuracy": 0.5, "steps": 300, "tokens": 1_200_000} for name in RUNS}
    lines = ablation["document"](compared(RUNS), found, students).splitlines()
    assert "| nothing | – | – | – | – | – | 50.0 % |" in lines
    assert "| no L_ce | -2.00 | -2.50 to -1.50 | -2.96 | -2.00 | -2.00 | 50.0 % |" in lines
    assert "| no frequency weighting | +1.00 | -0.50 to +1.00 | – | +0.00 | +1.00 | 50.0 % |" in lines
    assert any(
        "reaches SST-2 91.0, RTE 62.0" in line and "300 steps and 1.2 M tokens" in line for line in lines
    )


def test_the_plot_has_a_bar_of_the_papers_where_it_has_a_figure(ablation):
    found = ablation["changes"](compared(RUNS), list(RUNS))
    (ax,) = ablation["figure"](found).axes
    bars = sorted((round(bar.get_y() + bar.get_height() / 2, 2), bar.get_width()) for bar in ax.patches)
    assert bars == [(-0.2, pytest.approx(-2)), (0.2, -2.96), (0.8, pytest.approx(1))]


def test_every_variant_changes_one_setting_of_the_recipe(ablation, tmp_path):
    args = ablation["parse"](["--out", str(tmp_path), "--steps=10"])
    configs = {name: ablation["distillation"](args, name).to_dict() for name in ablation["VARIANTS"]}
    recipe = configs.pop("the recipe")
    assert recipe["loss"] == distiljax.distill_config().loss.to_dict()
    for name, config in configs.items():
        differing = [
            (part, key)
            for part in recipe
            if isinstance(recipe[part], dict)
            for key in recipe[part]
            if recipe[part][key] != config[part][key]
        ]
        assert len(differing) == 1, name
    assert set(ablation["PAPER"]) < set(configs)


@pytest.mark.parametrize("argument", ["--seeds=a", "--variants=no L_ce", "--variants=the recipe,no L_xy"])
def test_bad_arguments_are_one_line(ablation, argument, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        ablation["parse"](["--out", str(tmp_path), argument])
    assert caught.value.code == 2
    assert argument.split("=")[0] in capsys.readouterr().err.splitlines()[-1]


def test_told_to_stop_it_ends_as_a_command_does(ablation, capsys):
    assert ablation["stopped"]() == 0
    assert "the same command goes on from here" in capsys.readouterr().err


def test_the_whole_program(ablation, tokenizer, corpus_file, tmp_path, capsys, monkeypatch):
    kept = []
    monkeypatch.setattr("distiljax.programs.keep_programs", lambda: kept.append(True))
    config = distiljax.EncoderConfig(
        vocab_size=vocabulary_size(tokenizer),
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        intermediate_size=32,
        max_positions=64,
    )
    module = distiljax.MaskedLM(config)
    params = jax.device_get(jax.jit(module.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"])
    distiljax.save_pretrained(module, params, tmp_path / "teacher", tokenizer=tokenizer)
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    for split in ("train", "validation"):
        lines = [json.dumps({"sentence": "the river was " * (1 + i % 2), "label": i % 2}) for i in range(16)]
        (tmp_path / "data" / "sst2" / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    rows = default_data_config()
    rows.source, rows.seq_len, rows.holdout = str(corpus_file), 32, 0.2
    prepare(rows, tokenizer, tmp_path / "rows")
    flags = {
        "teacher": tmp_path / "teacher",
        "data": tmp_path / "rows",
        "task_data": tmp_path / "data",
        "variants": "the recipe,no frequency weighting",
        "out": tmp_path / "out",
        "steps": 2,
        "batch_size": 8,
        "seq_len": 32,
        "task_epochs": 1,
        "task_batch_size": 8,
        "seeds": "0",
        "dtype": "float32",
    }
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    with compiling.in_haste():
        assert ablation["main"](arguments) == 0
        assert kept  # the compiled programs, for the next start
        printed = capsys.readouterr().out
        results = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("result.json")}
        assert ablation["main"](arguments) == 0  # nothing is done again
    assert len(results) == 4
    assert all(path.stat().st_mtime_ns == time for path, time in results.items())
    stored = json.loads((tmp_path / "out" / "ablation.json").read_text())
    one, other = (
        json.loads((tmp_path / f"out/tasks/sst2/{name}/seed-0/result.json").read_text())["best"]["accuracy"]
        for name in ("the-recipe", "no-frequency-weighting")
    )
    assert stored["changes"]["no frequency weighting"]["median"] == pytest.approx(100 * (other - one))
    assert (tmp_path / "out" / "ablation.md").read_text() == printed
    assert (tmp_path / "out" / "plots" / "ablation.png").stat().st_size
