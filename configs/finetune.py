"""Fine-tune a model on a task.

Command:  distiljax finetune --config=configs/finetune.py --config.task=sst2 --config.model=DIR --workdir=runs/sst2
          distil on the task, too (the paper's second step): add --config.teacher=runs/sst2-teacher
Hardware: anything; one GPU or TPU chip, or 2 CPU cores for a small model.
"""

from ml_collections import ConfigDict

import distiljax


def get_config() -> ConfigDict:
    return distiljax.finetune_config()
