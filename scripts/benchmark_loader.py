"""How fast batches are read from a prepared corpus, with nothing else to do.

    python scripts/benchmark_loader.py --data=DIR [--batch_size=64] [--batches=500] [--rounds=5] [--cores=2]

DIR is what `distiljax prepare` made: rows/train, say. In every round the loader and, for comparison, the plain use of
the same libraries (Grain reads and decodes row by row, and stacks) give so many batches each, in turn; medians over
the rounds. The first batches of each, with the opening of the shards, are not counted. `--cores` keeps to so many
cores, 0 to all. Prints Markdown for BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from distiljax.data.loader import BATCHES_AHEAD, READ_THREADS, RowLoader
from distiljax.data.metadata import Metadata
from distiljax.data.rows import token_dtype
from distiljax.errors import UserError

WARM_UP = 20  # batches


def row_by_row(directory: str, batch_size: int) -> Iterator[Any]:
    """Batches as the libraries make them without further thought; of packed or padded rows."""
    import grain

    metadata = Metadata.load(directory)
    dtype, seq_len = token_dtype(metadata.vocab_size), metadata.seq_len

    def decode(record: bytes) -> dict[str, np.ndarray]:
        values = np.frombuffer(record, dtype)
        lengths = values[1 : 1 + values[0]].astype(np.int32)
        tokens = values[1 + values[0] :]
        padding = (0, seq_len - len(tokens))
        segments = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)
        positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
        ids = np.pad(tokens.astype(np.int32), padding, constant_values=metadata.pad_token_id)
        return {
            "input_ids": ids,
            "segment_ids": np.pad(segments, padding),
            "positions": np.pad(positions, padding),
        }

    source = grain.sources.ArrayRecordDataSource([os.path.join(directory, s.name) for s in metadata.shards])
    rows = grain.MapDataset.source(source).shuffle(seed=0).repeat().map(decode).batch(batch_size)
    return iter(rows.to_iter_dataset(grain.ReadOptions(READ_THREADS, BATCHES_AHEAD)))


def rate(batches: Iterator[Any], count: int) -> tuple[float, float]:
    """Rows and tokens a second over so many batches."""
    rows = tokens = 0
    began = time.perf_counter()
    for batch in itertools.islice(batches, count):
        rows += len(batch["input_ids"])
        tokens += int(np.count_nonzero(batch["segment_ids"]))
    seconds = time.perf_counter() - began
    return rows / seconds, tokens / seconds


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="a prepared corpus")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=500, help="in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=2)
    args = parser.parse_args()
    if args.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])

    loader = RowLoader(args.data, args.batch_size, seed=0)
    ways: dict[str, Callable[[], Iterator[Any]]] = {"distiljax": lambda: iter(loader)}
    if loader.metadata.settings.get("layout") != "bucketed":
        ways["row by row"] = lambda: row_by_row(args.data, args.batch_size)
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(args.rounds):
        for name, opened in ways.items():
            batches = opened()  # anew in each round: those of the other way must not be read ahead meanwhile
            rate(batches, WARM_UP)
            rates[name].append(rate(batches, args.batches))
            batches.close()  # type: ignore[attr-defined]
            print(f"round {number + 1}, {name}: {rates[name][-1][1] / 1e6:.2f} M tokens/s", file=sys.stderr)

    print(
        f"| loader, batches of {args.batch_size} × {loader.metadata.seq_len} | rows/s | tokens/s | rounds |"
    )
    print("|---|---:|---:|---|")
    for name, found in rates.items():
        rows, tokens = (statistics.median(values) for values in zip(*found, strict=True))
        spread = " to ".join(f"{edge(t for _, t in found) / 1e6:.1f}" for edge in (min, max))
        print(
            f"| {name} | {rows:,.0f} | {tokens / 1e6:.1f} M | {args.rounds} × {args.batches} batches, {spread} M |"
        )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"benchmark_loader: error: {error}", file=sys.stderr)
        sys.exit(2)
