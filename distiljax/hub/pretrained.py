"""Models in and out of Hugging Face directories."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError

from distiljax.errors import UserError
from distiljax.hub import files, names
from distiljax.hub.heads import (
    MASKED_LM,
    architecture,
    fits,
    fresh_head,
    fresh_pooler,
    fresh_task_head,
    head_from_hf,
    head_to_hf,
    missing,
    stored_head,
)
from distiljax.hub.tokenizer import check_vocabulary, save_tokenizer
from distiljax.nn import Encoder, EncoderConfig, HeadConfig, MaskedLM, TaskModel
from distiljax.nn.heads import KINDS

log = logging.getLogger(__name__)

Params = dict[str, Any]
Model = MaskedLM | TaskModel | Encoder

# What only a run directory has; an export must never replace one.
_RUN_FILES = ("model.json", "checkpoints", "best")


def from_pretrained(
    name_or_dir: str | os.PathLike[str],
    head: str | HeadConfig | None = MASKED_LM,
    dtype: Any = jnp.float32,
    *,
    init_head: bool = False,
    seed: int = 0,
) -> tuple[Model, Params]:
    """Load a BERT or DistilBERT model of Hugging Face's layout.

    Args:
      name_or_dir: a directory, or a hub name.
      head: "masked_lm"; a kind of `HeadConfig`, or one itself, for a `TaskModel`; "any" for the head that the model
        has; None for the bare encoder (with its pooler, where the file holds one).
      dtype: compute dtype of the module.
      init_head: draw a fresh head where the file holds none that fits, with "masked_lm" or a `HeadConfig`.
      seed: of that head.

    Returns:
      The module and its parameters, nested dicts of float32 NumPy arrays:
      `module.apply({"params": params}, input_ids, attention_mask=…)`.

    Raises:
      UserError: nothing there, a damaged file, another architecture, no head, or weights that do not fit the
        config.
    """
    check_head(head)
    where = os.fspath(name_or_dir)
    directory = files.resolve(name_or_dir)
    hf_config = files.read_config(directory)
    config = _encoder_config(hf_config, where)
    weights = files.read_weights(directory)
    stored = stored_head(hf_config, weights)
    if head == "any":
        if stored is None:
            raise UserError(f"{where} has no head; train one with distiljax finetune, or distiljax pretrain")
        head = stored
    module, kept = _module(config, head, dtype, hf_config, stored, weights, where)
    if not kept and not init_head and head is not None:
        raise missing(where, head if isinstance(head, str) else head.kind, stored)
    table = names.TABLES[hf_config["model_type"]]
    shapes = _shapes(module)
    if isinstance(module, Encoder):
        shapes = {"encoder": shapes}
    elif not kept:
        shapes = {"encoder": dict(shapes["encoder"])}
    fresh = {}
    if isinstance(module, TaskModel) and module.config.pooler and not names.has_pooler(table, weights):
        if not init_head:
            raise UserError(f"{where} lacks a pooler, which a BERT that classifies sequences needs")
        del shapes["encoder"]["pooler"]
        fresh["pooler"] = fresh_pooler(module.config, seed)
    tied = hf_config.get("tie_word_embeddings") is not False
    kind = stored if kept else None
    params = names.to_params(table, weights, shapes, where, head=kind, tied=tied)
    for path, array in traverse_util.flatten_dict(params, sep="/").items():
        if not np.isfinite(array).all():
            raise UserError(f"{where}: the weight {path!r} holds NaN or infinity; use a checkpoint of before")
    params["encoder"] |= fresh
    return _headed(module, params, seed)


def with_head(
    module: Model,
    params: Params,
    head: str | HeadConfig | None,
    where: str,
    *,
    init_head: bool = False,
    seed: int = 0,
) -> tuple[Model, Params]:
    """A loaded model with the head that is wanted: its own, a fresh one, or none; as `from_pretrained`.

    Raises:
      UserError: it has not the head that is wanted, and there is to be no fresh one.
    """
    kind = head_kind(module)
    if head is None:
        return Encoder(module.config, module.dtype), params["encoder"]
    if head in ("any", kind):
        return module, params
    if isinstance(module, TaskModel) and isinstance(head, HeadConfig) and fits(module.head, head):
        return module.clone(head=head), params  # with the drop rate that is wanted
    wanted = head.kind if isinstance(head, HeadConfig) else head
    if not init_head or head in KINDS:  # the name of a kind does not say what labels a fresh one has
        raise missing(where, wanted, kind)
    config, encoder = module.config, dict(params["encoder"])
    if not isinstance(head, HeadConfig):
        return _headed(MaskedLM(config, module.dtype), {"encoder": encoder}, seed)
    config = head.encoder_config(config)
    if config.pooler and "pooler" not in encoder:
        encoder["pooler"] = fresh_pooler(config, seed)
    elif not config.pooler:
        encoder.pop("pooler", None)
    return _headed(TaskModel(config, head, module.dtype), {"encoder": encoder}, seed)


def _headed(module: Model, params: Params, seed: int) -> tuple[Model, Params]:
    """The module, and what it needs of `encoder` and `head`: the encoder's parameters alone, or with a fresh head."""
    if isinstance(module, Encoder):
        return module, params["encoder"]
    if "head" not in params:
        fresh = (
            fresh_head(module.config, seed)
            if isinstance(module, MaskedLM)
            else fresh_task_head(module.config, module.head, seed)
        )
        params = {**params, "head": fresh}
    return module, params


def check_head(head: Any) -> None:
    """Refuse what is no `head` of `from_pretrained`.

    Raises:
      UserError: its value.
    """
    allowed = (MASKED_LM, "any", *KINDS)
    if not (head is None or isinstance(head, HeadConfig) or head in allowed):
        raise UserError(f"head is {head!r}; expected one of {', '.join(allowed)}, a HeadConfig or None")


def _module(
    config: EncoderConfig,
    head: str | HeadConfig | None,
    dtype: Any,
    hf_config: dict[str, Any],
    stored: str | None,
    weights: dict[str, np.ndarray],
    where: str,
) -> tuple[Model, bool]:
    """The module with the wanted head, and whether the stored one is it."""
    if head is None:
        pooler = names.has_pooler(names.TABLES[hf_config["model_type"]], weights)
        return Encoder(config.replace(pooler=pooler), dtype), False
    if head == MASKED_LM:
        return MaskedLM(config, dtype), stored == MASKED_LM
    kind = head.kind if isinstance(head, HeadConfig) else head
    own = None
    if kind == stored:
        try:
            own = head_from_hf(hf_config, kind, weights)
        except ValueError as error:
            if isinstance(head, str):
                raise UserError(f"{where}: {files.CONFIG}: {error}") from error
    kept = own is not None and (isinstance(head, str) or fits(own, head))
    if own is not None and not kept:
        log.warning("%s has another head of this kind (%s); a fresh one takes its place", where, own.labels)
    wanted = head if isinstance(head, HeadConfig) else own
    if wanted is None:
        raise missing(where, kind, stored)
    return TaskModel(wanted.encoder_config(config), wanted, dtype), kept


def save_pretrained(
    module: Model,
    params: Params,
    directory: str | os.PathLike[str],
    tokenizer: Any = None,
    card: str | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write a model as a directory that transformers loads.

    It holds config.json, model.safetensors, the tokenizer's files and README.md. A shape without token types,
    without pooler and with LayerNorm epsilon 1e-12 goes out as DistilBERT, any other as BERT;
    `from_pretrained` gives the parameters back bit for bit. What the two architectures cannot say is lost:
    BERT always has token types, so a shape without them gets one row of zeros; the pooler of a `MaskedLM`,
    which does not use it, is left out; DistilBERT never drops the attention sub-layer's output; BERT's
    positions are all learned.

    Args:
      module, params: the model; parameters are written as float32.
      directory: where to. Written beside it and renamed, so it is there whole or not at all.
      tokenizer: a fast tokenizer of transformers to put beside the model.
      card: the text of README.md; see `model_card`.
      overwrite: replace the model that stands there.

    Raises:
      UserError: a directory that is not empty, parameters that are not the module's, a tokenizer that does
        not fit, or no permission to write.
    """
    head = head_kind(module)
    _check_params(module, params)
    tree, config = _exportable(module.config, params if head else {"encoder": params}, head)
    if tokenizer is not None:
        check_vocabulary(tokenizer, config, "the model")
    table = names.TABLES[config.model_type]
    hf_config = {
        "architectures": [architecture(config, head)],
        **config.to_hf(),
        **(head_to_hf(module.head, config) if isinstance(module, TaskModel) else {}),
        "torch_dtype": "float32",
    }

    def write(path: Path) -> None:
        from safetensors.numpy import save_file

        # "pt" is the layout, kernels [out, in]; transformers refuses files that do not say so.
        save_file(
            names.from_params(table, tree, head=head),
            path / files.SAFETENSORS,
            metadata={"format": "pt"},
        )
        text = json.dumps(hf_config, indent=2, sort_keys=True)
        (path / files.CONFIG).write_text(text + "\n", encoding="utf-8")
        if tokenizer is not None:
            save_tokenizer(tokenizer, path, config.max_positions)
        if card is not None:
            (path / files.CARD).write_text(card, encoding="utf-8")

    _write_directory(Path(directory), write, overwrite)


def head_kind(module: Model) -> str | None:
    """The kind of a model's head, as `from_pretrained` names it."""
    if isinstance(module, TaskModel):
        return module.head.kind
    return MASKED_LM if isinstance(module, MaskedLM) else None


def _encoder_config(hf_config: dict[str, Any], where: str) -> EncoderConfig:
    try:
        return EncoderConfig.from_hf(hf_config)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {files.CONFIG}: {error}") from error


def _shapes(module: Model) -> Params:
    return jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]


def _check_params(module: Model, params: Params) -> None:
    wanted = traverse_util.flatten_dict(_shapes(module), sep="/")
    given = traverse_util.flatten_dict(params, sep="/")
    for path in sorted(wanted.keys() ^ given.keys()):
        verb = "lack" if path in wanted else "hold the unknown"
        raise UserError(f"the parameters {verb} {path!r}; expected those of {type(module).__name__}")
    for path, array in given.items():
        if tuple(np.shape(array)) != wanted[path].shape:
            raise UserError(
                f"the parameter {path!r} has shape {list(np.shape(array))}; "
                f"expected {list(wanted[path].shape)}"
            )


def _exportable(config: EncoderConfig, tree: Params, head: str | None) -> tuple[Params, EncoderConfig]:
    """The parameters and shape as Hugging Face's architecture has them."""
    encoder = dict(tree["encoder"])
    if head == MASKED_LM and encoder.pop("pooler", None) is not None:
        config = config.replace(pooler=False)
    if config.model_type == "bert" and not config.type_vocab_size:
        zeros = {"embedding": np.zeros((1, config.hidden_size), np.float32)}
        encoder["embeddings"] = {**encoder["embeddings"], "token_type": zeros}
    return {**tree, "encoder": encoder}, config


def _write_directory(directory: Path, write: Callable[[Path], None], overwrite: bool) -> None:
    """Make `directory` with what `write` puts into the empty one that it is given, in one piece."""
    if "://" in str(directory) or str(directory).startswith(("gs:/", "s3:/")):
        raise UserError(f"{directory} is remote; expected a local directory")
    target = directory.expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise UserError(f"{directory} is a file; give another directory")
    occupied = target.is_dir() and any(target.iterdir())
    if occupied and not overwrite:
        raise UserError(f"{directory} is not empty; give another directory, or overwrite it with --overwrite")
    if occupied and any((target / name).exists() for name in _RUN_FILES):
        raise UserError(f"{directory} holds a run, which an export would destroy; give another directory")
    if occupied and not (target / files.CONFIG).is_file():
        raise UserError(
            f"{directory} holds something else than a model (no {files.CONFIG}); give another directory"
        )
    if occupied and (foreign := files.foreign(entry.name for entry in target.iterdir())):
        raise UserError(
            f"{directory} holds {foreign!r} beside a model, which an export would destroy; give another directory"
        )
    new, old = (target.with_name(f".{target.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        new.mkdir()
        write(new)
        if occupied:
            target.rename(old)
        new.replace(target)
    except (OSError, SafetensorError) as error:
        error = error if isinstance(error, OSError) else OSError(str(error))
        raise UserError(
            f"cannot write {directory}: {error.strerror or error}; give another directory"
        ) from error
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(new, ignore_errors=True)
