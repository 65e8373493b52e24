"""The notebooks: as they are saved, and run from top to bottom, small and without network."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import nbformat
import numpy as np
import pytest

import distiljax
from tests.integration.conftest import corpus, tokenizer  # noqa: F401, the fixtures

ROOT = Path(__file__).parents[2]
FIRST = ROOT / "colab" / "distill_your_own_bert.ipynb"
SECOND = ROOT / "colab" / "finetune_and_compare.ipynb"
NOTEBOOKS = pytest.mark.parametrize("path", [FIRST, SECOND], ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, tokenizer):  # noqa: F811
    """A random 2-layer encoder without a head, as a Hugging Face directory."""
    config = distiljax.EncoderConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        intermediate_size=64,
        max_positions=64,
        initializer_range=0.1,
    )
    module = distiljax.Encoder(config)
    params = jax.device_get(module.init(jax.random.key(0), np.zeros((1, 4), np.int32))["params"])
    path = tmp_path_factory.mktemp("encoder") / "tiny"
    distiljax.save_pretrained(module, params, path, tokenizer=tokenizer)
    return path


def execute(path, directory, **settings):
    """The notebook, run in `directory` by the script that also makes the saved outputs."""
    out = directory / path.name
    environment = {
        **os.environ,
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        # Compiling is most of the time.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "DISTILJAX_NOTEBOOK_SETTINGS": json.dumps({"dtype": "float32", **settings}),
    }
    script = ROOT / "scripts" / "run_notebooks.py"
    ran = subprocess.run(
        [sys.executable, "-W", "error", script, path, f"--out={out}", f"--cwd={directory}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, re.sub(r"\x1b\[[\d;]*m", "", ran.stderr)[-4000:]
    notebook = nbformat.read(out, as_version=4)
    said = "".join(results(notebook, cell.id) for cell in notebook.cells if cell.cell_type == "code")
    assert not re.findall(r"\w*warning", ran.stderr + said, re.I)
    return notebook


def results(notebook, name):
    """What a cell put out: its texts, and the tables and HTML as they are written."""
    (cell,) = (cell for cell in notebook.cells if cell.id == name)
    found = []
    for output in cell.outputs:
        data = {"text": output.get("text"), **output.get("data", {})}
        found += [data[kind] for kind in ("text", "text/markdown", "text/html") if data.get(kind)]
    return "\n".join(found)


def table(notebook, name):
    """The rows of the table that a cell shows, without its heading."""
    lines = [line for line in results(notebook, name).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def images(notebook):
    """The pictures, by the cells that show them."""
    return {
        cell.id: base64.b64decode(output.data["image/png"])
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    }


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, encoder, corpus):  # noqa: F811
    directory = tmp_path_factory.mktemp("distilled")
    settings = {"teacher": str(encoder), "corpus": str(corpus), "seq_len": 32, "batch": 16, "micro_batch": 8}
    return directory, execute(FIRST, directory, **settings, adapt_steps=4, steps=4)


def test_the_first_notebook_distils(distilled):
    _, notebook = distilled
    assert [row[0] for row in table(notebook, "prepare")] == ["train", "validation"]
    assert results(notebook, "look").count("title=") > 2  # masked words
    models = {row[0]: row for row in table(notebook, "evaluate")}
    assert list(models) == ["teacher", "student", "student before distillation"]
    assert all(re.fullmatch(r"[\d.]+ %", row[-1]) for row in models.values())
    assert set(images(notebook)) == {"adapt-curve", "distil-curves", "evaluate-curves", "quality"}
    assert [len(row) for row in table(notebook, "predict")] == [3] * 4


def test_the_first_notebook_leaves_a_student(distilled):
    directory, notebook = distilled
    module, _ = distiljax.from_pretrained(directory / "runs" / "my-student")
    assert module.config.num_layers == 1
    assert "nothing is uploaded" in results(notebook, "hub")
    # PyTorch and JAX say the same.
    for token, score, ours, our_score in table(notebook, "torch"):
        assert token == ours and float(score) == pytest.approx(float(our_score), abs=2e-4)
    assert (directory / "runs" / "report.md").is_file()


@pytest.fixture(scope="module")
def compared(tmp_path_factory, encoder):
    directory = tmp_path_factory.mktemp("compared")
    settings = {
        "examples": 96,
        "max_length": 16,
        "epochs": 1,
        "sentences": ["Return the last line of a file."],
    }
    return directory, execute(SECOND, directory, teacher=str(encoder), **settings)


def test_the_second_notebook_compares(compared):
    _, notebook = compared
    assert "96 sentences to train on, 32 to validate" in results(notebook, "look")
    models = {row[0]: row[1:] for row in table(notebook, "compare")}
    assert list(models) == ["teacher", "student", "student + task distillation"]
    assert models["teacher"][-1] == "100.0 %"
    # What a cell said of a run is what the table says of it.
    for cell, model in (("teacher", "teacher"), ("student", "student"), ("distil", list(models)[-1])):
        (said,) = re.findall(r": ([\d.]+) % accuracy", results(notebook, cell))
        assert said == models[model][3]
    assert set(images(notebook)) == {"curves", "quality"}


def test_the_second_notebook_leaves_a_classifier(compared):
    directory, notebook = compared
    module, _ = distiljax.from_pretrained(directory / "runs" / "my-classifier", head="any")
    assert sorted(module.head.labels) == ["arrays", "language models", "network", "plots"]
    assert module.config.num_layers == 1  # copied from the teacher, as there was no student
    ((sentence, small, _),) = table(notebook, "predict")
    assert [[sentence, small]] == table(notebook, "export")


@NOTEBOOKS
def test_a_notebook_is_saved_as_it_ran(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    errors = [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert not errors
    assert sum(bool(cell.outputs) for cell in code) > len(code) / 2
    pictures = images(notebook)
    assert len(pictures) >= 2 and sum(map(len, pictures.values())) < 300_000
    assert path.stat().st_size < 450_000


@NOTEBOOKS
def test_a_notebook_says_nothing_of_the_machine(path):
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop("image/png", None)
    text = nbformat.writes(notebook)
    found = re.findall(
        rf"{re.escape(str(ROOT))}|site-packages|/home/\w+|/root/|/tmp/|/usr/|/content/|[A-Z]:\\\\Users", text
    )
    assert not found
    assert not re.findall(r"hf_[A-Za-z0-9]{20,}|api[_-]?key|password|Warning|Traceback", text)
