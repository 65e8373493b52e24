"""The commands: what each is for, its flags, and the function of the package that it calls."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags

from distiljax.errors import UserError

Flags = flags.FlagValues

# The functions whose docstrings explain the rest of a config, and the lines that stand above each.
_SHARED = {"distill.config.shared_config": ()}
_DATA: Mapping[str, tuple[str, ...]] = {"data.config.default_data_config": ("", "keys of data:", "")}


@dataclasses.dataclass(frozen=True)
class Command:
    """One command: what it is for, an example, its flags, what it runs, the function that gives its config."""

    summary: str
    example: str
    define: Callable[[Flags], None]
    run: Callable[[Flags, list[str]], int]
    config: str | None = None  # as "module.function" of the package
    config_part: str | None = None  # the function that takes the command's config out of that of a run
    config_help: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # as `_SHARED`
    processes: bool = False  # whether the same command may run on every host of a cluster, as one run
    arguments: str = ""  # what stands on the command line beside flags, for the help


# The commands. Each imports what it needs only when it runs.


def _workdir(values: Flags) -> None:
    flags.DEFINE_string("workdir", None, "the run directory; made if it is not there", flag_values=values)


def _needed(values: Flags, *names: str) -> list[Any]:
    for name in names:
        if values[name].value in (None, "", []):
            text = values[name].help.partition(";\n")[0]  # the rest is absl's own words on repeated flags
            raise UserError(f"--{name} is missing: {' '.join(text.split())}")
    return [values[name].value for name in names]


def _train(kind: str) -> Callable[[Flags, list[str]], int]:
    def run(values: Flags, rest: list[str]) -> int:
        del rest
        (workdir,) = _needed(values, "workdir")
        import distiljax

        result = getattr(distiljax, kind)(values.config, workdir)
        from distiljax.train import distributed

        if not distributed.first():
            return 0
        step = result.facts["steps"]
        if not result.finished:
            print(
                f"stopped at step {step}, saved in {workdir}; the same command goes on from there",
                file=sys.stderr,
            )
            return 0
        best = result.facts["best"] or result.facts["validation"]
        figures = f"loss {best['loss']:.4f}, {_quality(result.facts, best)}"
        print(f"finished at step {step}; best on held-out text at step {best['step']}: {figures}; {workdir}")
        return 0

    return run


def _quality(facts: dict[str, Any], best: dict[str, Any]) -> str:
    if "metric" not in facts:
        return f"masked-LM accuracy {100 * best['mlm_accuracy']:.1f} %"
    others = {name for name in best if not name.startswith("loss")} - {"step", facts["metric"]}
    return ", ".join(f"{name} {100 * best[name]:.1f} %" for name in (facts["metric"], *sorted(others)))


def _define_prepare(values: Flags) -> None:
    text, number = flags.DEFINE_string, flags.DEFINE_integer
    flags.DEFINE_multi_string(
        "source", [], "text, as config.data.source; repeat it to mix several", flag_values=values
    )
    text("tokenizer", None, "hub name or directory of the teacher or its tokenizer", flag_values=values)
    text("out", None, "the directory to make; each split gets a directory in it", flag_values=values)
    number("seq_len", None, "tokens in a row, as config.data.seq_len", flag_values=values)
    number("workers", 0, "processes; 0 = one for each core", flag_values=values)
    flags.DEFINE_enum(
        "on_error",
        None,
        ["fail", "skip"],
        "records that cannot be used, as config.data.on_error",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "split",
        ["train", "validation"],
        "what to prepare, repeated; validation is held out of train where there is none",
        flag_values=values,
    )
    number("shard_index", 0, "which part of the work this call does, from 0", flag_values=values)
    number("shard_count", 1, "parts; the calls for all parts share --out", flag_values=values)
    text(
        "beam",
        "",
        "run on Apache Beam with these pipeline options, such as '--runner=FlinkRunner --flink_master=host:8081'",
        flag_values=values,
    )


def _prepare(values: Flags, rest: list[str]) -> int:
    del rest
    (out,) = _needed(values, "out")
    config = values.config
    if values.source:
        config.data.source = tuple(values.source) if len(values.source) > 1 else values.source[0]
    for key in ("seq_len", "on_error"):
        if values[key].value is not None:
            config.data[key] = values[key].value
    name = values.tokenizer or config.tokenizer
    if not name:
        raise UserError(
            "--tokenizer is missing: the teacher's hub name or directory, or a --config that names it"
        )
    beam = _beam_options(values)
    import distiljax
    from distiljax.data import remote
    from distiljax.tasks.corpus_report import print_corpus
    from distiljax.train import storage

    if storage.is_remote(out) and (beam or values.shard_count > 1):
        raise UserError(
            f"--out={out} is remote; with --beam or --shard_count prepare into a directory that all machines mount, "
            "and copy it"
        )
    tokenizer = distiljax.load_tokenizer(name)
    splits = tuple(dict.fromkeys(values.split))
    with remote.preparing(out) as directory:
        if beam:
            from distiljax.data.beam import prepare_on_beam

            corpora = prepare_on_beam(config.data, tokenizer, directory, splits=splits, pipeline_options=beam)
        else:
            from distiljax.data.watch import prepare_watched

            corpora = prepare_watched(
                config.data,
                tokenizer,
                directory,
                splits=splits,
                workers=values.workers or _cores(),
                shard_index=values.shard_index,
                shard_count=values.shard_count,
            )
    if not corpora:
        print(
            f"part {values.shard_index} of {values.shard_count} is done; {out} is complete when all parts are"
        )
    for split in corpora:
        print_corpus(directory / split)
    return 0


def _beam_options(values: Flags) -> list[str]:
    try:
        options = shlex.split(values.beam)
    except ValueError as error:
        raise UserError(f"--beam={values.beam}: {error}; expected Beam's options as in a shell") from None
    for name in ("workers", "shard_index", "shard_count") if options else ():
        if values[name].value != values[name].default:
            raise UserError(
                f"--{name}={values[name].value} is not for --beam: the runner spreads the work; leave it out"
            )
    return options


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _define_inspect(values: Flags) -> None:
    flags.DEFINE_integer("rows", 3, "how many rows to show, drawn at random; 0 = none", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the rows that are drawn and of their masks", flag_values=values)
    flags.DEFINE_float(
        "smoothing", 0.7, "how much masks prefer rare tokens, as config.masking.smoothing", flag_values=values
    )
    flags.DEFINE_bool("verify", False, "also read every row and check every shard's hash", flag_values=values)
    flags.DEFINE_bool(
        "json", False, "print the facts as JSON, split by split, and no rows", flag_values=values
    )


def _inspect(values: Flags, rest: list[str]) -> int:
    if len(rest) != 1:
        raise UserError(
            f"{len(rest)} directories; give one: that of a prepared corpus, or the --out of `distiljax prepare`"
        )
    if "://" in rest[0]:
        raise UserError(f"{rest[0]} is remote; copy it to this machine and give the copy")
    # A few rows need no accelerator, which may be busy with a run.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from distiljax.tasks.inspect import inspect

    inspect(
        rest[0],
        rows=values.rows,
        seed=values.seed,
        smoothing=values.smoothing,
        verify=values.verify,
        as_json=values.json,
    )
    return 0


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
    flags.DEFINE_string("dtype", "float32", "compute dtype: float32 or bfloat16", flag_values=values)
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
        (data,) = _needed(values, "data")
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
    (specs,) = _needed(values, "model")
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


def _compare(values: Flags, rest: list[str]) -> int:
    del rest
    (workdir,) = _needed(values, "workdir")
    import distiljax
    from distiljax.comparison import MARKDOWN, print_comparison
    from distiljax.train import distributed

    result = distiljax.compare(values.config, workdir)
    if not distributed.first():
        return 0
    if not result.finished:
        print(f"stopped, saved in {workdir}; the same command goes on from there", file=sys.stderr)
        return 0
    print_comparison(result.facts)
    print(f"wrote {result.workdir / MARKDOWN}")
    return 0


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
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "compute dtype", flag_values=values)
    flags.DEFINE_bool("json", False, "one JSON object a text", flag_values=values)


def _predict(values: Flags, rest: list[str]) -> int:
    (model,) = _needed(values, "model")
    from distiljax.tasks import inputs, show

    # What can be refused is refused before a model is loaded.
    items = inputs.read_inputs(values.file, rest, values.format)
    defaults = inputs.read_defaults(values.question, values.context, values.text_pair)
    import jax.numpy as jnp

    import distiljax
    from distiljax.hub.pretrained import head_kind
    from distiljax.tasks.predict import predict
    from distiljax.tasks.presets import PRESETS
    from distiljax.train import storage
    from distiljax.train.run import MODEL, read_json

    module, params = distiljax.from_pretrained(model, inputs.needed_head(defaults), jnp.dtype(values.dtype))
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
    workdir, out = _needed(values, "workdir", "out")
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


def _define_plan(values: Flags) -> None:
    flags.DEFINE_multi_string(
        "topology",
        [],
        "chips to plan for, repeated: v5e:4x4, v5e-16, v4:2x2x4, v4-32, v6e:4x4, h100:8, a100-80gb:8, …",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "search", True, "also search for the largest micro-batch that fits, by compiling", flag_values=values
    )
    flags.DEFINE_float(
        "mfu", 0.3, "share of the peak rate that the models' work is expected to get", flag_values=values
    )
    flags.DEFINE_float(
        "tokens", 0.0, "tokens of text, to tell the hours of the run by; 0 = not known", flag_values=values
    )
    flags.DEFINE_bool("json", False, "print JSON in place of the table", flag_values=values)


def _plan(values: Flags, rest: list[str]) -> int:
    del rest
    (topologies,) = _needed(values, "topology")
    # Nothing is run: an accelerator that is there may be busy.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from distiljax.plan import make_plan
    from distiljax.plan.table import print_plan

    plan = make_plan(values.config, topologies, search=values.search, mfu=values.mfu, tokens=values.tokens)
    if values.json:
        print(json.dumps(plan, indent=2))
    else:
        print_plan(plan)
    return 0


def _define_report(values: Flags) -> None:
    flags.DEFINE_multi_string(
        "workdir", [], "a run directory; repeat it for several runs", flag_values=values
    )
    flags.DEFINE_string(
        "out", None, "where report.md and plots/ go; the last run directory by default", flag_values=values
    )


def _report(values: Flags, rest: list[str]) -> int:
    del rest
    (workdirs,) = _needed(values, "workdir")
    import distiljax

    print(f"wrote {distiljax.write_report(workdirs, values.out or workdirs[-1])}")
    return 0


COMMANDS = {
    "prepare": Command(
        "Tokenise and pack text, of any size, into the rows that training reads.",
        "distiljax prepare --source='text/*.jsonl.zst' --tokenizer=bert-base-uncased --seq_len=512 --out=rows\n"
        "distiljax prepare --config=configs/distilbert_base.py --out=rows\n"
        "distiljax distill --config=configs/distilbert_base.py --config.data_dir=rows --workdir=runs/distilbert",
        _define_prepare,
        _prepare,
        config="distill.config.prepare_config",
        config_part="distill.config.prepare_part",
        config_help=_DATA,
    ),
    "inspect": Command(
        "What is in a directory of prepared text: counts, what was dropped, rows as the model sees them.",
        "distiljax inspect rows/train --rows=5\n"
        "distiljax inspect rows --verify --rows=0\n"
        "distiljax inspect rows --json",
        _define_inspect,
        _inspect,
        arguments="DIR: what `prepare` made, or one split of it; WORKDIR/data of a run",
    ),
    "pretrain": Command(
        "Train or adapt a masked language model, such as a teacher for your own text.",
        "distiljax pretrain --config.model=bert-base-uncased --config.data.source='notes/*.txt' --workdir=runs/teacher",
        _workdir,
        _train("pretrain"),
        "distill.config.pretrain_config",
        config_help={**_SHARED, **_DATA},
        processes=True,
    ),
    "distill": Command(
        "Distil a teacher into a student of half its depth; the same command resumes a run.",
        "distiljax distill --config=configs/distilbert_base.py --workdir=runs/distilbert",
        _workdir,
        _train("distill"),
        "distill.config.distill_config",
        config_help={**_SHARED, **_DATA},
        processes=True,
    ),
    "finetune": Command(
        "Fine-tune a model on a task: a GLUE task, IMDb, SQuAD, named entities, or data of your own.",
        "distiljax finetune --config=configs/finetune.py --config.task=sst2 --config.model=runs/distilbert \\\n"
        "    --workdir=runs/sst2\n"
        "distiljax finetune --config.task=sequence_classification --config.data.source=reviews.csv \\\n"
        "    --config.data.text=review --config.data.label=stars --config.model=runs/distilbert --workdir=runs/stars\n"
        "distiljax finetune --config.task=squad --config.model=runs/distilbert --config.teacher=runs/squad-teacher \\\n"
        "    --workdir=runs/squad-student",
        _workdir,
        _train("finetune"),
        "tasks.config.finetune_config",
        config_help={"tasks.config.shared_with_pretraining": ()},
        processes=True,
    ),
    "evaluate": Command(
        "What models are worth: masked-LM accuracy, or a task's metrics, with size and speed, side by side.",
        "distiljax evaluate --workdir=runs/distilbert\n"
        "distiljax evaluate --model=teacher=bert-base-uncased --model=student=out/student --data=DIR_OF_ROWS\n"
        "distiljax evaluate --task=sst2 --model=teacher=runs/sst2-teacher --model=student=runs/sst2-student",
        _define_evaluate,
        _evaluate,
        processes=True,
    ),
    "compare": Command(
        "Fine-tune several models on the same tasks and seeds, and show what each keeps of the first.",
        "distiljax compare --config=configs/glue.py --workdir=runs/glue\n"
        "distiljax compare --config.models=teacher=bert-base-uncased,student=runs/distilbert \\\n"
        "    --config.tasks=sst2,rte --config.seeds=0,1,2 --config.data_root=data --workdir=runs/compared",
        _workdir,
        _compare,
        "tasks.config.compare_config",
        processes=True,
    ),
    "predict": Command(
        "Labels, entities, answers or words for [MASK]: what a model says of texts.",
        "distiljax predict --model=runs/sst2 'A film without a dull minute.'\n"
        "distiljax predict --model=runs/wnut17 --json --file=notes.txt > entities.jsonl\n"
        "distiljax predict --model=runs/squad --context=report.txt 'Who wrote it?' 'When?'\n"
        "distiljax predict --model=runs/distilbert 'Paris is the [MASK] of France.'",
        _define_predict,
        _predict,
        arguments="TEXT …: what the model's head is for; without one, lines of --file or standard input:\n"
        '  plain, or JSON {"text", "text_pair"}, {"tokens"}, {"question", "context"}; "id" comes back',
    ),
    "export": Command(
        "Write a run's model as a Hugging Face directory.",
        "distiljax export --workdir=runs/distilbert --out=out/distilbert",
        _define_export,
        _export,
        processes=True,
    ),
    "plan": Command(
        "Whether a run fits a TPU slice or GPUs, and how long it takes there, without having them.",
        "distiljax plan --config=configs/distilbert_base.py --topology=v5e:4x4 --topology=v5e:16x16\n"
        "distiljax plan --config=configs/distilbert_base.py --topology=h100:8 --tokens=4.2e9 --json",
        _define_plan,
        _plan,
        "distill.config.plan_config",
        "distill.config.plan_part",
        config_help=_DATA,
    ),
    "report": Command(
        "Write report.md with tables and plots of one or more runs.",
        "distiljax report --workdir=runs/distilbert",
        _define_report,
        _report,
    ),
}
