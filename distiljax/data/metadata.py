"""What a prepared corpus says about itself: metadata.json beside the shards."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from typing import Any

import numpy as np

from distiljax.data.config import LAYOUTS
from distiljax.data.files import replacing
from distiljax.errors import UserError

FORMAT_VERSION = 2
PROBLEMS_KEPT = 10
METADATA_FILE = "metadata.json"
TOKEN_COUNTS_FILE = "token_counts.npy"
TOKENIZER_DIRECTORY = "tokenizer"
TIMING_FILE = "timing.json"  # what differs between runs: seconds, tokens/s, workers


@dataclasses.dataclass
class Statistics:
    """Counts of one pass over a corpus; every field is a sum, so those of several passes add up.

    documents_read = dropped_duplicate + dropped_held_out + documents, and the examples of the documents are
    dropped_short + dropped_unknown + examples.
    """

    documents_read: int = 0
    unreadable: int = 0  # records that could not be used and were skipped, see data.on_error
    dropped_duplicate: int = 0  # documents
    dropped_held_out: int = 0  # documents that belong to the other side of the holdout
    documents: int = 0  # what is left of documents_read
    dropped_short: int = 0  # examples
    dropped_unknown: int = 0  # examples
    examples: int = 0
    tokens: int = 0  # in the examples, [CLS] and [SEP] included
    unknown_tokens: int = 0
    rows: int = 0

    def add(self, other: Statistics) -> None:
        """Adds the counts of another pass."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file of rows.

    Attributes:
      name: file name.
      rows: how many there are.
      tokens: in these rows, padding not counted.
      bytes: size of the file.
      sha256: of the file.
      source: which of the corpus's sources the text is from, an index.
      seq_len: the longest that a row may be; differs between shards only where rows are bucketed by length.
    """

    name: str
    rows: int
    tokens: int
    bytes: int
    sha256: str
    source: int
    seq_len: int


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
      sources_sha256: identity of the input: a hash of the names and sizes of the files that were read.
      weights: share of the rows that the loader draws from each source; empty draws in proportion to their rows.
      statistics: counts, see Statistics.
      problems: the first few records that were skipped, in words.
      shards: in order.
    """

    format_version: int
    tokenizer_name: str
    vocabulary_sha256: str
    vocab_size: int
    pad_token_id: int
    split: str
    settings: dict[str, Any]
    sources_sha256: str
    weights: tuple[float, ...]
    statistics: dict[str, int]
    problems: tuple[str, ...]
    shards: tuple[Shard, ...]

    @property
    def seq_len(self) -> int:
        """Tokens in the longest row, padding included."""
        return self.settings["seq_len"]

    @property
    def num_rows(self) -> int:
        """Rows in all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def tokens_per_row(self) -> float:
        """Tokens that are not padding, mean over the rows."""
        return sum(shard.tokens for shard in self.shards) / self.num_rows

    @property
    def fill_rate(self) -> float:
        """Share of the rows' positions that hold a token."""
        return sum(shard.tokens for shard in self.shards) / sum(s.rows * s.seq_len for s in self.shards)

    @property
    def unknown_rate(self) -> float:
        """Share of the tokens that are the unknown token."""
        return self.statistics["unknown_tokens"] / self.statistics["tokens"]

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes metadata.json, whole or not at all; for other readers it also has the two rates."""
        values = dataclasses.asdict(self) | {"fill_rate": self.fill_rate, "unknown_rate": self.unknown_rate}
        with (
            replacing(os.path.join(directory, METADATA_FILE)) as temporary,
            open(temporary, "w", encoding="utf-8") as file,
        ):
            json.dump(values, file, indent=1, ensure_ascii=False)
            file.write("\n")

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Metadata:
        """Reads a corpus's metadata, and checks that every shard is there in its full size.

        Raises:
          UserError: there is no corpus, its metadata is damaged or of another format, or a shard is missing or
            cut short.
        """
        path = os.path.join(directory, METADATA_FILE)
        try:
            with open(path, encoding="utf-8") as file:
                values = json.load(file)
            version = values["format_version"]
            if version == FORMAT_VERSION:
                metadata = cls._checked(values)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(_no_corpus(directory)) from None
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise UserError(
                f"{path} is damaged ({type(error).__name__}: {error}); "
                "delete the directory and prepare it again"
            ) from None
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {version!r}, this distiljax reads {FORMAT_VERSION}; "
                "use the version that wrote it or prepare the corpus again"
            )
        for index, shard in enumerate(metadata.shards):
            shard_path = os.path.join(directory, shard.name)
            try:
                size = os.path.getsize(shard_path)
            except OSError:
                raise UserError(
                    f"{shard_path} (shard {index} of {len(metadata.shards)}) is missing; prepare the corpus again"
                ) from None
            if size != shard.bytes:
                raise UserError(
                    f"{shard_path} (shard {index} of {len(metadata.shards)}) is damaged: {size:,} bytes, expected "
                    f"{shard.bytes:,}; prepare the corpus again, or copy the file again"
                )
        return metadata

    @classmethod
    def _checked(cls, values: dict[str, Any]) -> Metadata:
        """The metadata in parsed JSON; KeyError, TypeError or ValueError where it has another shape."""
        fields = {field.name: values[field.name] for field in dataclasses.fields(cls)}
        shards = [Shard(**shard) for shard in fields["shards"]]
        statistics, settings = fields["statistics"], fields["settings"]
        words = [fields[name] for name in ("tokenizer_name", "vocabulary_sha256", "split", "sources_sha256")]
        words += [word for shard in shards for word in (shard.name, shard.sha256)]
        words += [*fields["problems"], *settings["source"], settings["layout"]]
        numbers = [statistics[field.name] for field in dataclasses.fields(Statistics)]
        numbers += [
            n
            for shard in shards
            for n in (shard.rows, shard.tokens, shard.bytes, shard.source, shard.seq_len)
        ]
        numbers += [fields["vocab_size"], fields["pad_token_id"], settings["seq_len"]]
        if not all(isinstance(word, str) for word in words):
            raise TypeError("a name, hash or text is not a string")
        if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise TypeError("a count, size or length is not a whole number of at least 0")
        sources, longest = len(settings["source"]), settings["seq_len"]
        weights = tuple(map(float, fields["weights"]))
        consistent = {
            "no shards": shards,
            "a shard is not in the directory": all(s.name == os.path.basename(s.name) for s in shards),
            "a shard is of no source": all(shard.source < sources for shard in shards),
            "rows of a length that there is not": 3 <= longest <= 65_535
            and all(1 <= shard.seq_len <= longest for shard in shards),
            "the padding token is not in the vocabulary": fields["pad_token_id"]
            < fields["vocab_size"]
            < 2**31,
            "an unknown layout": settings["layout"] in LAYOUTS,
            "a weight that is not above 0": all(0 < weight < math.inf for weight in weights),
        }
        for problem, holds in consistent.items():
            if not holds:
                raise ValueError(problem)
        return cls(
            **fields | {"shards": tuple(shards), "weights": weights, "problems": tuple(fields["problems"])}
        )

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
            reason = error.strerror if isinstance(error, OSError) else "it is damaged"
            raise UserError(f"{path} cannot be read ({reason}); prepare the corpus again") from None
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


def _no_corpus(directory: str | os.PathLike[str]) -> str:
    where = os.fspath(directory)
    splits = [
        name for name in ("train", "validation") if os.path.isfile(os.path.join(where, name, METADATA_FILE))
    ]
    if splits:
        return (
            f"{where} holds the corpora of {len(splits)} splits; give one: {os.path.join(where, splits[-1])}"
        )
    return (
        f"{where} holds no prepared corpus (no {METADATA_FILE}); give one that `distiljax prepare` has finished, or "
        "that a run has prepared, such as WORKDIR/data/validation"
    )
