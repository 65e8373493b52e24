"""Distil a BERT-family teacher into a student of half its depth by the DistilBERT recipe (Sanh et al. 2019)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distiljax.distill.config import distill_config, pretrain_config
    from distiljax.distill.runs import Result, distill, pretrain
    from distiljax.distill.student import student_of
    from distiljax.errors import UserError
    from distiljax.hub import load_tokenizer, save_pretrained
    from distiljax.nn import Encoder, EncoderConfig, MaskedLM
    from distiljax.report import write_report
    from distiljax.tasks.evaluate import evaluate_models, evaluate_run
    from distiljax.tasks.fill_mask import fill_mask
    from distiljax.tasks.export import export
    from distiljax.train.load import from_pretrained

from distiljax.version import __version__

# Each name and where it is; imported on first use, so that `import distiljax` and the command line start at once.
_PUBLIC = {
    "Encoder": "distiljax.nn",
    "EncoderConfig": "distiljax.nn",
    "MaskedLM": "distiljax.nn",
    "Result": "distiljax.distill.runs",
    "UserError": "distiljax.errors",
    "distill_config": "distiljax.distill.config",
    "evaluate_models": "distiljax.tasks.evaluate",
    "evaluate_run": "distiljax.tasks.evaluate",
    "export": "distiljax.tasks.export",
    "fill_mask": "distiljax.tasks.fill_mask",
    "from_pretrained": "distiljax.train.load",
    "load_tokenizer": "distiljax.train.load",
    "pretrain": "distiljax.distill.runs",
    "pretrain_config": "distiljax.distill.config",
    "save_pretrained": "distiljax.hub",
    "student_of": "distiljax.distill.student",
    "write_report": "distiljax.report",
}

__all__ = ["__version__", "distill", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name == "distill":  # the folder, which is callable
        return importlib.import_module("distiljax.distill")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'distiljax' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
