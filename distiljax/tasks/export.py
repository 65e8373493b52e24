"""Hand a trained model over as a Hugging Face directory."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from distiljax.errors import UserError
from distiljax.hub import model_card, save_pretrained, task_card
from distiljax.hub.files import CONFIG as HF_CONFIG
from distiljax.hub.files import foreign
from distiljax.nn import MaskedLM
from distiljax.train import distributed, storage
from distiljax.train.checkpoint import checkpoint_step
from distiljax.train.load import from_pretrained, is_run, load_tokenizer
from distiljax.train.run import CONFIG, EVALUATION, MODEL, RESULT, read_json


def export(
    workdir: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    checkpoint: str = "best",
    overwrite: bool = False,
) -> Path:
    """Write a run's model, tokenizer and model card as a directory that transformers loads.

    A student without token types goes out as DistilBERT, a BERT-shaped model as BERT.

    Args:
      workdir: a run directory of `distill`, `pretrain` or `finetune`; may be remote.
      directory: where to; made in one piece, or, where it is remote, file by file with config.json last.
      checkpoint: "best" (lowest held-out loss; of a task its metric) or "last".
      overwrite: replace what stands there.

    Raises:
      UserError: no run, no checkpoint, or a directory that holds something already.
    """
    if checkpoint not in ("best", "last"):
        raise UserError(f"checkpoint is {checkpoint!r}; expected best or last")
    path = storage.as_path(workdir)
    if not is_run(path):
        raise UserError(
            f"{path} is no run directory (no model.json); give the --workdir of a pretrain, distill or finetune run"
        )
    if storage.is_remote(directory):
        _check_remote(directory, overwrite)
    module, params = from_pretrained(path, head="any", checkpoint=checkpoint)
    if not distributed.first():  # every process reads a checkpoint, one writes the model
        return storage.as_path(directory)
    facts = card_facts(path, checkpoint)
    card = model_card(facts) if isinstance(module, MaskedLM) else task_card(facts)
    tokenizer = load_tokenizer(path)
    if not storage.is_remote(directory):
        save_pretrained(module, params, directory, tokenizer=tokenizer, card=card, overwrite=overwrite)
        return Path(directory)
    with tempfile.TemporaryDirectory(prefix="distiljax-") as temporary:
        model = Path(temporary) / "model"
        save_pretrained(module, params, model, tokenizer=tokenizer, card=card)
        _replace_remote(model, directory)
    return storage.as_path(directory)


def _check_remote(directory: str | os.PathLike[str], overwrite: bool) -> None:
    """Refuses what `save_pretrained` refuses of a local directory."""
    held = storage.names(directory)
    if held and not overwrite:
        raise UserError(f"{directory} is not empty; give another directory, or overwrite it with --overwrite")
    if MODEL in held:
        raise UserError(f"{directory} holds a run, which an export would destroy; give another directory")
    if held and HF_CONFIG not in held:
        raise UserError(
            f"{directory} holds something else than a model (no {HF_CONFIG}); give another directory"
        )
    if held and (other := foreign(held)):
        raise UserError(
            f"{directory} holds {other!r} beside a model, which an export would destroy; give another directory"
        )


def _replace_remote(model: Path, directory: str | os.PathLike[str]) -> None:
    """Puts the files of a local directory in the place of those of a remote one."""
    # While config.json is away nobody takes what is there for a model.
    old, new = list(storage.files(directory)), list(storage.files(model))
    storage.remove(directory, [name for name in old if name == HF_CONFIG or name not in new])
    storage.upload(model, directory, [name for name in new if name != HF_CONFIG])
    storage.upload(model, directory, [HF_CONFIG])


def card_facts(path: Path, checkpoint: str) -> dict[str, Any]:
    """What a model card can say of a run; see `distiljax.hub.model_card`.

    An evaluation counts only if it was of the very parameters that are exported.
    """
    evaluation = read_json(path / EVALUATION)
    if evaluation and evaluation.get("best_step") != checkpoint_step(path, checkpoint):
        evaluation = None
    return {
        "model": read_json(path / MODEL) or {},
        "config": read_json(path / CONFIG) or {},
        "result": read_json(path / RESULT) or {},
        "evaluation": evaluation,
    }
