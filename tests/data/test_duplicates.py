"""The external sort finds what a set in memory would, for any number of ranges and units."""

from __future__ import annotations

import concurrent.futures
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distiljax.data import duplicates

# Few different hashes, at both ends of the range too, so that there are repetitions within and between units.
HASHES = st.sampled_from([0, 1, 5, 2**32, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1])


@settings(deadline=None, max_examples=60)
@given(
    units=st.lists(st.lists(HASHES | st.integers(0, 2**64 - 1), max_size=12), min_size=1, max_size=6),
    at_once=st.integers(1, 50),
)
def test_all_but_the_first_of_equal_documents_are_dropped(tmp_path_factory, units, at_once):
    directory = tmp_path_factory.mktemp("digests")
    files = {}
    for number, digests in enumerate(units):
        files[number] = directory / f"{number}.npy"
        duplicates.write_digests(files[number], digests)
    found = duplicates.find(files, directory / "found", at_once)

    seen: set[int] = set()
    for number, digests in enumerate(units):
        expected = []
        for ordinal, digest in enumerate(digests):
            if digest in seen:
                expected.append(ordinal)
            seen.add(digest)
        assert duplicates.dropped(directory / "found", number).tolist() == expected
        assert found[number] == len(expected)


def test_a_search_that_is_there_is_not_made_again(tmp_path):
    duplicates.write_digests(tmp_path / "0.npy", [7, 7])
    files = {0: tmp_path / "0.npy"}
    for _ in range(2):
        assert duplicates.find(files, tmp_path / "found") == {0: 1}
        assert duplicates.dropped(tmp_path / "found", 0).tolist() == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.npy", "found"]


def test_without_a_search_nothing_is_taken_for_unique(tmp_path):
    with pytest.raises(FileNotFoundError):
        duplicates.dropped(tmp_path / "found", 0)


def test_several_processes_may_search_at_the_same_time(tmp_path):
    files = {}
    for number in range(40):
        files[number] = tmp_path / f"{number}.npy"
        duplicates.write_digests(files[number], [number, number % 7, 1000 + number])
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for attempt in range(10):
            found = tmp_path / f"found-{attempt}"
            results = list(pool.map(lambda _, found=found: duplicates.find(files, found), range(4)))
            assert all(result == results[0] for result in results) and sum(results[0].values()) == 40
    assert not list(tmp_path.glob("*.tmp"))


def test_more_units_than_files_may_be_open(tmp_path):
    program = f"""
import resource
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
from distiljax.data import duplicates
files = {{}}
for number in range(60):
    files[number] = Path({str(tmp_path)!r}) / f"{{number}}.npy"
    duplicates.write_digests(files[number], [number, 5, 2**64 - 1])
found = duplicates.find(files, Path({str(tmp_path / "found")!r}), at_once=20)
assert sum(found.values()) == 59 * 2 + 1, found
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_equal_texts_have_equal_hashes_of_64_bits():
    texts = ["", "a", "A", "ä", "\ud800", "a" * 10_000]
    digests = [duplicates.digest(text) for text in texts]
    assert len(set(digests)) == len(texts) and all(0 <= digest < 2**64 for digest in digests)
    assert digests == [duplicates.digest(text) for text in texts]
