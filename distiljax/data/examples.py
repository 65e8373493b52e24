"""Text to examples: [CLS] tokens [SEP], at most `seq_len` tokens, never cut inside a word that fits."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from distiljax.data.metadata import Statistics
from distiljax.errors import UserError

if TYPE_CHECKING:
    import tokenizers

# Characters of text given to the tokenizer at once (it spreads a batch over the cores) and at most in one
# piece: a token's bookkeeping takes about 100 bytes, so a document of any size needs no more than some 50 MB.
BATCH_CHARACTERS = 1 << 20
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


def examples(
    texts: Iterable[str],
    tokenizer: Any,
    *,
    seq_len: int,
    min_tokens: int = 12,
    max_unknown: float = 0.5,
    statistics: Statistics | None = None,
) -> Iterator[np.ndarray]:
    """Tokenises texts and cuts them into examples.

    The filters are those of the original DistilBERT script: split over the limit, drop 11 tokens or fewer,
    drop 50 % unknown or more. Special tokens that the text spells out, such as "[MASK]" in an article about
    BERT, are tokenised as the text they are.

    Args:
      texts: the documents.
      tokenizer: a fast transformers tokenizer; it is not changed.
      seq_len: the longest example, [CLS] and [SEP] included.
      min_tokens: shorter examples are dropped, [CLS] and [SEP] counted.
      max_unknown: examples with at least this share of unknown tokens are dropped.
      statistics: counters to add to.

    Yields:
      int32 arrays [length], `min_tokens` ≤ length ≤ `seq_len`.

    Raises:
      UserError: the tokenizer is not a fast one or lacks [CLS], [SEP] or [PAD].
    """
    check_tokenizer(tokenizer)
    count = statistics if statistics is not None else Statistics()
    backend = _plain_backend(tokenizer)
    cls_id, sep_id, unknown_id = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.unk_token_id
    for batch in _batches(texts):
        for encoding in backend.encode_batch(batch, add_special_tokens=False):
            ids, words = encoding.ids, encoding.word_ids
            for start, end in word_spans(words, seq_len - 2):
                example = np.array([cls_id, *ids[start:end], sep_id], np.int32)
                unknown = int(np.count_nonzero(example == unknown_id)) if unknown_id is not None else 0
                if len(example) < min_tokens:
                    count.dropped_short += 1
                elif unknown >= max_unknown * len(example):
                    count.dropped_unknown += 1
                else:
                    count.examples += 1
                    count.tokens += len(example)
                    count.unknown_tokens += unknown
                    yield example


def word_spans(words: Sequence[int | None], limit: int) -> Iterator[tuple[int, int]]:
    """Cuts a token sequence into consecutive spans of at most `limit` tokens, between words.

    Args:
      words: the number of the word that each token belongs to.
      limit: tokens in a span; a single word longer than this is cut all the same.

    Yields:
      Ranges (start, end); in order they cover every token exactly once.
    """
    start = 0
    while start < len(words):
        end = min(start + limit, len(words))
        if end < len(words):
            cut = end
            while cut > start and words[cut] == words[cut - 1]:
                cut -= 1
            end = cut if cut > start else end
        yield start, end
        start = end


def _plain_backend(tokenizer: Any) -> tokenizers.Tokenizer:
    """A copy of the Rust tokenizer that neither truncates nor pads and takes special tokens for text."""
    import tokenizers

    # Unset, tokenizers turns its threads off, with a warning, in a process that has forked.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Groups of pieces of about BATCH_CHARACTERS characters."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        for piece in _pieces(text, PIECE_CHARACTERS):
            batch.append(piece)
            # The constant keeps a stream of empty or tiny texts from making a huge batch.
            characters += len(piece) + 64
            if characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


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
