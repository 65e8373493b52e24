"""Every config: it is what its command knows, it says what the recipe says, and one step of it runs."""

import runpy
from pathlib import Path

import pytest

import distiljax
from distiljax.cli import main

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = [("distill", str(path)) for path in sorted(CONFIGS.glob("*.py"))]
RUNS.append(("pretrain", f"{CONFIGS / 'quickstart.py'}:teacher"))


@pytest.mark.parametrize(("command", "config"), RUNS, ids=[Path(path).name for _, path in RUNS])
def test_one_step_of_every_config_with_its_sizes_shrunk(command, config, teacher, flags, tmp_path):
    # What a run on this machine cannot have: the hub, the paper's batch and lengths.
    small = flags(steps=1, micro_batch_size=1, eval__every=0, eval__rows=16, data_dir=tmp_path / "data")
    model = f"--config.{'teacher' if command == 'distill' else 'model'}={teacher}"
    assert main([command, f"--config={config}", model, *small, f"--workdir={tmp_path / 'run'}"]) == 0


def test_distilbert_base_is_the_papers_recipe():
    config = runpy.run_path(str(CONFIGS / "distilbert_base.py"))["get_config"]()
    assert config.teacher == "bert-base-uncased"
    assert (config.loss.ce, config.loss.mlm, config.loss.cos, config.loss.mse) == (5.0, 2.0, 1.0, 0.0)
    assert config.loss.temperature == 2.0 and config.loss.ce_positions == "all"
    masking = config.masking
    assert (masking.rate, masking.mask, masking.random, masking.smoothing) == (0.15, 0.8, 0.1, 0.7)
    optimizer = config.optimizer
    assert (optimizer.b1, optimizer.b2, optimizer.eps, optimizer.peak_lr) == (0.9, 0.98, 1e-6, 5e-4)
    assert (optimizer.warmup_fraction, optimizer.weight_decay, optimizer.clip_norm) == (0.05, 0.0, 5.0)
    assert config.batch_size == 4096 and config.epochs == 3.0 and config.data.seq_len == 512
    assert config.data.min_tokens == 12 and config.data.max_unknown == 0.5
    assert config.student.hidden_dropout == config.student.attention_dropout == 0.1
    # The recipe is also what the defaults say.
    defaults = distiljax.distill_config()
    for key in ("loss", "masking", "optimizer", "student", "batch_size", "epochs"):
        assert config[key] == defaults[key]
