"""What packing changes: nothing but the padding.

    python scripts/benchmark_packing.py --data=ROWS/train --teacher=NAME_OR_DIR [--rows=16]

Takes prepared packed rows, masks them, and computes the losses of an undistilled student, in float32: once on
these rows, once with every example in a padded row of its own and the same masks. Prints both, their difference,
and what the padding costs: positions, and the time of forward and backward pass (medians, in turn).
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import distiljax
from distiljax.data import Metadata, RowLoader
from distiljax.distill.masking import MaskedRows, Masking, mask_tokens, masking_weights
from distiljax.distill.step import Distillation, Models, Recipe, distillation_loss, term_means
from distiljax.distill.student import student_of
from distiljax.hub import vocabulary_size


def unpacked(rows: MaskedRows) -> MaskedRows:
    """The same masked rows with one example a row, padded to the same length."""
    masked = jax.device_get(rows)
    length = masked.input_ids.shape[1]
    alone = []
    for b, segments in enumerate(masked.segment_ids):
        for segment in range(1, segments.max() + 1):
            (columns,) = np.nonzero(segments == segment)
            ids = np.zeros(length, np.int32)
            ids[: len(columns)] = masked.input_ids[b, columns]
            used = (np.arange(length) < len(columns)).astype(np.int32)
            inside = np.isin(masked.masked_positions[b], columns) & (masked.masked_weights[b] > 0)
            places = np.where(inside, masked.masked_positions[b] - columns[0], 0)
            positions = np.arange(length, dtype=np.int32) * used
            alone.append((ids, used, positions, places, masked.labels[b], inside.astype(np.float32)))
    return MaskedRows(*(jnp.stack(field) for field in zip(*alone, strict=True)))


def main() -> None:
    """Compares the two on some rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    teacher, teacher_params = distiljax.from_pretrained(arguments.teacher, init_head=True)
    student, params = student_of(teacher, teacher_params)
    config = student.config.replace(hidden_dropout=0.0, attention_dropout=0.0)
    models = Models(student.clone(config=config), teacher)
    tokenizer = distiljax.load_tokenizer(arguments.teacher)
    metadata = Metadata.load(arguments.data)
    counts = np.pad(metadata.token_counts(arguments.data), (0, config.vocab_size - metadata.vocab_size))
    weights = jnp.asarray(masking_weights(counts, tokenizer.all_special_ids, 0.7))
    masking = Masking(mask_token_id=tokenizer.mask_token_id, vocab_size=vocabulary_size(tokenizer))
    batch = jax.device_put(next(iter(RowLoader(arguments.data, arguments.rows, seed=0))))
    recipe = Recipe()
    packed = mask_tokens(jax.random.split(jax.random.key(0), arguments.rows), batch, weights, masking)
    padded = unpacked(packed)

    def loss(params: object, rows: MaskedRows) -> tuple[jax.Array, dict[str, jax.Array]]:
        counts = Distillation(models, recipe, masking).counts(rows)
        scales = {name: weight / counts[name] for name, weight in recipe.weighted().items()}
        value, terms = distillation_loss(models, recipe, params, teacher_params, rows, None, scales)
        return value, term_means(recipe, terms)

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    metrics: dict[str, dict[str, float]] = {}
    seconds: dict[str, list[float]] = {}
    both = {"packed": packed, "padded": padded}
    for name, rows in both.items():
        metrics[name] = jax.device_get(gradient(params, rows)[1])
        seconds[name] = []
    for _ in range(arguments.rounds):
        for name, rows in both.items():
            began = time.monotonic()
            jax.block_until_ready(gradient(params, rows))
            seconds[name].append(time.monotonic() - began)

    print(f"{metadata.num_rows:,} rows, {100 * metadata.fill_rate:.2f} % filled; {arguments.rows} of them:\n")
    print("| | packed | one example a row, padded | difference |\n|---|---:|---:|---:|")
    for name in ("loss", "loss_ce", "loss_mlm", "loss_cos"):
        one, other = (float(metrics[way][name]) for way in both)
        print(f"| {name} | {one:.6f} | {other:.6f} | {abs(one - other) / other:.1e} |")
    positions = [rows.input_ids.size for rows in both.values()]
    print(f"| positions | {positions[0]:,} | {positions[1]:,} | {positions[1] / positions[0]:.2f} × |")
    medians = [statistics.median(seconds[name]) for name in both]
    print(
        f"| forward and backward | {medians[0]:.2f} s | {medians[1]:.2f} s | {medians[1] / medians[0]:.2f} × |"
    )


if __name__ == "__main__":
    main()
