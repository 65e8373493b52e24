"""Every config: it is what its command knows, it says what the recipe says, and one step of it runs."""

import json
import runpy
from pathlib import Path

import pytest

import distiljax
from distiljax.cli import main
from distiljax.comparison import GLUE
from distiljax.tasks.compare import model_paths, plan_fits

CONFIGS = Path(__file__).parents[2] / "configs"
# Those of other commands have tests below.
OTHERS = ("finetune.py", "glue.py")
RUNS = [("distill", str(path)) for path in sorted(CONFIGS.glob("*.py")) if path.name not in OTHERS]
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


def test_the_config_of_finetune_runs(teacher, tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        rows = "".join(f"the river was {label}\t{label}\n" for label in (0, 1)) * 8
        (tmp_path / "data" / f"{split}.tsv").write_text("sentence\tlabel\n" + rows)
    small = {
        "steps": 1,
        "batch_size": 8,
        "data.source": tmp_path / "data",
        "data.max_length": 64,
        "dtype": "float32",
    }
    flags = [f"--config.{key}={value}" for key, value in {**small, "model": teacher}.items()]
    assert (
        main(["finetune", f"--config={CONFIGS / 'finetune.py'}", *flags, f"--workdir={tmp_path / 'run'}"])
        == 0
    )
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["task"] == "sst2" and result["steps"] == 1


def test_glue_is_the_nine_tasks_of_the_paper():
    config = runpy.run_path(str(CONFIGS / "glue.py"))["get_config"]()
    assert set(config.tasks) == set(GLUE) and len(config.tasks) == 9
    fits = plan_fits(config, model_paths(config.models), Path("runs/glue"))
    assert len(fits) == 9 * 2 * 5 and {fit.config.data.max_length for fit in fits} == {128}
    assert {fit.config.epochs for fit in fits if fit.task.name == "mrpc"} == {5.0}
