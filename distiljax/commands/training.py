"""The commands on runs: pretrain, distill, finetune, compare, plan, report."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from absl import flags

from distiljax.commands.base import DATA_KEYS, SHARED_KEYS, Command, Flags, define_workdir, needed


def _train(kind: str) -> Callable[[Flags, list[str]], int]:
    def run(values: Flags, rest: list[str]) -> int:
        del rest
        (workdir,) = needed(values, "workdir")
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


PRETRAIN = Command(
    "Train or adapt a masked language model, such as a teacher for your own text.",
    "distiljax pretrain --config.model=bert-base-uncased --config.data.source='notes/*.txt' --workdir=runs/teacher",
    define_workdir,
    _train("pretrain"),
    "distill.config.pretrain_config",
    config_help={**SHARED_KEYS, **DATA_KEYS},
    processes=True,
)

DISTILL = Command(
    "Distil a teacher into a student of half its depth; the same command resumes a run.",
    "distiljax distill --config=configs/distilbert_base.py --workdir=runs/distilbert",
    define_workdir,
    _train("distill"),
    "distill.config.distill_config",
    config_help={**SHARED_KEYS, **DATA_KEYS},
    processes=True,
)

FINETUNE = Command(
    "Fine-tune a model on a task: a GLUE task, IMDb, SQuAD, named entities, or data of your own.",
    "distiljax finetune --config=configs/finetune.py --config.task=sst2 --config.model=runs/distilbert \\\n"
    "    --workdir=runs/sst2\n"
    "distiljax finetune --config.task=sequence_classification --config.data.source=reviews.csv \\\n"
    "    --config.data.text=review --config.data.label=stars --config.model=runs/distilbert --workdir=runs/stars\n"
    "distiljax finetune --config.task=squad --config.model=runs/distilbert --config.teacher=runs/squad-teacher \\\n"
    "    --workdir=runs/squad-student",
    define_workdir,
    _train("finetune"),
    "tasks.config.finetune_config",
    config_help={"tasks.config.shared_with_pretraining": ()},
    processes=True,
)


def _compare(values: Flags, rest: list[str]) -> int:
    del rest
    (workdir,) = needed(values, "workdir")
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


COMPARE = Command(
    "Fine-tune several models on the same tasks and seeds, and show what each keeps of the first.",
    "distiljax compare --config=configs/glue.py --workdir=runs/glue\n"
    "distiljax compare --config.models=teacher=bert-base-uncased,student=runs/distilbert \\\n"
    "    --config.tasks=sst2,rte --config.seeds=0,1,2 --config.data_root=data --workdir=runs/compared",
    define_workdir,
    _compare,
    "tasks.config.compare_config",
    processes=True,
)


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
    (topologies,) = needed(values, "topology")
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


PLAN = Command(
    "Whether a run fits a TPU slice or GPUs, and how long it takes there, without having them.",
    "distiljax plan --config=configs/distilbert_base.py --topology=v5e:4x4 --topology=v5e:16x16\n"
    "distiljax plan --config=configs/distilbert_base.py --topology=h100:8 --tokens=4.2e9 --json",
    _define_plan,
    _plan,
    "distill.config.plan_config",
    "distill.config.plan_part",
    config_help=DATA_KEYS,
)


def _define_report(values: Flags) -> None:
    flags.DEFINE_multi_string(
        "workdir", [], "a run directory; repeat it for several runs", flag_values=values
    )
    flags.DEFINE_string(
        "out", None, "where report.md and plots/ go; the last run directory by default", flag_values=values
    )


def _report(values: Flags, rest: list[str]) -> int:
    del rest
    (workdirs,) = needed(values, "workdir")
    import distiljax

    print(f"wrote {distiljax.write_report(workdirs, values.out or workdirs[-1])}")
    return 0


REPORT = Command(
    "Write report.md with tables and plots of one or more runs.",
    "distiljax report --workdir=runs/distilbert",
    _define_report,
    _report,
)
