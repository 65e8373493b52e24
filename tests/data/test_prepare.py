from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from distiljax.data import Metadata, default_data_config, eval_batches, prepare
from distiljax.data.examples import examples
from distiljax.data.prepare import write_shards
from distiljax.errors import UserError


def make_config(source, **values):
    config = default_data_config()
    config.source = str(source)
    config.seq_len = 64
    config.holdout = 0.0
    config.update(values)
    return config


def refused(*args):
    with pytest.raises(UserError) as caught:
        prepare(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def digests(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


@pytest.mark.parametrize("pack", [True, False])
def test_a_corpus_holds_the_examples_of_the_text_and_counts_them(tmp_path, corpus_file, tokenizer, pack):
    reports = []
    metadata = prepare(
        make_config(corpus_file, pack=pack),
        "train",
        tokenizer,
        tmp_path / "out",
        progress=lambda documents, tokens: reports.append((documents, tokens)),
    )
    assert Metadata.load(tmp_path / "out") == metadata
    texts = corpus_file.read_text().splitlines()
    expected = sorted(tuple(example) for example in examples(texts, tokenizer, seq_len=64))

    (batch,) = eval_batches(tmp_path / "out", metadata.num_rows)
    found = sorted(
        tuple(ids[segments == segment])
        for ids, segments in zip(batch["input_ids"], batch["segment_ids"], strict=True)
        for segment in range(1, segments.max() + 1)
    )
    assert found == expected

    statistics = metadata.statistics
    tokens = sum(map(len, expected))
    assert reports[-1] == (120, tokens)
    assert statistics["documents_read"] == statistics["documents"] == 120
    assert (statistics["examples"], statistics["tokens"]) == (len(expected), tokens)
    assert statistics["rows"] == metadata.num_rows == len(batch["input_ids"])
    if not pack:
        assert metadata.num_rows == len(expected)
    assert metadata.fill_rate == (batch["segment_ids"] > 0).mean()
    assert metadata.tokens_per_row == tokens / metadata.num_rows
    counts = metadata.token_counts(tmp_path / "out")
    np.testing.assert_array_equal(
        counts, np.bincount([t for example in expected for t in example], minlength=metadata.vocab_size)
    )


def test_the_same_settings_give_the_same_bytes(tmp_path, corpus_file, tokenizer):
    for name in "ab":
        prepare(make_config(corpus_file), "train", tokenizer, tmp_path / name)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_a_corpus_is_reused_and_never_overwritten(tmp_path, corpus_file, tokenizer):
    config = make_config(corpus_file)
    first = prepare(config, "train", tokenizer, tmp_path / "out")
    before = digests(tmp_path / "out")
    corpus_file.unlink()  # reuse needs no source
    assert prepare(config, "train", tokenizer, tmp_path / "out") == first

    other = make_config(corpus_file, min_tokens=20)
    assert "was prepared with data.min_tokens = 12, now it is 20" in refused(
        other, "train", tokenizer, tmp_path / "out"
    )
    assert "prepared with split of the corpus = 'train', now it is 'validation'" in refused(
        config, "validation", tokenizer, tmp_path / "out"
    )
    assert digests(tmp_path / "out") == before


def test_another_vocabulary_is_refused(tmp_path, corpus_file, tokenizer):
    import copy

    metadata = prepare(make_config(corpus_file), "train", tokenizer, tmp_path / "out")
    metadata.check_tokenizer(tokenizer)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["river-bank"])
    with pytest.raises(UserError, match=r"the vocabulary of small \(\d+ tokens, .* prepare it again"):
        metadata.check_tokenizer(other)
    assert "prepared with the vocabulary of small" in refused(
        make_config(corpus_file), "train", other, tmp_path / "out"
    )


def test_a_directory_with_other_things_in_it_is_left_alone(tmp_path, corpus_file, tokenizer):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    assert "exists and is not a prepared corpus" in refused(make_config(corpus_file), "train", tokenizer, out)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    (out / "thesis.tex").unlink()
    prepare(make_config(corpus_file), "train", tokenizer, out)  # an empty directory is fine


def test_a_failed_prepare_leaves_nothing(tmp_path, corpus_file, tokenizer):
    with open(corpus_file, "ab") as file:
        file.write(b"\xff\n")
    assert "line 121 is not UTF-8" in refused(
        make_config(corpus_file), "train", tokenizer, tmp_path / "o" / "train"
    )
    assert list((tmp_path / "o").iterdir()) == []


def test_a_killed_prepare_leaves_no_corpus_and_the_next_one_cleans_up(tmp_path, corpus_file, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    program = f"""
import os, signal, transformers
from distiljax.data import prepare, default_data_config
from distiljax.data import prepare as function
import distiljax.data.metadata as metadata
# Killed at the last moment: the shards are written, the metadata is not.
metadata.Metadata.save = lambda self, directory: os.kill(os.getpid(), signal.SIGKILL)
config = default_data_config()
config.source, config.seq_len, config.holdout = {str(corpus_file)!r}, 64, 0.0
tokenizer = transformers.AutoTokenizer.from_pretrained({str(tmp_path / "tokenizer")!r})
prepare(config, "train", tokenizer, {str(tmp_path / "o" / "train")!r})
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    assert done.returncode == -9, done.stderr.decode()
    (left,) = (tmp_path / "o").iterdir()
    assert ".train.partial-" in left.name and any(left.iterdir())

    prepare(make_config(corpus_file), "train", tokenizer, tmp_path / "o" / "train")
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["train"]


def test_an_empty_corpus_is_refused_with_the_reason(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("the river\n\n")
    message = refused(make_config(path), "train", tokenizer, tmp_path / "out")
    assert "1 documents read, 1 kept, 1 examples under 12 tokens" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seq_len": 2}, "data.seq_len is 2; expected 3 to 65535"),
        ({"min_tokens": 65}, "data.min_tokens is 65; expected at most data.seq_len, 64"),
        ({"unit": "sentence"}, "data.unit is 'sentence'; expected one of document, line, paragraph"),
        ({"holdout": 1.0}, "data.holdout is 1.0; expected a share from 0 to below 1"),
        ({"max_unknown": 0.0}, "data.max_unknown is 0.0; expected a share above 0"),
        ({"max_documents": -1}, "data.max_documents is -1; expected a number of documents"),
        ({"source": ()}, "data.source is (); expected a source"),
    ],
)
def test_bad_settings_are_refused_before_any_work(tmp_path, tokenizer, values, message):
    config = make_config(tmp_path / "missing.txt")
    config.update(values)
    assert message in refused(config, "train", tokenizer, tmp_path / "out")


def test_missing_and_unknown_settings_are_refused(tmp_path, tokenizer):
    config = make_config(tmp_path / "a.txt").to_dict()
    assert "data.color is not a data setting" in refused(
        {**config, "color": 1}, "train", tokenizer, tmp_path / "o"
    )
    del config["pack"]
    assert "data.pack is missing" in refused(config, "train", tokenizer, tmp_path / "o")
    assert "is remote; expected a local directory" in refused(
        make_config("x"), "train", tokenizer, "gs://b/o"
    )


def test_a_source_may_be_a_tuple(tmp_path, tokenizer, corpus_file):
    other = tmp_path / "other.txt"
    other.write_text("the river was in this and that and it was for the river of which he was\n")
    config = make_config(corpus_file)
    config.source = (str(corpus_file), str(other))
    metadata = prepare(config, "train", tokenizer, tmp_path / "out")
    assert metadata.statistics["documents"] == 121
    assert prepare(config, "train", tokenizer, tmp_path / "out") == metadata


def test_rows_are_spread_over_shards(tmp_path):
    rows = [[np.array([2, number, 3])] for number in range(7)]
    shards = write_shards(iter(rows), str(tmp_path), np.dtype("<u2"), rows_per_shard=3)
    assert shards == [(f"rows-0000{n}.array_record", rows) for n, rows in enumerate([3, 3, 1])]
    assert write_shards(iter(rows[:3]), str(tmp_path), np.dtype("<u2"), rows_per_shard=3) == shards[:1]
    assert write_shards(iter([]), str(tmp_path), np.dtype("<u2")) == []


def test_wikipedia_like_text_fills_rows(tmp_path, tokenizer):
    """Lengths spread as those of articles are: packing wastes under 3 % of the positions."""
    words = ["the", "river", "was", "in", "this", "and", "that", "it", "for", "which", "he"]
    lengths = np.random.default_rng(0).lognormal(5.5, 1.0, 400).astype(int) + 10
    path = tmp_path / "a.txt"
    path.write_text(
        "\n".join(" ".join(words[(n + i) % 11] for i in range(size)) for n, size in enumerate(lengths))
    )
    metadata = prepare(make_config(path, seq_len=512), "train", tokenizer, tmp_path / "out")
    assert metadata.fill_rate > 0.97


def edit_metadata(directory, **values):
    path = directory / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_damaged_newer_and_missing_metadata_are_refused(tmp_path, corpus_file, tokenizer):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="holds no prepared corpus"):
        Metadata.load(out)
    metadata = prepare(make_config(corpus_file), "train", tokenizer, out)
    edit_metadata(out, format_version=99)
    with pytest.raises(UserError, match="has format version 99, this distiljax reads 1"):
        Metadata.load(out)
    edit_metadata(out, format_version=1, shards=3)
    with pytest.raises(UserError, match="metadata.json is damaged"):
        Metadata.load(out)
    (out / "metadata.json").write_text("{")
    with pytest.raises(UserError, match="metadata.json is damaged"):
        Metadata.load(out)
    metadata.save(out)
    (out / metadata.shards[0][0]).unlink()
    with pytest.raises(UserError, match="rows-00000.array_record is missing"):
        Metadata.load(out)


def test_token_counts_are_never_unpickled(tmp_path, corpus_file, tokenizer):
    metadata = prepare(make_config(corpus_file), "train", tokenizer, tmp_path / "out")
    np.save(tmp_path / "out" / "token_counts.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(UserError, match="token_counts.npy cannot be read"):
        metadata.token_counts(tmp_path / "out")
    np.save(tmp_path / "out" / "token_counts.npy", np.zeros(3, np.int64))
    with pytest.raises(UserError, match="has shape"):
        metadata.token_counts(tmp_path / "out")
