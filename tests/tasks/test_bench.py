"""`distiljax bench`: what is measured, how it is shown, what is refused."""

from __future__ import annotations

import json
import re

import jax
import numpy as np
import pytest

import distiljax
from distiljax.cli import main
from distiljax.hub import vocabulary_size
from distiljax.nn import HeadConfig
from distiljax.nn.linear import place_compute_params
from distiljax.tasks.bench import JSON, MARKDOWN, bench
from distiljax.tasks.speed import compile_forward, in_turn, random_tokens
from tests import compiling

POSITIONS = 24
LENGTHS, BATCH_SIZES = (8, 16), (1, 3)


@pytest.fixture(scope="module", autouse=True)
def compiled_in_haste():
    with compiling.in_haste():
        yield


@pytest.fixture(scope="module")
def teacher(tokenizer):
    config = distiljax.EncoderConfig(
        vocab_size=vocabulary_size(tokenizer),
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        intermediate_size=32,
        max_positions=POSITIONS,
        initializer_range=0.2,
    )
    module = distiljax.MaskedLM(config)
    row = np.zeros((1, 4), np.int32)
    return module, jax.device_get(jax.jit(module.init)(jax.random.key(0), row)["params"])


@pytest.fixture(scope="module")
def models(teacher, tokenizer, tmp_path_factory):
    """A masked language model, a bare encoder of one layer, and a classifier made of it."""
    root = tmp_path_factory.mktemp("models")
    student, params = distiljax.student_of(*teacher)
    encoder = distiljax.Encoder(student.config), params["encoder"]
    distiljax.save_pretrained(*teacher, root / "teacher", tokenizer=tokenizer)
    distiljax.save_pretrained(*encoder, root / "encoder", tokenizer=tokenizer)
    head = HeadConfig("sequence_classification", ("bad", "good"))
    classifier = distiljax.from_pretrained(root / "encoder", head=head, init_head=True)
    distiljax.save_pretrained(*classifier, root / "classifier", tokenizer=tokenizer)
    return {name: root / name for name in ("teacher", "encoder", "classifier")}


def size(params):
    return sum(array.size for array in jax.tree.leaves(params))


def test_calls_take_turns():
    made = []
    times = in_turn([lambda: made.append("a"), lambda: made.append("b")], seconds=0)
    assert "".join(made) == "ab" * 4  # once to warm up, then the fewest rounds
    assert [len(taken) for taken in times] == [3, 3] and min(map(min, times)) >= 0
    many = in_turn([lambda: None], seconds=1000)
    assert len(many[0]) == 50


def test_kernels_in_bfloat16_give_the_same_outputs(teacher):
    module, params = teacher
    module = module.clone(dtype=jax.numpy.bfloat16)
    placed = place_compute_params(params, module.dtype)
    assert placed["encoder"]["layer_0"]["ffn"]["up"]["kernel"].dtype == "bfloat16"
    assert placed["encoder"]["layer_0"]["ffn"]["up"]["bias"].dtype == "float32"
    call, _ = compile_forward(module, placed, 3, 8)
    ids = random_tokens(module.config.vocab_size, 3, 8)
    expected = jax.jit(lambda p: module.apply({"params": p}, ids, np.ones_like(ids)))(params)
    np.testing.assert_array_equal(call(), expected.last_hidden_state)


def test_bench_measures_every_model_at_every_size(models, teacher, tmp_path, capsys):
    measured = ("teacher", "encoder")
    named = [f"--model={name}={models[name]}" for name in measured]
    flags = [f"--lengths={LENGTHS[0]},{LENGTHS[1]}", f"--batch_sizes={BATCH_SIZES[0]},{BATCH_SIZES[1]}"]
    ended = main(["bench", *named, *flags, "--dtype=float32", "--seconds=0", f"--out={tmp_path / 'out'}"])
    shown = capsys.readouterr()
    assert ended == 0, shown.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [JSON, MARKDOWN]
    result = json.loads((tmp_path / "out" / JSON).read_text())

    described = {model["name"]: model for model in result["models"]}
    assert {name: model["head"] for name, model in described.items()} == {
        "teacher": "masked_lm",
        "encoder": None,
    }
    assert described["teacher"]["parameters"] == size(teacher[1])
    assert described["teacher"]["bytes"] == {"float32": 4 * size(teacher[1])}

    figures = result["figures"]
    combinations = [(f["batch_size"], f["seq_len"], f["model"]) for f in figures]
    assert combinations == [(b, s, m) for b in BATCH_SIZES for s in LENGTHS for m in measured]
    for figure in figures:
        latency, speed = figure["latency_ms"], figure["tokens_per_second"]
        assert 0 < latency["min"] <= latency["median"] <= latency["max"]
        tokens = figure["batch_size"] * figure["seq_len"]
        assert speed["median"] == pytest.approx(1000 * tokens / latency["median"])
        reference = next(
            f for f in figures if all(f[key] == figure[key] for key in ("batch_size", "seq_len"))
        )
        assert figure["speed_ratio"] == pytest.approx(reference["latency_ms"]["median"] / latency["median"])
        # Beside the parameters that it uses a program needs room for what it computes.
        assert figure["program_bytes"] > 4 * size(teacher[1]["encoder"]) * (figure["model"] == "teacher")
    assert result["process_bytes"] > 10_000_000

    markdown = (tmp_path / "out" / MARKDOWN).read_text()
    for text in ("One row at a time", f"{BATCH_SIZES[1]} rows at once", "table 3"):
        assert text in markdown and text in shown.out
    assert "| BERT-base (paper) | 110 M | 668 | 100.0 % |" in markdown
    assert "| DistilBERT (paper) | 66.0 M | 410 | 61.4 % |" in markdown
    assert re.search(r"\| teacher, float32 \| [\d.]+ k \| [\d.]+ \| 100.0 % \|", markdown)
    assert "the encoder is run" in markdown
    lines = shown.out.splitlines()
    tables = [line for line in lines if re.match(r"\s*\d* *(teacher|encoder)\b", line)]
    assert len(tables) >= 2 * 6 and max(map(len, tables)) <= 80
    assert "has no head" in shown.err and "its encoder is measured" in shown.err


def test_bench_compares_dtypes(models):
    dtypes = ("float32", "bfloat16", "int8")
    found = bench(
        {"a classifier": models["classifier"]}, lengths=(8,), batch_sizes=(2,), dtypes=dtypes, seconds=0
    )
    assert [figure["dtype"] for figure in found["figures"]] == [*dtypes]
    (model,) = found["models"]
    assert model["head"] == "sequence_classification"
    kernels, scales = 4 * 16 * 16 + 2 * 16 * 32, 4 * (5 * 16 + 32)
    assert model["bytes"]["float32"] - model["bytes"]["bfloat16"] == 2 * kernels
    assert model["bytes"]["float32"] - model["bytes"]["int8"] == 3 * kernels - scales


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], ["--model", "missing"]),
        (["--model={}", "--lengths=8,x"], ["--lengths=8,x"]),
        (["--model={}", "--lengths=8,0"], ["lengths", "8,0"]),
        (["--model={}", "--batch_sizes=2,2"], ["batch_sizes", "2,2"]),
        (["--model={}", "--lengths=32"], ["32", str(POSITIONS)]),
        (["--model={}", "--dtype=float16"], ["float16", "bfloat16"]),
        (["--model={}", "--model=b=/nowhere/model", "--lengths=8"], ["/nowhere/model"]),
        (["--model=a={}", "--model=a={}"], ["each name once"]),
        (["--model={}", "--out={}/config.json"], ["config.json", "directory"]),
    ],
)
def test_bad_input_is_refused_in_one_line(models, flags, named, capsys):
    assert main(["bench", *(flag.format(models["teacher"]) for flag in flags)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("distiljax: error: ")
    assert all(text in lines[0] for text in named)
