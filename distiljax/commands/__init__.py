"""The commands: what each is for, its flags, and the function of the package that it calls.

Each imports what it needs only when it runs, so that the command line starts at once.
"""

from distiljax.commands import models, text, training
from distiljax.commands.base import Command

__all__ = ["COMMANDS", "Command"]

COMMANDS = {
    "prepare": text.PREPARE,
    "inspect": text.INSPECT,
    "pretrain": training.PRETRAIN,
    "distill": training.DISTILL,
    "finetune": training.FINETUNE,
    "evaluate": models.EVALUATE,
    "bench": models.BENCH,
    "compare": training.COMPARE,
    "predict": models.PREDICT,
    "export": models.EXPORT,
    "plan": training.PLAN,
    "report": training.REPORT,
}
