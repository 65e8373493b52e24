"""Preparing on Apache Beam gives the files of the local way, byte for byte, and its bad news in the same words."""

from __future__ import annotations

import json
import random
import re
import shutil
import sys

import pytest

from distiljax.cli import main
from distiljax.data import beam, default_data_config, prepare, units
from distiljax.data.metadata import TIMING_FILE
from distiljax.errors import UserError

pytest.importorskip("apache_beam")

# Not DirectRunner, which looks for a binary on the internet before it becomes this one.
IN_PROCESS = ["--runner=FnApiRunner"]
TWO_PROCESSES = [*IN_PROCESS, "--direct_num_workers=2", "--direct_running_mode=multi_processing"]


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(units, "MIN_UNIT_BYTES", 3000)
    monkeypatch.setattr(beam, "TEXT_AT_ONCE", 8000)


@pytest.fixture
def config(tmp_path):
    """Two sources of several units each; documents are repeated within units, between them and between sources."""
    draw = random.Random(7)
    words = re.findall(
        r"\w+", "the a of and to in is was for on that with he it as his by at from her an are were"
    )
    first, second = (
        [" ".join(draw.choices(words, k=draw.randrange(5, 60))) for _ in range(120)] for _ in range(2)
    )
    (tmp_path / "first.txt").write_text("\n".join([*first, first[-1], *first[:20]]) + "\n")
    (tmp_path / "second.txt").write_text("\n".join([*second, *first[30:50], second[0]]) + "\n")
    config = default_data_config()
    config.source = (str(tmp_path / "first.txt"), str(tmp_path / "second.txt"))
    config.seq_len = 32
    config.holdout = 0.1
    return config


def files(directory):
    """The bytes of all files but those that say how long it took."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != TIMING_FILE
    }


def spoil(config):
    """Puts a byte that is not UTF-8 into the last unit; returns what mends it."""
    path = config.source[-1]
    with open(path, "rb") as file:
        text = file.read()
    with open(path, "wb") as file:
        file.write(text[:-3] + b"\xff" + text[-2:])

    def mend():
        with open(path, "wb") as file:
            file.write(text)

    return mend


@pytest.mark.parametrize("options", [IN_PROCESS, TWO_PROCESSES], ids=["in process", "two processes"])
def test_the_files_are_those_of_the_local_way(tmp_path, tokenizer, config, options):
    local = prepare(config, tokenizer, tmp_path / "local")
    corpora = beam.prepare_on_beam(config, tokenizer, tmp_path / "beam", pipeline_options=options)
    assert corpora == local
    assert local["train"].statistics["dropped_duplicate"] >= 42
    assert local["validation"].statistics["examples"] > 5
    assert len(local["train"].shards) > 5
    assert files(tmp_path / "beam") == files(tmp_path / "local")
    assert not (tmp_path / "beam" / ".prepare").exists()

    timing = json.loads((tmp_path / "beam" / "train" / TIMING_FILE).read_text())
    assert timing["runner"] == "FnApiRunner"
    assert timing["tokens"] == sum(metadata.statistics["tokens"] for metadata in local.values())
    again = beam.prepare_on_beam(config, tokenizer, tmp_path / "beam", pipeline_options=options)
    assert again == local


def test_without_deduplication_every_document_stays(tmp_path, tokenizer, config):
    config.deduplicate = False
    config.layout = "bucketed"
    config.buckets = (16,)
    local = prepare(config, tokenizer, tmp_path / "local")
    corpora = beam.prepare_on_beam(config, tokenizer, tmp_path / "beam", pipeline_options=IN_PROCESS)
    assert corpora == local and local["train"].statistics["dropped_duplicate"] == 0
    assert files(tmp_path / "beam") == files(tmp_path / "local")


@pytest.mark.parametrize("deduplicate", [False, True])
def test_a_job_that_was_cut_short_goes_on(tmp_path, tokenizer, config, deduplicate):
    config.deduplicate = deduplicate
    prepare(config, tokenizer, tmp_path / "whole")
    mend = spoil(config)
    cut, out = tmp_path / "cut", tmp_path / "out"
    with pytest.raises(UserError, match="UTF-8"):
        prepare(config, tokenizer, cut, splits=("train", "validation"), shard_count=2, shard_index=0)
        prepare(config, tokenizer, cut, splits=("train", "validation"), shard_count=2, shard_index=1)
    mend()
    shutil.copytree(cut, out)
    before = {path: path.stat().st_ino for path in out.glob("train/*.array_record")}
    assert deduplicate or len(before) > 3
    beam.prepare_on_beam(config, tokenizer, out, pipeline_options=IN_PROCESS)
    assert files(out) == files(tmp_path / "whole")
    assert {path: path.stat().st_ino for path in before} == before  # what was finished was not made again


def test_what_beam_has_begun_the_local_way_finishes(tmp_path, tokenizer, config):
    prepare(config, tokenizer, tmp_path / "whole")
    mend = spoil(config)
    with pytest.raises(UserError, match="UTF-8"):
        beam.prepare_on_beam(config, tokenizer, tmp_path / "cut", pipeline_options=IN_PROCESS)
    mend()
    prepare(config, tokenizer, tmp_path / "cut")
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


@pytest.mark.parametrize("options", [IN_PROCESS, TWO_PROCESSES], ids=["in process", "two processes"])
def test_a_bad_record_is_named_in_one_line(tmp_path, tokenizer, config, options):
    spoil(config)
    with pytest.raises(UserError) as local:
        prepare(config, tokenizer, tmp_path / "local")
    with pytest.raises(UserError) as on_beam:
        beam.prepare_on_beam(config, tokenizer, tmp_path / "beam", pipeline_options=options)
    assert str(on_beam.value) == str(local.value)


def test_a_directory_that_the_workers_do_not_see_is_named(tmp_path, config):
    unit = units.plan(beam.checked_settings(config), ("train",))[0]
    with pytest.raises(UserError, match="share"):
        list(beam._scan(unit, tmp_path, 1))
    with pytest.raises(UserError, match="share"):
        beam._write(unit, tmp_path, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--runner=NoSuchRunner"], "NoSuchRunner"),
        ([*IN_PROCESS, "--direct_num_workers=many"], "invalid int value: 'many'"),
        (["--help"], "--help"),
        (["--runner=DataflowRunner", "--region=here", "--temp_location=/tmp"], "project|google|gs://"),
    ],
)
def test_bad_pipeline_options_are_named(tmp_path, tokenizer, config, options, words):
    with pytest.raises(UserError, match=words) as caught:
        beam.prepare_on_beam(config, tokenizer, tmp_path / "out", pipeline_options=options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_sample_is_refused(tmp_path, tokenizer, config):
    config.max_documents = 10
    with pytest.raises(UserError, match=r"data\.max_documents is 10"):
        beam.prepare_on_beam(config, tokenizer, tmp_path / "out", pipeline_options=IN_PROCESS)


def test_without_apache_beam_the_line_says_how_to_get_it(tmp_path, tokenizer, config, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"pip install 'distiljax\[beam\]'"):
        beam.prepare_on_beam(config, tokenizer, tmp_path / "out", pipeline_options=IN_PROCESS)


def test_the_command(tmp_path, tokenizer, config, capsys):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    command = [
        "prepare",
        *(f"--source={source}" for source in config.source),
        f"--tokenizer={tmp_path / 'tokenizer'}",
        "--seq_len=32",
        "--config.data.holdout=0.1",
    ]
    with_beam = [*command, f"--out={tmp_path / 'beam'}", "--beam=--runner=FnApiRunner --direct_num_workers=1"]
    for extra, words in {
        "--workers=2": "--workers=2 is not for --beam",
        "--shard_count=2": "--shard_count=2 is not for --beam",
        "--beam='": "No closing quotation",
    }.items():
        assert main([*with_beam, extra]) == 2
        assert words in capsys.readouterr().err
    assert main(with_beam) == 0
    assert main([*command, f"--out={tmp_path / 'local'}", "--workers=1"]) == 0
    assert files(tmp_path / "beam") == files(tmp_path / "local")
