"""Every setting of `distiljax pretrain` and `distiljax distill`, at its default."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from distiljax.data.config import default_data_config
from distiljax.errors import UserError

_AT_LEAST = {
    0: (
        *("seed", "data.seed", "steps", "micro_batch_size", "log_every", "checkpoint.every"),
        *("eval.every", "eval.rows", "eval.batch_size", "eval.smoothing", "masking.smoothing"),
        *("optimizer.weight_decay", "optimizer.clip_norm"),
    ),
    1: ("batch_size", "checkpoint.keep", "parallel.model", "max_nonfinite_steps"),
}
_SHARES = ("optimizer.warmup_fraction", "optimizer.b1", "optimizer.b2")
_POSITIVE = ("optimizer.peak_lr", "optimizer.eps")


def _numbers(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)):
            yield prefix + key, value


def check_ranges(config: ConfigDict) -> None:
    """Refuse numbers that no run can use, before anything is loaded or prepared; of the keys that the config has.

    Raises:
      UserError: the key, its value and what was expected.
    """
    values = dict(_numbers(config))

    for key, number in values.items():
        if isinstance(number, float) and not math.isfinite(number):
            raise UserError(f"{key} is {number}; expected a finite number")
    # `not (…)` and not the opposite comparison, so that NaN is refused too.
    for least, keys in _AT_LEAST.items():
        for key in keys:
            if key in values and not least <= values[key] < 2**31:
                raise UserError(f"{key} is {values[key]}; expected at least {least} and below 2**31")
    for key in _SHARES:
        value = values.get(key, 0)
        if not 0 <= value <= 1 or (value == 1 and key != "optimizer.warmup_fraction"):
            raise UserError(f"{key} is {value}; expected a share of one")
    for key in _POSITIVE:
        if not 0 < values.get(key, 1) < float("inf"):
            raise UserError(f"{key} is {values[key]}; expected a number above 0")
    if not config.steps and not 0 < config.epochs < float("inf"):
        raise UserError(f"steps is {config.steps} and epochs {config.epochs}; expected one of them above 0")


def shared_config() -> ConfigDict:
    """What `distill_config` and `pretrain_config` have in common, at the values of the original recipe.

    batch_size                          rows in the effective (global) batch of one optimiser step
    micro_batch_size                    rows a device computes at once; 0 = all of its share
    epochs, steps                       length of the run; `steps` wins where it is not 0
    masking.rate, mask, random          share of tokens predicted; of these shown as [MASK], as a random token
    masking.smoothing                   exponent s of the masking weights count^-s: 0.7 in the original distillation
                                        script, which predicts rare tokens more; 0, all tokens alike, in BERT
    optimizer.*                         AdamW: peak_lr, linear warm-up over warmup_fraction of the steps and linear
                                        decay to 0, b1, b2, eps, weight_decay (not on biases, LayerNorm), clip_norm
    dtype                               compute dtype, bfloat16 or float32; parameters are float32
    attention                           auto, plain, or fused: in one kernel, cuDNN's on a GPU and splash attention on a
                                        TPU, in bfloat16 and where no attention weights are dropped
    remat                               keep less for the backward pass, which computes each layer again
    parallel.mode                       jit or pmap
    parallel.model                      devices that each hold a part of the teacher, where it is too large for one
    tokenizer                           hub name or directory; the model's own by default
    data_dir                            where the prepared rows are, or will be; the run directory's data/ by default
    log_every                           steps between records in metrics.jsonl and TensorBoard
    eval.every, rows, batch_size        steps between validations (0 = only at the end), rows used (0 = all), rows
                                        at once (0 = a micro-batch a device)
    eval.smoothing                      masking.smoothing of held-out text; 0 makes accuracies compare with BERT's
    max_nonfinite_steps                 so many steps in a row may have a loss or gradient that is not finite (their
                                        updates are skipped); after that the run fails
    checkpoint.every, keep              steps between checkpoints, how many of the last to keep
    seed                                of masks, dropout, the order of rows and fresh weights
    """
    config = ConfigDict()
    config.seed = 0
    config.tokenizer = ""

    config.data = default_data_config()
    config.data_dir = ""

    config.masking = ConfigDict()
    config.masking.rate = 0.15
    config.masking.mask = 0.8
    config.masking.random = 0.1
    config.masking.smoothing = 0.0

    config.optimizer = ConfigDict()
    config.optimizer.peak_lr = 5e-4
    config.optimizer.warmup_fraction = 0.05
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.98
    config.optimizer.eps = 1e-6
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 5.0

    config.batch_size = 4096
    config.micro_batch_size = 0
    config.epochs = 3.0
    config.steps = 0

    config.dtype = "bfloat16"
    config.attention = "auto"
    config.remat = False
    config.parallel = ConfigDict()
    config.parallel.mode = "jit"
    config.parallel.model = 1

    config.max_nonfinite_steps = 10
    config.log_every = 50
    config.eval = ConfigDict()
    config.eval.every = 1000
    config.eval.rows = 0
    config.eval.batch_size = 0
    config.eval.smoothing = 0.0
    config.checkpoint = ConfigDict()
    config.checkpoint.every = 1000
    config.checkpoint.keep = 2
    return config


def distill_config() -> ConfigDict:
    """The config of `distiljax distill` with every key at its default, the recipe of Sanh et al. 2019.

    teacher                             hub name, Hugging Face directory or run directory of a masked LM
    teacher_dtype                       compute dtype of the teacher; the run's `dtype` by default
    student.layers                      how many (0 = half of the teacher's), or a tuple of teacher layers to copy
    student.initialise                  teacher (copied layers) or random
    student.token_types                 fold type 0 into the positions, drop it as the original does, or keep the table
    student.hidden_size, num_heads, intermediate_size    0 = the teacher's
    student.hidden_dropout, attention_dropout            drop rates while training
    loss.ce, mlm, cos, mse              weights of the loss terms; 0 leaves a term out
    loss.temperature                    T of the soft targets
    loss.ce_positions                   all (non-padding) or masked
    """
    config = ConfigDict()
    config.teacher = "bert-base-uncased"
    config.teacher_dtype = ""
    config.student = ConfigDict()
    config.student.layers = placeholder(object)
    config.student.layers = 0
    config.student.initialise = "teacher"
    config.student.token_types = "fold"
    config.student.hidden_size = 0
    config.student.num_heads = 0
    config.student.intermediate_size = 0
    config.student.hidden_dropout = 0.1
    config.student.attention_dropout = 0.1
    config.loss = ConfigDict()
    config.loss.ce = 5.0
    config.loss.mlm = 2.0
    config.loss.cos = 1.0
    config.loss.mse = 0.0
    config.loss.temperature = 2.0
    config.loss.ce_positions = "all"
    config.update(shared_config())
    config.masking.smoothing = 0.7
    return config


def pretrain_config() -> ConfigDict:
    """The config of `distiljax pretrain` (masked-language-model training) with every key at its default.

    model                               hub name, Hugging Face directory or run directory to start from; a missing
                                        masked-LM head is added
    hidden_dropout, attention_dropout   drop rates while training
    """
    config = ConfigDict()
    config.model = "bert-base-uncased"
    config.hidden_dropout = 0.1
    config.attention_dropout = 0.1
    config.update(shared_config())
    return config


def prepare_config() -> ConfigDict:
    """The config of `distiljax prepare` with every key at its default; the config of a run will do, too.

    tokenizer                           hub name or directory; in a run's config its teacher's or model's by default
    """
    config = ConfigDict()
    config.tokenizer = ""
    config.data = default_data_config()
    return config


def prepare_part(config: ConfigDict) -> ConfigDict:
    """What `prepare` needs of a run's config, and anything else that it would not know.

    A config that has no teacher or model is returned as it is, to be checked as one of `prepare`.
    """
    model = config.get("teacher") or config.get("model")
    if not model or "data" not in config:
        return config
    part = prepare_config()
    part.tokenizer = config.get("tokenizer") or model
    part.data = config.data
    return part


def plan_config() -> ConfigDict:
    """The config of `distiljax plan` with every key at its default; the config of a run will do, too.

    That of a distill run, and what a pretrain run has besides:

    model                               of a pretrain run, which has no teacher
    hidden_dropout, attention_dropout   of a pretrain run
    """
    config = distill_config()
    config.model = ""
    config.hidden_dropout = config.attention_dropout = 0.1
    return config


def plan_part(config: ConfigDict) -> ConfigDict:
    """The config of a distill or pretrain run with what the other kind has besides, at its default."""
    whole, defaults = ConfigDict(config), plan_config()
    if "model" in config:
        defaults.teacher = ""
    for key in defaults:
        if key not in config:
            whole[key] = defaults[key]
    return whole
