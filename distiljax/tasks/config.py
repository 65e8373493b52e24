"""Every setting of `distiljax finetune` and `distiljax compare`, at its default."""

from __future__ import annotations

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from distiljax.distill.config import shared_config

# Of the settings that all training commands share, those that are about masked text.
_NOT_HERE = ("data", "data_dir", "masking")
# What a comparison sets in the config of each run.
COMPARED = ("task", "model", "teacher", "seed")


def finetune_config() -> ConfigDict:
    """The config of `distiljax finetune` with every key at its default.

    task                                a preset (cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, imdb, squad,
                                        squad_v2, conll2003, wnut17), or for data of your own the kind of task:
                                        sequence_classification, regression, token_classification, question_answering
    model                               hub name, Hugging Face directory or run directory to start from; a head that
                                        does not fit the task is replaced by a fresh one
    teacher                             a model fine-tuned on the same task, whose soft targets are learnt, too
    teacher_dtype                       compute dtype of the teacher; the run's `dtype` by default
    cache_teacher                       compute the teacher's outputs once, before training, and keep them on the disk
    data.source                         hub name (NAME or NAME/CONFIG), directory, CSV, JSONL or Parquet file; the
                                        preset's by default
    data.train, validation, test        a split of the source, or a file of its own
    data.text, text_pair, label         columns of a classification or regression
    data.tokens, tags                   columns of a token classification: words, and a label for each
    data.id, question, context, answers columns of question answering
    data.holdout                        share of the training examples to validate on, where there is no such split
    data.max_train_examples, max_eval_examples    draw so many of the examples; 0 = all
    data.seed                           of these draws
    data.max_length                     tokens in a row; longer texts are cut, or (answers, tokens) read by windows
    data.stride                         tokens that a window shares with the one before it; -1 = a third of max_length
    data.shapes                         how many different lengths batches come in; chosen to waste the least padding
    loss.label, soft                    weights of the labels' loss and of the teacher's soft targets
    loss.temperature                    T of the soft targets
    hidden_dropout, attention_dropout   drop rates while training; -1 = the model's own
    head_dropout                        drop rate before the last layer; -1 = the architecture's own
    eval.every, batch_size              steps between validations (0 = only at the end; else also at the start, and
                                        the best parameters count), rows at once
    """
    config = ConfigDict()
    config.task = "sst2"
    config.model = "distilbert-base-uncased"
    config.teacher = ""
    config.teacher_dtype = ""
    config.cache_teacher = True
    config.data = finetune_data_config()
    config.loss = ConfigDict()
    config.loss.label = 1.0
    config.loss.soft = 1.0
    config.loss.temperature = 2.0
    config.hidden_dropout = -1.0
    config.attention_dropout = -1.0
    config.head_dropout = -1.0
    config.update(shared_with_pretraining())
    config.eval = ConfigDict({"every": 0, "batch_size": 64})
    # As BERT was fine-tuned (Devlin et al. 2019, appendix A.3).
    config.optimizer.peak_lr = 5e-5
    config.optimizer.warmup_fraction = 0.1
    config.optimizer.b2 = 0.999
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0
    config.batch_size = 32
    config.epochs = 3.0
    return config


def shared_with_pretraining() -> ConfigDict:
    """What `finetune_config` has in common with those of `distill` and `pretrain`.

    batch_size                          rows in the effective (global) batch of one optimiser step
    micro_batch_size                    rows a device computes at once; 0 = all of its share
    epochs, steps                       length of the run; `steps` wins where it is not 0
    optimizer.*                         AdamW: peak_lr, linear warm-up over warmup_fraction of the steps and linear
                                        decay to 0, b1, b2, eps, weight_decay (not on biases, LayerNorm), clip_norm
    dtype                               compute dtype, bfloat16 or float32; parameters are float32
    attention                           auto, plain, or fused: in one kernel, cuDNN's on a GPU and splash attention on a
                                        TPU, in bfloat16 and where no attention weights are dropped
    remat                               keep less for the backward pass, which computes each layer again
    parallel.mode, model                jit or pmap; devices that each hold a part of the teacher
    tokenizer                           hub name or directory; the model's own by default
    log_every                           steps between records in metrics.jsonl and TensorBoard
    max_nonfinite_steps                 so many steps in a row may have a loss that is not finite
    checkpoint.every, keep              steps between checkpoints, how many of the last to keep
    seed                                of dropout, the order of examples and fresh weights
    """
    return ConfigDict({key: value for key, value in shared_config().items() if key not in _NOT_HERE})


def finetune_data_config() -> ConfigDict:
    """The `data` part of `finetune_config`."""
    data = ConfigDict()
    data.source = ""
    for split in ("train", "validation", "test"):
        data[split] = ""
    for role in ("text", "text_pair", "label", "tokens", "tags", "id", "question", "context", "answers"):
        data[role] = ""
    data.holdout = 0.1
    data.max_train_examples = 0
    data.max_eval_examples = 0
    data.seed = 0
    data.max_length = 384
    data.stride = -1
    data.shapes = 4
    return data


def compare_config() -> ConfigDict:
    """The config of `distiljax compare` with every key at its default.

    models                              NAME=PATH,NAME=PATH,… (in Python also a mapping): run directories, Hugging Face
                                        directories or hub names, in the order of the table; the first is the reference
    tasks                               presets, such as sst2,rte
    seeds                               each model is fine-tuned on each task once a seed; the paper: medians of 5
    task_teacher                        the model of these whose fine-tuned runs are teachers of the others on the same
                                        task and seed, which adds a row "… + task distillation" to each; none by default
    data_root                           directory with a folder a task, named as the task; the hub by default
    split                               what is scored: validation, by the runs' own best checkpoint, or another split
    finetune.*                          settings of all runs, as of `distiljax finetune`
    overrides.TASK.*                    of these, what is different on a task (in a config file)
    """
    config = ConfigDict()
    config.models = placeholder(object)
    config.models = ""
    config.tasks = ()
    config.seeds = (0, 1, 2, 3, 4)
    config.task_teacher = ""
    config.data_root = ""
    config.split = "validation"
    config.finetune = finetune_config()
    for key in COMPARED:
        del config.finetune[key]
    config.overrides = ConfigDict()
    return config
