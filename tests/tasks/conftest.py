from __future__ import annotations

import pytest

from distiljax.data import default_data_config, prepare


@pytest.fixture
def make_corpora(tokenizer, tmp_path):
    """Prepares text in a new directory with some data settings; gives the directory."""

    def make(source, splits=("train",), **settings):
        config = default_data_config()
        config.source = source
        config.update({"seq_len": 64, "holdout": 0.2 if "validation" in splits else 0.0} | settings)
        out = tmp_path / f"corpora-{len(list(tmp_path.glob('corpora-*')))}"
        prepare(config, tokenizer, out, splits=splits)
        return out

    return make
