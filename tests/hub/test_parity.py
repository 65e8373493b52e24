"""The same outputs as transformers, on random and on real weights, in both directions."""

import numpy as np
import pytest

from distiljax.hub import from_pretrained, load_tokenizer, save_pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4

# (kind, head?, Hugging Face config)
SHAPES = {
    "bert": ("bert", True, {}),
    "bert one layer, wide feed-forward": ("bert", True, {"num_hidden_layers": 1, "intermediate_size": 77}),
    "bert one head, gelu_new": ("bert", True, {"num_attention_heads": 1, "hidden_act": "gelu_new"}),
    "bert relu, large eps, one token type": (
        "bert",
        True,
        {"hidden_act": "relu", "layer_norm_eps": 1e-3, "type_vocab_size": 1},
    ),
    "bert silu, deep and narrow": (
        "bert",
        True,
        {"hidden_act": "silu", "hidden_size": 6, "num_attention_heads": 6, "num_hidden_layers": 7},
    ),
    "bert odd vocabulary, four token types": (
        "bert",
        True,
        {"vocab_size": 101, "type_vocab_size": 4, "max_position_embeddings": 13, "pad_token_id": 3},
    ),
    "bert encoder with pooler": ("bert", False, {"hidden_size": 20, "num_attention_heads": 4}),
    "bert no layers": ("bert", True, {"num_hidden_layers": 0}),
    "distilbert": ("distilbert", True, {}),
    "distilbert sinusoidal": ("distilbert", True, {"sinusoidal_pos_embds": True, "dim": 10, "n_heads": 5}),
    "distilbert one layer, relu": (
        "distilbert",
        True,
        {"n_layers": 1, "activation": "relu", "vocab_size": 67},
    ),
    "distilbert gelu_new, deep": (
        "distilbert",
        True,
        {"n_layers": 5, "activation": "gelu_new", "hidden_dim": 9},
    ),
    "distilbert encoder": ("distilbert", False, {"activation": "silu", "max_position_embeddings": 12}),
}
BERT_BASE = {
    "vocab_size": 50,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 31,
    "max_position_embeddings": 19,
}
DISTILBERT_BASE = {
    "vocab_size": 50,
    "dim": 12,
    "n_layers": 2,
    "n_heads": 3,
    "hidden_dim": 31,
    "max_position_embeddings": 19,
}


def hf_model(kind, head, changes):
    if kind == "bert":
        config = transformers.BertConfig(**{**BERT_BASE, **changes})
        return (transformers.BertForMaskedLM if head else transformers.BertModel)(config)
    config = transformers.DistilBertConfig(**{**DISTILBERT_BASE, **changes})
    return (transformers.DistilBertForMaskedLM if head else transformers.DistilBertModel)(config)


def inputs_for(config, seed=0):
    rng = np.random.default_rng(seed)
    length = config.max_position_embeddings
    ids = rng.integers(0, config.vocab_size, (4, length)).astype(np.int32)
    mask = (np.arange(length) < np.array([[length], [length - 3], [4], [1]])).astype(np.int32)
    ids[mask == 0] = config.pad_token_id
    inputs = {"input_ids": ids, "attention_mask": mask}
    if config.model_type == "bert":
        inputs["token_type_ids"] = rng.integers(0, config.type_vocab_size, ids.shape).astype(np.int32)
    return inputs


def _tensors(inputs):
    return {name: torch.from_numpy(x).long() for name, x in inputs.items()}


def check_same(module, params, model, inputs):
    """Every hidden state, logits and pooled vectors, at all positions, padding too."""
    ours = module.apply({"params": params}, **inputs)
    with torch.no_grad():
        theirs = model.eval()(**_tensors(inputs), output_hidden_states=True)
    if module.config.num_layers == 0:  # transformers records no hidden states without a layer
        assert "logits" in theirs and len(ours.hidden_states) == 1 and not theirs.hidden_states
        theirs.hidden_states = (model.base_model(**_tensors(inputs)).last_hidden_state.detach(),)
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert np.abs(np.asarray(mine) - other.numpy()).max() <= TOLERANCE
    if "logits" in theirs:
        assert np.abs(np.asarray(ours.logits) - theirs.logits.numpy()).max() <= TOLERANCE
    if theirs.get("pooler_output") is not None:
        assert np.abs(np.asarray(ours.pooled) - theirs.pooler_output.numpy()).max() <= TOLERANCE


@pytest.mark.parametrize("name", SHAPES)
def test_random_models(name, tmp_path, randomise):
    """Theirs read by us, then ours read by them."""
    kind, head, changes = SHAPES[name]
    model = randomise(hf_model(kind, head, changes))
    inputs = inputs_for(model.config)
    model.save_pretrained(tmp_path / "theirs")
    module, params = from_pretrained(tmp_path / "theirs", head="masked_lm" if head else None)
    check_same(module, params, model, inputs)

    save_pretrained(module, params, tmp_path / "ours")
    auto = transformers.AutoModelForMaskedLM if head else transformers.AutoModel
    again, info = auto.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    check_same(module, params, again, inputs)
    assert type(again) is type(model)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    # The two config.json differ in nothing that transformers acts on.
    ignored = {"dtype", "transformers_version", "_name_or_path", "architectures"}
    ours, theirs = (
        {k: v for k, v in c.to_dict().items() if k not in ignored} for c in (again.config, model.config)
    )
    assert ours == theirs


def test_defaults_without_a_mask(tmp_path, randomise):
    model = randomise(hf_model("bert", True, {}))
    model.save_pretrained(tmp_path)
    module, params = from_pretrained(tmp_path)
    check_same(module, params, model, {"input_ids": np.arange(14, dtype=np.int32).reshape(2, 7)})


def test_encoder_of_a_masked_lm(tmp_path, randomise):
    """head=None on a checkpoint with a head gives its encoder."""
    model = randomise(hf_model("distilbert", True, {}))
    model.save_pretrained(tmp_path)
    module, params = from_pretrained(tmp_path, head=None)
    assert not module.config.pooler and set(params) == {"embeddings", "layer_0", "layer_1"}
    check_same(module, params, model.distilbert, inputs_for(model.config))


def test_shape_without_token_types_that_only_bert_holds(tmp_path, make_model):
    """No token types but another epsilon: goes out as BERT with one row of zeros, to the same outputs."""
    module, params = make_model(type_vocab_size=0, layer_norm_eps=1e-5)
    save_pretrained(module, params, tmp_path / "model")
    model, info = transformers.AutoModelForMaskedLM.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert model.config.model_type == "bert" and not any(info.values()), info
    check_same(module, params, model, {"input_ids": np.arange(10, dtype=np.int32).reshape(2, 5)})


def test_real_encoder_on_real_text(minilm_dir):
    module, params = from_pretrained(minilm_dir, head=None)
    assert module.config.pooler
    tokenizer = load_tokenizer(minilm_dir)
    texts = [
        "The Danube is the second-longest river in Europe, after the Volga in Russia.",
        "Return the index of the first element that is not smaller than the given value.",
        "Yes.",
    ]
    encoded = tokenizer(texts, padding=True, return_tensors="np")
    model = transformers.AutoModel.from_pretrained(minilm_dir)
    check_same(module, params, model, {name: x.astype(np.int32) for name, x in encoded.items()})


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_fill_mask_pipeline(kind, tmp_path, make_model, distilbert, vocabulary_dir):
    """The directory works in transformers as it is, with the answers that we compute."""
    module, params = make_model(**(distilbert if kind == "distilbert" else {}))
    tokenizer = load_tokenizer(vocabulary_dir)
    save_pretrained(module, params, tmp_path / "model", tokenizer=tokenizer)
    fill = transformers.pipeline("fill-mask", model=str(tmp_path / "model"))
    answers = fill("the [MASK] runs .", top_k=3)
    ids = tokenizer("the [MASK] runs .", return_tensors="np")["input_ids"]
    logits = np.asarray(module.apply({"params": params}, ids.astype(np.int32)).logits)[0, 2]
    assert [answer["token"] for answer in answers] == list(np.argsort(-logits)[:3])
    assert fill.tokenizer.model_max_length == module.config.max_positions
