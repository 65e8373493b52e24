"""Text to a prepared corpus: documents ▶ examples ▶ rows ▶ ArrayRecord shards and metadata.json."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from distiljax.data import packing, rows
from distiljax.data.config import settings as checked_settings
from distiljax.data.examples import check_tokenizer, examples
from distiljax.data.metadata import (
    FORMAT_VERSION,
    METADATA_FILE,
    TOKEN_COUNTS_FILE,
    Metadata,
    Statistics,
    vocabulary_sha256,
)
from distiljax.data.sources import documents
from distiljax.errors import UserError

Progress = Callable[[int, int], None]

ROWS_PER_SHARD = 65_536  # 64 MB of rows of 512 uint16 tokens before compression
_SECONDS_BETWEEN_REPORTS = 0.5


def prepare(
    config: Any,
    split: str,
    tokenizer: Any,
    out_dir: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
) -> Metadata:
    """Makes the corpus of one split in `out_dir`, or finds that it is there already.

    The directory appears under its name only when it is complete. The same text, config and tokenizer always
    give the same rows. A corpus that is there is reused when it was made with the same config, split and
    vocabulary; whether the text has changed since is not looked at.

    Args:
      config: a data config, see `default_data_config`.
      split: "train" (the source's split `config.split`), "validation" or another split of the source.
      tokenizer: a fast transformers tokenizer with [CLS], [SEP] and [PAD].
      out_dir: a local directory that does not exist yet, is empty, or holds the corpus.
      progress: called now and then with the documents and tokens so far.

    Returns:
      The corpus's metadata.

    Raises:
      UserError: a value of the config, the source, the tokenizer or the directory is not as it must be, or no
        example is left after the filters.
    """
    settings = checked_settings(config)
    check_tokenizer(tokenizer)
    out_dir = _local(out_dir)
    if existing := _existing(out_dir, settings, split, tokenizer):
        return existing

    os.makedirs(os.path.dirname(out_dir), exist_ok=True)
    _remove_abandoned(out_dir)
    partial = _partial_name(out_dir)
    try:
        os.mkdir(partial)
        metadata = _write_corpus(partial, settings, split, tokenizer, progress)
        try:
            os.replace(partial, out_dir)
        except OSError:
            # Another process was faster; what counts is that the corpus under the name is the one asked for.
            if not (existing := _existing(out_dir, settings, split, tokenizer)):
                raise
            return existing
        return metadata
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_corpus(
    directory: str, settings: dict[str, Any], split: str, tokenizer: Any, progress: Progress | None
) -> Metadata:
    statistics = Statistics()
    texts = documents(
        settings["source"],
        split,
        train_split=settings["split"],
        text_field=settings["text_field"],
        unit=settings["unit"],
        max_documents=settings["max_documents"],
        holdout=settings["holdout"],
        deduplicate=settings["deduplicate"],
        statistics=statistics,
    )
    pieces = examples(
        texts,
        tokenizer,
        seq_len=settings["seq_len"],
        min_tokens=settings["min_tokens"],
        max_unknown=settings["max_unknown"],
        statistics=statistics,
    )
    # Not len(tokenizer): ids may have gaps.
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    token_counts = np.zeros(vocab_size, np.int64)
    counted = _counted(pieces, token_counts, statistics, progress)
    packed = packing.pack(counted, settings["seq_len"]) if settings["pack"] else packing.one_a_row(counted)
    shards = write_shards(packed, directory, rows.token_dtype(vocab_size))

    statistics.rows = sum(count for _, count in shards)
    if not statistics.rows:
        raise UserError(
            f"no example of {split} is left of {', '.join(settings['source'])}: {statistics.documents_read} "
            f"documents read, {statistics.documents} kept, {statistics.dropped_short} examples under "
            f"{settings['min_tokens']} tokens, {statistics.dropped_unknown} mostly unknown; "
            "check data.source, data.holdout and data.min_tokens"
        )
    np.save(os.path.join(directory, TOKEN_COUNTS_FILE), token_counts, allow_pickle=False)
    metadata = Metadata(
        format_version=FORMAT_VERSION,
        tokenizer_name=str(tokenizer.name_or_path),
        vocabulary_sha256=vocabulary_sha256(tokenizer),
        vocab_size=vocab_size,
        pad_token_id=tokenizer.pad_token_id,
        split=split,
        settings=settings,
        statistics=vars(statistics).copy(),
        shards=tuple(shards),
    )
    metadata.save(directory)
    return metadata


def _counted(
    pieces: Iterable[np.ndarray], token_counts: np.ndarray, statistics: Statistics, progress: Progress | None
) -> Iterator[np.ndarray]:
    """The examples as they come, adding to `token_counts` [vocab_size] and reporting."""
    reported = time.monotonic()
    for example in pieces:
        np.add.at(token_counts, example, 1)
        if progress and time.monotonic() - reported > _SECONDS_BETWEEN_REPORTS:
            progress(statistics.documents, statistics.tokens)
            reported = time.monotonic()
        yield example
    if progress:
        progress(statistics.documents, statistics.tokens)


def write_shards(
    packed: Iterable[Sequence[np.ndarray]],
    directory: str,
    dtype: np.dtype,
    rows_per_shard: int = ROWS_PER_SHARD,
) -> list[tuple[str, int]]:
    """Writes rows to ArrayRecord files of `rows_per_shard` rows each.

    Returns:
      (file name, rows) of every shard, in order.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    shards: list[tuple[str, int]] = []
    writer, count = None, 0
    for row in packed:
        if writer is None:
            name, count = f"rows-{len(shards):05d}.array_record", 0
            # A group of one record is what makes reading a single row cheap.
            writer = ArrayRecordWriter(os.path.join(directory, name), "group_size:1")
        writer.write(rows.encode_row(row, dtype))
        count += 1
        if count == rows_per_shard:
            writer.close()
            shards.append((name, count))
            writer = None
    if writer is not None:
        writer.close()
        shards.append((name, count))
    return shards


# The directory.


def _local(directory: str | os.PathLike[str]) -> str:
    path = os.fspath(directory)
    if "://" in path:
        raise UserError(f"prepared corpus directory {path} is remote; expected a local directory")
    return os.path.abspath(os.path.expanduser(path))


def _existing(out_dir: str, settings: dict[str, Any], split: str, tokenizer: Any) -> Metadata | None:
    """The corpus that is there if it is the one asked for, None if there is nothing yet."""
    if not os.path.lexists(out_dir) or (os.path.isdir(out_dir) and not os.listdir(out_dir)):
        return None
    if not os.path.isfile(os.path.join(out_dir, METADATA_FILE)):
        raise UserError(
            f"{out_dir} exists and is not a prepared corpus (no {METADATA_FILE}); choose another directory"
        )
    metadata = Metadata.load(out_dir)
    metadata.check_tokenizer(tokenizer)
    made = {
        "split of the corpus": metadata.split,
        **{f"data.{key}": value for key, value in metadata.settings.items()},
    }
    asked = {"split of the corpus": split, **{f"data.{key}": value for key, value in settings.items()}}
    for key in asked:
        if made.get(key) != asked[key]:
            raise UserError(
                f"{out_dir} was prepared with {key} = {made.get(key)!r}, now it is {asked[key]!r}; "
                "delete that directory or choose another"
            )
    return metadata


def _partial_name(out_dir: str) -> str:
    """Where this process builds the corpus: beside the final name, so that renaming is atomic."""
    parent, name = os.path.split(out_dir)
    return os.path.join(parent, f".{name}.partial-{socket.gethostname()}-{os.getpid()}")


def _remove_abandoned(out_dir: str) -> None:
    """Removes what killed runs on this host left behind."""
    parent, own = os.path.split(_partial_name(out_dir))
    prefix = own.rpartition("-")[0] + "-"
    for name in os.listdir(parent):
        pid = name.removeprefix(prefix)
        if name.startswith(prefix) and pid.isdigit() and (name == own or not _runs(int(pid))):
            shutil.rmtree(os.path.join(parent, name), ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
