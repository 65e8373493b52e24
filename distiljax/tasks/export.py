"""Hand a trained model over as a Hugging Face directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from distiljax.errors import UserError
from distiljax.hub import model_card, save_pretrained
from distiljax.train.checkpoint import checkpoint_step
from distiljax.train.load import from_pretrained, is_run, load_tokenizer
from distiljax.train.run import CONFIG, EVALUATION, RESULT, read_json


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
      workdir: a run directory of `distill` or `pretrain`.
      directory: where to; made in one piece.
      checkpoint: "best" (lowest held-out loss) or "last".
      overwrite: replace what stands there.

    Raises:
      UserError: no run, no checkpoint, or a directory that holds something already.
    """
    if checkpoint not in ("best", "last"):
        raise UserError(f"checkpoint is {checkpoint!r}; expected best or last")
    path = Path(workdir)
    if not is_run(path):
        raise UserError(
            f"{path} is no run directory (no model.json); give the --workdir of a pretrain or distill run"
        )
    module, params = from_pretrained(path, checkpoint=checkpoint)
    card = model_card(card_facts(path, checkpoint))
    save_pretrained(module, params, directory, tokenizer=load_tokenizer(path), card=card, overwrite=overwrite)
    return Path(directory)


def card_facts(path: Path, checkpoint: str) -> dict[str, Any]:
    """What a model card can say of a run; see `distiljax.hub.model_card`.

    An evaluation counts only if it was of the very parameters that are exported.
    """
    evaluation = read_json(path / EVALUATION)
    if evaluation and evaluation.get("best_step") != checkpoint_step(path, checkpoint):
        evaluation = None
    return {
        "config": read_json(path / CONFIG) or {},
        "result": read_json(path / RESULT) or {},
        "evaluation": evaluation,
    }
