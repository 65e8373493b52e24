"""DistilmBERT from bert-base-multilingual-cased: the recipe with a teacher of 104 languages.

Command:  distiljax distill --config=configs/distilbert_base_multilingual.py --workdir=runs/distilbert-base-multilingual
Hardware: as configs/distilbert_base.py; the vocabulary of 119,547 entries makes the logits four times as large, hence
          the smaller micro-batch.
Time:     not measured.
Result:   not run.

The languages are Wikipedia's dozen largest of BERT's; add to LANGUAGES for more.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

LANGUAGES = ("en", "de", "fr", "es", "it", "pt", "nl", "pl", "ru", "ja", "zh", "ar")


def get_config() -> ConfigDict:
    base = runpy.run_path(str(pathlib.Path(__file__).with_name("distilbert_base.py")))
    config: ConfigDict = base["get_config"]()
    config.teacher = "bert-base-multilingual-cased"
    config.data.source = tuple(f"hf:wikimedia/wikipedia/20231101.{language}" for language in LANGUAGES)
    config.micro_batch_size = 4
    return config
