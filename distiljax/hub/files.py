"""A model's files: found in a directory or fetched from the hub, and read without running any code."""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distiljax.errors import UserError

CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
TORCH = "pytorch_model.bin"
CARD = "README.md"
_INDEX = ".index.json"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
)
_SAFETENSORS_FILES = ("model*.safetensors", SAFETENSORS + _INDEX)
_TORCH_FILES = ("pytorch_model*.bin", TORCH + _INDEX)


def resolve(name_or_dir: str | os.PathLike[str], *, weights: bool = True) -> Path:
    """The local directory of a model: the one given, or a hub repository's files in the Hugging Face cache.

    Args:
      name_or_dir: a directory, or a hub name such as "bert-base-uncased" or "user/name".
      weights: whether the weights are wanted, besides config and tokenizer.

    Raises:
      UserError: no such directory, or a hub name that cannot be had.
    """
    text = os.fspath(name_or_dir)
    path = Path(os.path.expanduser(text))
    if text and path.is_dir():
        return path
    if path.is_file():
        raise UserError(f"{text} is a file; expected a model directory or a hub name")
    looks_like_path = isinstance(name_or_dir, os.PathLike) or text.startswith((".", "/", "~", os.sep))
    if not text or looks_like_path or text.count("/") > 1 or text.endswith("/"):
        raise UserError(
            f"no such directory: {text!r}; give a directory of a Hugging Face model, or a hub name"
        )
    wanted = (CONFIG, *TOKENIZER_FILES)
    if not weights:
        return _snapshot(text, wanted)
    path = _snapshot(text, (*wanted, *_SAFETENSORS_FILES))
    # Hub repositories often hold the same weights in both formats.
    return path if _has(path, SAFETENSORS) else _snapshot(text, (*wanted, *_TORCH_FILES))


def foreign(names: Iterable[str]) -> str | None:
    """The first name in a model's directory, in their order, that is no file of a model's; None if all are."""
    known = (
        CONFIG,
        CARD,
        *TOKENIZER_FILES,
        *_SAFETENSORS_FILES,
        *_TORCH_FILES,
        "*.onnx",
        "*_config.json",
        ".git*",
    )
    for name in sorted(names):
        if not any(fnmatch.fnmatch(name, pattern) for pattern in known):
            return name
    return None


def read_config(directory: Path) -> dict[str, Any]:
    """The parsed config.json.

    Raises:
      UserError: it is missing or no JSON object.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise UserError(f"{directory} holds no {CONFIG}; expected a Hugging Face model directory")
    return _read_json(path)


def read_weights(directory: Path) -> dict[str, np.ndarray]:
    """All weights of a model directory by their Hugging Face names, in the dtype they are stored in.

    model.safetensors goes before pytorch_model.bin, which is read with `torch.load(weights_only=True)`. Both
    may be in shards with an index.

    Raises:
      UserError: none there, a missing or damaged file, or PyTorch weights where torch is not installed.
    """
    for name, read in ((SAFETENSORS, _read_safetensors), (TORCH, _read_torch)):
        if (directory / name).is_file():
            return read(directory / name)
        if (directory / (name + _INDEX)).is_file():
            return _read_shards(directory / (name + _INDEX), read)
    raise UserError(
        f"{directory} holds no weights; expected {SAFETENSORS} or {TORCH}, or one of them in shards"
    )


def _has(directory: Path, name: str) -> bool:
    return (directory / name).is_file() or (directory / (name + _INDEX)).is_file()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({_line(error)}); fetch it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    import ml_dtypes  # noqa: F401, makes NumPy know bfloat16
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged or no safetensors file ({_line(error)}); fetch it again"
        ) from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} holds PyTorch weights, which need torch to be read; install it (pip install torch), "
            f"or convert them to {SAFETENSORS}"
        ) from error
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds: pickle, zip, runtime and end-of-file errors
        raise UserError(
            f"{path} cannot be read as PyTorch weights ({_line(error)}); fetch it again, or use {SAFETENSORS}"
        ) from error
    if not isinstance(weights, Mapping) or not all(isinstance(x, torch.Tensor) for x in weights.values()):
        raise UserError(f"{path} holds no state dict; expected weights by name")
    # NumPy has no bfloat16 of its own; widening it loses nothing.
    return {
        name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()
        for name, tensor in weights.items()
    }


def _read_shards(index: Path, read: Any) -> dict[str, np.ndarray]:
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(x, str) for x in places.values()):
        raise UserError(f"{index} holds no weight_map; expected weight names and their files; fetch it again")
    weights: dict[str, np.ndarray] = {}
    for shard in sorted(set(places.values())):
        path = index.parent / shard
        if Path(shard).name != shard:
            raise UserError(f"{index} names the shard {shard!r}; expected a file beside the index")
        if not path.is_file():
            raise UserError(f"{index} names the shard {shard!r}, which is not there; fetch it again")
        held = read(path)
        for name in (name for name, place in places.items() if place == shard):
            if name not in held:
                raise UserError(
                    f"{path} lacks the weight {name!r} that {index.name} says it holds; fetch it again"
                )
            weights[name] = held[name]
    return weights


def _snapshot(name: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except HFValidationError as error:
        raise UserError(f"{name!r} is neither a directory nor a hub name ({_line(error)})") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"no directory {name!r}, and the Hugging Face hub has no such model or keeps it private; "
            "check the name"
        ) from error
    except Exception as error:  # whatever the network and the hub's client come up with
        raise UserError(
            f"no directory {name!r}, and the Hugging Face hub cannot be reached for it ({_line(error)}); "
            "give a local directory that holds the model"
        ) from error


def _line(error: BaseException) -> str:
    """An error's first line, without its closing full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__
