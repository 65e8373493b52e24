"""What `distiljax prepare` costs, and that it survives being killed.

    python scripts/benchmark_prepare.py speed  --source=FILE.parquet --tokenizer=DIR [--workers=1,2] [--rounds=3]
    python scripts/benchmark_prepare.py memory --source=FILE.parquet --tokenizer=DIR [--workers=2]
    python scripts/benchmark_prepare.py kill   --source=FILE --tokenizer=DIR [--kills=10]

speed   Tokens/s beside `datasets.map(tokenizer, batched=True, num_proc=N)` plus concatenating and chunking, the
        way of transformers' language-model examples. Both in turn, each in a new process, without caches; medians.
memory  Peak memory of all processes together (proportional set size) on a quarter of the file and on all of it.
kill    SIGKILL at random moments to the command and its workers; started again, it must end with the same bytes as an
        unbroken run.

Each prints Markdown for BENCHMARKS.md. FILE.parquet has its text in the column `text`. Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SEQ_LEN = 512


def baseline(source: str, tokenizer_name: str, workers: int, cache: str) -> int:
    """The library's way; returns the tokens of its chunks."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_name)
    tokenizer.model_max_length = sys.maxsize  # or it warns about every article
    text = datasets.load_dataset("parquet", data_files=source, split="train", cache_dir=cache)

    def tokenise(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": tokenizer(batch["text"])["input_ids"]}

    def chunk(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = [token for ids in batch["input_ids"] for token in ids]
        end = len(joined) // SEQ_LEN * SEQ_LEN
        return {"input_ids": [joined[start : start + SEQ_LEN] for start in range(0, end, SEQ_LEN)]}

    processes = workers if workers > 1 else None
    tokens = text.map(tokenise, batched=True, num_proc=processes, remove_columns=text.column_names)
    chunks = tokens.map(chunk, batched=True, num_proc=processes)
    return len(chunks) * SEQ_LEN


def command(source: str, tokenizer: str, out: str, workers: int) -> list[str]:
    """The command line under test."""
    main = [sys.executable, "-m", "distiljax", "prepare"]
    return [
        *main, f"--source={source}", f"--tokenizer={tokenizer}", f"--out={out}", f"--seq_len={SEQ_LEN}",
        f"--workers={workers}",
    ]  # fmt: skip


def tokens_of(out: str) -> int:
    """Tokens of all corpora in a directory."""
    paths = Path(out).glob("*/metadata.json")
    return sum(json.loads(path.read_text())["statistics"]["tokens"] for path in paths)


def digests(out: str) -> dict[str, str]:
    """What must not differ between runs."""
    files = [path for path in Path(out).rglob("*") if path.is_file() and path.name != "timing.json"]
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)}


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for process in found:
        try:
            for thread in os.listdir(f"/proc/{process}/task"):
                found += map(int, Path(f"/proc/{process}/task/{thread}/children").read_text().split())
        except OSError:
            continue
    return found


def pss(pid: int) -> int:
    """Bytes of memory of a process, shared pages divided among those that share them."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return 0


def speed(arguments: argparse.Namespace, scratch: str) -> None:
    """Prints tokens/s of both ways for each number of workers."""
    print(
        "| workers | distiljax prepare | datasets.map, concatenate and chunk | ratio |\n|---:|---:|---:|---:|"
    )
    for workers in map(int, arguments.workers.split(",")):
        rates: dict[str, list[float]] = {"ours": [], "theirs": []}
        for round_number in range(arguments.rounds):
            for way in rates:
                directory = os.path.join(scratch, f"{way}-{workers}-{round_number}")
                if way == "ours":
                    call = command(arguments.source, arguments.tokenizer, directory, workers)
                else:
                    own = ["--source", arguments.source, "--tokenizer", arguments.tokenizer]
                    call = [
                        sys.executable,
                        __file__,
                        "baseline",
                        *own,
                        f"--workers={workers}",
                        f"--cache={directory}",
                    ]
                began = time.monotonic()
                done = subprocess.run(
                    call, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                )
                seconds = time.monotonic() - began
                tokens = tokens_of(directory) if way == "ours" else int(done.stdout.split()[-1])
                rates[way].append(tokens / seconds)
                print(f"{way}, {workers} workers: {tokens:,} tokens in {seconds:.1f} s", file=sys.stderr)
                shutil.rmtree(directory)
        ours, theirs = (statistics.median(rates[way]) for way in ("ours", "theirs"))
        ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates["theirs"], strict=True))
        print(
            f"| {workers} | {ours / 1e6:.2f} M tokens/s | {theirs / 1e6:.2f} M tokens/s | {ratio:.2f} |",
            flush=True,
        )


def memory(arguments: argparse.Namespace, scratch: str) -> None:
    """Prints the peak memory for a quarter of the input and for all of it, as JSON lines and as Parquet."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(arguments.source, columns=["text"])
    workers = int(arguments.workers.split(",")[-1])
    print("| text | format | peak memory, all processes |\n|---:|---|---:|")
    for kind in ("jsonl", "parquet"):
        peaks = []
        for share in (4, 1):
            part = table.slice(0, table.num_rows // share)
            path = os.path.join(scratch, f"part-{share}.{kind}")
            if kind == "parquet":
                pyarrow.parquet.write_table(part, path)
            else:
                with open(path, "w", encoding="utf-8") as file:
                    for batch in part.to_batches(256):
                        file.writelines(json.dumps(record) + "\n" for record in batch.to_pylist())
            out = os.path.join(scratch, f"memory-{kind}-{share}")
            process = subprocess.Popen(
                command(path, arguments.tokenizer, out, workers),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            peak = 0
            while process.poll() is None:
                peak = max(peak, sum(map(pss, family(process.pid))))
                time.sleep(0.1)
            if process.returncode:
                sys.exit("distiljax prepare failed")
            peaks.append(peak)
            print(f"| {part.nbytes / 1e6:.0f} MB | {kind} | {peak / 1e6:.0f} MB |", flush=True)
        print(f"| ratio | {kind} | {peaks[1] / peaks[0]:.2f} |", flush=True)


def kill(arguments: argparse.Namespace, scratch: str) -> None:
    """Kills the command at random moments, each time of a new preparation, and compares the outcome."""
    workers = int(arguments.workers.split(",")[-1])
    whole = os.path.join(scratch, "whole")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    began = time.monotonic()
    subprocess.run(command(arguments.source, arguments.tokenizer, whole, workers), check=True, **quiet)  # type: ignore[call-overload]
    seconds = time.monotonic() - began
    expected = digests(whole)
    randomness = random.Random(arguments.seed)
    for number in range(arguments.kills):
        moment = randomness.uniform(0, 1) * seconds
        out = os.path.join(scratch, f"killed-{number}")
        call = command(arguments.source, arguments.tokenizer, out, workers)
        process = subprocess.Popen(call, start_new_session=True, **quiet)  # type: ignore[call-overload]
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            # Every second time the workers stay behind, to find that they have lost their parent.
            (os.killpg if number % 2 else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        left = len(list(Path(out).glob("*/*.array_record")))
        began = time.monotonic()
        subprocess.run(call, check=True, **quiet)  # type: ignore[call-overload]
        same = digests(out) == expected
        again = time.monotonic() - began
        print(
            f"killed after {moment:5.1f} s of {seconds:.1f} s with {left} shards finished; "
            f"again: {again:5.1f} s, {'the same bytes' if same else 'DIFFERENT'}",
            flush=True,
        )
        if not same:
            sys.exit(1)
        shutil.rmtree(out)


def main() -> None:
    """Parses the arguments and runs the part asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["speed", "memory", "kill", "baseline"])
    parser.add_argument("--source", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part == "baseline":
        print(baseline(arguments.source, arguments.tokenizer, int(arguments.workers), arguments.cache))
        return
    with tempfile.TemporaryDirectory() as scratch:
        {"speed": speed, "memory": memory, "kill": kill}[arguments.part](arguments, scratch)


if __name__ == "__main__":
    main()
