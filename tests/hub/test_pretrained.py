"""Saving and loading: bit for bit, whole or not at all, and clear about what does not fit."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from distiljax.errors import UserError
from distiljax.hub import from_pretrained, load_tokenizer, model_card, save_pretrained
from distiljax.hub.heads import fresh_head
from distiljax.nn import Encoder, EncoderConfig, MaskedLM
from distiljax.nn.encoder import sinusoidal_positions


def assert_equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


rates = st.integers(0, 9).map(lambda n: n / 10)


@st.composite
def encoder_configs(draw):
    heads = draw(st.integers(1, 3))
    shape = {
        "vocab_size": draw(st.integers(1, 30)),
        "num_heads": heads,
        "hidden_size": heads * draw(st.integers(1, 4)),
        "num_layers": draw(st.integers(0, 3)),
        "intermediate_size": draw(st.integers(1, 9)),
        "max_positions": draw(st.integers(1, 9)),
        "activation": draw(st.sampled_from(["gelu", "gelu_tanh", "relu", "silu"])),
        "hidden_dropout": draw(rates),
        "attention_dropout": draw(rates),
        "pad_token_id": draw(st.integers(0, 30)),
        "initializer_range": draw(st.floats(1e-4, 1.0)),
    }
    if draw(st.booleans()):
        kind = {"type_vocab_size": 0, "drop_attention_output": False}
        return EncoderConfig(**shape, **kind, position_kind=draw(st.sampled_from(["learned", "sinusoidal"])))
    eps = draw(st.sampled_from([1e-12, 1e-5, 0.1]))
    return EncoderConfig(**shape, type_vocab_size=draw(st.integers(1, 3)), layer_norm_eps=eps)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=encoder_configs(), head=st.booleans(), pooler=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_round_trip_is_bit_for_bit(tmp_path_factory, config, head, pooler, seed):
    if pooler and not head and config.model_type == "bert":
        config = config.replace(pooler=True)
    module = MaskedLM(config) if head else Encoder(config)
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    rng = np.random.default_rng(seed)

    def any_finite(x):
        # Any bits, subnormal numbers and negative zeros too; what is not finite is refused on the way in.
        drawn = rng.integers(0, 2**32, x.shape, np.uint32).view(np.float32)
        return np.where(np.isfinite(drawn), drawn, np.float32(-0.0))

    params = jax.tree.map(any_finite, shapes)
    directory = tmp_path_factory.mktemp("model") / "model"
    save_pretrained(module, params, directory)
    again, read = from_pretrained(directory, head="masked_lm" if head else None)
    assert again == module
    assert_equal(
        jax.tree.map(lambda x: x.view(np.uint32), read), jax.tree.map(lambda x: x.view(np.uint32), params)
    )
    assert {x.dtype for x in jax.tree.leaves(read)} == {np.dtype(np.float32)}


def test_files_are_those_of_transformers(tmp_path, make_model, distilbert, vocabulary_dir):
    module, params = make_model(**distilbert)
    tokenizer = load_tokenizer(vocabulary_dir)
    save_pretrained(module, params, tmp_path / "a" / "model", tokenizer=tokenizer, card=model_card({}))
    directory = tmp_path / "a" / "model"
    assert sorted(os.listdir(directory)) == [
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert os.listdir(tmp_path / "a") == ["model"]
    assert json.loads((directory / "config.json").read_text()) == {
        "architectures": ["DistilBertForMaskedLM"],
        "model_type": "distilbert",
        "vocab_size": 19,
        "dim": 12,
        "n_layers": 2,
        "n_heads": 3,
        "hidden_dim": 20,
        "max_position_embeddings": 16,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "activation": "gelu",
        "initializer_range": 0.02,
        "pad_token_id": 0,
        "sinusoidal_pos_embds": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    with safe_open(directory / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert "vocab_projector.weight" not in file.keys()  # noqa: SIM118
    assert (directory / "README.md").read_text().startswith("---\n")


def test_bert_without_token_types_gets_a_row_of_zeros(tmp_path, make_model):
    module, params = make_model(type_vocab_size=0, layer_norm_eps=1e-5)
    save_pretrained(module, params, tmp_path / "model")
    again, read = from_pretrained(tmp_path / "model")
    assert again.config == module.config.replace(type_vocab_size=1)
    assert not read["encoder"]["embeddings"].pop("token_type")["embedding"].any()
    assert_equal(read, params)


def test_pooler_of_a_masked_lm_is_left_out(tmp_path, make_model):
    module, params = make_model(pooler=True)
    save_pretrained(module, params, tmp_path / "model")
    again, read = from_pretrained(tmp_path / "model")
    assert again.config == module.config.replace(pooler=False)
    del params["encoder"]["pooler"]
    assert_equal(read, params)


def test_compute_dtype_and_device_arrays(tmp_path, make_model):
    module, params = make_model()
    save_pretrained(module, jax.device_put(params), tmp_path / "model")
    again, read = from_pretrained(tmp_path / "model", dtype="bfloat16")
    assert again.dtype == "bfloat16"
    assert_equal(read, params)


def test_head_choices(tmp_path, make_model):
    module, params = make_model(head=False, pooler=True)
    save_pretrained(module, params, tmp_path / "encoder")
    with pytest.raises(
        UserError, match=r"encoder has no masked-LM head.*distiljax pretrain .*--config\.model="
    ):
        from_pretrained(tmp_path / "encoder")
    with pytest.raises(UserError, match="head is 'squad'; expected one of masked_lm, any, "):
        from_pretrained(tmp_path / "encoder", head="squad")
    adapted, read = from_pretrained(tmp_path / "encoder", init_head=True, seed=3)
    assert isinstance(adapted, MaskedLM) and not adapted.config.pooler
    del params["pooler"]
    assert_equal(read["encoder"], params)
    assert_equal(read["head"], fresh_head(adapted.config, 3))
    shapes = jax.eval_shape(adapted.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    assert jax.tree.map(np.shape, read) == jax.tree.map(lambda x: x.shape, shapes)
    assert read["head"]["transform"]["kernel"].any() and (read["head"]["norm"]["scale"] == 1).all()
    assert not read["head"]["bias"].any() and not read["head"]["transform"]["bias"].any()


def test_fresh_head_is_drawn_from_the_configs_range(make_model):
    module, _ = make_model(hidden_size=120, initializer_range=0.5)
    kernel = fresh_head(module.config, 0)["transform"]["kernel"]
    assert abs(kernel.std() - 0.5) < 0.02 and abs(kernel.mean()) < 0.02
    assert not np.array_equal(kernel, fresh_head(module.config, 1)["transform"]["kernel"])


def test_an_existing_head_is_kept(tmp_path, make_model):
    module, params = make_model()
    save_pretrained(module, params, tmp_path / "model")
    assert_equal(from_pretrained(tmp_path / "model", init_head=True, seed=1)[1], params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "roberta"}, "model_type is 'roberta'; expected bert or distilbert"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "tanh"}, "activation is 'tanh'; expected one of gelu"),
        ({"position_embedding_type": "relative_key"}, "expected absolute"),
        ({"is_decoder": True}, "expected an encoder"),
        ({"num_attention_heads": 5}, "hidden_size 12 does not divide by num_heads 5"),
        ({"hidden_size": "12"}, "config.json"),
        ({"hidden_size": 24}, r"has shape \[.*12\]; expected \[.*24\]"),
        ({"vocab_size": 20}, r"has shape \[19, 12\]; expected \[20, 12\]"),
        ({"num_hidden_layers": 3}, r"lacks the weight 'bert\.encoder\.layer\.2\."),
        ({"num_hidden_layers": 1}, r"bert\.encoder\.layer\.1\..*no place for"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings false"),
    ],
)
def test_configs_that_do_not_fit(tmp_path, make_model, edit_json, changes, message):
    module, params = make_model()
    save_pretrained(module, params, tmp_path / "model")
    edit_json(tmp_path / "model" / "config.json", **changes)
    with pytest.raises(UserError, match=message) as error:
        from_pretrained(tmp_path / "model")
    assert "\n" not in str(error.value)


def test_untied_flag_with_an_equal_decoder(tmp_path, make_model, edit_json):
    module, params = make_model()
    save_pretrained(module, params, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    decoder = {"cls.predictions.decoder.weight": weights["bert.embeddings.word_embeddings.weight"]}
    save_file(weights | decoder, path)
    edit_json(tmp_path / "model" / "config.json", tie_word_embeddings=False)
    assert_equal(from_pretrained(tmp_path / "model")[1], params)
    # The encoder alone does not care.
    save_file(weights, path)
    assert_equal(from_pretrained(tmp_path / "model", head=None)[1], params["encoder"])


def test_positions_of_sinusoidal_distilbert(tmp_path, make_model, distilbert):
    module, params = make_model(**distilbert, position_kind="sinusoidal")
    params["encoder"]["embeddings"]["position"]["embedding"] = sinusoidal_positions(16, 12)
    save_pretrained(module, params, tmp_path / "model")
    again, read = from_pretrained(tmp_path / "model")
    assert again.config.position_kind == "sinusoidal"
    np.testing.assert_array_equal(
        read["encoder"]["embeddings"]["position"]["embedding"], sinusoidal_positions(16, 12)
    )


def tree_of(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def test_existing_directories(tmp_path, make_model):
    module, params = make_model()
    (tmp_path / "empty").mkdir()
    save_pretrained(module, params, tmp_path / "empty")
    before = tree_of(tmp_path)
    with pytest.raises(UserError, match="is not empty"):
        save_pretrained(module, params, tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        save_pretrained(module, params, tmp_path / "file")
    with pytest.raises(UserError, match="cannot write"):
        save_pretrained(module, params, tmp_path / "file" / "model")
    assert tree_of(tmp_path) == before | {"file": b""}

    (tmp_path / "empty" / "model-00001-of-00002.safetensors").write_text("old")
    other, other_params = make_model(seed=1, num_layers=1)
    save_pretrained(other, other_params, tmp_path / "empty", overwrite=True)
    assert sorted(os.listdir(tmp_path / "empty")) == ["config.json", "model.safetensors"]
    assert_equal(from_pretrained(tmp_path / "empty")[1], other_params)


def test_overwrite_spares_what_is_no_model(tmp_path, make_model):
    module, params = make_model()
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="something else than a model"):
        save_pretrained(module, params, tmp_path, overwrite=True)
    assert os.listdir(tmp_path) == ["thesis.txt"]
    save_pretrained(module, params, tmp_path / "model")
    (tmp_path / "thesis.txt").rename(tmp_path / "model" / "thesis.txt")
    with pytest.raises(UserError, match="holds 'thesis.txt' beside a model"):
        save_pretrained(module, params, tmp_path / "model", overwrite=True)
    assert (tmp_path / "model" / "thesis.txt").read_text() == "years of work"


class BrokenTokenizer:
    """Passes the checks and fails while its files are written."""

    pad_token_id = 0

    def get_vocab(self):
        return {"[PAD]": 0, "a": 1, "b": 2}

    def save_pretrained(self, directory):
        (directory / "tokenizer.json").write_text("{")
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_half_written(tmp_path, make_model, overwrite):
    module, params = make_model()
    if overwrite:
        save_pretrained(module, params, tmp_path / "model")
    before = tree_of(tmp_path)
    with pytest.raises(UserError, match="cannot write .*No space left on device"):
        save_pretrained(module, params, tmp_path / "model", tokenizer=BrokenTokenizer(), overwrite=overwrite)
    assert tree_of(tmp_path) == before
    assert os.listdir(tmp_path) == (["model"] if overwrite else [])


def test_the_old_model_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, make_model, monkeypatch):
    module, params = make_model()
    save_pretrained(module, params, tmp_path / "model")
    before = tree_of(tmp_path)

    def fail(self, target):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UserError, match="Input/output error"):
        save_pretrained(*make_model(seed=1), tmp_path / "model", overwrite=True)
    assert tree_of(tmp_path) == before and os.listdir(tmp_path) == ["model"]


def test_parameters_of_another_module(tmp_path, make_model):
    module, params = make_model()
    extra = {**params, "projection": {"kernel": np.ones((2, 2))}}
    with pytest.raises(UserError, match="hold the unknown 'projection/kernel'; expected those of MaskedLM"):
        save_pretrained(module, extra, tmp_path / "model")
    with pytest.raises(UserError, match="lack 'head/bias'"):
        save_pretrained(module, {"encoder": params["encoder"], "head": {}}, tmp_path / "model")
    wrong = {**params, "head": {**params["head"], "bias": np.ones(3)}}
    with pytest.raises(UserError, match=r"'head/bias' has shape \[3\]; expected \[19\]"):
        save_pretrained(module, wrong, tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_tokenizer_of_another_model(tmp_path, make_model, vocabulary_dir):
    module, params = make_model(vocab_size=18)
    with pytest.raises(UserError, match="tokenizer has 19 tokens, the model only 18"):
        save_pretrained(module, params, tmp_path / "model", tokenizer=load_tokenizer(vocabulary_dir))
    assert os.listdir(tmp_path) == []
