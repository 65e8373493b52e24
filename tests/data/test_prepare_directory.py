"""The directory of prepared corpora: what is gone on with, refused, kept, and what its metadata must be like."""

from __future__ import annotations

import json
import logging
import os
import shutil

import numpy as np
import pytest

from distiljax.data import Metadata, default_data_config, prepare
from distiljax.errors import UserError
from tests.data.preparing import (
    digests,
    make_config,
    refused,
    start,
    train,
)


def test_a_corpus_is_reused_and_never_overwritten(tmp_path, corpus_file, tokenizer, caplog):
    config = make_config(corpus_file)
    first = train(config, tokenizer, tmp_path / "out")
    before = digests(tmp_path / "out")
    text = corpus_file.read_text()
    corpus_file.unlink()  # reuse needs no source
    assert train(config, tokenizer, tmp_path / "out") == first

    other = make_config(corpus_file, min_tokens=20)
    assert "was prepared with data.min_tokens = 12, now it is 20" in refused(
        other, tokenizer, tmp_path / "out"
    )
    assert digests(tmp_path / "out") == before

    with caplog.at_level(logging.WARNING):
        corpus_file.write_text(text)
        train(config, tokenizer, tmp_path / "out")
        assert not caplog.records
        corpus_file.write_text(text + "more\n")
        train(config, tokenizer, tmp_path / "out")
    assert "was prepared from other text than there is now" in caplog.text


def test_a_corpus_may_be_adopted_as_it_is(tmp_path, corpus_file, tokenizer):
    made = train(make_config(corpus_file, min_tokens=20), tokenizer, tmp_path / "out")
    assert train(default_data_config(), tokenizer, tmp_path / "out", adopt=True) == made
    asked = default_data_config()
    asked.min_tokens = 30  # not the corpus's, not the default
    assert "min_tokens = 20, now it is 30" in refused(asked, tokenizer, tmp_path / "out", adopt=True)
    assert "was prepared with data." in refused(default_data_config(), tokenizer, tmp_path / "out")


def test_unfinished_work_of_other_settings_is_refused(tmp_path, corpus_file, tokenizer, small_units):
    config = make_config(corpus_file)
    assert not prepare(config, tokenizer, tmp_path / "out", splits=("train",), shard_count=2)
    other = make_config(corpus_file, min_tokens=20)
    message = refused(other, tokenizer, tmp_path / "out")
    assert "unfinished work of another preparation (data.min_tokens was 12 and is now 20)" in message
    with open(corpus_file, "a") as file:
        file.write("the river was in the river and that was it for him as it is\n" * 2)
    assert "another preparation (other text)" in refused(config, tokenizer, tmp_path / "out")
    # As the message says.
    shutil.rmtree(tmp_path / "out" / ".prepare")
    assert train(config, tokenizer, tmp_path / "out").statistics["documents"] == 121
    train(config, tokenizer, tmp_path / "fresh")
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


def test_unfinished_work_goes_on_where_the_text_has_moved(tmp_path, corpus_file, tokenizer, small_units):
    (tmp_path / "one").mkdir()
    for number in range(3):
        (tmp_path / "one" / f"{number}.txt").write_text(corpus_file.read_text() + f"part {number}\n")
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        config = make_config("text/*.txt")
        os.rename("one", "text")
        assert not prepare(config, tokenizer, tmp_path / "out", splits=("train",), shard_count=2)
        (tmp_path / "other").mkdir()
        os.rename("text", "other/text")
        os.chdir("other")
        assert train(config, tokenizer, tmp_path / "out").num_rows > 10
    finally:
        os.chdir(here)


def test_parts_started_at_the_same_instant_make_one_corpus(tmp_path, corpus_file, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = tmp_path / "large.txt"
    text = corpus_file.read_text().splitlines()
    source.write_text("\n".join(f"{line} {number % 7}" for number in range(10) for line in text))
    options = {"workers": 1, "shard_count": 3}
    parts = [
        start(source, tmp_path / "tokenizer", tmp_path / "out", shard_index=i, **options) for i in range(3)
    ]
    for part in parts:
        _, errors = part.communicate(timeout=100)
        assert part.returncode == 0, errors
    whole = start(source, tmp_path / "tokenizer", tmp_path / "whole", workers=1)
    assert whole.communicate(timeout=100) and whole.returncode == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_work_left_by_a_kill_after_the_end_is_removed(tmp_path, corpus_file, tokenizer, small_units):
    config = make_config(corpus_file)
    assert not prepare(config, tokenizer, tmp_path / "out", splits=("train",), shard_count=2)
    shutil.copytree(tmp_path / "out" / ".prepare", tmp_path / "left")
    made = train(config, tokenizer, tmp_path / "out")
    shutil.copytree(tmp_path / "left", tmp_path / "out" / ".prepare")
    assert train(config, tokenizer, tmp_path / "out") == made
    assert not (tmp_path / "out" / ".prepare").exists()


def test_damaged_notes_of_a_unit_are_made_again(tmp_path, corpus_file, tokenizer, small_units):
    config = make_config(corpus_file)
    train(config, tokenizer, tmp_path / "fresh")
    for pattern, damage in (("unit-*.json", b"[]"), ("counts-*.npz", None)):
        assert not prepare(config, tokenizer, tmp_path / "out", splits=("train",), shard_count=2)
        path = sorted((tmp_path / "out" / ".prepare").glob(pattern))[0]
        path.unlink() if damage is None else path.write_bytes(damage)
        shutil.rmtree(tmp_path / "out" / "train")
        train(config, tokenizer, tmp_path / "out")
        assert digests(tmp_path / "out") == digests(tmp_path / "fresh")
        shutil.rmtree(tmp_path / "out")


def test_nothing_of_the_users_is_removed_when_nothing_comes_of_it(tmp_path, corpus_file, tokenizer):
    made = train(make_config(corpus_file), tokenizer, tmp_path / "out")
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "mine.array_record").write_text("precious")
    config = make_config(tmp_path / "bad.jsonl")
    assert "line 1 is not JSON" in refused(config, tokenizer, tmp_path / "user")
    assert [path.name for path in (tmp_path / "user").rglob("*")] == ["mine.array_record"]
    assert "is the corpus of one split" in refused(config, tokenizer, tmp_path / "out" / "train")
    assert Metadata.load(tmp_path / "out" / "train") == made
    assert "is not a directory" in refused(config, tokenizer, tmp_path / "bad.jsonl")


def test_an_empty_validation_split_does_not_cost_the_training_rows(tmp_path, corpus_file, tokenizer):
    text = tmp_path / "set"
    text.mkdir()
    (text / "train.txt").write_text(corpus_file.read_text())
    (text / "validation.txt").write_text("too short\n")
    config = make_config(text)
    message = refused(config, tokenizer, tmp_path / "out", splits=("train", "validation"))
    assert "no example of validation is left" in message and "the other splits stay" in message
    assert list((tmp_path / "out" / "train").glob("rows-*"))
    shutil.rmtree(tmp_path / "out" / ".prepare")  # as the message says
    assert train(config, tokenizer, tmp_path / "out").num_rows > 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_count": 0}, "shard_count is 0; expected the number of parts, at least 1"),
        ({"shard_index": 2, "shard_count": 2}, "shard_index is 2; expected 0 to 1, as shard_count is 2"),
        ({"shard_index": -1}, "shard_index is -1; expected 0 to 0"),
        ({"workers": 0}, "workers is 0; expected at least 1"),
    ],
)
def test_parts_and_workers_that_there_are_not(tmp_path, corpus_file, tokenizer, options, message):
    assert message in refused(make_config(corpus_file), tokenizer, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_lost_shard_of_unfinished_work_is_made_again(tmp_path, corpus_file, tokenizer, small_units):
    config = make_config(corpus_file)
    assert not prepare(config, tokenizer, tmp_path / "out", splits=("train",), shard_count=2)
    shard = sorted((tmp_path / "out" / "train").glob("*.array_record"))[0]
    shard.write_bytes(shard.read_bytes()[:100])
    train(config, tokenizer, tmp_path / "out")
    train(config, tokenizer, tmp_path / "fresh")
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


def test_another_vocabulary_is_refused(tmp_path, corpus_file, tokenizer):
    import copy

    metadata = train(make_config(corpus_file), tokenizer, tmp_path / "out")
    metadata.check_tokenizer(tokenizer)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["river-bank"])
    with pytest.raises(UserError, match=r"the vocabulary of small \(\d+ tokens, .* prepare it again"):
        metadata.check_tokenizer(other)
    message = refused(make_config(corpus_file), other, tmp_path / "out")
    assert "prepared with the vocabulary of small" in message


def test_the_tokenizer_is_kept_with_the_corpus(tmp_path, corpus_file, tokenizer):
    from distiljax.hub import load_tokenizer

    metadata = train(make_config(corpus_file), tokenizer, tmp_path / "out")
    metadata.check_tokenizer(load_tokenizer(tmp_path / "out" / "train" / "tokenizer"))


def test_a_directory_with_other_things_in_it_is_left_alone(tmp_path, corpus_file, tokenizer):
    out = tmp_path / "out" / "train"
    out.mkdir(parents=True)
    (out / "thesis.tex").write_text("precious")
    assert "exists and is not a prepared corpus" in refused(
        make_config(corpus_file), tokenizer, tmp_path / "out"
    )
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    (out / "thesis.tex").unlink()
    train(make_config(corpus_file), tokenizer, tmp_path / "out")  # an empty directory is fine


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": 3}, "data.source is 3; expected a source"),
        ({"seq_len": 2}, "data.seq_len is 2; expected 3 to 65535"),
        ({"min_tokens": 65}, "data.min_tokens is 65; expected at most data.seq_len, 64"),
        ({"unit": "word"}, "data.unit is 'word'; expected one of document, line, paragraph, sentence"),
        ({"layout": "loose"}, "data.layout is 'loose'; expected one of packed, padded, bucketed"),
        ({"on_error": "cry"}, "data.on_error is 'cry'; expected one of fail, skip"),
        ({"buckets": (0,)}, "data.buckets is (0,); expected lengths in tokens"),
        ({"holdout": 1.0}, "data.holdout is 1.0; expected a share from 0 to below 1"),
        ({"max_unknown": 0.0}, "data.max_unknown is 0.0; expected a share above 0"),
        ({"max_documents": -1}, "data.max_documents is -1; expected a number of documents"),
        ({"source": ()}, "data.source is (); expected a source"),
    ],
)
def test_bad_settings_are_refused_before_any_work(tmp_path, tokenizer, values, message):
    config = make_config(tmp_path / "missing.txt")
    config.update(values)
    assert message in refused(config, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_and_unknown_settings_are_refused(tmp_path, tokenizer):
    config = make_config(tmp_path / "a.txt").to_dict()
    for key, value, kind in (
        ("seq_len", "x", "a whole number"),
        ("holdout", None, "a number"),
        ("buckets", 64, "a tuple"),
        ("deduplicate", "no", "True or False"),
        ("text_field", 3, "a string"),
        ("max_unknown", True, "a number"),
    ):
        message = refused({**config, key: value}, tokenizer, tmp_path / "o")
        assert f"data.{key} is {value!r}; expected {kind}" in message
    assert "data.color is not a data setting" in refused({**config, "color": 1}, tokenizer, tmp_path / "o")
    del config["layout"]
    assert "data.layout is missing" in refused(config, tokenizer, tmp_path / "o")
    assert "is remote; expected a local directory" in refused(make_config("x"), tokenizer, "gs://b/o")


@pytest.mark.parametrize(
    ("splits", "values", "message"),
    [
        (("validation",), {}, "has no validation split; set data.holdout"),
        (("train", "validation"), {}, "has no validation split; set data.holdout"),
        (("test",), {}, "has no split 'test'"),
    ],
)
def test_missing_splits_are_refused_before_any_work(
    tmp_path, corpus_file, tokenizer, splits, values, message
):
    config = make_config(corpus_file, **values)
    assert message in refused(config, tokenizer, tmp_path / "out", splits=splits)
    assert not (tmp_path / "out").exists()


def test_wikipedia_like_text_fills_rows(tmp_path, tokenizer):
    """Lengths spread as those of articles are: packing wastes under 3 % of the positions."""
    words = ["the", "river", "was", "in", "this", "and", "that", "it", "for", "which", "he"]
    lengths = np.random.default_rng(0).lognormal(5.5, 1.0, 400).astype(int) + 10
    path = tmp_path / "a.txt"
    path.write_text(
        "\n".join(" ".join(words[(n + i) % 11] for i in range(size)) for n, size in enumerate(lengths))
    )
    assert train(make_config(path, seq_len=512), tokenizer, tmp_path / "out").fill_rate > 0.97


def edit_metadata(directory, **values):
    path = directory / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_damaged_newer_and_missing_metadata_are_refused(tmp_path, corpus_file, tokenizer):
    out = tmp_path / "out" / "train"
    with pytest.raises(UserError, match="holds no prepared corpus"):
        Metadata.load(out)
    metadata = train(make_config(corpus_file), tokenizer, tmp_path / "out")
    with pytest.raises(UserError, match=r"holds the corpora of 1 splits; give one: .*/train"):
        Metadata.load(tmp_path / "out")
    edit_metadata(out, format_version=99)
    with pytest.raises(UserError, match="has format version 99, this distiljax reads 2"):
        Metadata.load(out)
    values = json.loads((out / "metadata.json").read_text())
    (shard,), settings_made = values["shards"], values["settings"]
    damages = [
        {"shards": 3},
        {"shards": []},
        {"statistics": {}},
        {"settings": {}},
        {"vocab_size": "x"},
        {"pad_token_id": -1},
        {"pad_token_id": 10**9},
        {"tokenizer_name": None},
        {"split": 3},
        {"problems": [1]},
        {"weights": ["a"]},
        {"weights": [0.0]},
        {"settings": settings_made | {"seq_len": 0}},
        {"settings": settings_made | {"layout": 3}},
        {"shards": [shard | {"name": 3}]},
        {"shards": [shard | {"name": "../other/rows"}]},
        {"shards": [shard | {"source": 7}]},
        {"shards": [shard | {"seq_len": 65}]},
        {"shards": [shard | {"sha256": None}]},
    ]
    for damage in damages:
        metadata.save(out)
        edit_metadata(out, **damage)
        with pytest.raises(UserError, match="metadata.json is damaged"):
            Metadata.load(out)
    (out / "metadata.json").write_text("{")
    with pytest.raises(UserError, match="metadata.json is damaged"):
        Metadata.load(out)
    metadata.save(out)
    shard = out / metadata.shards[0].name
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"rows-00000.array_record \(shard 0 of 1\) is damaged"):
        Metadata.load(out)
    shard.unlink()
    with pytest.raises(UserError, match=r"rows-00000.array_record \(shard 0 of 1\) is missing"):
        Metadata.load(out)


def test_token_counts_are_never_unpickled(tmp_path, corpus_file, tokenizer):
    metadata = train(make_config(corpus_file), tokenizer, tmp_path / "out")
    directory = tmp_path / "out" / "train"
    np.save(directory / "token_counts.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(UserError, match="token_counts.npy cannot be read"):
        metadata.token_counts(directory)
    np.save(directory / "token_counts.npy", np.zeros(3, np.int64))
    with pytest.raises(UserError, match="has shape"):
        metadata.token_counts(directory)
