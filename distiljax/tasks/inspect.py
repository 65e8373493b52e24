"""Rows of a prepared corpus as the model sees them, for a person."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from distiljax.data.metadata import METADATA_FILE, TOKENIZER_DIRECTORY, Metadata
from distiljax.data.reader import RowReader
from distiljax.data.reader import verify as verify_rows
from distiljax.distill.config import distill_config
from distiljax.distill.masking import MaskedRows, Masking, mask_tokens, masking_weights
from distiljax.distill.step import example_keys, split_keys
from distiljax.errors import UserError
from distiljax.hub import load_tokenizer, vocabulary_size
from distiljax.tasks.corpus_report import corpus_facts, print_facts, printable, stdout_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

Array = jax.Array
STYLES = {
    "text": "",
    "special": "dim",
    "unknown": "red",
    "hidden": "bold yellow",
    "swapped": "bold magenta",
    "left": "bold green",
}
SEGMENTS = ("default", "cyan")  # in turn
LEGEND = (
    ("⟦word⟧", "hidden", "the model sees [MASK]"),
    ("⟦word→other⟧", "swapped", "the model sees another token, drawn at random"),
    ("⟦word=⟧", "left", "the model sees the word"),
)
GUTTER = 5  # columns


def inspect(
    directory: str | os.PathLike[str],
    *,
    rows: int = 3,
    seed: int = 0,
    smoothing: float = 0.7,
    verify: bool = False,
    as_json: bool = False,
) -> None:
    """Prints what is in a prepared corpus, or in the corpora of a directory, on standard output.

    Args:
      directory: of a corpus, or with the directories of several.
      rows: how many rows to show, see `masked_rows`.
      seed: as for `masked_rows`.
      smoothing: as for `masked_rows`.
      verify: whether to read all rows and check the shards' hashes.
      as_json: print the facts as one JSON object, split → facts, and no rows.

    Raises:
      UserError: there is no corpus, or one is damaged.
    """
    ranges = (
        ("rows", rows, rows >= 0, "0 or more"),
        ("seed", seed, 0 <= seed < 2**32, "0 to 2^32 - 1"),
        ("smoothing", smoothing, 0 <= smoothing <= 10, "0 (all tokens alike) to 10; the original has 0.7"),
    )
    for name, value, holds, expected in ranges:
        if not holds:
            raise UserError(f"{name} is {value}; expected {expected}")
    directories = _corpora(directory)
    facts = [corpus_facts(path) for path in directories]
    console = stdout_console()
    if as_json:
        for path in directories if verify else ():
            verify_rows(path)
        print(json.dumps({fact["split"]: fact for fact in facts}, indent=2, ensure_ascii=False))
        return
    for number, (path, fact) in enumerate(zip(directories, facts, strict=True)):
        if number:
            console.print()
        print_facts(fact, console)
        if verify:
            verify_rows(path)
            console.print()
            console.print("Verified: every row was read, and every shard has the hash of its metadata.")
        if rows:
            if not number:
                _print_legend(console)
            _print_rows(masked_rows(path, rows, seed=seed, smoothing=smoothing), console)


def _corpora(directory: str | os.PathLike[str]) -> list[str]:
    """The directory itself if it is a corpus, otherwise the corpora in it, training first."""
    where = os.fspath(directory)
    if not os.path.isfile(os.path.join(where, METADATA_FILE)) and os.path.isdir(where):
        found = sorted(Path(where).glob(f"*/{METADATA_FILE}"))
        found.sort(key=lambda path: path.parent.name != "train")
        if found:
            return [str(path.parent) for path in found]
    return [where]


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of a row.

    Attributes:
      text: as the vocabulary has it.
      shown: what the model sees in its place; the same unless it is hidden or swapped.
      kind: "text", "special" ([CLS], [SEP]) or "unknown"; to be predicted are "hidden" behind [MASK], "swapped" for
        a random token, and "left" as it is.
    """

    text: str
    shown: str
    kind: str

    @property
    def predicted(self) -> bool:
        """Whether the model has to say what stood here."""
        return self.kind in ("hidden", "swapped", "left")


@dataclasses.dataclass(frozen=True)
class MaskedRow:
    """A row as it is trained on: its examples, and what fills it up.

    Attributes:
      number: its place in the corpus.
      examples: the tokens of each.
      padding: how many padding tokens follow.
    """

    number: int
    examples: tuple[tuple[Token, ...], ...]
    padding: int


def masked_rows(
    directory: str | os.PathLike[str], count: int, *, seed: int = 0, smoothing: float = 0.7
) -> Iterator[MaskedRow]:
    """Some rows, drawn at random, masked by the functions of the training step.

    Rate and shares are those of `distill_config`. A row's masks depend on the seed and its number.

    Args:
      directory: of a corpus.
      count: how many rows; fewer if there are fewer.
      seed: of the choice and of the masks.
      smoothing: exponent of the masking weights, see `masking_weights`.

    Yields:
      The rows, by their numbers.

    Raises:
      UserError: there is no corpus, or it, its tokenizer or one of the rows is damaged.
    """
    metadata = Metadata.load(directory)
    tokenizer = load_tokenizer(os.path.join(directory, TOKENIZER_DIRECTORY))
    metadata.check_tokenizer(tokenizer)
    total = metadata.num_rows
    numbers = sorted(random.Random(seed).sample(range(total), min(count, total)))
    names = {index: printable(token) for token, index in tokenizer.get_vocab().items()}
    special = frozenset(tokenizer.all_special_ids) - {tokenizer.unk_token_id}

    def token(was: int, shown: int, predicted: bool) -> Token:
        if predicted:
            kind = "left" if shown == was else "hidden" if shown == tokenizer.mask_token_id else "swapped"
        else:
            kind = "special" if was in special else "unknown" if was == tokenizer.unk_token_id else "text"
        return Token(names[was], names.get(shown, f"token {shown}"), kind)  # ids may have gaps

    for number, original, masked in _masked(directory, metadata, tokenizer, numbers, seed, smoothing):
        segments = masked.segment_ids[0]
        predicted = np.zeros(len(segments), bool)
        predicted[masked.masked_positions[0][masked.masked_weights[0] > 0]] = True
        tokens = list(map(token, original.tolist(), masked.input_ids[0].tolist(), predicted.tolist()))
        ends = [0, *np.cumsum(np.bincount(segments)[1:])]
        examples = tuple(tuple(tokens[start:end]) for start, end in itertools.pairwise(ends))
        yield MaskedRow(number, examples, int((segments == 0).sum()))


def _masked(
    directory: str | os.PathLike[str],
    metadata: Metadata,
    tokenizer: Any,
    numbers: list[int],
    seed: int,
    smoothing: float,
) -> Iterator[tuple[int, np.ndarray, MaskedRows]]:
    """Each row's number, its tokens [S], and the masked row, a batch of one."""
    shares = distill_config().masking
    masking = Masking(
        tokenizer.mask_token_id, vocabulary_size(tokenizer), shares.rate, shares.mask, shares.random
    )
    weights = masking_weights(metadata.token_counts(directory), tokenizer.all_special_ids, smoothing)
    for number, batch in _batches_of_one(directory, metadata, numbers):
        masked = _mask(seed, masking, np.int32(number), batch, weights)
        yield number, batch["input_ids"][0], jax.device_get(masked)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _mask(seed: int, masking: Masking, row: Array, batch: dict[str, Array], weights: Array) -> MaskedRows:
    keys, _ = split_keys(example_keys(seed, jnp.int32(0), row, 1))
    return mask_tokens(keys, batch, weights, masking)


def _batches_of_one(
    directory: str | os.PathLike[str], metadata: Metadata, numbers: list[int]
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Rows as batches, each as long as the rows of its shard."""
    reader = RowReader(directory, metadata)
    ends = list(itertools.accumulate(shard.rows for shard in metadata.shards))
    for number in numbers:
        shard = metadata.shards[bisect.bisect_right(ends, number)]
        yield number, reader.batch([number], shard.seq_len)


def _print_legend(console: Console) -> None:
    from rich.text import Text

    console.print("\nRows are drawn at random and masked as in training. To be predicted:", soft_wrap=True)
    for word, kind, meaning in LEGEND:
        console.print(Text.assemble("  ", (f"{word:<14}", STYLES[kind]), meaning), soft_wrap=True)


def _print_rows(rows: Iterator[MaskedRow], console: Console) -> None:
    from rich.text import Text

    for row in rows:
        tokens = sum(map(len, row.examples))
        predicted = sum(token.predicted for example in row.examples for token in example)
        examples = f"{len(row.examples)} example{'s' if len(row.examples) > 1 else ''}"
        about = f": {examples}, {tokens:,} tokens, {predicted:,} to be predicted"
        console.print()
        console.print(Text.assemble((f"Row {row.number:,}", "bold"), about), soft_wrap=True)
        for number, example in enumerate(row.examples):
            text = _example_text(example)
            text.stylize_before(SEGMENTS[number % len(SEGMENTS)])
            for i, line in enumerate(text.wrap(console, max(console.width - GUTTER, 20))):
                line.rstrip()
                gutter = (f"{'' if i else number + 1:>{GUTTER - 2}}  ", "dim")
                console.print(Text.assemble(gutter, line), soft_wrap=True)
        if row.padding:
            console.print(Text(f"{'':{GUTTER}}[PAD] × {row.padding:,}", "dim"), soft_wrap=True)


def _example_text(example: tuple[Token, ...]) -> Text:
    """The tokens as words: what continues a word stands right after what it continues."""
    from rich.text import Text

    text = Text()
    for index, token in enumerate(example):
        continues = index > 0 and token.text.startswith("##")
        if index and not continues:
            text.append(" ")
        shape = {"hidden": "⟦{}⟧", "swapped": "⟦{}→{}⟧", "left": "⟦{}=⟧"}.get(token.kind)
        plain = token.text.removeprefix("##") if continues else token.text
        text.append(shape.format(token.text, token.shown) if shape else plain, STYLES[token.kind])
    return text
