"""The main job on this machine, for real: adapt a teacher, distil it, evaluate, export, report.

    make quickstart

Everything lands in runs/quickstart. Run again, it goes on where it was stopped; finished stages are not repeated.
The teacher is the 6-layer encoder of all-MiniLM-L6-v2, which a package carries, so that no hub is needed; it has no
masked-LM head, so it is given one and adapted to the corpus first. The corpus is what every Python installation has:
the docstrings of the standard library and of the installed packages.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path

# One CPU device, no GPU needed; said before JAX is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import distiljax
from distiljax.cli import set_up_logging
from distiljax.errors import UserError
from distiljax.programs import keep_programs
from distiljax.report import print_retention_table
from distiljax.train.format import human_seconds
from distiljax.train.progress import stage

ROOT = Path(__file__).resolve().parent.parent
RUNS = Path("runs/quickstart")
STAGES = 5
EXAMPLES = (
    "Return a [MASK] of all files in the directory.",
    "If the file does not [MASK], an error is raised.",
    "The default [MASK] is None.",
)


def main() -> int:
    began = time.monotonic()
    os.chdir(ROOT)
    set_up_logging()
    keep_programs()
    get_config = runpy.run_path("configs/quickstart.py")["get_config"]
    teacher, student, exported = RUNS / "teacher", RUNS / "student", RUNS / "exported"

    stage("Adapting the teacher: all-MiniLM-L6-v2 learns to fill in masked words", 1, STAGES)
    if not distiljax.pretrain(get_config("teacher"), teacher).finished:
        return stopped()
    stage("Distilling it into a student of half its depth", 2, STAGES)
    if not distiljax.distill(get_config("student"), student).finished:
        return stopped()
    stage("Evaluating teacher and student on held-out text", 3, STAGES)
    evaluation = distiljax.evaluate_run(student)
    stage("Exporting the student for Hugging Face", 4, STAGES)
    distiljax.export(student, exported, overwrite=exported.exists())
    stage("Writing the report", 5, STAGES)
    report = distiljax.write_report([teacher, student], RUNS)

    print()
    print_retention_table(evaluation)
    print()
    module, params = distiljax.from_pretrained(exported)
    tokenizer = distiljax.load_tokenizer(exported)
    for result in distiljax.fill_mask(module, params, tokenizer, EXAMPLES, top_k=3):
        words = ", ".join(f"{choice['token']} ({choice['score']:.2f})" for choice in result["masks"][0])
        print(f"  {result['text']:<50} {words}")
    print()
    print(f"Student for Hugging Face:  {exported}")
    print(f"Report with plots:         {report}")
    print(f"Done in {human_seconds(time.monotonic() - began)}.")
    return 0


def stopped() -> int:
    print("Stopped; `make quickstart` goes on from here.", file=sys.stderr)
    return 130


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"quickstart: error: {error}", file=sys.stderr)
        sys.exit(2)
