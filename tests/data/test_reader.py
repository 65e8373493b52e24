from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from distiljax.data import reader
from distiljax.data.metadata import Metadata
from distiljax.data.reader import RowReader, verify
from distiljax.errors import UserError
from tests.data.corpora import numbered_rows, write_corpus, write_shard

SEQ_LEN = 6


@pytest.fixture
def corpus(tmp_path):
    """53 rows in shards of 10; row n is the one example [1000, n, 1001]."""
    shards = [numbered_rows(range(first, min(first + 10, 53))) for first in range(0, 53, 10)]
    write_corpus(tmp_path, shards, seq_len=SEQ_LEN)
    return tmp_path


def read(directory, numbers):
    metadata = Metadata.load(directory)
    return RowReader(directory, metadata).batch(numbers, SEQ_LEN)["input_ids"][:, 1].tolist()


def test_rows_come_in_the_order_asked_for(corpus):
    numbers = [52, 0, 10, 9, 0, 33, 34, 31]
    assert read(corpus, numbers) == numbers
    assert len(RowReader(corpus, Metadata.load(corpus))) == 53
    assert read(corpus, range(53)) == list(range(53))


def test_no_rows_are_an_empty_batch(corpus):
    batch = RowReader(corpus, Metadata.load(corpus)).batch([], SEQ_LEN, 2)
    assert batch["input_ids"].tolist() == [[7] * SEQ_LEN] * 2 and not batch["segment_ids"].any()


def open_shards(directory):
    files = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum(os.path.exists(file) and os.readlink(file).startswith(str(directory)) for file in files)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files where Linux lists them")
def test_only_so_many_shards_are_open(corpus, monkeypatch):
    monkeypatch.setattr(reader, "MAX_OPEN_SHARDS", 2)
    rows = RowReader(corpus, Metadata.load(corpus))
    assert open_shards(corpus) == 0
    for number in (0, 10, 20, 30, 11, 1, 52):
        assert rows.batch([number], SEQ_LEN)["input_ids"][0, 1] == number
        assert open_shards(corpus) <= 2
    assert rows.batch(range(53), SEQ_LEN)["input_ids"][:, 1].tolist() == list(range(53))
    assert open_shards(corpus) == 2
    del rows
    assert open_shards(corpus) == 0


LIMITED = """
import os, resource, sys
import numpy as np
from distiljax.data.metadata import Metadata
from distiljax.data.reader import RowReader

directory, hard = sys.argv[1], int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
readers = [RowReader(directory, Metadata.load(directory)) for _ in range(2)]
numbers = np.random.default_rng(0).permutation(200).tolist()
for reader in readers:
    for _ in range(2):
        assert reader.batch(numbers, 6)["input_ids"][:, 1].tolist() == numbers
    print(sum("array_record" in os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")))
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
del reader, readers
RowReader(directory, Metadata.load(directory))
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files where Linux lists them")
@pytest.mark.parametrize(
    ("hard", "expected"),
    [
        (64, [32, 40, 64, 64]),  # the first reader leaves half
        (300, [150, 187, 300, 300]),
        (4000, [200, 400, 912, 912]),  # all are open, and 512 are left for others
    ],
)
def test_the_limit_on_open_files_is_raised_as_far_as_it_can_be(tmp_path, hard, expected):
    write_corpus(tmp_path, [numbered_rows([number]) for number in range(200)], seq_len=SEQ_LEN)
    command = [sys.executable, "-c", LIMITED, str(tmp_path), str(hard)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert [int(line) for line in run.stdout.split()] == expected


def test_threads_share_a_reader(corpus, monkeypatch):
    monkeypatch.setattr(reader, "MAX_OPEN_SHARDS", 2)
    rows = RowReader(corpus, Metadata.load(corpus))
    wrong = []

    def work(seed):
        draw = np.random.default_rng(seed)
        for _ in range(50):
            numbers = draw.integers(0, 53, 8).tolist()
            if rows.batch(numbers, SEQ_LEN)["input_ids"][:, 1].tolist() != numbers:
                wrong.append(numbers)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def refused(directory, match, numbers=range(53)):
    with pytest.raises(UserError, match=match) as caught:
        read(directory, numbers)
    assert "\n" not in str(caught.value)


def replace(directory, index, rows, vocab_size=1002, **claims):
    """Another shard in the place of one. The metadata know its size, and nothing else that is new unless it is told."""
    metadata = Metadata.load(directory)
    shards = list(metadata.shards)
    shard = write_shard(directory / shards[index].name, rows, vocab_size, seq_len=SEQ_LEN)
    known = {"bytes": shard.bytes} | {name: getattr(shard, name) for name in claims if claims[name]}
    shards[index] = dataclasses.replace(shards[index], **known)
    dataclasses.replace(metadata, shards=tuple(shards)).save(directory)


def test_a_sound_corpus_is_verified(corpus):
    assert verify(corpus) is None


def test_a_flipped_byte_is_found_in_its_row(corpus):
    path = corpus / "rows-00002.array_record"
    data = bytearray(path.read_bytes())
    data[108] ^= 0xFF  # in the first row: the file's header ends at byte 64, the first record's at 104
    path.write_bytes(data)
    match = r"rows-00002\.array_record \(shard 2 of 6\) is damaged at row 0: "
    refused(corpus, match)
    refused(corpus, match, [3, 25, 20, 50])
    assert read(corpus, [*range(20), *range(21, 53)]) == [*range(20), *range(21, 53)]
    with pytest.raises(UserError, match=match):
        verify(corpus)


def test_every_flipped_byte_is_found(corpus):
    """Where it does not hurt a row, the sum over the file tells."""
    path = corpus / "rows-00001.array_record"
    whole = path.read_bytes()
    for place in range(0, len(whole), 97):
        data = bytearray(whole)
        data[place] ^= 0x10
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"rows-00001\.array_record \(shard 1 of 6\) is damaged"):
            verify(corpus)
    path.write_bytes(whole)
    verify(corpus)


def test_a_shard_with_fewer_rows_than_told_is_found(corpus):
    replace(corpus, 1, numbered_rows(range(3)))
    refused(corpus, r"rows-00001\.array_record \(shard 1 of 6\) is damaged at row 3: ")
    with pytest.raises(UserError, match=r"\(shard 1 of 6\) is damaged at row 3: "):
        verify(corpus)


def test_a_shard_with_more_rows_than_told_is_found(corpus):
    replace(corpus, 1, numbered_rows(range(12)))
    with pytest.raises(UserError, match=r"\(shard 1 of 6\) is damaged: sha256 \w+, expected \w+; prepare"):
        verify(corpus)


def test_other_rows_than_told_are_found(corpus):
    replace(corpus, 5, [[[1000, 1, 2, 1001]], *numbered_rows(range(2))], sha256=True)
    with pytest.raises(UserError, match=r"\(shard 5 of 6\) is damaged: tokens 10, expected 9; "):
        verify(corpus)


def test_rows_of_another_vocabulary_are_found(corpus):
    replace(corpus, 4, [*numbered_rows(range(9)), [[1000, 5000, 1001]]], sha256=True)
    refused(corpus, r"\(shard 4 of 6\) is damaged at row 9: token 5000 is outside the vocabulary of 1002")
    with pytest.raises(UserError, match=r"damaged at row 9: token 5000 is outside"):
        verify(corpus)


def test_rows_that_are_too_long_are_found(corpus):
    replace(corpus, 0, [[[5] * 4, [6] * 3], *numbered_rows(range(9))])
    refused(corpus, r"\(shard 0 of 6\) is damaged at row 0: 7 tokens, row length 6")


def test_rows_of_wider_numbers_are_found(corpus):
    replace(corpus, 2, numbered_rows(range(10)), vocab_size=70_000)
    refused(corpus, r"\(shard 2 of 6\) is damaged at row 0: ")


def test_a_shard_that_is_gone_or_no_shard_is_found(corpus):
    rows = RowReader(corpus, Metadata.load(corpus))
    (corpus / "rows-00003.array_record").unlink()
    (corpus / "rows-00004.array_record").write_bytes(b"hello " * 50)
    for number, match in ((35, "shard 3 of 6"), (42, "shard 4 of 6")):
        with pytest.raises(UserError, match=rf"\({match}\) is damaged at row {number % 10}: "):
            rows.batch([number], SEQ_LEN)
