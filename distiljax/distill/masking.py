"""Dynamic masking on the device (Devlin et al. 2019, task 1; Sanh et al. 2019's frequency weighting)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Masking:
    """How tokens are masked.

    Attributes:
      mask_token_id: the id of [MASK].
      vocab_size: V; random replacements are drawn uniformly from it.
      rate: share of the eligible tokens that are predicted.
      mask: of these, the share shown as [MASK].
      random: of these, the share shown as a random token; the rest is shown as it is.

    Raises:
      ValueError: shares outside 0…1.
    """

    mask_token_id: int
    vocab_size: int
    rate: float = 0.15
    mask: float = 0.8
    random: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 < self.rate < 1.0:
            raise ValueError(f"masking rate is {self.rate}; expected 0 < rate < 1")
        if min(self.mask, self.random) < 0 or self.mask + self.random > 1 + 1e-9:
            raise ValueError(
                f"masking shares are mask {self.mask} and random {self.random}; expected at least 0, at most 1 together"
            )

    def max_masked(self, seq_len: int) -> int:
        """K, the most positions that a row of `seq_len` tokens can have masked."""
        return math.ceil(self.rate * seq_len)


class MaskedRows(NamedTuple):
    """Token rows with some tokens masked.

    Attributes:
      input_ids: int32 [B, S], what the models see.
      segment_ids: int32 [B, S]; 0 = padding.
      positions: int32 [B, S]; restart at 0 in each segment.
      masked_positions: int32 [B, K], columns of the tokens to predict; in a row they are distinct, fillers too.
      labels: int32 [B, K], the tokens that stood there.
      masked_weights: float32 [B, K], 1 for real entries, 0 for filler.
    """

    input_ids: Array
    segment_ids: Array
    positions: Array
    masked_positions: Array
    labels: Array
    masked_weights: Array

    @property
    def token_weights(self) -> Array:
        """float32 [B, S], 1 at tokens ([CLS] and [SEP] too) and 0 at padding."""
        return (self.segment_ids > 0).astype(jnp.float32)


def masking_weights(token_counts: np.ndarray, special_ids: Iterable[int], smoothing: float) -> np.ndarray:
    """Relative chance of each vocabulary entry to be masked: max(count, 1)^−smoothing, 0 for special tokens.

    Args:
      token_counts: [V], occurrences in the corpus.
      special_ids: ids that are never masked.
      smoothing: 0.7 in the original, which favours rare tokens; 0 weights all alike.

    Returns:
      float32 [V].
    """
    weights = np.maximum(token_counts, 1).astype(np.float64) ** -smoothing
    weights[list(special_ids)] = 0.0
    return weights.astype(np.float32)


def mask_tokens(keys: Array, batch: dict[str, Array], weights: Array, masking: Masking) -> MaskedRows:
    """Mask `rate` of each row's eligible tokens, drawn without replacement in proportion to their weights.

    A row of m eligible tokens (not padding, weight above 0) has ⌊rate·m + u⌋ masked, u uniform in [0, 1), which is
    rate·m on average. The original draws over a whole micro-batch at once; per row, the draw is a function of the
    row's own key and does not depend on how a batch is split.

    Args:
      keys: typed PRNG keys [B], one a row.
      batch: int32 [B, S] arrays `input_ids`, `segment_ids`, `positions`.
      weights: float32 [V] of `masking_weights`.
      masking: the shares.
    """
    K = masking.max_masked(batch["input_ids"].shape[1])

    def mask_row(key: Array, tokens: Array, segments: Array) -> tuple[Array, Array, Array, Array]:
        count_key, draw_key, shown_key, random_key = jax.random.split(key, 4)
        weight = jnp.where(segments > 0, weights[tokens], 0.0)
        eligible = (weight > 0).sum()
        count = jnp.floor(masking.rate * eligible + jax.random.uniform(count_key)).astype(jnp.int32)
        # The K largest of log w + Gumbel noise are K draws without replacement (Gumbel top-k; Kool et al. 2019).
        score = jnp.where(weight > 0, jnp.log(weight) + jax.random.gumbel(draw_key, weight.shape), -jnp.inf)
        _, positions = jax.lax.top_k(score, K)
        is_masked = jnp.arange(K) < jnp.minimum(count, eligible)
        labels = tokens[positions]
        u = jax.random.uniform(shown_key, (K,))
        random = jax.random.randint(random_key, (K,), 0, masking.vocab_size)
        shown = jnp.where(u < masking.mask, masking.mask_token_id, labels)
        shown = jnp.where((u >= masking.mask) & (u < masking.mask + masking.random), random, shown)
        masked = tokens.at[positions].set(jnp.where(is_masked, shown, labels))
        return masked, positions, labels, is_masked.astype(jnp.float32)

    input_ids, positions, labels, is_masked = jax.vmap(mask_row)(
        keys, batch["input_ids"], batch["segment_ids"]
    )
    return MaskedRows(input_ids, batch["segment_ids"], batch["positions"], positions, labels, is_masked)
