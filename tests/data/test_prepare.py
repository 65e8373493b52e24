"""Preparing corpora: what is in them, and that they are the same however they were made."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distiljax.data import Metadata, default_data_config, prepare
from distiljax.data.duplicates import digest
from distiljax.errors import UserError
from tests import commands
from tests.data.preparing import (
    digests,
    expected_examples,
    found_examples,
    make_config,
    refused,
    start,
    train,
)


@pytest.mark.parametrize("layout", ["packed", "padded", "bucketed"])
def test_a_corpus_holds_the_examples_of_the_text_and_counts_them(tmp_path, corpus_file, tokenizer, layout):
    reports = []
    metadata = train(
        make_config(corpus_file, layout=layout, buckets=(20, 40)),
        tokenizer,
        tmp_path / "out",
        progress=lambda state: reports.append((state.stage, state.done, state.documents, state.tokens)),
    )
    directory = tmp_path / "out" / "train"
    assert Metadata.load(directory) == metadata
    expected = expected_examples(corpus_file.read_text().splitlines(), tokenizer)
    assert found_examples(directory) == expected

    statistics = metadata.statistics
    tokens = sum(map(len, expected))
    assert reports[-1] == ("tokenising", 1, 120, tokens)
    assert statistics["documents_read"] == statistics["documents"] == 120
    assert (statistics["examples"], statistics["tokens"]) == (len(expected), tokens)
    assert statistics["rows"] == metadata.num_rows == sum(shard.rows for shard in metadata.shards)
    if layout == "packed":
        assert metadata.num_rows < len(expected) and metadata.fill_rate > 0.95
    else:
        assert metadata.num_rows == len(expected)
    assert [shard.seq_len for shard in metadata.shards] == ([20, 40, 64] if layout == "bucketed" else [64])
    assert metadata.tokens_per_row == tokens / metadata.num_rows
    counts = metadata.token_counts(directory)
    tokens_of_all = [token for example in expected for token in example]
    np.testing.assert_array_equal(counts, np.bincount(tokens_of_all, minlength=metadata.vocab_size))
    for shard in metadata.shards:
        content = (directory / shard.name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard.bytes, shard.sha256)
    assert not (tmp_path / "out" / ".prepare").exists()


def test_the_bytes_do_not_depend_on_workers_parts_or_interruptions(
    tmp_path, corpus_file, tokenizer, small_units
):
    other = tmp_path / "other.txt"
    other.write_text(
        corpus_file.read_text()[:3000] + "the river was in the river and that was it for him as it is\n"
    )
    config = make_config((str(corpus_file), str(other)), holdout=0.2)
    whole = prepare(config, tokenizer, tmp_path / "whole")
    assert sum(shard.name.startswith("rows") for shard in whole["train"].shards) > 5
    assert whole["train"].statistics["dropped_duplicate"] > 10

    prepare(config, tokenizer, tmp_path / "workers", workers=2)
    assert digests(tmp_path / "workers") == digests(tmp_path / "whole")

    for part in (2, 0, 1):
        made = prepare(config, tokenizer, tmp_path / "parts", shard_index=part, shard_count=3)
        assert bool(made) == (part == 1)
        if part != 1:
            with pytest.raises(UserError, match="holds no prepared corpus"):
                Metadata.load(tmp_path / "parts" / "train")
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")

    class Interrupted(Exception):
        pass

    randomness, attempts = random.Random(0), 0
    while True:
        attempts += 1

        def interrupt(state):
            if randomness.random() < 0.4:
                raise Interrupted

        try:
            prepare(config, tokenizer, tmp_path / "interrupted", progress=interrupt)
            break
        except Interrupted:
            assert not (tmp_path / "interrupted" / "train" / "metadata.json").exists()
    assert attempts > 2 and digests(tmp_path / "interrupted") == digests(tmp_path / "whole")


def test_killed_at_any_moment_it_goes_on_and_leaves_no_process_behind(tmp_path, corpus_file, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = tmp_path / "large.txt"
    text = corpus_file.read_text().splitlines()
    source.write_text("\n".join(f"{line} {number}" for number in range(30) for line in text))

    def run(out):
        process = start(source, tmp_path / "tokenizer", out)
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors

    run(tmp_path / "whole")
    expected = digests(tmp_path / "whole")
    out = tmp_path / "killed"
    process = start(source, tmp_path / "tokenizer", out)
    while len(list(out.glob("*/rows-*"))) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    with open(children) as file:
        family = [int(pid) for pid in file.read().split()]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "train" / "metadata.json").exists()
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in family):
        assert time.monotonic() < deadline, "a worker outlives the process that it worked for"
        time.sleep(0.02)
    run(out)
    assert digests(out) == expected


def started_and_writing(tmp_path, corpus_file, tokenizer):
    """The command on two processes, once it has finished its first shard."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = tmp_path / "large.txt"
    source.write_text(
        "\n".join(f"{line} {n}" for n in range(60) for line in corpus_file.read_text().splitlines())
    )
    process = start(source, tmp_path / "tokenizer", tmp_path / "out")
    while not list((tmp_path / "out").glob("*/rows-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    return process


def test_sigterm_ends_it_cleanly_and_it_goes_on(tmp_path, corpus_file, tokenizer):
    process = started_and_writing(tmp_path, corpus_file, tokenizer)
    process.terminate()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0 and "the same command goes on from there" in errors
    assert "Traceback" not in errors


def test_a_dead_worker_is_named(tmp_path, corpus_file, tokenizer):
    process = started_and_writing(tmp_path, corpus_file, tokenizer)
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        children = [int(pid) for pid in file.read().split()]
    os.kill(children[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 2 and "one of 2 worker processes was ended from outside" in errors
    assert "Traceback" not in errors


# Which documents go where.


def test_held_out_and_training_text_are_the_whole_and_never_overlap(
    tmp_path, corpus_file, tokenizer, small_units
):
    texts = corpus_file.read_text().splitlines()
    made = prepare(make_config(corpus_file, holdout=0.3), tokenizer, tmp_path / "out")
    sides = {split: found_examples(tmp_path / "out" / split) for split in made}
    held = [text for text in texts if digest(text) < 0.3 * 2**64]
    assert sides["validation"] == expected_examples(held, tokenizer) and sides["validation"]
    assert sides["train"] == expected_examples(sorted(set(texts) - set(held)), tokenizer)
    train, validation = made["train"].statistics, made["validation"].statistics
    assert train["documents"] == validation["dropped_held_out"]
    assert validation["documents"] == train["dropped_held_out"] == len(held)
    # One pass over the text gives what two give.
    prepare(make_config(corpus_file, holdout=0.3), tokenizer, tmp_path / "two", splits=("validation",))
    prepare(make_config(corpus_file, holdout=0.3), tokenizer, tmp_path / "two", splits=("train",))
    assert digests(tmp_path / "two" / "train") == digests(tmp_path / "out" / "train")


def test_a_sources_own_validation_text_is_dropped_from_its_training_text(tmp_path, corpus_file, tokenizer):
    texts = corpus_file.read_text().splitlines()
    directory = tmp_path / "set"
    directory.mkdir()
    (directory / "train.txt").write_text("\n".join(texts))
    (directory / "validation.txt").write_text("\n".join(texts[:20]))
    config = make_config(directory, holdout=0.5)
    made = prepare(config, tokenizer, tmp_path / "out")
    assert found_examples(tmp_path / "out" / "validation") == expected_examples(texts[:20], tokenizer)
    assert found_examples(tmp_path / "out" / "train") == expected_examples(texts[20:], tokenizer)
    assert made["train"].statistics["dropped_duplicate"] == 20
    assert made["train"].statistics["dropped_held_out"] == 0
    # Whether or not that is prepared at the same time.
    for split in made:
        prepare(config, tokenizer, tmp_path / "one by one", splits=(split,))
    assert digests(tmp_path / "one by one") == digests(tmp_path / "out")


@settings(deadline=None, max_examples=25)
@given(
    texts=st.lists(st.lists(st.sampled_from("abcdefghij"), max_size=8), min_size=1, max_size=3),
    limit=st.integers(0, 6),
    deduplicate=st.booleans(),
)
def test_duplicates_and_the_limit(tmp_path_factory, tokenizer, texts, limit, deduplicate):
    """Of each source the first `limit` different documents that no source before has."""
    tmp_path = tmp_path_factory.mktemp("sources")
    seen: set[str] = set()
    kept = []
    for index, source in enumerate(texts):
        (tmp_path / f"{index}.txt").write_text("\n".join(source))
        taken, different = 0, set()
        for text in source:
            # A source is read until it has given `limit` different documents.
            if limit and (taken == limit or len(different) == limit):
                break
            different.add(text)
            if deduplicate and text in seen:
                continue
            seen.add(text)
            kept.append(text)
            taken += 1
    config = make_config(
        tuple(str(tmp_path / f"{index}.txt") for index in range(len(texts))),
        min_tokens=1,
        max_documents=limit,
        deduplicate=deduplicate,
    )
    if not kept:
        assert "is left of" in refused(config, tokenizer, tmp_path / "out") or not any(texts)
        return
    metadata = train(config, tokenizer, tmp_path / "out")
    assert metadata.statistics["documents"] == len(kept)
    assert found_examples(tmp_path / "out" / "train") == expected_examples(kept, tokenizer, min_tokens=1)


def test_a_limit_reads_no_more_units_than_it_needs(tmp_path, tokenizer, corpus_file, small_units):
    lines = corpus_file.read_text().splitlines()
    for number in range(12):
        (tmp_path / f"part-{number:02d}.txt").write_text("\n".join(f"{line} {number}" for line in lines))
    broken = tmp_path / "part-11.txt"
    broken.write_bytes(b"\xff")
    config = make_config(tmp_path / "part-*.txt", max_documents=150, on_error="fail")
    metadata = train(config, tokenizer, tmp_path / "out")  # and never meets the last file
    assert metadata.statistics["documents"] == 150


def test_weights_come_from_the_sources(tmp_path, corpus_file, tokenizer):
    other = tmp_path / "other.txt"
    other.write_text(corpus_file.read_text().upper())
    spelled = (f"{corpus_file}?weight=3", f"{other}?weight=1")
    assert train(make_config(spelled), tokenizer, tmp_path / "out").weights == (0.75, 0.25)
    # Other weights need no other rows.
    swapped = (f"{corpus_file}?weight=1", f"{other}?weight=3")
    assert train(make_config(swapped), tokenizer, tmp_path / "out").weights == (0.25, 0.75)
    assert train(make_config((str(corpus_file), str(other))), tokenizer, tmp_path / "out").weights == ()
    assert "weights and data.layout is bucketed" in refused(
        make_config(spelled, layout="bucketed"), tokenizer, tmp_path / "o"
    )
    assert "has no weight but others have" in refused(
        make_config((f"{corpus_file}?weight=3", str(other))), tokenizer, tmp_path / "o"
    )


# Text that cannot be used.


def test_unusable_records_are_refused_or_skipped_and_counted(tmp_path, tokenizer):
    good = json.dumps({"text": "the river was in the river and that was it for him as it is"})
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b"\n".join([good.encode(), b"{", b'{"txt": "x"}', b"\xff", good.replace("him", "her").encode()])
    )
    message = refused(make_config(path), tokenizer, tmp_path / "out")
    assert "a.jsonl line 2 is not JSON" in message and "--on_error=skip" in message
    assert not (tmp_path / "out").exists()

    metadata = train(make_config(path, on_error="skip"), tokenizer, tmp_path / "out")
    assert metadata.statistics["unreadable"] == 3 and metadata.statistics["documents"] == 2
    assert [problem.split(" line ")[1][0] for problem in metadata.problems] == ["2", "3", "4"]


def test_an_empty_corpus_is_refused_with_the_reason(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("the river\n\n")
    message = refused(make_config(path), tokenizer, tmp_path / "out")
    assert (
        "1 documents read, 0 of them duplicates, 0 of another split, 1 kept, 1 examples under 12 tokens"
        in message
    )
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line_and_no_shard_has_its_name_yet(tmp_path, corpus_file, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = tmp_path / "large.txt"
    source.write_text(
        "\n".join(f"{line} {n}" for n in range(200) for line in corpus_file.read_text().splitlines())
    )
    program = f"""
import resource, sys, transformers
from distiljax.data import prepare, default_data_config
config = default_data_config()
config.source, config.seq_len, config.deduplicate = {str(source)!r}, 64, False
tokenizer = transformers.AutoTokenizer.from_pretrained({str(tmp_path / "tokenizer")!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
prepare(config, tokenizer, {str(tmp_path / "out")!r})
"""
    environment = commands.environment(python_path=filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "rows-00000.array_record cannot be written: the disk is full" in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "out").rglob("*.array_record"))
    config = default_data_config()
    config.source, config.seq_len, config.deduplicate = str(source), 64, False
    assert prepare(config, tokenizer, tmp_path / "out")["train"].num_rows > 1000
