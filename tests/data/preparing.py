"""What the tests of preparing share."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest

from distiljax.data import default_data_config, eval_batches, prepare
from distiljax.data.examples import Tokeniser, examples
from distiljax.data.metadata import Statistics
from distiljax.errors import UserError
from tests import commands


def make_config(source, **values):
    config = default_data_config()
    config.source = source if isinstance(source, tuple) else str(source)
    config.seq_len = 64
    config.holdout = 0.0
    config.update(values)
    return config


def train(config, tokenizer, out, **options):
    """The corpus of the training split alone."""
    return prepare(config, tokenizer, out, splits=("train",), **options).get("train")


def refused(*args, **options):
    with pytest.raises(UserError) as caught:
        prepare(*args, **{"splits": ("train",), **options})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def digests(directory):
    """What must not differ between runs."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file() and path.name != "timing.json"
    }


def expected_examples(texts, tokenizer, **options):
    count = Statistics()
    found = examples(((text, count) for text in texts), Tokeniser.of(tokenizer), seq_len=64, **options)
    return sorted(tuple(example.tolist()) for example, _ in found)


def found_examples(directory):
    found = []
    for batch in eval_batches(directory, 1):
        for segment in range(1, batch["segment_ids"].max() + 1):
            found.append(tuple(batch["input_ids"][batch["segment_ids"] == segment].tolist()))
    return sorted(found)


def start(source, tokenizer_directory, out, **values):
    """`distiljax prepare` with small units on two processes."""
    program = (
        "import sys; from distiljax.data import units; units.MIN_UNIT_BYTES = 4000\n"
        "from distiljax.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    flags = {
        "source": source,
        "tokenizer": tokenizer_directory,
        "out": out,
        "seq_len": 64,
        "workers": 2,
    } | values
    call = [sys.executable, "-c", program, "prepare", *(f"--{key}={value}" for key, value in flags.items())]
    environment = commands.environment(python_path=filter(None, sys.path))
    return subprocess.Popen(call, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
