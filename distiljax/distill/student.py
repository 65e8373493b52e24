"""A student out of its teacher (Sanh et al. 2019, section 3: student architecture and initialisation)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from distiljax.errors import UserError
from distiljax.nn import MaskedLM

Params = dict[str, Any]
TOKEN_TYPES = ("fold", "drop", "keep")


def layer_choice(teacher_layers: int, layers: int | Sequence[int] | None = None) -> tuple[int, ...]:
    """Which teacher layers the student copies.

    A number n asks for n layers spread evenly from the first to the last, round(i·(L−1)/(n−1)); for 6 of 12 these
    are the original's 0, 2, 4, 7, 9, 11. None asks for half of the layers. A sequence is taken as it is.

    Raises:
      UserError: more layers than the teacher has, none at all, or an index outside the teacher.
    """
    if layers is None:
        layers = max(teacher_layers // 2, 1)
    if isinstance(layers, int) and not isinstance(layers, bool):
        if not 1 <= layers <= teacher_layers:
            raise UserError(f"student of {layers} layers; expected 1 to {teacher_layers}, the teacher's")
        if layers == 1:
            return (0,)
        return tuple(int(i) for i in np.rint(np.linspace(0, teacher_layers - 1, layers)))
    if not isinstance(layers, Sequence) or not all(type(i) is int for i in layers):
        raise UserError(f"student layers {layers!r}; expected a number of layers or a tuple of layer indices")
    chosen = tuple(layers)
    outside = [i for i in chosen if not 0 <= i < teacher_layers]
    if not chosen or outside:
        raise UserError(
            f"student layers {chosen}; expected indices from 0 to {teacher_layers - 1} of the teacher"
        )
    return chosen


def student_of(
    module: MaskedLM,
    params: Params,
    layers: int | Sequence[int] | None = None,
    *,
    hidden_size: int | None = None,
    num_heads: int | None = None,
    intermediate_size: int | None = None,
    token_types: str = "fold",
    hidden_dropout: float = 0.1,
    attention_dropout: float = 0.1,
    initialise: str = "teacher",
    seed: int = 0,
) -> tuple[MaskedLM, Params]:
    """A student of the teacher `module` and its parameters, initialised from the teacher's.

    Every tensor whose shape agrees with the teacher's is copied from it, layers according to `layer_choice`; the
    others (nearly all, in a narrower student) are drawn afresh. The pooler is left out.

    Args:
      module, params: the teacher.
      layers: how many layers, or which; half of them by default.
      hidden_size, num_heads, intermediate_size: the student's, the teacher's by default.
      token_types: "fold" adds the embedding of token type 0 to the position embeddings, which keeps the student's
        embeddings equal to the teacher's; "drop" leaves it out as the original does; "keep" keeps the table.
      hidden_dropout, attention_dropout: drop rates while the student trains.
      initialise: "teacher", or "random" for the ablation of the paper's table 4.
      seed: of what is drawn afresh.

    Returns:
      The student's module (same compute dtype) and its float32 parameters.

    Raises:
      UserError: layers outside the teacher, or an unknown option.
    """
    if token_types not in TOKEN_TYPES:
        raise UserError(f"token_types is {token_types!r}; expected one of {', '.join(TOKEN_TYPES)}")
    if initialise not in ("teacher", "random"):
        raise UserError(f"initialise is {initialise!r}; expected teacher or random")
    teacher = module.config
    chosen = layer_choice(teacher.num_layers, layers)
    fold = token_types == "fold" and teacher.type_vocab_size > 0
    keep = token_types == "keep"
    try:
        config = teacher.replace(
            num_layers=len(chosen),
            hidden_size=hidden_size or teacher.hidden_size,
            num_heads=num_heads or teacher.num_heads,
            intermediate_size=intermediate_size or teacher.intermediate_size,
            type_vocab_size=teacher.type_vocab_size if keep else 0,
            hidden_dropout=hidden_dropout,
            attention_dropout=attention_dropout,
            drop_attention_output=keep and teacher.drop_attention_output,
            pooler=False,
            position_kind="learned" if fold else teacher.position_kind,
        )
    except ValueError as error:
        raise UserError(f"the student's shape: {error}") from error
    student = MaskedLM(config, module.dtype)
    fresh = _fresh_params(student, seed)
    if initialise == "random":
        return student, fresh
    return student, _copy_agreeing(fresh, _teacher_view(params, chosen, fold))


def _fresh_params(module: MaskedLM, seed: int) -> Params:
    row = np.zeros((1, 1), np.int32)
    return jax.device_get(jax.jit(module.init)(jax.random.key(seed), row)["params"])


def _teacher_view(params: Params, chosen: Sequence[int], fold: bool) -> Params:
    """The teacher's parameters under the student's names."""
    encoder = params["encoder"]
    embeddings = {name: dict(table) for name, table in encoder["embeddings"].items()}
    if fold:
        token_type = np.asarray(embeddings["token_type"]["embedding"])[0]
        embeddings["position"]["embedding"] = np.asarray(embeddings["position"]["embedding"]) + token_type
    layers = {f"layer_{i}": encoder[f"layer_{j}"] for i, j in enumerate(chosen)}
    return {"encoder": {"embeddings": embeddings, **layers}, "head": params["head"]}


def _copy_agreeing(fresh: Params, source: Params) -> Params:
    flat_source = traverse_util.flatten_dict(source)
    return traverse_util.unflatten_dict(
        {
            path: np.array(flat_source[path], np.float32)
            if path in flat_source and flat_source[path].shape == value.shape
            else value
            for path, value in traverse_util.flatten_dict(fresh).items()
        }
    )
