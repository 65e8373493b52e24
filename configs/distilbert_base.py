"""DistilBERT-base from bert-base-uncased on English Wikipedia and BookCorpus (Sanh et al. 2019).

Command:  distiljax distill --config=configs/distilbert_base.py --workdir=runs/distilbert-base-uncased
Hardware: made for the GPUs or TPU chips of one host; the same command runs on one device.
          Set --config.micro_batch_size to what fits a device (4096 rows divided by the devices must divide by it).
Time:     the original took about 90 hours on 8 V100 16 GB (3 epochs of some 3.3 billion words).
Result:   the paper's student keeps 97 % of BERT's GLUE score with 40 % fewer parameters.

Every value below is the recipe's, spelled out although it is the default.
"""

from ml_collections import ConfigDict

import distiljax


def get_config() -> ConfigDict:
    config = distiljax.distill_config()
    config.teacher = "bert-base-uncased"

    # Half of the layers (0, 2, 4, 7, 9 and 11 of 12), the teacher's width, no token types.
    config.student.layers = 0
    config.student.initialise = "teacher"
    config.student.token_types = "fold"
    config.student.hidden_dropout = 0.1
    config.student.attention_dropout = 0.1

    # 5.0 · L_ce + 2.0 · L_mlm + 1.0 · L_cos at temperature 2.
    config.loss.ce = 5.0
    config.loss.mlm = 2.0
    config.loss.cos = 1.0
    config.loss.mse = 0.0
    config.loss.temperature = 2.0
    config.loss.ce_positions = "all"

    # 15 % of the tokens, rare ones more often; of these 80 % [MASK], 10 % random, 10 % as they are.
    config.masking.rate = 0.15
    config.masking.mask = 0.8
    config.masking.random = 0.1
    config.masking.smoothing = 0.7

    config.data.source = ("hf:wikimedia/wikipedia/20231101.en", "hf:rojagtap/bookcorpus")
    config.data.seq_len = 512
    config.data.min_tokens = 12
    config.data.max_unknown = 0.5
    config.data.layout = "packed"
    config.data.holdout = 0.001

    config.batch_size = 4096
    config.micro_batch_size = 16
    config.epochs = 3.0
    config.optimizer.peak_lr = 5e-4
    config.optimizer.warmup_fraction = 0.05
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.98
    config.optimizer.eps = 1e-6
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 5.0

    config.dtype = "bfloat16"
    config.log_every = 10
    config.eval.every = 250
    config.eval.rows = 4096
    config.checkpoint.every = 250
    return config
