"""What a prepared corpus says about itself: metadata.json beside the shards."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from typing import Any

import numpy as np

from distiljax.errors import UserError

FORMAT_VERSION = 1
METADATA_FILE = "metadata.json"
TOKEN_COUNTS_FILE = "token_counts.npy"


@dataclasses.dataclass
class Statistics:
    """Counts of one pass over a corpus; every field is a sum, so those of several passes add up."""

    documents_read: int = 0
    dropped_duplicate: int = 0  # documents
    dropped_held_out: int = 0  # documents that belong to the other side of the holdout
    documents: int = 0  # what is left of documents_read
    dropped_short: int = 0  # examples
    dropped_unknown: int = 0  # examples
    examples: int = 0
    tokens: int = 0  # in the examples, [CLS] and [SEP] included
    unknown_tokens: int = 0
    rows: int = 0


@dataclasses.dataclass(frozen=True)
class Metadata:
    """A prepared corpus: how it was made, what is in it, and its shards in order.

    Attributes:
      format_version: the layout of the directory.
      tokenizer_name: the tokenizer's name, for people.
      vocabulary_sha256: the vocabulary's identity: token ids mean the same only where this is equal.
      vocab_size: the highest token id + 1.
      pad_token_id: fills rows up to seq_len.
      split: the split that the corpus is.
      settings: the data config that it was made with.
      statistics: counts, see Statistics.
      shards: (file name, rows) in order.
    """

    format_version: int
    tokenizer_name: str
    vocabulary_sha256: str
    vocab_size: int
    pad_token_id: int
    split: str
    settings: dict[str, Any]
    statistics: dict[str, int]
    shards: tuple[tuple[str, int], ...]

    @property
    def seq_len(self) -> int:
        """Tokens in a row, padding included."""
        return self.settings["seq_len"]

    @property
    def num_rows(self) -> int:
        """Rows in all shards."""
        return sum(rows for _, rows in self.shards)

    @property
    def tokens_per_row(self) -> float:
        """Tokens that are not padding, mean over the rows."""
        return self.statistics["tokens"] / self.num_rows

    @property
    def fill_rate(self) -> float:
        """Share of the rows' positions that hold a token."""
        return self.tokens_per_row / self.seq_len

    @property
    def unknown_rate(self) -> float:
        """Share of the tokens that are the unknown token."""
        return self.statistics["unknown_tokens"] / self.statistics["tokens"]

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes metadata.json; for readers other than this package it also has the two rates."""
        values = dataclasses.asdict(self) | {"fill_rate": self.fill_rate, "unknown_rate": self.unknown_rate}
        with open(os.path.join(directory, METADATA_FILE), "w", encoding="utf-8") as file:
            json.dump(values, file, indent=2, ensure_ascii=False)
            file.write("\n")

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Metadata:
        """Reads a corpus's metadata.

        Raises:
          UserError: there is no corpus, its metadata is damaged or of a newer format, or a shard is missing.
        """
        path = os.path.join(directory, METADATA_FILE)
        try:
            with open(path, encoding="utf-8") as file:
                values = json.load(file)
            version = values["format_version"]
            if version == FORMAT_VERSION:
                fields = {field.name: values[field.name] for field in dataclasses.fields(cls)}
                fields["shards"] = tuple((str(name), int(rows)) for name, rows in fields["shards"])
        except FileNotFoundError:
            raise UserError(
                f"{os.fspath(directory)} holds no prepared corpus (no {METADATA_FILE}); "
                "give one that a run has prepared, such as WORKDIR/data/validation"
            ) from None
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is damaged ({type(error).__name__}: {error}); "
                "delete the directory and prepare it again"
            ) from None
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {version!r}, this distiljax reads {FORMAT_VERSION}; "
                "use the version that wrote it or prepare the corpus again"
            )
        for name, _ in fields["shards"]:
            if not os.path.isfile(os.path.join(directory, name)):
                raise UserError(f"{os.path.join(directory, name)} is missing; prepare the corpus again")
        return cls(**fields)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuses a tokenizer whose ids differ from those in the corpus.

        Raises:
          UserError: the vocabularies are not the same.
        """
        digest = vocabulary_sha256(tokenizer)
        if digest != self.vocabulary_sha256:
            raise UserError(
                f"the corpus was prepared with the vocabulary of {self.tokenizer_name} ({self.vocab_size} "
                f"tokens, sha256 {self.vocabulary_sha256[:8]}), not that of {tokenizer.name_or_path} "
                f"({len(tokenizer)} tokens, sha256 {digest[:8]}); prepare it again with this tokenizer"
            )

    def token_counts(self, directory: str | os.PathLike[str]) -> np.ndarray:
        """How often each token occurs in the corpus: int64 [vocab_size], special tokens counted too.

        Raises:
          UserError: the file is missing, damaged or of another vocabulary size.
        """
        path = os.path.join(directory, TOKEN_COUNTS_FILE)
        try:
            counts = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} cannot be read ({error}); prepare the corpus again") from None
        if counts.shape != (self.vocab_size,):
            raise UserError(
                f"{path} has shape {counts.shape}, expected ({self.vocab_size},); prepare the corpus again"
            )
        return counts


def vocabulary_sha256(tokenizer: Any) -> str:
    """The identity of a tokenizer's vocabulary: a hash of all (id, token) pairs in the order of the ids."""
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        digest.update(f"{index}\t{token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
