"""A small real job: English text from the standard library, a WordPiece tokenizer of its words, a small teacher."""

import collections
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import distiljax
from tests import commands, compiling

SEQ_LEN = 32
SMALL = {
    "data.seq_len": SEQ_LEN,
    "data.unit": "paragraph",
    "data.holdout": 0.1,
    "batch_size": 16,
    "steps": 8,
    "log_every": 2,
    "eval.every": 4,
    "eval.rows": 32,
    "checkpoint.every": 4,
    "dtype": "float32",
    # High enough for a few steps to show, whatever the masks are.
    "optimizer.peak_lr": 3e-3,
}


@pytest.fixture(scope="module", autouse=True)
def in_haste():
    """Whole commands compile for most of their time."""
    with compiling.in_haste():
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """The language reference that pydoc carries, as blank-line separated paragraphs."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))[:400_000]
    path = tmp_path_factory.mktemp("corpus") / "topics.txt"
    path.write_text(re.sub(r"[ \t]+", " ", text), encoding="utf-8")
    return path


def vocabulary(corpus, size=600):
    """The words and letters of a text that occur most; a trainer would break ties differently in every process."""
    words = collections.Counter(re.findall(r"\w+|[^\w\s]", corpus.read_text(encoding="utf-8").lower()))
    letters = sorted({letter for word in words for letter in word})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    tokens += [w for w in sorted(words, key=lambda word: (-words[word], word)) if len(w) > 1]
    return {token: index for index, token in enumerate(tokens[:size])}


@pytest.fixture(scope="session")
def tokenizer(corpus):
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary(corpus), unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.decoder = tokenizers.decoders.WordPiece()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **special)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory, tokenizer):
    """A random 4-layer masked language model as a Hugging Face directory."""
    config = distiljax.EncoderConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        intermediate_size=64,
        max_positions=64,
        initializer_range=0.1,
    )
    module = distiljax.MaskedLM(config)
    params = jax.device_get(module.init(jax.random.key(0), np.zeros((1, 4), np.int32))["params"])
    path = tmp_path_factory.mktemp("teacher") / "hf"
    distiljax.save_pretrained(module, params, path, tokenizer=tokenizer)
    return path


@pytest.fixture(scope="session")
def flags(corpus):
    """Config flags of a run of a few seconds; keyword arguments with dots as `__` change them."""

    def make(**changes):
        settings = {
            **SMALL,
            "data.source": str(corpus),
            **{k.replace("__", "."): v for k, v in changes.items()},
        }
        return [f"--config.{key}={value}" for key, value in settings.items()]

    return make


@pytest.fixture(scope="session")
def environment():
    """The environment of a command in a process of its own, on one device."""
    return commands.environment(XLA_FLAGS="", **{compiling.OPTION.upper(): "1"})


@pytest.fixture(scope="session")
def start(environment):
    """Starts `distiljax …` in a process of its own."""

    def run(*arguments):
        return subprocess.Popen(
            [sys.executable, "-m", "distiljax", *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


@pytest.fixture(scope="session")
def distilled(tmp_path_factory, teacher, flags):
    """A finished small distillation."""
    from distiljax.cli import main

    path = tmp_path_factory.mktemp("distilled") / "run"
    # As the tests that compare with it, also where it is made before the first of them.
    with compiling.in_haste():
        assert main(["distill", f"--config.teacher={teacher}", *flags(), f"--workdir={path}"]) == 0
    return path
