"""What the tests share: eight simulated devices, a small tokenizer and a text of its words."""

from __future__ import annotations

import os
import re
import string
from pathlib import Path

import pytest

# For the tests of what must not depend on the number of devices.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Most of the time would go into compiling the same small programs again. A worker has its own: JAX does not write them
# in one piece.
_PROGRAMS = Path(__file__).parent.parent / ".pytest_cache" / os.environ.get("PYTEST_XDIST_WORKER", "main")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_PROGRAMS))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

WORDS = re.findall(
    r"\w+",
    "the a of and to in is was for on that with he it as his by at from her an are were which this river",
)
SUBWORDS = ["un", "##believ", "##able", "##s", "##ing"]
LETTERS = [*string.ascii_lowercase, *string.digits, ".", ",", "-"]


@pytest.fixture(scope="session")
def tokenizer():
    """A small lower-casing WordPiece tokenizer; only its listed words, and single letters, are known."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: index for index, token in enumerate([*specials, *WORDS, *SUBWORDS, *LETTERS])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    # Truncation and padding are on so that a test sees whether they are really ignored.
    backend.enable_truncation(8)
    backend.enable_padding(length=16)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        name_or_path="small",
        model_max_length=512,
    )


@pytest.fixture
def corpus_file(tmp_path):
    """120 different documents of 5 to 60 known words, one a line."""
    lines = []
    for number in range(120):
        length = 5 + (number * 37) % 56
        lines.append(
            " ".join(WORDS[(number * number + 7 * i) % len(WORDS)] for i in range(length)) + f" {number}"
        )
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
