"""Text to examples: [CLS] tokens [SEP], at most `seq_len` tokens, never cut inside a word that fits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from distiljax.data.metadata import Statistics
from distiljax.errors import UserError

# Characters of text given to the tokenizer at once (it may spread a batch over the cores) and at most in one piece: a
# token's bookkeeping takes some 100 bytes until the batch is done.
BATCH_CHARACTERS = 1 << 18
PIECE_CHARACTERS = 1 << 17


def check_tokenizer(tokenizer: Any) -> None:
    """Checks that a transformers tokenizer is a fast one with the special tokens that rows need.

    Raises:
      UserError: it is not, naming what it lacks.
    """
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"tokenizer {name} is not a fast tokenizer; expected one with a tokenizer.json")
    for token in ("cls", "sep", "pad"):
        if getattr(tokenizer, f"{token}_token_id") is None:
            raise UserError(f"tokenizer {name} has no {token} token; expected a BERT-family tokenizer")


class Tokeniser:
    """A fast tokenizer's Rust part, which neither truncates nor pads and takes special tokens for text.

    Built from JSON, so that worker processes make theirs without importing transformers.

    Args:
      backend: the tokenizer.json, as text.
      cls_id: begins an example.
      sep_id: ends an example.
      unknown_id: the unknown token, None if the tokenizer has none.
    """

    def __init__(self, backend: str, cls_id: int, sep_id: int, unknown_id: int | None) -> None:
        import tokenizers

        self.cls_id, self.sep_id, self.unknown_id = cls_id, sep_id, unknown_id
        self._backend = tokenizers.Tokenizer.from_str(backend)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        prefix = getattr(self._backend.model, "continuing_subword_prefix", None)
        self._continues: np.ndarray | None = None
        if isinstance(self._backend.model, tokenizers.models.WordPiece) and prefix:
            vocabulary = self._backend.get_vocab()
            self._continues = np.zeros(max(vocabulary.values()) + 1, bool)
            self._continues[[index for token, index in vocabulary.items() if token.startswith(prefix)]] = True

    @classmethod
    def of(cls, tokenizer: Any) -> Tokeniser:
        """The Tokeniser of a transformers tokenizer.

        Raises:
          UserError: it is not a fast one or lacks [CLS], [SEP] or [PAD].
        """
        check_tokenizer(tokenizer)
        ids = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.unk_token_id
        return cls(tokenizer.backend_tokenizer.to_str(), *ids)

    def encode(self, texts: list[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The token ids of each text, and which of them continue the word of the token before: int32, bool [tokens]."""
        if self._continues is not None:
            # The tokens say it themselves ("##ing"), so the slower call that keeps track of words is not needed.
            for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False):
                ids = np.array(encoding.ids, np.int32)
                yield ids, self._continues[ids]
        else:
            for encoding in self._backend.encode_batch(texts, add_special_tokens=False):
                words = np.array(encoding.word_ids, np.float64)  # None → NaN, which equals nothing
                continues = np.zeros(len(words), bool)
                continues[1:] = words[1:] == words[:-1]
                yield np.array(encoding.ids, np.int32), continues


def examples(
    documents: Iterable[tuple[str, Statistics]],
    tokeniser: Tokeniser,
    *,
    seq_len: int,
    min_tokens: int = 12,
    max_unknown: float = 0.5,
) -> Iterator[tuple[np.ndarray, Statistics]]:
    """Tokenises texts and cuts them into examples.

    The filters are those of the original DistilBERT script: split over the limit, drop 11 tokens or fewer,
    drop 50 % unknown or more. Special tokens that the text spells out, such as "[MASK]" in an article about
    BERT, are tokenised as the text they are.

    Args:
      documents: texts, each with the counters that what becomes of it is added to.
      tokeniser: of the teacher.
      seq_len: the longest example, [CLS] and [SEP] included.
      min_tokens: shorter examples are dropped, [CLS] and [SEP] counted.
      max_unknown: examples with at least this share of unknown tokens are dropped.

    Yields:
      int32 arrays [length], `min_tokens` ≤ length ≤ `seq_len`, each with the counters of its text.
    """
    for texts, counters in _batches(documents):
        for (ids, continues), count in zip(tokeniser.encode(texts), counters, strict=True):
            for start, end in word_spans(continues, seq_len - 2):
                example = np.empty(end - start + 2, np.int32)
                example[0], example[1:-1], example[-1] = tokeniser.cls_id, ids[start:end], tokeniser.sep_id
                unknown = 0
                if tokeniser.unknown_id is not None:
                    unknown = int(np.count_nonzero(example == tokeniser.unknown_id))
                if len(example) < min_tokens:
                    count.dropped_short += 1
                elif unknown >= max_unknown * len(example):
                    count.dropped_unknown += 1
                else:
                    count.examples += 1
                    count.tokens += len(example)
                    count.unknown_tokens += unknown
                    yield example, count


def word_spans(continues: Sequence[bool] | np.ndarray, limit: int) -> Iterator[tuple[int, int]]:
    """Cuts a token sequence into consecutive spans of at most `limit` tokens, between words.

    Args:
      continues: for each token whether it belongs to the word of the token before.
      limit: tokens in a span; a single word longer than this is cut all the same.

    Yields:
      Ranges (start, end); in order they cover every token exactly once.
    """
    start = 0
    while start < len(continues):
        end = min(start + limit, len(continues))
        if end < len(continues):
            cut = end
            while cut > start and continues[cut]:
                cut -= 1
            end = cut if cut > start else end
        yield start, end
        start = end


def _batches(
    documents: Iterable[tuple[str, Statistics]],
) -> Iterator[tuple[list[str], list[Statistics]]]:
    """Groups of pieces of about BATCH_CHARACTERS characters."""
    batch: list[str] = []
    counters: list[Statistics] = []
    characters = 0
    for text, count in documents:
        for piece in _pieces(text, PIECE_CHARACTERS):
            batch.append(piece)
            counters.append(count)
            # The constant keeps a stream of empty or tiny texts from making a huge batch.
            characters += len(piece) + 64
            if characters >= BATCH_CHARACTERS:
                yield batch, counters
                batch, counters, characters = [], [], 0
    if batch:
        yield batch, counters


def _pieces(text: str, limit: int) -> Iterator[str]:
    """Cuts a text into pieces of at most `limit` characters, before the space in front of a word.

    Byte-level BPE tokenizers (RoBERTa's) have that space in the word's token.
    """
    start = 0
    while len(text) - start > limit:
        end = start + limit
        before_words = (
            i for i in range(end - 1, start, -1) if text[i].isspace() and not text[i + 1].isspace()
        )
        cut = next(before_words, end)
        yield text[start:cut]
        start = cut
    yield text[start:]
