"""The commands: what each is for, its flags, and the function of the package that it calls."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags

from distiljax.errors import UserError

Flags = flags.FlagValues


@dataclasses.dataclass(frozen=True)
class Command:
    """One command: what it is for, an example, its flags, what it runs, the function that gives its config."""

    summary: str
    example: str
    define: Callable[[Flags], None]
    run: Callable[[Flags, list[str]], int]
    config: str | None = None
    config_part: str | None = None  # the function that takes the command's config out of that of a run
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

        result = (distiljax.distill if kind == "distill" else distiljax.pretrain)(values.config, workdir)
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
        figures = f"loss {best['loss']:.4f}, masked-LM accuracy {100 * best['mlm_accuracy']:.1f} %"
        print(f"finished at step {step}; best on held-out text at step {best['step']}: {figures}; {workdir}")
        return 0

    return run


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
        "model", [], "NAME=PATH of a model, repeated; the first is the reference", flag_values=values
    )
    flags.DEFINE_string(
        "data",
        None,
        "with --model: a directory of prepared rows, such as WORKDIR/data/validation of a run",
        flag_values=values,
    )
    flags.DEFINE_integer("rows", 0, "how many rows; 0 = all", flag_values=values)
    flags.DEFINE_string("dtype", "float32", "compute dtype: float32 or bfloat16", flag_values=values)
    flags.DEFINE_string("out", None, "also write the result as JSON to this file", flag_values=values)
    flags.DEFINE_bool("json", False, "print JSON in place of the table", flag_values=values)


def _evaluate(values: Flags, rest: list[str]) -> int:
    del rest
    if bool(values.workdir) == bool(values.model):
        raise UserError("give either --workdir=RUN or --model=NAME=PATH … with --data=DIR")
    import distiljax
    from distiljax.report import print_retention_table
    from distiljax.train.run import write_json

    if values.workdir:
        evaluation = distiljax.evaluate_run(values.workdir, rows=values.rows, dtype=values.dtype)
    else:
        (data,) = _needed(values, "data")
        models = {}
        for spec in values.model:
            name, equals, path = spec.partition("=")
            if name in models or not name or (equals and not path):
                raise UserError(f"--model={spec}; expected NAME=PATH, each name once")
            models[name] = path if equals else spec
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


def _define_predict(values: Flags) -> None:
    flags.DEFINE_string(
        "model", None, "a run directory, a Hugging Face directory or a hub name", flag_values=values
    )
    flags.DEFINE_string("file", None, "read texts from this file, one a line", flag_values=values)
    flags.DEFINE_integer("top_k", 5, "how many words for each [MASK]", flag_values=values)
    flags.DEFINE_integer("batch_size", 16, "texts at once", flag_values=values)
    flags.DEFINE_bool("json", False, "one JSON object a text", flag_values=values)


def _predict(values: Flags, rest: list[str]) -> int:
    (model,) = _needed(values, "model")
    texts = _texts(values.file, rest)
    import distiljax

    module, params = distiljax.from_pretrained(model)
    tokenizer = distiljax.load_tokenizer(model)
    for result in distiljax.fill_mask(
        module, params, tokenizer, texts, top_k=values.top_k, batch_size=values.batch_size
    ):
        if values.json:
            print(json.dumps(result, ensure_ascii=False), flush=True)
            continue
        print(result["text"])
        for number, choices in enumerate(result["masks"], 1):
            if len(result["masks"]) > 1:
                print(f"  [MASK] {number}")
            for choice in choices:
                print(f"  {choice['score']:7.4f}  {choice['token']:<16} {choice['filled']}", flush=True)
    return 0


def _texts(file: str | None, arguments: list[str]) -> Iterator[str]:
    if file and arguments:
        raise UserError("give texts either as arguments or with --file")
    if arguments:
        return iter(arguments)
    if not file and sys.stdin.isatty():
        raise UserError("no text; give it as an argument, with --file, or on standard input")

    def lines() -> Iterator[str]:
        try:
            with open(file, encoding="utf-8") if file else contextlib.nullcontext(sys.stdin) as source:
                for line in source:
                    if line.strip():
                        yield line.rstrip("\n")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file or 'standard input'} is not UTF-8 ({error.reason}); convert it first"
            ) from error
        except OSError as error:
            raise UserError(
                f"--file {file} cannot be read ({error.strerror}); give a text file, one text a line"
            ) from error

    return lines()


def _define_export(values: Flags) -> None:
    flags.DEFINE_string("workdir", None, "the run directory of a pretrain or distill run", flag_values=values)
    flags.DEFINE_string("out", None, "the Hugging Face directory to write", flag_values=values)
    flags.DEFINE_string("checkpoint", "best", "best (lowest held-out loss) or last", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "replace what stands at --out", flag_values=values)


def _export(values: Flags, rest: list[str]) -> int:
    del rest
    workdir, out = _needed(values, "workdir", "out")
    import distiljax
    from distiljax.train import distributed

    path = distiljax.export(workdir, out, checkpoint=values.checkpoint, overwrite=values.overwrite)
    if not distributed.first():
        return 0
    print(f'wrote {path}; in Python: transformers.AutoModelForMaskedLM.from_pretrained("{path}")')
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
        config="prepare_config",
        config_part="prepare_part",
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
        "pretrain_config",
        processes=True,
    ),
    "distill": Command(
        "Distil a teacher into a student of half its depth; the same command resumes a run.",
        "distiljax distill --config=configs/distilbert_base.py --workdir=runs/distilbert",
        _workdir,
        _train("distill"),
        "distill_config",
        processes=True,
    ),
    "evaluate": Command(
        "Masked-LM accuracy, size and speed of models side by side.",
        "distiljax evaluate --workdir=runs/distilbert\n"
        "distiljax evaluate --model=teacher=bert-base-uncased --model=student=out/student --data=DIR_OF_ROWS",
        _define_evaluate,
        _evaluate,
        processes=True,
    ),
    "predict": Command(
        "The likeliest words for every [MASK].",
        "distiljax predict --model=runs/distilbert 'Paris is the [MASK] of France.'",
        _define_predict,
        _predict,
        arguments="TEXT …: each with [MASK] in it; without one, lines of --file or standard input",
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
        "plan_config",
        "plan_part",
    ),
    "report": Command(
        "Write report.md with tables and plots of one or more runs.",
        "distiljax report --workdir=runs/distilbert",
        _define_report,
        _report,
    ),
}
