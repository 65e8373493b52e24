"""The report of a prepared corpus: its figures are those of the metadata, and it is fit to be read."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from distiljax.cli import main
from distiljax.data import Metadata
from distiljax.data.metadata import Statistics
from distiljax.tasks.corpus_report import corpus_facts, print_corpus


def figures(text):
    """Label → number, of the lines that have one; those of a part of a number stand after it: "Documents/kept"."""
    found, parent = {}, ""
    for line in text.splitlines():
        if match := re.fullmatch(r"(  )?(\S.{0,17}?) {3,}([\d,]+)(   .*)?", line):
            label = match[2] if not match[1] else f"{parent}/{match[2]}"
            parent = parent if match[1] else match[2]
            found[label] = int(match[3].replace(",", ""))
    return found


@pytest.fixture
def messy(tmp_path, corpus_file):
    """Text with everything in it that a preparation drops; the two sources are drawn by weight."""
    lines = [
        *({"text": line} for line in corpus_file.read_text().splitlines()[:30]),
        *[{"text": "the river was in the and of this for that with by"}] * 3,
        *({"text": f"of this {number}"} for number in range(4)),
        {"text": "§ " * 20},
        {"words": "the field has another name"},
    ]
    path = tmp_path / "messy.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{no json\n")
    other = tmp_path / "other.txt"
    other.write_text("\n".join(corpus_file.read_text().splitlines()[30:]) + "\n")
    return f"{path}?weight=3", f"{other}?weight=1"


def test_the_figures_are_those_of_the_metadata(make_corpora, messy, capsys):
    out = make_corpora(messy, ("train", "validation"), on_error="skip")
    capsys.readouterr()
    for split, other in (("train", "validation"), ("validation", "train")):
        metadata = Metadata.load(out / split)
        statistics = Statistics(**metadata.statistics)
        # What the text was made to have, held out or not.
        assert (statistics.documents_read, statistics.dropped_duplicate, statistics.unreadable) == (128, 2, 2)

        print_corpus(out / split)
        text = capsys.readouterr().out
        found = figures(text)
        assert (
            found.items()
            >= {
                "Records skipped": 2,
                "Documents": 128,
                "Documents/duplicates": 2,
                "Documents/of another split": Metadata.load(out / other).statistics["documents"],
                "Documents/kept": statistics.documents,
                "Examples": statistics.examples + statistics.dropped_short + statistics.dropped_unknown,
                "Examples/too short": statistics.dropped_short,
                "Examples/kept": statistics.examples,
                "Tokens": statistics.tokens,
                "Rows": metadata.num_rows,
                "Shards": len(metadata.shards),
            }.items()
        )
        assert found.get("Examples/mostly unknown", 0) == statistics.dropped_unknown
        assert found.get("Tokens/unknown", 0) == statistics.unknown_tokens
        for expected in (
            f"Corpus              {out / split}\n",
            f"{100 * metadata.fill_rate:.1f} % full",
            "75.0 % of a batch, by weight",
            f"Tokenizer           small, {metadata.vocab_size} tokens",
            "Layout              packed: several examples share a row of 64 tokens",
            *messy,
        ):
            assert expected in text
        assert all(f"messy.jsonl line {number} " in " ".join(text.split()) for number in (39, 40))

        facts = corpus_facts(out / split)
        assert json.loads(json.dumps(facts))["split"] == split
        assert facts.items() >= metadata.statistics.items()
        assert [source["rows"] for source in facts["sources"]] == [
            sum(shard.rows for shard in metadata.shards if shard.source == index) for index in (0, 1)
        ]
        assert facts["bytes"] == sum((out / split / shard.name).stat().st_size for shard in metadata.shards)
    both = [Metadata.load(out / split).statistics["dropped_unknown"] for split in ("train", "validation")]
    assert sum(both) == 1


def test_what_did_not_happen_is_not_mentioned(make_corpora, corpus_file, capsys):
    directory = make_corpora(str(corpus_file), min_tokens=0) / "train"
    (directory / "timing.json").unlink()
    capsys.readouterr()
    print_corpus(directory)
    text = capsys.readouterr().out
    assert set(figures(text)) == {"Documents", "Examples", "Tokens", "Tokens/unknown", "Rows", "Shards"} - (
        set() if Metadata.load(directory).statistics["unknown_tokens"] else {"Tokens/unknown"}
    )
    for word in ("duplicate", "short", "skipped", "split   ", "Made in", "batch"):
        assert word not in text


def test_rows_of_each_length_are_counted(make_corpora, corpus_file, capsys):
    directory = make_corpora(str(corpus_file), layout="bucketed", buckets=(20, 40)) / "train"
    capsys.readouterr()
    print_corpus(directory)
    text = capsys.readouterr().out
    metadata = Metadata.load(directory)
    assert "bucketed: one example a row of 20, 40 or 64 tokens" in text
    found = figures(text)
    assert {shard.seq_len: shard.rows for shard in metadata.shards} == {
        length: found[f"Rows/of {length} tokens"] for length in (20, 40, 64)
    }


def test_a_large_corpus_fits_80_columns_and_nothing_moves_the_cursor(make_corpora, corpus_file, capsys):
    directory = make_corpora(str(corpus_file)) / "train"
    metadata = Metadata.load(directory)
    number = 123_456_789_012_345
    statistics = {name: number for name in metadata.statistics} | {"documents_read": 5 * number}
    shard = dataclasses.replace(metadata.shards[0], rows=number, tokens=number * 60)
    for layout in ("packed", "padded", "bucketed"):
        settings = metadata.settings | {"layout": layout, "seq_len": 65_535, "max_documents": 1_000_000_000}
        settings["source"] = ["a.txt", "b\x1b[2J.txt"]
        problems = (f"b.txt line 12 is not JSON: {'expected a value ' * 20}",)
        dataclasses.replace(
            metadata, settings=settings, statistics=statistics, problems=problems, weights=(0.5, 0.5)
        ).save(directory)
        # The shard is there in its size, but not with so many rows: only reading them would tell.
        saved = json.loads((directory / "metadata.json").read_text())
        saved["shards"] = [dataclasses.asdict(shard)]
        (directory / "metadata.json").write_text(json.dumps(saved))
        capsys.readouterr()
        print_corpus(directory)
        text = capsys.readouterr().out
        assert f"{number:,}" in text and "mostly unknown" in text and "\x1b" not in text
        for line in text.splitlines():
            assert len(line) <= 80 or line.startswith("Corpus"), line


@pytest.mark.parametrize(
    "damage",
    [
        lambda values: values["settings"].pop("layout"),
        lambda values: values["statistics"].update(examples=0),
        lambda values: values["shards"][0].update(rows=0),
    ],
)
def test_damaged_metadata_is_one_line(make_corpora, corpus_file, capsys, damage):
    directory = make_corpora(str(corpus_file)) / "train"
    values = json.loads((directory / "metadata.json").read_text())
    damage(values)
    (directory / "metadata.json").write_text(json.dumps(values))
    assert main(["inspect", str(directory)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "metadata.json is damaged" in error
