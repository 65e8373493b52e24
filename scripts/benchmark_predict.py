"""Throughput of `predict` against transformers on PyTorch: same model, same texts of mixed length, in turn.

    python scripts/benchmark_predict.py --model=NAME_OR_DIR --texts=sst2/validation.parquet:sentence \
        --texts=imdb/test.parquet:text --squad=squad/validation.parquet [--count=400 --rounds=3]

Puts a fresh head of each kind on an encoder, exports it, and runs `distiljax.tasks.predict.predict` and
`transformers.pipeline` one after the other over the same inputs, in one process on all its cores, both with the same
batch size and row length, in float32. The first pass includes compilation; of the others, medians count. transformers 5
has no pipeline for question answering any more: there the model is run as the pipeline of version 4 did it, but with
tokenisation in batches. Prints Markdown; needs PyTorch.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import transformers

import distiljax
from distiljax.nn import HeadConfig
from distiljax.tasks.predict import predict

STRIDE = 128
LONGEST_ANSWER = 30
HEADS = {
    "sequence classification": HeadConfig("sequence_classification", ("negative", "positive")),
    "token classification": HeadConfig("token_classification", ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")),
    "question answering": HeadConfig("question_answering"),
}


def read_texts(specs: list[str], count: int) -> list[str]:
    """As many texts of each FILE:COLUMN, mixed."""
    draw = random.Random(0)
    texts: list[str] = []
    for spec in specs:
        file, _, column = spec.rpartition(":")
        found = pq.read_table(file, columns=[column])[column].to_pylist()
        texts += draw.sample(found, count // len(specs))
    draw.shuffle(texts)
    return texts


def read_questions(file: str, count: int) -> list[dict[str, str]]:
    """Questions with their contexts."""
    rows = pq.read_table(file, columns=["question", "context"]).to_pylist()
    return random.Random(0).sample(rows, min(count, len(rows)))


def pytorch_pipeline(
    task: str, directory: str, batch_size: int, length: int
) -> Callable[[list[str]], list[Any]]:
    """A pipeline of transformers; the result is a label a text, or the entities' types and places."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, model_max_length=length)
    make: Any = transformers.pipeline  # its overloads are by literal task names
    if task == "text-classification":
        pipe = make(task, model=directory, tokenizer=tokenizer)
        return lambda texts: [r["label"] for r in pipe(texts, batch_size=batch_size, truncation=True)]
    pipe = make(task, model=directory, tokenizer=tokenizer, aggregation_strategy="first", stride=STRIDE)
    return lambda texts: [
        [(e["entity_group"], e["start"], e["end"]) for e in found]
        for found in pipe(texts, batch_size=batch_size)
    ]


def pytorch_answers(
    directory: str, batch_size: int, length: int
) -> Callable[[list[dict[str, str]]], list[Any]]:
    """The answers' places, by the best span over the windows of each context."""
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)

    def windows(items: list[dict[str, str]]) -> Iterator[tuple[int, np.ndarray, np.ndarray, Any]]:
        for first in range(0, len(items), batch_size):
            part = items[first : first + batch_size]
            batch = tokenizer(
                [item["question"].lstrip() for item in part],
                [item["context"] for item in part],
                truncation="only_second",
                max_length=length,
                stride=STRIDE,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
                padding=True,
                return_tensors="pt",
            )
            examples, offsets = batch.pop("overflow_to_sample_mapping"), batch.pop("offset_mapping")
            for begin in range(0, len(examples), batch_size):
                rows = slice(begin, begin + batch_size)
                with torch.inference_mode():
                    output = model(**{name: values[rows] for name, values in batch.items()})
                logits = output.start_logits.numpy(), output.end_logits.numpy()
                for at, example in enumerate(examples[rows].tolist()):
                    inside = np.array(batch.sequence_ids(begin + at)) == 1
                    start, end = (np.where(inside, values[at], -1e9) for values in logits)
                    yield first + example, start, end, offsets[begin + at]

    def answer(items: list[dict[str, str]]) -> list[Any]:
        best: list[tuple[float, int, int]] = [(-np.inf, 0, 0)] * len(items)
        for example, start, end, offsets in windows(items):
            sums = start[:, None] + end[None]
            sums = np.where(np.tril(np.triu(np.ones_like(sums)), LONGEST_ANSWER - 1) > 0, sums, -np.inf)
            first, last = np.unravel_index(sums.argmax(), sums.shape)
            if sums[first, last] > best[example][0]:
                best[example] = float(sums[first, last]), int(offsets[first][0]), int(offsets[last][1])
        return [place[1:] for place in best]

    return answer


def ours(directory: str, kind: str, batch_size: int, length: int) -> Callable[[list[Any]], list[Any]]:
    """`predict`, with results of the same form."""
    module, params = distiljax.from_pretrained(directory, head="any")
    tokenizer = distiljax.load_tokenizer(directory)

    def run(items: list[Any]) -> list[Any]:
        options = {"batch_size": batch_size, "max_length": length, "stride": STRIDE}
        results = list(predict(module, params, tokenizer, items, **options))
        if kind == "sequence_classification":
            return [result["labels"][0]["label"] for result in results]
        if kind == "token_classification":
            return [[(e["label"], e["start"], e["end"]) for e in result["entities"]] for result in results]
        return [(result["answers"][0]["start"], result["answers"][0]["end"]) for result in results]

    return run


def compare(
    name: str, head: HeadConfig, arguments: argparse.Namespace, items: list[Any], length: int
) -> tuple[list[str], float]:
    """A row of the table, and the share of inputs that both give the same result for."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = os.path.join(temporary, "model")
        module, params = distiljax.from_pretrained(arguments.model, head=head, init_head=True)
        distiljax.save_pretrained(module, params, directory, distiljax.load_tokenizer(arguments.model))
        if head.kind == "question_answering":
            theirs: Any = pytorch_answers(directory, arguments.batch_size, length)
        else:
            task = name.replace("sequence", "text").replace(" ", "-")
            theirs = pytorch_pipeline(task, directory, arguments.batch_size, length)
        runs = {"PyTorch": theirs, "distiljax": ours(directory, head.kind, arguments.batch_size, length)}
        seconds: dict[str, list[float]] = {way: [] for way in runs}
        results = {}
        for _ in range(1 + arguments.rounds):
            for way, run in runs.items():
                began = time.perf_counter()
                results[way] = run(items)
                seconds[way].append(time.perf_counter() - began)
    same = sum(one == other for one, other in zip(*results.values(), strict=True)) / len(items)
    first = seconds["PyTorch"][0] / seconds["distiljax"][0]
    ratios = [one / other for one, other in zip(*(times[1:] for times in seconds.values()), strict=True)]
    speeds = [len(items) / statistics.median(times[1:]) for times in seconds.values()]
    spread = f"{statistics.median(ratios):.2f} × ({min(ratios):.2f} to {max(ratios):.2f})"
    return [name, f"{len(items):,}", *(f"{speed:,.1f}" for speed in speeds), spread, f"{first:.2f} ×"], same


def main() -> None:
    """Compares the two on each head that there are inputs for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", action="append", default=[], help="FILE.parquet:COLUMN, repeated")
    parser.add_argument("--squad", help="FILE.parquet with question and context")
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument(
        "--answer_length", type=int, default=384, help="tokens in a row of question and context"
    )
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    print(
        f"{arguments.model}; batches of {arguments.batch_size}, float32, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}\n"
    )
    print(
        "| head | inputs | PyTorch, inputs/s | distiljax, inputs/s | warm, median (range) | with compilation |"
    )
    print("|---|---:|---:|---:|---:|---:|", flush=True)
    agreement = {}
    for name, head in HEADS.items():
        asks = head.kind == "question_answering"
        if not (arguments.squad if asks else arguments.texts):
            continue
        items: list[Any]
        if asks:
            items = read_questions(arguments.squad, arguments.count)
        else:
            items = read_texts(arguments.texts, arguments.count)
        length = arguments.answer_length if asks else arguments.max_length
        cells, agreement[name] = compare(name, head, arguments, items, length)
        print(f"| {' | '.join(cells)} |", flush=True)
    # Entities differ where words do: the pipeline splits at all punctuation, and a fresh head calls most words one.
    print(
        "\nSame result from both: "
        + ", ".join(f"{name} {100 * share:.1f} %" for name, share in agreement.items())
    )


if __name__ == "__main__":
    main()
