"""Words for [MASK]."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distiljax.errors import UserError
from distiljax.hub import check_vocabulary, vocabulary_size
from distiljax.nn import MaskedLM

MAX_BATCH = 4096
LENGTHS = (16, 32, 64, 128, 256, 512)


def fill_mask(
    module: MaskedLM,
    params: Any,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    top_k: int = 5,
    batch_size: int = 16,
) -> Iterator[dict[str, Any]]:
    """The likeliest words for every [MASK] of each text, in the order of the texts.

    Texts are read batch by batch and padded to one of a few lengths, so that few programs are compiled.

    Args:
      module, params: a masked language model.
      tokenizer: its tokenizer.
      texts: each with at least one mask token; longer ones than the model has positions are cut at the end.
      top_k: how many words.
      batch_size: how many texts at once.

    Yields:
      `{"text": text, "masks": [[{"token", "id", "score", "filled"}, … top_k], … one list a mask]}`, the score being
      the softmax probability and `filled` the text with this mask filled.

    Raises:
      UserError: a text without a mask token (or with it past the model's positions), a bad `top_k` or `batch_size`.
    """
    if not 1 <= top_k <= vocabulary_size(tokenizer):
        raise UserError(f"top_k is {top_k}; expected 1 to {vocabulary_size(tokenizer)}")

    if not 1 <= batch_size <= MAX_BATCH:
        raise UserError(f"batch_size is {batch_size}; expected 1 to {MAX_BATCH}")

    check_vocabulary(tokenizer, module.config, "the model")

    @functools.partial(jax.jit, static_argnums=4)
    def run(params: Any, ids: jax.Array, attention_mask: jax.Array, at: jax.Array, k: int) -> tuple:
        hidden: Any = module.apply({"params": params}, ids, attention_mask=attention_mask, method="encode")
        picked = jnp.take_along_axis(hidden, at[..., None], axis=1)  # [B, M, E]
        logits: Any = module.apply({"params": params}, picked, method="decode")
        return jax.lax.top_k(jax.nn.softmax(logits[..., : vocabulary_size(tokenizer)]), k)

    limit = module.config.max_positions
    for group in _groups(texts, batch_size):
        # An argument that is no UTF-8 reaches Python with surrogates, which no tokenizer takes.
        group = tuple(text.encode("utf-8", "replace").decode() for text in group)
        encoded = [tokenizer(text, truncation=True, max_length=limit)["input_ids"] for text in group]
        places = [np.flatnonzero(np.array(ids) == tokenizer.mask_token_id) for ids in encoded]
        for text, place in zip(group, places, strict=True):
            if not len(place):
                raise UserError(
                    f"no {tokenizer.mask_token} in the first {limit} tokens of {_shortened(text)!r}; "
                    f"write {tokenizer.mask_token} where a word is to be filled in"
                )
        # One shape a length: the last group is padded with empty texts, the number of masks to a power of two.
        length = min(next((n for n in LENGTHS if n >= max(map(len, encoded))), limit), limit)
        masks = 1 << (max(map(len, places)) - 1).bit_length()
        ids = np.full((batch_size, length), tokenizer.pad_token_id, np.int32)
        at = np.zeros((batch_size, masks), np.int32)
        attention_mask = np.zeros((batch_size, length), np.int32)
        attention_mask[:, 0] = 1
        for row, (tokens, place) in enumerate(zip(encoded, places, strict=True)):
            ids[row, : len(tokens)], attention_mask[row, : len(tokens)] = tokens, 1
            at[row, : len(place)] = place
        scores, tokens = jax.device_get(run(params, ids, attention_mask, at, top_k))
        for row, (text, place) in enumerate(zip(group, places, strict=True)):
            yield {
                "text": text,
                "masks": [
                    [
                        _choice(tokenizer, text, mask, int(token), float(score))
                        for token, score in zip(tokens[row, mask], scores[row, mask], strict=True)
                    ]
                    for mask in range(len(place))
                ],
            }


def _choice(tokenizer: Any, text: str, mask: int, token: int, score: float) -> dict[str, Any]:
    word = tokenizer.decode([token]).strip()
    parts = text.split(tokenizer.mask_token)
    before, after = tokenizer.mask_token.join(parts[: mask + 1]), tokenizer.mask_token.join(parts[mask + 1 :])
    if tokenizer.convert_ids_to_tokens(token).startswith("##"):
        word, before = word.removeprefix("##"), before.rstrip()
    return {"token": word, "id": token, "score": score, "filled": before + word + after}


def _groups(texts: Iterable[str], size: int) -> Iterator[tuple[str, ...]]:
    texts = iter(texts)
    while group := tuple(islice(texts, size)):  # itertools.batched is Python 3.12's
        yield group


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"
