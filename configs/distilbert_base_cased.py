"""DistilBERT-base-cased from bert-base-cased: the recipe of configs/distilbert_base.py with a cased teacher.

Command:  distiljax distill --config=configs/distilbert_base_cased.py --workdir=runs/distilbert-base-cased
Hardware: as configs/distilbert_base.py.
Time:     as configs/distilbert_base.py (the vocabulary has 28,996 entries, not 30,522).
Result:   not run.

BookCorpus exists in lower case only, so the text is Wikipedia.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    base = runpy.run_path(str(pathlib.Path(__file__).with_name("distilbert_base.py")))
    config: ConfigDict = base["get_config"]()
    config.teacher = "bert-base-cased"
    config.data.source = "hf:wikimedia/wikipedia/20231101.en"
    return config
