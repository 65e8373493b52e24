"""Distil a BERT-family teacher into a student of half its depth by the DistilBERT recipe (Sanh et al. 2019).

Names are imported on first use, so that `import distiljax` and the command line start at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from distiljax.version import __version__

if TYPE_CHECKING:
    from distiljax.data.prepare import prepare
    from distiljax.distill.config import distill_config, pretrain_config
    from distiljax.distill.runs import Result, distill, pretrain
    from distiljax.distill.student import student_of
    from distiljax.errors import UserError
    from distiljax.hub import save_pretrained
    from distiljax.nn import Encoder, EncoderConfig, HeadConfig, MaskedLM, TaskModel
    from distiljax.nn.int8 import quantize
    from distiljax.plan import make_plan
    from distiljax.report import write_report
    from distiljax.tasks.bench import bench
    from distiljax.tasks.compare import compare
    from distiljax.tasks.config import compare_config, finetune_config
    from distiljax.tasks.evaluate import evaluate_models, evaluate_run
    from distiljax.tasks.evaluate_task import evaluate_task
    from distiljax.tasks.export import export
    from distiljax.tasks.fill_mask import fill_mask
    from distiljax.tasks.finetune import finetune
    from distiljax.tasks.predict import predict
    from distiljax.train.load import from_pretrained, load_tokenizer

__all__ = [
    "Encoder",
    "EncoderConfig",
    "HeadConfig",
    "MaskedLM",
    "Result",
    "TaskModel",
    "UserError",
    "__version__",
    "bench",
    "compare",
    "compare_config",
    "distill",
    "distill_config",
    "evaluate_models",
    "evaluate_run",
    "evaluate_task",
    "export",
    "fill_mask",
    "finetune",
    "finetune_config",
    "from_pretrained",
    "load_tokenizer",
    "make_plan",
    "predict",
    "prepare",
    "pretrain",
    "pretrain_config",
    "quantize",
    "save_pretrained",
    "student_of",
    "write_report",
]

_MODULES = {
    "distiljax.data.prepare": ("prepare",),
    "distiljax.distill.config": ("distill_config", "pretrain_config"),
    "distiljax.distill.runs": ("Result", "pretrain"),
    "distiljax.distill.student": ("student_of",),
    "distiljax.errors": ("UserError",),
    "distiljax.hub": ("save_pretrained",),
    "distiljax.nn": ("Encoder", "EncoderConfig", "HeadConfig", "MaskedLM", "TaskModel"),
    "distiljax.nn.int8": ("quantize",),
    "distiljax.plan": ("make_plan",),
    "distiljax.report": ("write_report",),
    "distiljax.tasks.bench": ("bench",),
    "distiljax.tasks.compare": ("compare",),
    "distiljax.tasks.config": ("compare_config", "finetune_config"),
    "distiljax.tasks.evaluate": ("evaluate_models", "evaluate_run"),
    "distiljax.tasks.evaluate_task": ("evaluate_task",),
    "distiljax.tasks.export": ("export",),
    "distiljax.tasks.fill_mask": ("fill_mask",),
    "distiljax.tasks.finetune": ("finetune",),
    "distiljax.tasks.predict": ("predict",),
    "distiljax.train.load": ("from_pretrained", "load_tokenizer"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "distill":  # the folder, which is callable
        return importlib.import_module("distiljax.distill")
    if name not in _HOME:
        raise AttributeError(f"module 'distiljax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
