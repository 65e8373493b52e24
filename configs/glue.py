"""The nine tasks of GLUE for a teacher and its student, beside the DistilBERT paper's Table 1 (Sanh et al. 2019).

Command:  distiljax compare --config=configs/glue.py --workdir=runs/glue
          with other models: --config.models=teacher=bert-base-uncased,student=runs/distilbert,baseline=DIR
          a part of it:      --config.tasks=rte,mrpc --config.seeds=0,1,2
Hardware: made for one GPU or the TPU chips of one host; each of the 90 runs fits a 16 GB device.
Time:     not measured yet. MNLI and QQP are four fifths of GLUE's training examples; leave them out for a first look.
Result:   the paper's: BERT-base 79.5, DistilBERT 77.0 on average, 97 % of it. The command prints its own rows below
          these and leaves comparison.md, with plots, in the run directory.

The hyperparameters are those of transformers' GLUE example: three epochs of 32 sentences a step, 2e-5, 128 tokens; MRPC
and WNLI get five epochs, as there. The data are on the Hugging Face hub; --config.data_root=DIR reads DIR/cola,
DIR/mnli, ….
"""

from ml_collections import ConfigDict

import distiljax


def get_config() -> ConfigDict:
    config = distiljax.compare_config()
    # distilbert-base-uncased is the paper's student; put your own run in its place.
    config.models = "teacher=bert-base-uncased,student=distilbert-base-uncased"
    config.tasks = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
    config.seeds = (0, 1, 2, 3, 4)  # the paper: medians of 5

    config.finetune.data.max_length = 128
    config.finetune.batch_size = 32
    config.finetune.epochs = 3.0
    config.finetune.optimizer.peak_lr = 2e-5

    config.overrides.mrpc = ConfigDict({"epochs": 5.0})
    config.overrides.wnli = ConfigDict({"epochs": 5.0})
    return config
