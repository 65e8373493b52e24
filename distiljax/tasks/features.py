"""Tokenised examples of a task in memory, padded batch by batch.

Texts are tokenised without special tokens or truncation, each distinct text once; rows are cut from the pieces with
NumPy. The rows are those that a transformers tokenizer gives, but a context of five questions is tokenised once, and a
pair of very long texts costs no more than its length (the tokenizer would make every pair of their overflowing parts).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from distiljax.errors import UserError
from distiljax.nn.heads import ANSWERS, SEQUENCES, TOKENS
from distiljax.tasks.labels import plain

IGNORED = -100  # a label that is not scored
SHORTEST = 8  # tokens in a row

# Given to the tokenizer at once: enough for all cores, and the Python objects of its answer stay small.
_BATCH_TEXTS = 4096
_BATCH_CHARACTERS = 1 << 22


@dataclasses.dataclass
class Features:
    """N rows of token ids of different lengths, one after the other.

    Args:
      kind: "sequence_classification", "token_classification" or "question_answering".
      tokens: int32 [total], all rows' token ids.
      starts: int64 [N + 1], where each row begins in `tokens`.
      second: int32 [N], where token type 1 begins in the row; the row's length where there is no second text.
      labels: sequence: int32 [N] classes or float32 [N]; token: int32 [total], -100 where not scored; answer: int32
        [N, 2], first and last token of the answer in the row, (0, 0) = [CLS] where it is not in this window. None
        where not labelled.
      examples: int32 [N], the data set's row that each row is of.
      words: token: int32 [total], the index of the word that is scored at this token, else -1.
      offsets: answer: int32 [total, 2], first and last + 1 character in the context; (-1, -1) outside of it.
      truncated: how many rows lost text at `max_length` (sequence).
      pad_token_id: fills batches.
    """

    kind: str
    tokens: np.ndarray
    starts: np.ndarray
    second: np.ndarray
    examples: np.ndarray
    labels: np.ndarray | None = None
    words: np.ndarray | None = None
    offsets: np.ndarray | None = None
    truncated: int = 0
    pad_token_id: int = 0

    def __len__(self) -> int:
        return len(self.starts) - 1

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int64 [N]: tokens in each row."""
        return np.diff(self.starts)

    def batch(self, rows: Sequence[int] | np.ndarray, length: int) -> dict[str, np.ndarray]:
        """Some rows, padded.

        Args:
          rows: [B] row numbers; -1 is a filler, an empty row.
          length: S, at least the longest of these rows.

        Returns:
          int32 `input_ids`, `attention_mask`, `token_type_ids` [B, S], `row` [B], and where there are labels `labels`
          [B], [B, S] or [B, 2]. Filler rows have attention mask 0 and labels -100 (numbers 0.0, answers (0, 0)).

        Raises:
          ValueError: a row is longer than `length`.
        """
        row = np.asarray(rows, np.int32)
        real = row >= 0
        picked = row[real]
        begins, lengths = self.starts[picked], self.starts[picked + 1] - self.starts[picked]
        if len(picked) and lengths.max() > length:
            raise ValueError(f"a row of {lengths.max()} tokens does not fit into a batch of length {length}")
        shape = len(row), length
        source = ragged(begins, lengths)
        target = ragged(np.flatnonzero(real) * length, lengths)

        def padded(values: np.ndarray, fill: int) -> np.ndarray:
            out = np.full(shape, fill, np.int32)
            out.reshape(-1)[target] = values
            return out

        ends = np.zeros(len(row), np.int64)
        seconds = np.zeros(len(row), np.int64)
        ends[real], seconds[real] = lengths, self.second[picked]
        places = np.arange(length)
        attention_mask = (places < ends[:, None]).astype(np.int32)
        batch = {
            "input_ids": padded(self.tokens[source], self.pad_token_id),
            "attention_mask": attention_mask,
            "token_type_ids": (places >= seconds[:, None]).astype(np.int32) * attention_mask,
            "row": row,
        }
        if self.labels is None:
            return batch
        if self.kind == TOKENS:
            batch["labels"] = padded(self.labels[source], IGNORED)
        else:
            fill = IGNORED if self.kind == SEQUENCES and self.labels.dtype == np.int32 else 0
            labels = np.full((len(row), *self.labels.shape[1:]), fill, self.labels.dtype)
            labels[real] = self.labels[picked]
            batch["labels"] = labels
        return batch


def make_features(
    kind: str,
    dataset: Any,
    tokenizer: Any,
    *,
    max_length: int,
    stride: int = 0,
    labelled: bool = True,
    regression: bool = False,
) -> Features:
    """Tokenise a data set as its kind of task wants it.

    - Sequence: `[CLS] text [SEP]`, or `[CLS] text [SEP] text_pair [SEP]`; the longer text is cut to fit.
    - Token: words in pieces, the first of which carries the label. What is longer than a row becomes overlapping
      windows, and each word is scored in the one in which it is farthest from the border.
    - Answer: `[CLS] question [SEP] context [SEP]`, the context in overlapping windows, as transformers' run_qa.py.

    Args:
      kind: "sequence_classification", "token_classification" or "question_answering".
      dataset: columns by the names of their roles: a `datasets.Dataset` as `load_task` returns, or a mapping of lists.
      tokenizer: a fast tokenizer of transformers with BERT's special tokens, which is left as it is; or its `Pieces`,
        for many small data sets.
      max_length: the longest row, special tokens included.
      stride: tokens that consecutive windows share (token and answer).
      labelled: whether to take the labels.
      regression: the labels are numbers.

    Raises:
      UserError: a `max_length` or `stride` that leaves no room, or a question that fills a row by itself.
    """
    if max_length < SHORTEST:
        raise UserError(f"max_length is {max_length}; expected {SHORTEST} or more")
    special = 3 if kind == ANSWERS else 2
    if kind != SEQUENCES and not 0 <= stride < max_length - special:
        raise UserError(
            f"stride is {stride}; expected 0 to {max_length - special - 1}, below the {max_length - special} "
            f"tokens of text in a row of {max_length}"
        )
    pieces = tokenizer if isinstance(tokenizer, Pieces) else Pieces(tokenizer)
    if kind == SEQUENCES:
        return _sequences(dataset, pieces, max_length, labelled, regression)
    if kind == TOKENS:
        return _words(dataset, pieces, max_length, stride, labelled)
    if kind == ANSWERS:
        return _answers(dataset, pieces, max_length, stride, labelled)
    raise UserError(f"kind is {kind!r}; expected {SEQUENCES}, {TOKENS} or {ANSWERS}")


def choose_lengths(lengths: Sequence[int] | np.ndarray, count: int, multiple: int = 8) -> tuple[int, ...]:
    """The row lengths that waste the least padding when each row takes the shortest one that holds it.

    Exact, by dynamic programming over the lengths that occur.

    Args:
      lengths: [N] tokens in each row.
      count: how many lengths at most.
      multiple: each is a multiple of this.

    Returns:
      At most `count` lengths, ascending; the last holds the longest row.

    Raises:
      UserError: `count` below 1.
    """
    if count < 1:
        raise UserError(f"the number of row lengths is {count}; expected 1 or more")
    rounded = -(-np.maximum(np.asarray(lengths, np.int64), 1) // multiple) * multiple
    if not len(rounded):
        return (multiple,)
    values, rows = np.unique(rounded, return_counts=True)
    before = np.concatenate([[0], np.cumsum(rows)])
    number = len(values)
    # best[j]: the fewest tokens, padding included, of all rows up to values[j - 1], the last length being that.
    best = np.concatenate([[0], values * before[1:]])
    choices = []
    for _ in range(min(count, number) - 1):
        total = best[None, :-1] + values[:, None] * (before[1:, None] - before[None, :-1])
        total[np.triu_indices(number, 1)] = np.iinfo(np.int64).max
        choices.append(total.argmin(1))
        best = np.concatenate([[0], total.min(1)])
    chosen, at = [], number
    for choice in reversed(choices):
        chosen.append(int(values[at - 1]))
        at = int(choice[at - 1])
        if not at:
            break
    if at:
        chosen.append(int(values[at - 1]))
    return tuple(reversed(chosen))


def ragged(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64 indices of several ranges, one after the other: begins[i], …, begins[i] + lengths[i] - 1."""
    lengths = np.asarray(lengths, np.int64)
    shifts = np.asarray(begins, np.int64) - (np.cumsum(lengths) - lengths)
    return np.repeat(shifts, lengths) + np.arange(lengths.sum())


class Pieces:
    """A copy of a tokenizer's Rust part that neither truncates nor pads nor adds special tokens.

    To make one takes as long as to tokenise hundreds of texts. What is changed in the tokenizer later it does not have.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.no_truncation()
        self._backend.no_padding()
        self.cls_id, self.sep_id = tokenizer.cls_token_id, tokenizer.sep_token_id
        self.pad_id = tokenizer.pad_token_id

    def of(self, texts: Iterable[str], offsets: bool = False) -> _Ragged:
        """The pieces of each text; `offsets` also says where they stand in it."""
        index: dict[str, int] = {}
        which = np.fromiter((index.setdefault(text, len(index)) for text in texts), np.int64)
        encode = self._backend.encode_batch if offsets else self._backend.encode_batch_fast
        ids, places, lengths = [np.zeros(0, np.int32)], [np.zeros((0, 2), np.int32)], []
        for batch in _batches(index):
            for encoding in encode(batch, add_special_tokens=False):
                ids.append(np.array(encoding.ids, np.int32))
                lengths.append(len(ids[-1]))
                if offsets and lengths[-1]:
                    places.append(np.array(encoding.offsets, np.int32))
        sizes = np.array(lengths, np.int64)
        begins = np.cumsum(sizes) - sizes
        return _Ragged(
            np.concatenate(ids), begins[which], sizes[which], np.concatenate(places) if offsets else None
        )


@dataclasses.dataclass
class _Ragged:
    """Pieces of texts: text i has ids[begins[i] : begins[i] + lengths[i]]; equal texts share theirs."""

    ids: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray
    offsets: np.ndarray | None


def _batches(texts: Iterable[str]) -> Iterable[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        # What was no UTF-8 on its way in has surrogates, which no tokenizer takes. "?" keeps the places of the others.
        batch.append(text if text.isascii() else text.encode("utf-8", "replace").decode())
        characters += len(text)
        if len(batch) == _BATCH_TEXTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _has(dataset: Any, role: str) -> bool:
    return role in (dataset if isinstance(dataset, Mapping) else dataset.column_names)


def _column(dataset: Any, role: str) -> list[Any]:
    return list(dataset[role][:])


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _fit(first: np.ndarray, second: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """What longest-first truncation leaves of two texts with these lengths."""
    short, long = np.minimum(first, second), np.maximum(first, second)
    short = np.minimum(short, np.maximum(room // 2, 0))
    long = np.minimum(long, room - short)
    return np.where(first <= second, short, long), np.where(first <= second, long, short)


def _sequences(dataset: Any, pieces: Pieces, max_length: int, labelled: bool, regression: bool) -> Features:
    first = pieces.of(_column(dataset, "text"))
    count = len(first.lengths)
    pair = _has(dataset, "text_pair")
    if pair:
        second = pieces.of(_column(dataset, "text_pair"))
        left, right = _fit(first.lengths, second.lengths, max_length - 3)
        truncated = np.count_nonzero(left + right < first.lengths + second.lengths)
    else:
        left = np.minimum(first.lengths, max_length - 2)
        truncated = np.count_nonzero(left < first.lengths)
    middle = left + 2
    lengths = middle + right + 1 if pair else middle
    starts = _starts(lengths)
    tokens = np.full(starts[-1], pieces.sep_id, np.int32)
    tokens[starts[:-1]] = pieces.cls_id
    tokens[ragged(starts[:-1] + 1, left)] = first.ids[ragged(first.begins, left)]
    if pair:
        tokens[ragged(starts[:-1] + middle, right)] = second.ids[ragged(second.begins, right)]
    labels = None
    if labelled:
        labels = np.array(_column(dataset, "label"), np.float32 if regression else np.int32)
    return Features(
        SEQUENCES,
        tokens,
        starts,
        middle.astype(np.int32),
        np.arange(count, dtype=np.int32),
        labels,
        truncated=int(truncated),
        pad_token_id=pieces.pad_id,
    )


def _windows(lengths: np.ndarray, room: np.ndarray, overlap: np.ndarray) -> tuple[np.ndarray, ...]:
    """Overlapping windows over texts.

    Args:
      lengths: [N] tokens of each text.
      room, overlap: [N] tokens in a window, and of them shared with the next; 0 ≤ overlap < room.

    Returns:
      [W] the text of each window, its first token, and how many it has.
    """
    step = room - overlap
    counts = 1 + -(-np.maximum(lengths - room, 0) // step)
    texts = np.repeat(np.arange(len(lengths)), counts)
    begins = ragged(np.zeros(len(lengths), np.int64), counts) * step[texts]
    return texts, begins, np.minimum(room[texts], lengths[texts] - begins)


def _words(dataset: Any, pieces: Pieces, max_length: int, stride: int, labelled: bool) -> Features:
    sentences = _column(dataset, "tokens")
    word_counts = np.array([len(words) for words in sentences], np.int64)
    # A word's pieces do not depend on its neighbours.
    words = pieces.of(word for sentence in sentences for word in sentence)
    word_starts = _starts(words.lengths)  # pieces before each word
    sentence_words = _starts(word_counts)
    sentence_starts = word_starts[sentence_words]
    ids = words.ids[ragged(words.begins, words.lengths)]

    room = np.full(len(sentences), max_length - 2)
    examples, begins, sizes = _windows(np.diff(sentence_starts), room, np.full(len(sentences), stride))
    starts = _starts(sizes + 2)
    tokens = np.full(starts[-1], pieces.sep_id, np.int32)
    tokens[starts[:-1]] = pieces.cls_id
    inside = ragged(starts[:-1] + 1, sizes)
    tokens[inside] = ids[ragged(sentence_starts[examples] + begins, sizes)]

    spoken = np.flatnonzero(
        words.lengths
    )  # a word may have no piece at all, such as a lone control character
    sentence = np.repeat(np.arange(len(sentences)), word_counts)[spoken]
    counts = np.bincount(examples, minlength=len(sentences))
    first = word_starts[spoken] - sentence_starts[sentence]
    last = first + words.lengths[spoken]
    step = max_length - 2 - stride
    # Only so many windows in a row can hold a token.
    overlapping = min(-(-(max_length - 2) // step), counts.max(initial=0))
    oldest = _starts(counts)[sentence]
    newest = oldest + np.minimum(first // step, counts[sentence] - 1)
    window = _farthest(first, last, oldest, newest, overlapping, begins, sizes)
    place = starts[window] + 1 + first - begins[window]
    index = np.full(len(tokens), -1, np.int32)
    index[place] = spoken - sentence_words[sentence]
    labels = None
    if labelled:
        tags = [np.asarray(tags, np.int32) for tags in _column(dataset, "tags")]
        labels = np.full(len(tokens), IGNORED, np.int32)
        labels[place] = np.concatenate([np.zeros(0, np.int32), *tags])[spoken]
    return Features(
        TOKENS,
        tokens,
        starts,
        (sizes + 2).astype(np.int32),
        examples.astype(np.int32),
        labels,
        words=index,
        pad_token_id=pieces.pad_id,
    )


def _farthest(
    first: np.ndarray,
    last: np.ndarray,
    oldest: np.ndarray,
    newest: np.ndarray,
    overlapping: int,
    begins: np.ndarray,
    sizes: np.ndarray,
) -> np.ndarray:
    """For each word the window in which it is farthest from the border; the first one of equals.

    That the first window's beginning and the last one's end cut nothing off changes nothing: a word that is near one of
    them is still nearer to a border of every other window.

    Args:
      first, last: [M] a word's first piece and last + 1, in its text.
      oldest, newest: [M] the first window of its text, and the last that begins at or before `first`.
      overlapping: how many windows, up to `newest`, may hold `first`.
      begins, sizes: [W] of all windows, those of a text in order.

    Returns:
      [M] windows that hold the word's first piece.
    """
    best, farthest = newest, np.full(len(first), np.iinfo(np.int64).min)
    for back in range(overlapping):
        window = np.maximum(newest - back, oldest)
        begin = begins[window]
        end = begin + sizes[window]
        distance = np.minimum(first - begin, end - last)
        better = (first < end) & (distance >= farthest)
        best, farthest = np.where(better, window, best), np.where(better, distance, farthest)
    return best


def _answers(dataset: Any, pieces: Pieces, max_length: int, stride: int, labelled: bool) -> Features:
    questions = pieces.of(_column(dataset, "question"))
    contexts = pieces.of(_column(dataset, "context"), offsets=True)
    room = max_length - 3 - questions.lengths
    if len(room) and room.min() < 1:
        worst = int(room.argmin())
        name = dataset["id"][worst] if _has(dataset, "id") else worst
        raise UserError(
            f"the question of example {plain(name)} has {questions.lengths[worst]} tokens, which leaves no room for "
            f"its context in rows of {max_length}; expected at most {max_length - 4}: shorten the question, or raise "
            "max_length if the model has more positions"
        )
    # A long question leaves narrow windows, which overlap by half where they are no wider than the stride.
    overlap = np.where(room > stride, stride, room // 2)
    examples, begins, sizes = _windows(contexts.lengths, room, overlap)
    asked = questions.lengths[examples]
    starts = _starts(asked + sizes + 3)
    tokens = np.full(starts[-1], pieces.sep_id, np.int32)
    tokens[starts[:-1]] = pieces.cls_id
    tokens[ragged(starts[:-1] + 1, asked)] = questions.ids[ragged(questions.begins[examples], asked)]
    inside = ragged(starts[:-1] + asked + 2, sizes)
    source = ragged(contexts.begins[examples] + begins, sizes)
    tokens[inside] = contexts.ids[source]
    offsets = np.full((len(tokens), 2), -1, np.int32)
    assert contexts.offsets is not None
    offsets[inside] = contexts.offsets[source]
    second = (asked + 2).astype(np.int32)
    labels = (
        _answer_labels(_column(dataset, "answers"), examples, starts, second, offsets) if labelled else None
    )
    return Features(
        ANSWERS,
        tokens,
        starts,
        second,
        examples.astype(np.int32),
        labels,
        offsets=offsets,
        pad_token_id=pieces.pad_id,
    )


def _answer_labels(
    answers: list[Any], examples: np.ndarray, starts: np.ndarray, second: np.ndarray, offsets: np.ndarray
) -> np.ndarray:
    """int32 [N, 2]: first and last token of the first answer, (0, 0) where the row does not hold all of it."""
    labels = np.zeros((len(examples), 2), np.int32)
    for row, example in enumerate(examples):
        answer = answers[example]
        if not answer["text"]:
            continue
        begin = answer["answer_start"][0]
        end = begin + len(answer["text"][0])
        first, last = starts[row] + second[row], starts[row + 1] - 1
        if first == last or offsets[first, 0] > begin or offsets[last - 1, 1] < end:
            continue
        start = np.searchsorted(offsets[first:last, 0], begin, side="right") - 1
        stop = np.searchsorted(offsets[first:last, 1], end, side="left")
        labels[row] = second[row] + start, second[row] + max(start, stop)
    return labels
