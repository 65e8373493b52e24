"""The commands on models: evaluate, bench, predict, export."""

from __future__ import annotations

import json
import os

from absl import flags

from distiljax.commands.base import Command, Flags, needed
from distiljax.errors import UserError


def _define_evaluate(values: Flags) -> None:
    flags.DEFINE_string(
        "workdir",
        None,
        "a run: its teacher, its student now and before, on its own held-out rows",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "model",
        [],
        "NAME=PATH of a model, repeated; the first is the reference; with --task a NAME may be repeated, once a seed",
        flag_values=values,
    )
    flags.DEFINE_string(
        "data",
        None,
        "with --model: a directory of prepared rows, such as WORKDIR/data/validation of a run",
        flag_values=values,
    )
    flags.DEFINE_integer("rows", 0, "how many rows; 0 = all", flag_values=values)
    flags.DEFINE_string(
        "task",
        None,
        "score models that are fine-tuned on it: a preset such as sst2, or a kind of task, as config.task of finetune",
        flag_values=values,
    )
    flags.DEFINE_string(
        "source",
        "",
        "with --task: other data than that of the fine-tuning, as config.data.source; files whose names say no split "
        "are scored whole",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "column",
        [],
        "with --task: ROLE=COLUMN, such as text=review, repeated; as config.data.ROLE",
        flag_values=values,
    )
    flags.DEFINE_string(
        "split",
        "validation",
        "with --task: which split is scored, or a file; a share that the fine-tuning held out is the same one here",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "max_length", 0, "with --task: tokens in a row; 0 = as each model was fine-tuned", flag_values=values
    )
    flags.DEFINE_string(
        "dtype",
        "float32",
        "compute dtype: float32 or bfloat16; with --task also int8 kernels",
        flag_values=values,
    )
    flags.DEFINE_string(
        "out",
        None,
        "also write the result: as JSON to this file; with --task comparison.json, .md and plots to this directory",
        flag_values=values,
    )
    flags.DEFINE_bool("json", False, "print JSON in place of the table", flag_values=values)


def _evaluate(values: Flags, rest: list[str]) -> int:
    del rest
    if values.task:
        return _evaluate_task(values)
    if bool(values.workdir) == bool(values.model):
        raise UserError(
            "give --workdir=RUN, --model=NAME=PATH … with --data=DIR, or --task=TASK with --model=NAME=PATH …"
        )
    import distiljax
    from distiljax.report import print_retention_table
    from distiljax.train.run import write_json

    if values.workdir:
        evaluation = distiljax.evaluate_run(values.workdir, rows=values.rows, dtype=values.dtype)
    else:
        (data,) = needed(values, "data")
        models = {name: path for name, (path, *more) in _named_models(values.model, once=True).items()}
        evaluation = distiljax.evaluate_models(models, data, rows=values.rows, dtype=values.dtype)
    from distiljax.train import distributed, storage

    if not distributed.first():
        return 0
    if values.out:
        write_json(storage.as_path(values.out), evaluation)
    if values.json:
        print(json.dumps(evaluation, indent=2))
    else:
        print_retention_table(evaluation)
    return 0


def _named_models(specs: list[str], *, once: bool) -> dict[str, list[str]]:
    """The paths of NAME=PATH by their names, in order; a PATH alone is its own name."""
    models: dict[str, list[str]] = {}
    for spec in specs:
        name, equals, path = spec.partition("=")
        if not name or (equals and not path) or (once and name in models):
            raise UserError(f"--model={spec}; expected NAME=PATH{', each name once' if once else ''}")
        models.setdefault(name, []).append(path if equals else spec)
    return models


def _evaluate_task(values: Flags) -> int:
    (specs,) = needed(values, "model")
    for name in ("workdir", "data", "rows"):
        if values[name].value:
            raise UserError(f"--{name}={values[name].value} is not for --task; leave it out")
    import distiljax
    from distiljax.tasks.datasets import ROLES
    from distiljax.tasks.evaluate_task import data_settings
    from distiljax.tasks.presets import find_task

    columns = {}
    for column in values.column:
        role, _, name = column.partition("=")
        if not name or role not in ROLES:
            raise UserError(f"--column={column}; expected ROLE=COLUMN, such as text=review or label=stars")
        columns[role] = name
    models = _named_models(specs, once=False)
    data = data_settings(
        find_task(values.task),
        models,
        source=values.source,
        split=values.split,
        columns=columns,
        max_length=values.max_length,
    )
    evaluation = distiljax.evaluate_task(values.task, models, data, split=values.split, dtype=values.dtype)
    from distiljax.comparison import print_comparison, write_comparison
    from distiljax.train import distributed

    if not distributed.first():
        return 0
    # What was measured is shown, even where it cannot be written.
    if values.json:
        print(json.dumps(evaluation, indent=2))
    else:
        print_comparison(evaluation)
    if values.out:
        write_comparison(evaluation, values.out)
    return 0


EVALUATE = Command(
    "What models are worth: masked-LM accuracy, or a task's metrics, with size and speed, side by side.",
    "distiljax evaluate --workdir=runs/distilbert\n"
    "distiljax evaluate --model=teacher=bert-base-uncased --model=student=out/student --data=DIR_OF_ROWS\n"
    "distiljax evaluate --task=sst2 --model=teacher=runs/sst2-teacher --model=student=runs/sst2-student",
    _define_evaluate,
    _evaluate,
    processes=True,
)


def _define_bench(values: Flags) -> None:
    text = flags.DEFINE_string
    flags.DEFINE_multi_string(
        "model",
        [],
        "NAME=PATH or PATH of a run, a Hugging Face directory or a hub name, repeated; the first is the reference",
        flag_values=values,
    )
    text("lengths", "32,128,512", "tokens in a row", flag_values=values)
    text(
        "batch_sizes",
        "1,32",
        "rows at once; of 1 the latency is shown, of others tokens/s",
        flag_values=values,
    )
    text("dtype", "float32,bfloat16", "compute dtypes, and int8 for kernels in int8", flag_values=values)
    flags.DEFINE_float(
        "seconds", 1.0, "how long each is measured on average, in 3 to 50 rounds", flag_values=values
    )
    text("out", None, "also write bench.json and bench.md to this directory", flag_values=values)
    flags.DEFINE_bool("json", False, "print JSON in place of the tables", flag_values=values)


def _bench(values: Flags, rest: list[str]) -> int:
    del rest
    (specs,) = needed(values, "model")
    models = {name: path for name, (path, *more) in _named_models(specs, once=True).items()}
    numbers = {name: _whole_numbers(values, name) for name in ("lengths", "batch_sizes")}
    if values.out and os.path.isfile(values.out):
        raise UserError(f"--out={values.out} is a file; give a directory")
    from distiljax.tasks.bench import bench, print_bench, write_bench

    result = bench(models, **numbers, dtypes=values.dtype.split(","), seconds=values.seconds)
    # What was measured is shown, even where it cannot be written.
    if values.json:
        print(json.dumps(result, indent=2))
    else:
        print_bench(result)
    if values.out:
        write_bench(result, values.out)
    return 0


def _whole_numbers(values: Flags, name: str) -> list[int]:
    text = str(values[name].value)
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--{name}={text}; expected whole numbers, such as 32,128") from None


BENCH = Command(
    "How fast models are and what memory they take, at several lengths and batch sizes, side by side.",
    "distiljax bench --model=teacher=bert-base-uncased --model=student=runs/distilbert\n"
    "distiljax bench --model=runs/sst2 --lengths=64 --batch_sizes=1,8,64 --dtype=bfloat16 --out=speed",
    _define_bench,
    _bench,
)


def _define_predict(values: Flags) -> None:
    text, number = flags.DEFINE_string, flags.DEFINE_integer
    text("model", None, "a run directory, a Hugging Face directory or a hub name", flag_values=values)
    text("file", None, "read texts from this file, one a line", flag_values=values)
    flags.DEFINE_enum(
        "format",
        "auto",
        ["auto", "text", "jsonl"],
        "of the lines; auto: JSON where the first one begins with an object",
        flag_values=values,
    )
    text("question", None, "question answering: asked of every text", flag_values=values)
    text(
        "context",
        None,
        "question answering: a file with the context that every text asks of",
        flag_values=values,
    )
    text("text_pair", None, "sequence pairs: the second text of every text", flag_values=values)
    number("top_k", None, "how many words for each [MASK] (5), labels or answers (1)", flag_values=values)
    number("batch_size", 32, "texts at once, at most", flag_values=values)
    number("max_length", 0, "tokens in a row; 0 = the model's positions", flag_values=values)
    flags.DEFINE_float(
        "no_answer",
        None,
        "question answering: none where its logit is this much above the best answer's, inf = always one; not given = "
        "0 for a run whose task has questions without an answer (squad_v2), else inf",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "dtype",
        "float32",
        ["float32", "bfloat16", "int8"],
        "compute dtype; int8: kernels in int8, a quarter of their size; what it gains here says `distiljax bench`",
        flag_values=values,
    )
    flags.DEFINE_bool("json", False, "one JSON object a text", flag_values=values)


def _predict(values: Flags, rest: list[str]) -> int:
    (model,) = needed(values, "model")
    from distiljax.tasks import inputs, show

    # What can be refused is refused before a model is loaded.
    items = inputs.read_inputs(values.file, rest, values.format)
    defaults = inputs.read_defaults(values.question, values.context, values.text_pair)
    import distiljax
    from distiljax.hub.pretrained import head_kind
    from distiljax.tasks.precision import in_precision
    from distiljax.tasks.predict import predict
    from distiljax.tasks.presets import PRESETS
    from distiljax.train import storage
    from distiljax.train.run import MODEL, read_json

    loaded = distiljax.from_pretrained(model, inputs.needed_head(defaults))
    module, params = in_precision(*loaded, values.dtype)
    kind = head_kind(module) or ""
    no_answer = values.no_answer
    if no_answer is None:
        # A run says what it was fine-tuned on; other directories have no such file.
        task = PRESETS.get(str((read_json(storage.as_path(model) / MODEL) or {}).get("task")))
        no_answer = 0.0 if task is not None and task.no_answer else None
    results = predict(
        module,
        params,
        distiljax.load_tokenizer(model),
        (inputs.as_input(item, kind, where, defaults) for where, item in items),
        batch_size=values.batch_size,
        top_k=values.top_k,
        max_length=values.max_length,
        no_answer=no_answer,
    )
    show.print_results(results, as_json=values.json, file=values.file, bar=not rest)
    return 0


PREDICT = Command(
    "Labels, entities, answers or words for [MASK]: what a model says of texts.",
    "distiljax predict --model=runs/sst2 'A film without a dull minute.'\n"
    "distiljax predict --model=runs/wnut17 --json --file=notes.txt > entities.jsonl\n"
    "distiljax predict --model=runs/squad --context=report.txt 'Who wrote it?' 'When?'\n"
    "distiljax predict --model=runs/distilbert 'Paris is the [MASK] of France.'",
    _define_predict,
    _predict,
    arguments="TEXT …: what the model's head is for; without one, lines of --file or standard input:\n"
    '  plain, or JSON {"text", "text_pair"}, {"tokens"}, {"question", "context"}; "id" comes back',
)


def _define_export(values: Flags) -> None:
    flags.DEFINE_string(
        "workdir", None, "the run directory of a pretrain, distill or finetune run", flag_values=values
    )
    flags.DEFINE_string("out", None, "the Hugging Face directory to write", flag_values=values)
    flags.DEFINE_string(
        "checkpoint", "best", "best (by held-out loss, of a task by its metric) or last", flag_values=values
    )
    flags.DEFINE_bool("overwrite", False, "replace what stands at --out", flag_values=values)


def _export(values: Flags, rest: list[str]) -> int:
    del rest
    workdir, out = needed(values, "workdir", "out")
    import distiljax
    from distiljax.train import distributed

    path = distiljax.export(workdir, out, checkpoint=values.checkpoint, overwrite=values.overwrite)
    if not distributed.first():
        return 0
    from distiljax.hub.heads import auto_class
    from distiljax.train.run import read_json

    loader = auto_class(read_json(path / "config.json") or {})
    print(f'wrote {path}; in Python: transformers.{loader}.from_pretrained("{path}")')
    return 0


EXPORT = Command(
    "Write a run's model as a Hugging Face directory.",
    "distiljax export --workdir=runs/distilbert --out=out/distilbert",
    _define_export,
    _export,
    processes=True,
)
