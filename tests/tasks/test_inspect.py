"""Rows as the model sees them: the text's words, and the masks of the training step."""

from __future__ import annotations

import inspect as python_inspect
import io
import json
import re
import shutil
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distiljax.cli import main
from distiljax.commands import COMMANDS
from distiljax.data import Metadata, eval_batches
from distiljax.data.reader import RowReader
from distiljax.distill.config import distill_config
from distiljax.distill.masking import Masking, mask_tokens, masking_weights
from distiljax.distill.step import example_keys, split_keys
from distiljax.tasks.inspect import Token, _example_text, _print_rows, masked_rows

EVERYTHING = 1000  # more rows than there are
mask = jax.jit(mask_tokens, static_argnums=3)


def words(row):
    """The text of each example, with neither special tokens nor masks."""
    found = []
    for example in row.examples:
        assert [token.text for token in (example[0], example[-1])] == ["[CLS]", "[SEP]"]
        found.append(" ".join(token.text for token in example[1:-1]).replace(" ##", ""))
    return found


def tokenised(corpus_file, tokenizer):
    """The texts as the vocabulary spells them; each shorter than a row."""
    return [
        " ".join(tokenizer.tokenize(line)).replace(" ##", "") for line in corpus_file.read_text().splitlines()
    ]


@pytest.mark.parametrize("layout", ["packed", "padded", "bucketed"])
def test_rows_hold_the_text(make_corpora, corpus_file, tokenizer, layout):
    directory = make_corpora(str(corpus_file), layout=layout, buckets=(20, 40), seq_len=80) / "train"
    rows = list(masked_rows(directory, EVERYTHING))
    metadata = Metadata.load(directory)
    assert [row.number for row in rows] == list(range(metadata.num_rows))
    texts = [text for text in tokenised(corpus_file, tokenizer) if len(text.split()) + 2 >= 12]
    assert sorted(text for row in rows for text in words(row)) == sorted(texts)
    assert any(len(row.examples) > 1 for row in rows) == (layout == "packed")
    lengths = [shard.seq_len for shard in metadata.shards for _ in range(shard.rows)]
    assert [sum(map(len, row.examples)) + row.padding for row in rows] == lengths
    assert {token.kind for row in rows for example in row.examples for token in example} > {"text", "special"}


def test_a_sample_is_of_the_seed(make_corpora, corpus_file):
    directory = make_corpora(str(corpus_file)) / "train"
    everything = {row.number: words(row) for row in masked_rows(directory, EVERYTHING)}
    samples = [list(masked_rows(directory, 5, seed=seed)) for seed in (0, 0, 1)]
    assert samples[0] == samples[1]
    numbers = [[row.number for row in sample] for sample in samples]
    assert numbers[0] != numbers[2] and all(sorted(set(chosen)) == chosen for chosen in numbers)
    assert all(words(row) == everything[row.number] for sample in samples for row in sample)
    assert list(masked_rows(directory, 0)) == []


@pytest.mark.parametrize("smoothing", [0.0, 0.7])
def test_masks_are_those_of_the_training_step(make_corpora, corpus_file, tokenizer, smoothing):
    """All rows in one batch, as a step has them, are masked as one by one."""
    directory = make_corpora(str(corpus_file)) / "train"
    metadata = Metadata.load(directory)
    (batch,) = eval_batches(directory, metadata.num_rows)
    recipe = distill_config().masking
    masking = Masking(tokenizer.mask_token_id, metadata.vocab_size, recipe.rate, recipe.mask, recipe.random)
    weights = masking_weights(metadata.token_counts(directory), tokenizer.all_special_ids, smoothing)
    keys, _ = split_keys(example_keys(11, jnp.int32(0), jnp.int32(0), metadata.num_rows))
    expected = mask(keys, batch, weights, masking)

    kinds: Counter[str] = Counter()
    for row in masked_rows(directory, EVERYTHING, seed=11, smoothing=smoothing):
        tokens = [token for example in row.examples for token in example]
        shown = tokenizer.convert_ids_to_tokens(np.array(expected.input_ids[row.number][: len(tokens)]))
        real = np.array(expected.masked_weights[row.number]) > 0
        places = np.array(expected.masked_positions[row.number])[real]
        assert [token.shown for token in tokens] == shown
        assert [place for place, token in enumerate(tokens) if token.predicted] == sorted(places)
        for place, label in zip(places, np.array(expected.labels[row.number])[real], strict=True):
            assert tokens[place].text == tokenizer.convert_ids_to_tokens(int(label))
        for token in tokens:
            kinds[token.kind] += 1
            assert (token.shown == "[MASK]") == (token.kind == "hidden")
            assert (token.shown != token.text) == (token.kind in ("hidden", "swapped"))
    # ⌊0.15·m + u⌋ of a row's m tokens, 80/10/10 of these: within five standard deviations.
    predicted = kinds["hidden"] + kinds["swapped"] + kinds["left"]
    eligible = predicted + kinds["text"]
    assert abs(predicted - recipe.rate * eligible) < 5 * 0.5 * metadata.num_rows**0.5
    assert abs(kinds["hidden"] - recipe.mask * predicted) < 5 * (predicted * 0.8 * 0.2) ** 0.5


def test_a_row_of_a_bucket_is_masked_at_the_length_of_the_bucket(make_corpora, corpus_file, tokenizer):
    directory = make_corpora(str(corpus_file), layout="bucketed", buckets=(20, 40)) / "train"
    metadata = Metadata.load(directory)
    reader = RowReader(directory, metadata)
    masking = Masking(tokenizer.mask_token_id, metadata.vocab_size)
    weights = jnp.asarray(masking_weights(metadata.token_counts(directory), tokenizer.all_special_ids, 0.7))
    lengths = [shard.seq_len for shard in metadata.shards for _ in range(shard.rows)]
    rows = list(masked_rows(directory, 12, seed=3))
    assert len({lengths[row.number] for row in rows}) == 3
    for row in rows:
        batch = reader.batch([row.number], lengths[row.number])
        keys, _ = split_keys(example_keys(3, jnp.int32(0), jnp.int32(row.number), 1))
        shown = np.array(mask(keys, batch, weights, masking).input_ids[0])
        tokens = [token.shown for example in row.examples for token in example]
        assert tokens == tokenizer.convert_ids_to_tokens(shown[: len(tokens)])


def test_the_recipe_is_that_of_distillation():
    smoothing = distill_config().masking.smoothing
    assert python_inspect.signature(masked_rows).parameters["smoothing"].default == smoothing
    from absl import flags

    values = flags.FlagValues()
    COMMANDS["inspect"].define(values)
    assert values["smoothing"].default == smoothing


EXAMPLE = tuple(
    Token(*fields)
    for fields in (
        ("[CLS]", "[CLS]", "special"),
        ("un", "un", "text"),
        ("##believ", "[MASK]", "hidden"),
        ("##able", "##able", "text"),
        ("river", "the", "swapped"),
        ("##s", "##s", "left"),
        ("was", "was", "left"),
        ("[UNK]", "[UNK]", "unknown"),
        ("[SEP]", "[SEP]", "special"),
    )
)


def test_subwords_are_joined_and_every_kind_of_mask_is_told_apart():
    text = _example_text(EXAMPLE)
    assert text.plain == "[CLS] un⟦##believ⟧able ⟦river→the⟧⟦##s=⟧ ⟦was=⟧ [UNK] [SEP]"
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    masks = [styles[mark] for mark in ("⟦##believ⟧", "⟦river→the⟧", "⟦was=⟧", "[UNK]", "[SEP]")]
    assert len(set(masks)) == 5


def test_colours_are_for_terminals_only(make_corpora, corpus_file, monkeypatch):
    from rich.console import Console

    directory = make_corpora(str(corpus_file)) / "train"
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")

    def printed(**options):
        console = Console(file=io.StringIO(), width=60, highlight=False, **options)
        _print_rows(masked_rows(directory, 4), console)
        return console.file.getvalue()

    coloured, plain = printed(force_terminal=True), printed()
    assert "\x1b[" in coloured and "\x1b[" not in plain
    assert all(len(line) <= 60 and line == line.rstrip() for line in plain.splitlines())
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain


def test_the_command_prints_every_split(make_corpora, corpus_file, capsys):
    out = make_corpora(str(corpus_file), ("train", "validation"))
    capsys.readouterr()
    assert main(["inspect", str(out), "--rows=2", "--verify"]) == 0
    text = capsys.readouterr().out
    train, validation = text.split(f"Corpus              {out / 'validation'}\n")
    assert train.startswith(f"Corpus              {out / 'train'}\n")
    for part in (train, validation):
        assert part.count("\nRow ") == 2 and part.count("Verified") == 1 and "[CLS] " in part
    assert text.count("To be predicted") == 1

    assert main(["inspect", str(out / "train"), "--rows=0"]) == 0
    text = capsys.readouterr().out
    assert "Row " not in text and "Verified" not in text and "predicted" not in text

    assert main(["inspect", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts) == ["train", "validation"]
    assert facts["train"]["rows"] == Metadata.load(out / "train").num_rows


def refused(capsys, *arguments):
    assert main(["inspect", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("distiljax: error: ")
    return captured.err


def test_bad_input_is_one_line(make_corpora, corpus_file, tmp_path, capsys):
    good = make_corpora(str(corpus_file)) / "train"
    (tmp_path / "empty").mkdir()
    for arguments, expected in (
        ([], "0 directories; give one"),
        ([good, good], "2 directories; give one"),
        ([tmp_path / "nowhere"], "holds no prepared corpus"),
        ([tmp_path / "empty"], "holds no prepared corpus"),
        ([corpus_file], "holds no prepared corpus"),
        ([good, "--rows=-1"], "rows is -1; expected 0 or more"),
        ([good, "--rows=x"], "rows"),
        ([good, "--seed=-1"], "seed is -1"),
        ([good, "--smoothing=nan"], "smoothing is nan"),
    ):
        assert expected in refused(capsys, *arguments)


def test_damage_is_one_line(make_corpora, corpus_file, tmp_path, capsys):
    good = make_corpora(str(corpus_file)) / "train"

    def damaged(name, change):
        directory = tmp_path / name
        shutil.copytree(good, directory)
        change(directory)
        return directory

    shard = Metadata.load(good).shards[0].name

    def flip(directory):
        content = bytearray((directory / shard).read_bytes())
        content[: len(content) // 2] = bytes(len(content) // 2)
        (directory / shard).write_bytes(content)

    def flip_last(directory):
        """A byte that no row is in: only the hash tells."""
        content = bytearray((directory / shard).read_bytes())
        content[-1] ^= 1
        (directory / shard).write_bytes(content)

    assert shard in refused(capsys, damaged("rows", flip), f"--rows={EVERYTHING}")
    assert shard in refused(capsys, damaged("hash", flip_last), "--verify")
    assert shard in refused(capsys, damaged("json", flip), "--verify", "--json")
    assert "token_counts.npy" in refused(
        capsys, damaged("counts", lambda directory: (directory / "token_counts.npy").write_bytes(b"x"))
    )
    assert "tokenizer" in refused(
        capsys, damaged("tokenizer", lambda directory: shutil.rmtree(directory / "tokenizer"))
    )
    assert shard in refused(capsys, damaged("missing", lambda directory: (directory / shard).unlink()))
