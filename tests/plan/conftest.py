"""A small teacher, of which there is only a config.json, and configs of runs with it."""

from __future__ import annotations

import json

import pytest

import distiljax

TEACHER = {
    "model_type": "bert",
    "vocab_size": 384,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
}


def write_teacher(directory, **changes):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**TEACHER, **changes}))
    return str(directory)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture
def config(teacher):
    config = distiljax.distill_config()
    config.teacher = teacher
    config.data.seq_len = 32
    config.batch_size = 32
    config.micro_batch_size = 2
    config.student.hidden_dropout = config.student.attention_dropout = 0.0  # quick to compile
    return config


@pytest.fixture(scope="session")
def recipe():
    """The program of the recipe at its full size."""
    from distiljax.plan.program import load_program

    return load_program(distiljax.distill_config())
