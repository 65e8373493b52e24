"""Tokenizers in and out of Hugging Face directories."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from distiljax.errors import UserError
from distiljax.hub import files
from distiljax.nn import EncoderConfig

# Where BERT's special tokens stand in a vocabulary that does not say which they are.
_SPECIAL_TOKENS = {
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "mask_token": "[MASK]",
    "unk_token": "[UNK]",
}
# What transformers notes about where a tokenizer was loaded from, and about the truncation and padding that
# it happened to be saved with.
_PASSING_KEYS = (
    *("is_local", "local_files_only", "name_or_path"),
    *("max_length", "stride", "truncation_strategy", "pad_to_multiple_of"),
)


def load_tokenizer(name_or_dir: str | os.PathLike[str]) -> Any:
    """The fast tokenizer of a Hugging Face directory or hub name.

    A directory with nothing but a vocab.txt is read as BERT WordPiece, lower-casing if no word of the
    vocabulary has a capital letter.

    Raises:
      UserError: no tokenizer files, one without a fast version, or one that lacks a special token of BERT.
    """
    where = os.fspath(name_or_dir)
    directory = files.resolve(name_or_dir, weights=False)
    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        # transformers would make up a tokenizer of five tokens.
        raise UserError(f"{where} holds no tokenizer; expected tokenizer.json or vocab.txt in it")
    try:
        tokenizer = _load(directory)
    except Exception as error:  # transformers raises many kinds for files it cannot read
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the tokenizer of {where} cannot be loaded ({line}); fetch its files again"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer of {where} is a {type(tokenizer).__name__} without a fast version; "
            "expected one with a tokenizer.json, such as BERT's"
        )
    vocabulary = tokenizer.get_vocab()
    for name, token in _SPECIAL_TOKENS.items():
        if getattr(tokenizer, name) is None:
            if token not in vocabulary:
                raise UserError(f"the tokenizer of {where} has no {name}; expected one, such as {token}")
            tokenizer.add_special_tokens({name: token})
    return tokenizer


def check_vocabulary(tokenizer: Any, config: EncoderConfig, where: str) -> None:
    """Check that every token has a row in the model's embedding, and that both pad with the same token.

    Args:
      tokenizer: a fast tokenizer of transformers.
      config: the model's.
      where: the model, for messages.

    Raises:
      UserError: the tokenizer has more tokens than the model rows, or another padding token.
    """
    if vocabulary_size(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer has {vocabulary_size(tokenizer):,} tokens, {where} only {config.vocab_size:,} rows of word "
            "embeddings; use the tokenizer that belongs to the model"
        )
    if tokenizer.pad_token_id != config.pad_token_id:
        raise UserError(
            f"the tokenizer pads with token {tokenizer.pad_token_id}, {where} with {config.pad_token_id}; "
            "use the tokenizer that belongs to the model"
        )


def vocabulary_size(tokenizer: Any) -> int:
    """The highest token id plus one. Not `len(tokenizer)`: ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def save_tokenizer(tokenizer: Any, directory: Path, max_length: int) -> None:
    """Write a tokenizer's files so that `AutoTokenizer` loads them beside a BERT or DistilBERT model.

    Args:
      tokenizer: a fast tokenizer of transformers.
      directory: where to.
      max_length: the model's positions, above which transformers is to truncate.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # Several processes may finish one corpus at once: each file appears whole, and is the same from all of them.
    with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=directory) as temporary:
        made = Path(temporary)
        tokenizer.save_pretrained(made)
        _without_passing_settings(made, max_length)
        for path in sorted(made.iterdir()):
            os.replace(path, directory / path.name)


def _without_passing_settings(directory: Path, max_length: int) -> None:
    path = directory / "tokenizer.json"
    backend = json.loads(path.read_text(encoding="utf-8"))
    _write_json(path, {**backend, "truncation": None, "padding": None})
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in _PASSING_KEYS}
    config["model_max_length"] = min(config.get("model_max_length") or max_length, max_length)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # its name in every version of transformers
    _write_json(path, config)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _load(directory: Path) -> Any:
    import transformers

    if not (directory / "tokenizer.json").is_file() and not (directory / "tokenizer_config.json").is_file():
        # The config stands for the one that may be missing.
        config = transformers.BertConfig()
        lower = _lower_cased(directory)
        return transformers.AutoTokenizer.from_pretrained(directory, config=config, do_lower_case=lower)
    return transformers.AutoTokenizer.from_pretrained(directory, use_fast=True, trust_remote_code=False)


def _lower_cased(directory: Path) -> bool:
    words = (directory / "vocab.txt").read_text(encoding="utf-8").splitlines()
    return not any(word != word.lower() for word in words if not word.startswith("["))
