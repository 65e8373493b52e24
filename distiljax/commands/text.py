"""The commands on text: prepare, inspect."""

from __future__ import annotations

import os
import shlex

from absl import flags

from distiljax.commands.base import DATA_KEYS, Command, Flags, needed
from distiljax.errors import UserError


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
    (out,) = needed(values, "out")
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


PREPARE = Command(
    "Tokenise and pack text, of any size, into the rows that training reads.",
    "distiljax prepare --source='text/*.jsonl.zst' --tokenizer=bert-base-uncased --seq_len=512 --out=rows\n"
    "distiljax prepare --config=configs/distilbert_base.py --out=rows\n"
    "distiljax distill --config=configs/distilbert_base.py --config.data_dir=rows --workdir=runs/distilbert",
    _define_prepare,
    _prepare,
    config="distill.config.prepare_config",
    config_part="distill.config.prepare_part",
    config_help=DATA_KEYS,
)


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


INSPECT = Command(
    "What is in a directory of prepared text: counts, what was dropped, rows as the model sees them.",
    "distiljax inspect rows/train --rows=5\n"
    "distiljax inspect rows --verify --rows=0\n"
    "distiljax inspect rows --json",
    _define_inspect,
    _inspect,
    arguments="DIR: what `prepare` made, or one split of it; WORKDIR/data of a run",
)
