"""Masked-language-model accuracy, size and speed of models on the same held-out rows and masks."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from distiljax.data import Metadata, remote
from distiljax.distill.evaluator import EVAL_SEED, Evaluator, full_counts
from distiljax.distill.masking import Masking, masking_weights
from distiljax.distill.runs import DTYPES, count_parameters, prepare_corpus, run_student
from distiljax.distill.step import Distillation, Models, Recipe
from distiljax.errors import UserError
from distiljax.hub import check_vocabulary, vocabulary_size
from distiljax.nn import MaskedLM
from distiljax.nn.linear import compute_params
from distiljax.tasks.speed import BATCH_ROWS, model_speed
from distiljax.train import distributed, storage
from distiljax.train.checkpoint import checkpoint_step
from distiljax.train.load import from_pretrained, is_run, load_tokenizer
from distiljax.train.parallel import Parallel
from distiljax.train.run import CONFIG, EVALUATION, machine, read_json, write_json

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model to evaluate: its name in the table, where it is from, module and parameters."""

    name: str
    path: str
    module: MaskedLM
    params: Any


def evaluate_models(
    models: Mapping[str, str | os.PathLike[str]] | Sequence[Candidate],
    corpus: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    masking_counts: np.ndarray | None = None,
    masking: Mapping[str, float] | None = None,
    dtype: str = "float32",
    rows: int = 0,
    speed: bool = True,
    spread: int = 1,
) -> dict[str, Any]:
    """Evaluate masked language models on a prepared corpus; the first is the reference for what the others keep.

    Every model sees the same masks, a function of the row alone. Speed is that of the encoder (what a downstream
    task runs), measured in turn with all models over several rounds; the figures are medians.

    Args:
      models: name → run directory, Hugging Face directory or hub name; or candidates already loaded.
      corpus: directory of prepared rows.
      tokenizer: the models' tokenizer; the first model's by default.
      masking_counts: token counts for the masking weights [V]; the corpus's own by default.
      masking: `rate`, `mask`, `random`, `smoothing`; BERT's by default (15 % of all tokens alike, 80/10/10).
      dtype: compute dtype.
      rows: how many rows; 0 = all.
      speed: whether to measure speed.
      spread: devices that each hold a part of a model, as `config.parallel.model`; above 1 no speed is measured.

    Returns:
      `{"data": …, "machine": …, "models": [{"name", "path", "parameters", "bytes", "mlm_accuracy", "mlm_loss"
      (nats), "perplexity", "tokens_per_second", "latency_ms"}, …]}`.

    Raises:
      UserError: a model that cannot be loaded, or whose vocabulary is not the corpus's.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if rows < 0:
        raise UserError(f"rows is {rows}; expected 0 (all) or more")
    if isinstance(models, Mapping):
        tokenizer = tokenizer or load_tokenizer(next(iter(models.values())))
        candidates = [
            Candidate(name, str(path), *from_pretrained(path, dtype=DTYPES[dtype]))
            for name, path in models.items()
        ]
    else:
        candidates = [dataclasses.replace(c, module=c.module.clone(dtype=DTYPES[dtype])) for c in models]
    if not candidates:
        raise UserError("no model to evaluate; give at least one")
    corpus = _local(corpus)
    metadata = Metadata.load(corpus)
    metadata.check_tokenizer(tokenizer)
    for candidate in candidates:
        check_vocabulary(tokenizer, candidate.module.config, candidate.path)
        if metadata.seq_len > candidate.module.config.max_positions:
            raise UserError(
                f"{candidate.path} has {candidate.module.config.max_positions} positions, the corpus's rows "
                f"{metadata.seq_len}; prepare it again with data.seq_len={candidate.module.config.max_positions}"
            )
    settings = {"rate": 0.15, "mask": 0.8, "random": 0.1, "smoothing": 0.0, **(masking or {})}
    smoothing = settings.pop("smoothing")
    counts = metadata.token_counts(corpus) if masking_counts is None else masking_counts
    parallel = Parallel(model=spread)
    recipe = Recipe(ce=0.0, mlm=1.0, cos=0.0)
    results = []
    for candidate in candidates:
        weights = masking_weights(
            full_counts(counts, candidate.module.config.vocab_size), tokenizer.all_special_ids, smoothing
        )
        evaluator = Evaluator(
            Distillation(
                Models(candidate.module),
                recipe,
                Masking(
                    mask_token_id=tokenizer.mask_token_id, vocab_size=vocabulary_size(tokenizer), **settings
                ),
            ),
            parallel,
            BATCH_ROWS,
        )
        frozen = parallel.replicate({"teacher": None, "masking_weights": weights})
        params = parallel.place_teacher(compute_params(candidate.params, candidate.module.dtype))
        terms = evaluator.terms(params, frozen, Path(corpus), rows)
        masked_tokens = int(terms["mlm"].count)
        accuracy, loss = (float(terms[name].sum / masked_tokens) for name in ("mlm_accuracy", "mlm"))
        parameters = count_parameters(candidate.params)
        results.append(
            {
                "name": candidate.name,
                "path": candidate.path,
                "parameters": parameters,
                "bytes": 4 * parameters,
                "mlm_accuracy": accuracy,
                "mlm_loss": loss,
                "perplexity": math.exp(min(loss, 700.0)),
            }
        )
        log.info("%s: masked-LM accuracy %.2f %%", candidate.name, 100 * accuracy)
    if speed and spread == 1:
        models_in_turn = [(candidate.module, candidate.params) for candidate in candidates]
        for result, figures in zip(results, model_speed(models_in_turn, metadata.seq_len), strict=True):
            result |= figures
    seen = min(rows, metadata.num_rows) if rows else metadata.num_rows
    return {
        "data": {
            "source": ", ".join(metadata.settings["source"]),
            "split": metadata.split,
            "rows": seen,
            "tokens": round(seen * metadata.tokens_per_row),
            "seq_len": metadata.seq_len,
            "masked_tokens": masked_tokens,
            "masks_seed": EVAL_SEED,
        },
        "machine": machine(),
        "dtype": dtype,
        "models": results,
    }


def _local(corpus: str | os.PathLike[str]) -> Path:
    """The directory of one split, or its copy where it is remote."""
    if not storage.is_remote(corpus):
        return Path(corpus)
    split = storage.as_path(corpus)
    return remote.local(split.parent) / split.name


def evaluate_run(workdir: str | os.PathLike[str], *, rows: int = 0, dtype: str = "float32") -> dict[str, Any]:
    """Evaluate a run on its own held-out rows and keep the result in its evaluation.json.

    A distillation gives teacher, student, and the student as it was before distillation; masked-language-model
    training gives the model. See `evaluate_models` for what is returned.

    Raises:
      UserError: no run, or one without a checkpoint.
    """
    path = storage.as_path(workdir)
    if not is_run(path):
        raise UserError(
            f"{path} is no run directory (no model.json); give the --workdir of a pretrain or distill run"
        )
    stored = read_json(path / CONFIG) or {}
    config = ConfigDict(stored)
    if stored.get("kind") == "finetune":
        raise UserError(
            f"{path} is fine-tuned on {stored.get('task')}; evaluate it with --task={stored.get('task')} "
            f"--model=NAME={path}"
        )
    module, params = from_pretrained(path)
    candidates = [Candidate("student", str(path), module, params)]
    if "kind" not in stored:
        raise UserError(
            f"{path / CONFIG} is missing or of no run; restore it, or evaluate with --model and --data"
        )
    if stored["kind"] == "distill":
        teacher, teacher_params = from_pretrained(config.teacher)
        before, before_params = run_student(config, teacher, teacher_params)
        candidates = [
            Candidate("teacher", str(config.teacher), teacher, teacher_params),
            *candidates,
            Candidate("student before distillation", "", before, before_params),
        ]
    else:
        candidates = [dataclasses.replace(candidates[0], name="model")]
    tokenizer = load_tokenizer(path)
    directory, corpora = prepare_corpus(config, path, tokenizer)
    spread = config.parallel.get("model", 1)
    evaluation = evaluate_models(
        candidates,
        directory / "validation",
        tokenizer=tokenizer,
        masking_counts=corpora["train"].token_counts(directory / "train"),
        masking={**stored["masking"], "smoothing": stored["eval"]["smoothing"]},
        dtype=dtype,
        rows=rows,
        # A teacher that was spread for its size is spread here, too, where there are the devices.
        spread=spread if jax.local_device_count() % spread == 0 else 1,
    )
    evaluation["best_step"] = checkpoint_step(path)
    if distributed.first():
        write_json(path / EVALUATION, evaluation)
    return evaluation
