"""Words for [MASK]."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distiljax.errors import UserError
from distiljax.hub import check_vocabulary, vocabulary_size
from distiljax.hub.heads import MASKED_LM
from distiljax.nn import MaskedLM
from distiljax.nn.heads import SEQUENCES
from distiljax.nn.linear import place_compute_params
from distiljax.tasks.features import Features, Pieces, make_features
from distiljax.tasks.inputs import as_input
from distiljax.tasks.stream import Output, stream


def fill_mask(
    module: MaskedLM,
    params: Any,
    tokenizer: Any,
    texts: Iterable[str | Mapping[str, Any]],
    *,
    top_k: int = 5,
    batch_size: int = 32,
) -> Iterator[dict[str, Any]]:
    """The likeliest words for every [MASK] of each text, in the order of the texts.

    Texts are read ahead and batched by length; see `stream`.

    Args:
      module, params: a masked language model.
      tokenizer: its tokenizer.
      texts: each with at least one mask token; longer ones than the model has positions are cut at the end. An object
        `{"text": …}` may have an "id", which the result has too.
      top_k: how many words.
      batch_size: how many texts at once, at most.

    Yields:
      `{"text": text, "masks": [[{"token", "id", "score", "filled"}, … top_k], … one list a mask]}`, the score being
      the softmax probability and `filled` the text with this mask filled.

    Raises:
      UserError: a text without a mask token (or with it past the model's positions), a bad `top_k` or `batch_size`.
    """
    if not 1 <= top_k <= vocabulary_size(tokenizer):
        raise UserError(f"top_k is {top_k}; expected 1 to {vocabulary_size(tokenizer)}")
    check_vocabulary(tokenizer, module.config, "the model")
    job = _Masks(module, place_compute_params(params, module.dtype), tokenizer, top_k)
    items = (as_input(text, MASKED_LM, f"input {number}") for number, text in enumerate(texts, 1))
    yield from stream(items, job, batch_size=batch_size, limit=module.config.max_positions)


class _Masks:
    def __init__(self, module: MaskedLM, params: Any, tokenizer: Any, top_k: int) -> None:
        self._module, self._params, self._tokenizer, self._top_k = module, params, tokenizer, top_k
        self._pieces, self._vocabulary = Pieces(tokenizer), vocabulary_size(tokenizer)

    def size(self, item: dict[str, Any]) -> int:
        return len(item["text"])

    def prepare(self, items: Sequence[dict[str, Any]]) -> Features:
        limit = self._module.config.max_positions
        texts = {"text": [item["text"] for item in items]}
        features = make_features(SEQUENCES, texts, self._pieces, max_length=limit, labelled=False)
        masks = np.add.reduceat(features.tokens == self._tokenizer.mask_token_id, features.starts[:-1])
        for item, count in zip(items, masks, strict=True):
            if not count:
                raise UserError(
                    f"no {self._tokenizer.mask_token} in the first {limit} tokens of {_shortened(item['text'])!r}; "
                    f"write {self._tokenizer.mask_token} where a word is to be filled in"
                )
        return features

    def run(self, batch: dict[str, np.ndarray]) -> tuple[jax.Array, ...]:
        masked = batch["input_ids"] == self._tokenizer.mask_token_id
        counts = masked.sum(1)
        # Few shapes: the number of masks is padded to a power of two.
        at = np.zeros((len(masked), 1 << (int(counts.max()) - 1).bit_length()), np.int32)
        row, place = np.nonzero(masked)
        at[row, np.arange(len(row)) - (np.cumsum(counts) - counts)[row]] = place
        ids, attention_mask = batch["input_ids"], batch["attention_mask"]
        return _words_at(self._module, self._params, ids, attention_mask, at, self._vocabulary, self._top_k)

    def result(
        self, item: dict[str, Any], features: Features, rows: Sequence[int], outputs: Sequence[Output]
    ) -> dict[str, Any]:
        (row,), ((scores, tokens),) = rows, outputs
        ids = features.tokens[features.starts[row] : features.starts[row + 1]]
        masks = int(np.count_nonzero(ids == self._tokenizer.mask_token_id))
        choices = [
            [
                self._choice(item["text"], mask, int(token), float(score))
                for token, score in zip(tokens[mask], scores[mask], strict=True)
            ]
            for mask in range(masks)
        ]
        return {**item, "masks": choices}

    def _choice(self, text: str, mask: int, token: int, score: float) -> dict[str, Any]:
        tokenizer = self._tokenizer
        word = tokenizer.decode([token]).strip()
        parts = text.split(tokenizer.mask_token)
        before = tokenizer.mask_token.join(parts[: mask + 1])
        after = tokenizer.mask_token.join(parts[mask + 1 :])
        if tokenizer.convert_ids_to_tokens(token).startswith("##"):
            word, before = word.removeprefix("##"), before.rstrip()
        return {"token": word, "id": token, "score": score, "filled": before + word + after}


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _words_at(
    module: MaskedLM, params: Any, ids: jax.Array, attention_mask: jax.Array, at: jax.Array, size: int, k: int
) -> tuple[jax.Array, jax.Array]:
    """Probabilities and ids [B, M, k] of the likeliest of the first `size` tokens at the places `at` [B, M]."""
    hidden: Any = module.apply({"params": params}, ids, attention_mask=attention_mask, method="encode")
    picked = jnp.take_along_axis(hidden, at[..., None], axis=1)  # [B, M, E]
    logits: Any = module.apply({"params": params}, picked, method="decode")
    scores, tokens = jax.lax.top_k(jax.nn.softmax(logits[..., :size]), k)
    return scores, tokens


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"
