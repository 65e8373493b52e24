"""Models in and out of Hugging Face directories."""

from __future__ import annotations

import json
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
from distiljax.hub.tokenizer import check_vocabulary, save_tokenizer
from distiljax.nn import Encoder, EncoderConfig, MaskedLM
from distiljax.nn.heads import MaskedLMHead

Params = dict[str, Any]

_ARCHITECTURES = {
    ("bert", True): "BertForMaskedLM",
    ("bert", False): "BertModel",
    ("distilbert", True): "DistilBertForMaskedLM",
    ("distilbert", False): "DistilBertModel",
}

# What only a run directory has; an export must never replace one.
_RUN_FILES = ("model.json", "checkpoints", "best")


def from_pretrained(
    name_or_dir: str | os.PathLike[str],
    head: str | None = "masked_lm",
    dtype: Any = jnp.float32,
    *,
    init_head: bool = False,
    seed: int = 0,
) -> tuple[MaskedLM | Encoder, Params]:
    """Load a BERT or DistilBERT model of Hugging Face's layout.

    Args:
      name_or_dir: a directory, or a hub name.
      head: "masked_lm", or None for the bare encoder (with its pooler, where the file holds one).
      dtype: compute dtype of the module.
      init_head: draw a fresh head where the file holds none; see `fresh_head`.
      seed: of that head.

    Returns:
      The module and its parameters, nested dicts of float32 NumPy arrays:
      `module.apply({"params": params}, input_ids, attention_mask=…)`.

    Raises:
      UserError: nothing there, a damaged file, another architecture, no head, or weights that do not fit the
        config.
    """
    if head not in ("masked_lm", None):
        raise UserError(f"head is {head!r}; expected masked_lm or None")
    where = os.fspath(name_or_dir)
    directory = files.resolve(name_or_dir)
    hf_config = files.read_config(directory)
    config = _encoder_config(hf_config, where)
    table = names.TABLES[hf_config["model_type"]]
    weights = files.read_weights(directory)
    stored_head = names.has_head(table, weights)
    if head and not stored_head and not init_head:
        raise UserError(
            f"{where} has no masked-LM head; train one with: "
            f"distiljax pretrain --config=… --config.model={where}"
        )
    if head is None:
        config = config.replace(pooler=names.has_pooler(table, weights))
    shapes = _shapes(MaskedLM(config))
    if not (head and stored_head):
        del shapes["head"]
    tied = hf_config.get("tie_word_embeddings") is not False
    params = names.to_params(table, weights, shapes, where, head=bool(head and stored_head), tied=tied)
    for path, array in traverse_util.flatten_dict(params, sep="/").items():
        if not np.isfinite(array).all():
            raise UserError(f"{where}: the weight {path!r} holds NaN or infinity; use a checkpoint of before")
    if head is None:
        return Encoder(config, dtype), params["encoder"]
    if not stored_head:
        params["head"] = fresh_head(config, seed)
    return MaskedLM(config, dtype), params


def save_pretrained(
    module: MaskedLM | Encoder,
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
    masked_lm = isinstance(module, MaskedLM)
    _check_params(module, params)
    tree, config = _exportable(module.config, params if masked_lm else {"encoder": params}, masked_lm)
    if tokenizer is not None:
        check_vocabulary(tokenizer, config, "the model")
    table = names.TABLES[config.model_type]
    hf_config = {
        "architectures": [_ARCHITECTURES[config.model_type, masked_lm]],
        **config.to_hf(),
        "torch_dtype": "float32",
    }

    def write(path: Path) -> None:
        from safetensors.numpy import save_file

        # "pt" is the layout, kernels [out, in]; transformers refuses files that do not say so.
        save_file(
            names.from_params(table, tree, prefix=masked_lm),
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


def fresh_head(config: EncoderConfig, seed: int = 0) -> Params:
    """A masked-LM head before training: kernel drawn from normal(initializer_range), scale 1, biases 0."""
    hidden, table = np.zeros((1, config.hidden_size)), np.zeros((config.vocab_size, config.hidden_size))
    return jax.device_get(jax.jit(MaskedLMHead(config).init)(jax.random.key(seed), hidden, table)["params"])


def _encoder_config(hf_config: dict[str, Any], where: str) -> EncoderConfig:
    try:
        return EncoderConfig.from_hf(hf_config)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {files.CONFIG}: {error}") from error


def _shapes(module: MaskedLM | Encoder) -> Params:
    return jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]


def _check_params(module: MaskedLM | Encoder, params: Params) -> None:
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


def _exportable(config: EncoderConfig, tree: Params, masked_lm: bool) -> tuple[Params, EncoderConfig]:
    """The parameters and shape as Hugging Face's architecture has them."""
    encoder = dict(tree["encoder"])
    if masked_lm and encoder.pop("pooler", None) is not None:
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
