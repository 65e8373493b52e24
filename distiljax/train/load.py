"""Models by name: a run directory of this package, a Hugging Face directory (both also remote), or a hub name."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np

from distiljax import hub
from distiljax.errors import UserError
from distiljax.hub.files import CONFIG as HF_CONFIG
from distiljax.hub.files import TOKENIZER_FILES
from distiljax.nn import Encoder, EncoderConfig, HeadConfig, MaskedLM, TaskModel
from distiljax.train import storage
from distiljax.train.checkpoint import restore_params
from distiljax.train.run import CONFIG, MODEL, TOKENIZER, read_json

Params = dict[str, Any]

# What is copied of a remote Hugging Face directory.
_MODEL_FILES = (HF_CONFIG, "*.safetensors", "*.bin", "*.index.json")


def is_run(name_or_dir: str | os.PathLike[str]) -> bool:
    """Whether a name is a run directory."""
    with storage.errors(name_or_dir):
        return (storage.as_path(name_or_dir) / MODEL).is_file()


@overload
def from_pretrained(
    name_or_dir: str | os.PathLike[str],
    head: Literal["masked_lm"] = ...,
    dtype: Any = ...,
    *,
    checkpoint: str = ...,
    **options: Any,
) -> tuple[MaskedLM, Params]: ...
@overload
def from_pretrained(
    name_or_dir: str | os.PathLike[str],
    head: None,
    dtype: Any = ...,
    *,
    checkpoint: str = ...,
    **options: Any,
) -> tuple[Encoder, Params]: ...
@overload
def from_pretrained(
    name_or_dir: str | os.PathLike[str],
    head: HeadConfig,
    dtype: Any = ...,
    *,
    checkpoint: str = ...,
    **options: Any,
) -> tuple[TaskModel, Params]: ...
@overload
def from_pretrained(
    name_or_dir: str | os.PathLike[str],
    head: str,
    dtype: Any = ...,
    *,
    checkpoint: str = ...,
    **options: Any,
) -> tuple[hub.Model, Params]: ...
def from_pretrained(
    name_or_dir: str | os.PathLike[str],
    head: str | HeadConfig | None = "masked_lm",
    dtype: Any = jnp.float32,
    *,
    checkpoint: str = "best",
    **options: Any,
) -> tuple[hub.Model, Params]:
    """Load a model.

    Args:
      name_or_dir: a run directory of `pretrain`, `distill` or `finetune`, a Hugging Face directory, or a hub name;
        directories may be remote (gs://…).
      head: "masked_lm"; a kind of `HeadConfig`, or one itself, for a `TaskModel`; "any" for the head that the model
        has; None for the bare encoder.
      dtype: compute dtype of the module; parameters are float32.
      checkpoint: of a run directory: "best" (lowest held-out loss; of a task its metric) or "last".
      **options: `init_head` and `seed`, see `distiljax.hub.from_pretrained`.

    Returns:
      The module and its parameters: `module.apply({"params": params}, input_ids, attention_mask=…)`.

    Raises:
      UserError: nothing there, damaged, or another architecture.
    """
    if not is_run(name_or_dir):
        _refuse_half_a_run(name_or_dir)
        with _resolved(name_or_dir, _MODEL_FILES) as where:
            return hub.from_pretrained(where, head=head, dtype=dtype, **options)
    hub.check_head(head)
    path = storage.as_path(name_or_dir)
    module = _module_of_run(path, dtype)
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    try:
        params, _ = restore_params(path, shapes, checkpoint)
    except FileNotFoundError:
        raise UserError(
            f"{path} has no {checkpoint} checkpoint yet; let the run reach its first validation, or give its "
            f"teacher or a finished run (config in {path / CONFIG})"
        ) from None
    return hub.with_head(module, params, head, str(path), **options)


def _refuse_half_a_run(name_or_dir: str | os.PathLike[str]) -> None:
    path = storage.as_path(name_or_dir)
    if (path / CONFIG).is_file() and "kind" in (read_json(path / CONFIG) or {}):
        raise UserError(
            f"{path} is a run directory without {MODEL}; copy it back, or train again in another directory"
        )


def _module_of_run(path: Any, dtype: Any) -> hub.Model:
    facts = read_json(path / MODEL) or {}
    try:
        config, head = EncoderConfig(**facts["encoder"]), facts["head"]
        if head == "masked_lm":
            return MaskedLM(config, dtype)
        return TaskModel(config, HeadConfig(**{**head, "labels": tuple(head["labels"])}), dtype)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path / MODEL} is damaged ({error}); copy it back, or train again in another directory"
        ) from error


def load_tokenizer(name_or_dir: str | os.PathLike[str]) -> Any:
    """The fast tokenizer of a run directory, a Hugging Face directory or a hub name.

    Raises:
      UserError: there is none.
    """
    place = storage.as_path(name_or_dir) / TOKENIZER if is_run(name_or_dir) else name_or_dir
    with _resolved(place, TOKENIZER_FILES) as where:
        tokenizer = hub.load_tokenizer(where)
    if storage.is_remote(place):
        tokenizer.name_or_path = storage.absolute(place)  # not the copy's, which is another one every time
    return tokenizer


@contextlib.contextmanager
def _resolved(
    name_or_dir: str | os.PathLike[str], patterns: Sequence[str]
) -> Iterator[str | os.PathLike[str]]:
    """The name itself, or a local copy of the remote directory that it names."""
    if not storage.is_remote(name_or_dir):
        yield name_or_dir
        return
    with storage.local_copy(name_or_dir, patterns) as directory:
        if not any(directory.iterdir()):
            raise UserError(
                f"{storage.absolute(name_or_dir)} holds no model and no tokenizer; give a run directory or a Hugging "
                "Face directory"
            )
        yield directory
