"""Tokenizers from directories in the states that they are found in."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from distiljax.errors import UserError
from distiljax.hub import check_vocabulary, load_tokenizer, save_pretrained
from distiljax.nn import EncoderConfig


def test_vocabulary_alone(vocabulary_dir):
    tokenizer = load_tokenizer(vocabulary_dir)
    assert tokenizer.is_fast
    assert tokenizer("The Dog runs").input_ids == [2, 5, 8, 11, 3]
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (0, 4)


@pytest.mark.parametrize("with_config", [False, True])
def test_vocabulary_with_capitals_is_read_as_cased(tmp_path, with_config):
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Dog", "dog"])
    )
    if with_config:
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert load_tokenizer(tmp_path)("Dog dog").input_ids == [2, 5, 6, 3]


def test_real_vocabulary_is_read_as_uncased(minilm_dir, tmp_path):
    shutil.copy(minilm_dir / "vocab.txt", tmp_path)
    text = "Élan vital: the Danube’s 2,850 km — naïvely."
    assert load_tokenizer(tmp_path)(text).input_ids == load_tokenizer(minilm_dir)(text).input_ids


def test_tokenizer_json_alone_gets_its_special_tokens(minilm_dir, tmp_path):
    shutil.copy(minilm_dir / "tokenizer.json", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokens = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id
    assert tokens == (101, 102, 0, 103) and len(tokenizer) == 30522
    assert tokenizer("Hello").input_ids == [101, 7592, 102]


def test_no_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"holds no tokenizer; expected tokenizer\.json or vocab\.txt"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        load_tokenizer(tmp_path / "no")


def test_damaged_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded .*fetch its files again") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_slow_tokenizer(tmp_path):
    """CANINE's characters have no fast version."""
    (tmp_path / "vocab.txt").write_text("[PAD]")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CanineTokenizer"}')
    with pytest.raises(UserError, match="CanineTokenizer without a fast version"):
        load_tokenizer(tmp_path)


def test_tokenizer_without_a_mask(tmp_path):
    from tokenizers import Tokenizer, models

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the"]
    vocabulary = {word: i for i, word in enumerate(words)}
    Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"has no mask_token; expected one, such as \[MASK\]"):
        load_tokenizer(tmp_path)


def test_no_code_from_the_directory_is_run(tmp_path, vocabulary_dir):
    shutil.copy(vocabulary_dir / "vocab.txt", tmp_path)
    touched = tmp_path / "touched"
    (tmp_path / "evil.py").write_text(f"open({str(touched)!r}, 'w')\n")
    auto_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": auto_map})
    )
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    assert not touched.exists()


def test_check_vocabulary(vocabulary_dir):
    tokenizer = load_tokenizer(vocabulary_dir)
    for rows in (19, 32):
        check_vocabulary(tokenizer, EncoderConfig(vocab_size=rows), "bert")
    with pytest.raises(UserError, match="19 tokens, bert only 18 rows"):
        check_vocabulary(tokenizer, EncoderConfig(vocab_size=18), "bert")
    with pytest.raises(UserError, match="pads with token 0, bert with 1"):
        check_vocabulary(tokenizer, EncoderConfig(vocab_size=19, pad_token_id=1), "bert")


@pytest.mark.parametrize(
    "files", [("tokenizer.json",), ("tokenizer.json", "tokenizer_config.json"), ("vocab.txt",)]
)
def test_saved_beside_distilbert(files, minilm_dir, tmp_path, make_model, distilbert):
    """`AutoTokenizer` gives the same tokens, untruncated, whatever the tokenizer came from."""
    (tmp_path / "source").mkdir()
    for name in files:
        shutil.copy(minilm_dir / name, tmp_path / "source")
    tokenizer = load_tokenizer(tmp_path / "source")
    module, params = make_model(vocab_size=30522, max_positions=300, **distilbert)
    save_pretrained(module, params, tmp_path / "model", tokenizer=tokenizer)
    text = "The Danube flows through ten countries. " * 50
    for again in (AutoTokenizer.from_pretrained(tmp_path / "model"), load_tokenizer(tmp_path / "model")):
        assert again.is_fast and again.model_max_length == 300
        assert again(text).input_ids == tokenizer(text).input_ids
        assert again.all_special_ids == tokenizer.all_special_ids
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] in ("BertTokenizer", "PreTrainedTokenizerFast")
    assert str(tmp_path) not in json.dumps(config)
    # Readers of tokenizer.json alone do not truncate either, though the original file says 128.
    assert json.loads((tmp_path / "model" / "tokenizer.json").read_text())["truncation"] is None
