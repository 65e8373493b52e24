"""The same fine-tuning by distiljax and by the Trainer of transformers in PyTorch, in turn on one machine.

    python scripts/benchmark_finetune.py --task=sst2 --data=DIR --model=DIR [--seeds=3] [--epochs=3]
        [--examples=N] [--eval_examples=N]

For each seed both start from one and the same exported model, fresh head included, and train on the same rows of token
ids with the same AdamW, schedule, clipping, dropout and batch size; each in the order that its own length-grouped
sampler draws. The logits of both are scored by the same code. Each run has a process of its own, and which side goes
first changes with the seed. Times are of training alone, without reading data, validation and checkpoints.
`--examples` and `--eval_examples` take so many of the examples, 0 all.

Prints Markdown for BENCHMARKS.md; `--json` keeps everything. The PyTorch side needs `torch` and `accelerate`.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

import distiljax
from distiljax.errors import UserError
from distiljax.nn import HeadConfig
from distiljax.tasks.datasets import label_names, load_task
from distiljax.tasks.features import Features
from distiljax.tasks.finetune import task_features
from distiljax.tasks.presets import find_task
from distiljax.tasks.scoring import Scorer
from distiljax.train.memory import peak_memory
from distiljax.train.metrics import read_metrics

SIDES = {"jax": "distiljax", "torch": "transformers Trainer"}
EVAL_BATCH = 64
PREFIX = "benchmark_finetune: error: "


def settings(args: argparse.Namespace, model: str, seed: int) -> ConfigDict:
    """The config of distiljax' run, from which the Trainer's arguments are made, too."""
    config = distiljax.finetune_config()
    config.task, config.model, config.seed = args.task, model, seed
    config.data.source = args.data
    config.data.max_train_examples, config.data.max_eval_examples = args.examples, args.eval_examples
    config.data.max_length, config.data.stride = args.max_length, args.stride
    config.batch_size, config.epochs, config.optimizer.peak_lr = args.batch_size, args.epochs, args.lr
    config.dtype = "bfloat16" if args.bf16 else "float32"
    config.eval.every, config.eval.batch_size, config.checkpoint.every = 0, EVAL_BATCH, 0
    config.log_every = 10**9  # one record, at the end: its tokens a second are of the whole training
    return config


def run_start(args: argparse.Namespace, start: Path, seed: int) -> dict[str, Any]:
    """Exports the model with a fresh head for the task to `start`."""
    config, task = settings(args, args.model, seed), find_task(args.task)
    head = HeadConfig(task.kind, label_names(task, load_task(task, config.data)), task.regression)
    module, params = distiljax.from_pretrained(args.model, head, init_head=True, seed=seed)
    distiljax.save_pretrained(module, params, start, distiljax.load_tokenizer(args.model))
    return {}


def run_jax(args: argparse.Namespace, start: Path, seed: int) -> dict[str, Any]:
    """Fine-tunes by distiljax from what is in `start`."""
    config, workdir = settings(args, str(start), seed), start.with_name(f"{start.name}-run")
    facts = distiljax.finetune(config, workdir).facts
    steps = facts["tokens"] / read_metrics(workdir)["train"]["tokens_per_second"][-1][1]
    return {
        "seconds": steps + facts["compile_seconds"],
        "once_seconds": facts["compile_seconds"],
        "metrics": facts["validation"],
        **{key: facts[key] for key in ("steps", "machine")},
    }


def run_torch(args: argparse.Namespace, start: Path, seed: int) -> dict[str, Any]:
    """Fine-tunes by the Trainer of transformers from what is in `start`."""
    import torch
    import transformers

    config, task = settings(args, str(start), seed), find_task(args.task)
    splits = load_task(task, config.data)
    architecture = f"AutoModelFor{task.kind.title().replace('_', '')}"
    model = getattr(transformers, architecture).from_pretrained(start)
    reading = distiljax.load_tokenizer(start), config.data, model.config.max_position_embeddings
    train = task_features(task, splits["train"], *reading)
    held_out = task_features(task, splits["validation"], *reading)
    head = HeadConfig(task.kind, label_names(task, splits), task.regression)
    score = Scorer(task, head, held_out, splits["validation"])
    clock: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.append(time.monotonic())

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if torch.cuda.is_available() and state.global_step in (1, state.max_steps):
                torch.cuda.synchronize()
            clock.append(time.monotonic())

    ids = np.split(train.tokens, train.starts[1:-1])  # from which the sampler takes the lengths
    trainer = transformers.Trainer(
        model,
        trainer_arguments(config, start.with_name(f"{start.name}-trainer"), len(train)),
        train_dataset=[{"row": row, "input_ids": tokens} for row, tokens in enumerate(ids)],
        data_collator=lambda examples: tensors(model, train, [example["row"] for example in examples]),
        callbacks=[Clock()],
    )
    trainer.train()
    steps = np.diff(clock)
    return {
        "seconds": float(steps.sum()),
        # What PyTorch loads when it is first asked.
        "once_seconds": max(0.0, float(steps[0] - np.median(steps))),
        "steps": trainer.state.global_step,
        "metrics": score(predict(model, held_out, args.bf16)),
        "machine": f"{model.device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }


def tensors(model: Any, features: Features, rows: Any) -> dict[str, Any]:
    """Some rows as a model of transformers takes them, padded to the longest."""
    import torch

    taken = inspect.signature(model.forward).parameters
    arrays = features.batch(rows, int(features.lengths[rows].max()))
    labels = torch.from_numpy(arrays.pop("labels"))
    labels = labels if labels.is_floating_point() else labels.long()
    batch = {name: torch.from_numpy(array).long() for name, array in arrays.items() if name in taken}
    if "start_positions" not in taken:
        return batch | {"labels": labels}
    return batch | {"start_positions": labels[:, 0], "end_positions": labels[:, 1]}


def predict(model: Any, features: Features, bf16: bool) -> list[np.ndarray]:
    """The logits of every row without padding, as `Scorer` takes them."""
    import torch

    model.eval()
    found = [np.zeros(0, np.float32)] * len(features)
    order = np.argsort(-features.lengths, kind="stable")
    for rows in np.split(order, range(EVAL_BATCH, len(order), EVAL_BATCH)):
        batch = {name: tensor.to(model.device) for name, tensor in tensors(model, features, rows).items()}
        with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            out = model(**batch)
            logits = out.logits if "logits" in out else torch.stack([out.start_logits, out.end_logits], -1)
        for row, values in zip(rows, logits.float().cpu().numpy(), strict=True):
            found[row] = values if values.ndim == 1 else values[: features.lengths[row]]
    return found


def trainer_arguments(config: ConfigDict, directory: Path, rows: int) -> Any:
    """distiljax' settings in the words of the Trainer."""
    import torch
    import transformers

    steps = math.ceil(config.epochs * math.ceil(rows / config.batch_size))
    grouped: dict[str, Any] = {"train_sampling_strategy": "group_by_length"}
    if "train_sampling_strategy" not in inspect.signature(transformers.TrainingArguments).parameters:
        grouped = {"group_by_length": True}  # before transformers 5
    return transformers.TrainingArguments(
        output_dir=str(directory),
        seed=config.seed,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.optimizer.peak_lr,
        warmup_steps=math.ceil(steps * config.optimizer.warmup_fraction),
        adam_beta1=config.optimizer.b1,
        adam_beta2=config.optimizer.b2,
        adam_epsilon=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
        max_grad_norm=config.optimizer.clip_norm,
        bf16=config.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **grouped,
    )


def call(part: str, start: Path, seed: int) -> dict[str, Any]:
    """Runs one part in a process of its own, quietly, and returns what it found."""
    command = [sys.executable, __file__, *sys.argv[1:], f"--part={part}:{start}:{seed}"]
    # On PyTorch's side jax is only imported, and must not take the accelerator.
    environment = os.environ | ({"JAX_PLATFORMS": "cpu"} if part == "torch" else {})
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        message = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"{part}, seed {seed}: {message.removeprefix(PREFIX)}")
    return json.loads(Path(f"{start}.{part}.json").read_text())


def markdown(args: argparse.Namespace, runs: Sequence[dict[str, Any]]) -> str:
    """A table of the first metric for each seed, and of the medians and ranges of everything."""
    torch_run = next(run for run in runs if run["side"] == "torch")
    metrics = list(torch_run["metrics"])

    def figures(run: dict[str, Any]) -> dict[str, float]:
        training = run["seconds"] - run["once_seconds"]
        return {f"{name}, %": 100 * run["metrics"][name] for name in metrics} | {
            "s per epoch": training / args.epochs,
            "s per epoch with what is done once": run["seconds"] / args.epochs,
            "done once (compilation; the first step's excess), s per run": run["once_seconds"],
            "peak memory of the process, GB": run["peak_bytes"] / 1e9,
        }

    by_side = {side: [run for run in runs if run["side"] == side] for side in SIDES}
    found = [[figures(run) for run in by_side[side]] for side in SIDES]
    head = f"{args.task}, {args.epochs:g} epochs, {runs[0]['steps']:,} steps of {args.batch_size}"
    head += ", bfloat16" if args.bf16 else ", float32"
    lines = [f"| {' | '.join([head, *SIDES.values()])} |", "|---|---:|---:|"]
    for seed in range(args.seeds):
        scores = [f"{side[seed][f'{metrics[0]}, %']:.2f}" for side in found]
        lines.append(f"| {metrics[0]}, seed {seed}, % | {' | '.join(scores)} |")
    for title in found[0][0]:
        columns = [[run[title] for run in side] for side in found]
        cells = [f"{statistics.median(c):,.2f} ({min(c):,.2f} to {max(c):,.2f})" for c in columns]
        lines.append(f"| {title}: median (range) | {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", *(f"{name}: {by_side[side][0]['machine']}" for side, name in SIDES.items())]
    )


def main() -> int:
    """Runs both sides for every seed and prints the table."""
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("--task", required=True, help="sst2, squad, wnut17 or another preset")
    parser.add_argument("--data", default="", help="the data set; the preset's on the hub by default")
    parser.add_argument("--model", required=True, help="to start from")
    numbers = {"seeds": 3, "examples": 0, "eval_examples": 0, "epochs": 3.0, "batch_size": 32, "lr": 5e-5}
    for name, default in (numbers | {"max_length": 384, "stride": -1}).items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{default} by default")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, the Trainer by autocast")
    parser.add_argument("--json", default="", help="a file for everything that was measured")
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        part, start, seed = args.part.split(":")
        run = {"start": run_start, "jax": run_jax, "torch": run_torch}[part]
        measured = run(args, Path(start), int(seed))
        measured["peak_bytes"] = peak_memory()
        Path(f"{start}.{part}.json").write_text(json.dumps(measured))
        return 0
    if missing := [name for name in ("torch", "accelerate") if importlib.util.find_spec(name) is None]:
        raise UserError(f"the Trainer needs {' and '.join(missing)}; pip install {' '.join(missing)}")
    if args.seeds < 1:
        raise UserError(f"seeds is {args.seeds}; expected 1 or more")

    runs = []
    with tempfile.TemporaryDirectory(prefix="benchmark_finetune-") as directory:
        for seed in range(args.seeds):
            start = Path(directory) / f"seed-{seed}"
            call("start", start, seed)
            for side in SIDES if seed % 2 == 0 else reversed(SIDES):
                runs.append({"side": side, "seed": seed, **call(side, start, seed)})
                scores = ", ".join(f"{name} {value:.4f}" for name, value in runs[-1]["metrics"].items())
                print(f"seed {seed}, {SIDES[side]}: {runs[-1]['seconds']:.1f} s, {scores}", file=sys.stderr)
    if args.json:
        Path(args.json).write_text(json.dumps({"settings": vars(args), "runs": runs}, indent=2) + "\n")
    print(markdown(args, runs))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"{PREFIX}{error}", file=sys.stderr)
        sys.exit(2)
