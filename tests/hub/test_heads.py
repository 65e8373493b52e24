"""Heads of tasks: the same logits as transformers in both directions, labels, fresh heads, and what is refused."""

import json

import jax
import numpy as np
import pytest

from distiljax import from_pretrained, save_pretrained
from distiljax.errors import UserError
from distiljax.hub.heads import auto_class
from distiljax.nn import EncoderConfig, HeadConfig, MaskedLM, TaskModel

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5
LABELS = {"sequence_classification": ("good", "bad", "so so"), "token_classification": ("O", "B-X", "I-X")}
SIZES = {
    "bert": {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20},
    "distilbert": {"dim": 12, "n_layers": 2, "n_heads": 3, "hidden_dim": 20},
}
CLASSES = {
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
}


@pytest.fixture(params=[(a, k) for a in SIZES for k in CLASSES], ids="-".join)
def case(request, randomise, tmp_path):
    """(kind, a model of transformers with that head, the directory that it was saved to)."""
    architecture, kind = request.param
    labels = dict(enumerate(LABELS.get(kind, ("LABEL_0", "LABEL_1"))))
    config = transformers.AutoConfig.for_model(
        architecture,
        vocab_size=31,
        max_position_embeddings=16,
        id2label=labels,
        label2id={label: i for i, label in labels.items()},
        **SIZES[architecture],
    )
    model = randomise(getattr(transformers, CLASSES[kind]).from_config(config))
    model.save_pretrained(tmp_path / "theirs")
    return kind, model, tmp_path / "theirs"


def batch(seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 31, (3, 16)).astype(np.int32)
    mask = (np.arange(16) < np.array([[16], [9], [1]])).astype(np.int32)
    return {"input_ids": ids, "attention_mask": mask}, rng.integers(0, 2, ids.shape).astype(np.int32)


def check_same(module, params, model):
    inputs, types = batch()
    if model.config.model_type == "bert":
        inputs["token_type_ids"] = types
    ours = np.asarray(module.apply({"params": params}, **inputs))
    with torch.no_grad():
        theirs = model.eval()(**{name: torch.from_numpy(x).long() for name, x in inputs.items()})
    if module.head.kind == "question_answering":
        expected = torch.stack([theirs.start_logits, theirs.end_logits], -1).numpy()
    else:
        expected = theirs.logits.numpy()
    assert ours.shape == expected.shape and ours.dtype == np.float32
    assert np.abs(ours - expected).max() <= TOLERANCE


def test_the_same_logits_in_both_directions(case, tmp_path):
    kind, model, theirs = case
    module, params = from_pretrained(theirs, head="any")
    assert isinstance(module, TaskModel) and module.head.kind == kind
    assert module.head.labels == LABELS.get(kind, ())
    check_same(module, params, model)

    save_pretrained(module, params, tmp_path / "ours")
    assert auto_class(json.loads((tmp_path / "ours" / "config.json").read_text())) == CLASSES[kind]
    auto = getattr(transformers, CLASSES[kind])
    again, info = auto.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert type(again) is type(model)
    check_same(module, params, again)
    if kind in LABELS:
        assert again.config.id2label == dict(enumerate(LABELS[kind]))
        assert again.config.label2id == model.config.label2id
    read, back = from_pretrained(tmp_path / "ours", head=kind)
    # The drop rates that transformers leaves to its defaults stand in what we write.
    assert read.head.dropout_rate(read.config) == module.head.dropout_rate(module.config)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_heads_are_told_apart(case):
    kind, _, theirs = case
    for other in {*CLASSES, "masked_lm"} - {kind}:
        command = "pretrain" if other == "masked_lm" else "finetune"
        with pytest.raises(UserError, match=f"has no .*head.*distiljax {command} .*--config.model="):
            from_pretrained(theirs, head=other)
    encoder, params = from_pretrained(theirs, head=None)
    assert "head" not in params and encoder.config.num_layers == 2


WANTED = {
    "token_classification": HeadConfig("sequence_classification", ("yes", "no")),
    "question_answering": HeadConfig("sequence_classification", ("score",), regression=True),
    "sequence_classification": HeadConfig("token_classification", ("O", "B-Y", "I-Y")),
}


def test_a_fresh_head_keeps_the_encoder(case):
    kind, _, theirs = case
    _, params = from_pretrained(theirs, head=kind)
    wanted = WANTED[kind]
    with pytest.raises(UserError, match="distiljax finetune"):
        from_pretrained(theirs, head=wanted)
    module, read = from_pretrained(theirs, head=wanted, init_head=True, seed=5)
    assert module.head == wanted
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    assert jax.tree.map(np.shape, read) == jax.tree.map(lambda x: x.shape, shapes)
    for name, weights in params["encoder"].items():
        if name in read["encoder"]:
            jax.tree.map(np.testing.assert_array_equal, read["encoder"][name], weights)
    classifier = read["head"]["classifier"]
    assert classifier["kernel"].std() > 0 and not classifier["bias"].any()
    again = from_pretrained(theirs, head=wanted, init_head=True, seed=5)[1]
    jax.tree.map(np.testing.assert_array_equal, again, read)


def test_a_head_that_fits_goes_on(case):
    kind, _, theirs = case
    wanted = HeadConfig(kind, LABELS.get(kind, ()))
    _, params = from_pretrained(theirs, head=kind)
    read = from_pretrained(theirs, head=wanted, init_head=True)[1]
    jax.tree.map(np.testing.assert_array_equal, read, params)
    if kind in LABELS:
        # Other names are another task, even if there are as many.
        renamed = HeadConfig(kind, LABELS[kind][::-1])
        read = from_pretrained(theirs, head=renamed, init_head=True)[1]
        assert not np.array_equal(
            read["head"]["classifier"]["kernel"], params["head"]["classifier"]["kernel"]
        )


@pytest.mark.parametrize("pooler", [True, False])
def test_a_bert_without_a_pooler_gets_one(make_model, tmp_path, pooler):
    module, params = make_model(head=False, pooler=pooler)
    save_pretrained(module, params, tmp_path / "encoder")
    wanted = HeadConfig("sequence_classification", ("a", "b"))
    model, read = from_pretrained(tmp_path / "encoder", head=wanted, init_head=True)
    assert model.config.pooler
    kernel = read["encoder"]["pooler"]["kernel"]
    assert np.array_equal(kernel, params["pooler"]["kernel"]) if pooler else 0 < kernel.std() < 0.1
    tokens, read = from_pretrained(
        tmp_path / "encoder", head=HeadConfig("token_classification", ("O", "B")), init_head=True
    )
    assert not tokens.config.pooler and "pooler" not in read["encoder"]


def test_a_masked_lm_head_is_replaced(make_model, distilbert, tmp_path):
    module, params = make_model(**distilbert)
    save_pretrained(module, params, tmp_path / "model")
    assert isinstance(from_pretrained(tmp_path / "model", head="any")[0], MaskedLM)
    wanted = HeadConfig("sequence_classification", ("a", "b"))
    model, read = from_pretrained(tmp_path / "model", head=wanted, init_head=True)
    assert set(read["head"]) == {"transform", "classifier"} and not model.config.pooler
    jax.tree.map(np.testing.assert_array_equal, read["encoder"], params["encoder"])


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"0": "a", "2": "b"}, "id2label is"),
        ({"0": "a"}, "names 1 labels.*3 outputs"),
        (["a"], "id2label is"),
    ],
)
def test_labels_that_do_not_fit(case, labels, words):
    kind, _, theirs = case
    if kind == "question_answering":
        pytest.skip("has no labels")
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps({**config, "id2label": labels}))
    with pytest.raises(UserError, match=words):
        from_pretrained(theirs, head=kind)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "summarisation"}, "summarisation"),
        ({"kind": "sequence_classification"}, "0 labels"),
        ({"kind": "question_answering", "labels": ("a",)}, "1 labels"),
        ({"kind": "token_classification", "labels": ("a",), "regression": True}, "regression"),
        ({"kind": "question_answering", "dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_bad_heads(fields, words):
    with pytest.raises(ValueError, match=words):
        HeadConfig(**fields)


@pytest.mark.parametrize("kind", CLASSES)
def test_the_architecture_decides_the_drop_rate(kind):
    head = HeadConfig(kind, LABELS.get(kind, ()))
    bert = EncoderConfig(hidden_dropout=0.3)
    distilbert = bert.replace(type_vocab_size=0)
    expected = {"sequence_classification": (0.3, 0.2), "token_classification": (0.3, 0.3)}
    rates = expected.get(kind, (0.0, 0.1))
    assert (head.dropout_rate(bert), head.dropout_rate(distilbert)) == rates
    fixed = HeadConfig(kind, LABELS.get(kind, ()), dropout=0.05)
    assert fixed.dropout_rate(bert) == fixed.dropout_rate(distilbert) == 0.05
