"""The name tables: every row read and written, and every way in which weights can be wrong."""

import re

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util

from distiljax.errors import UserError
from distiljax.hub.names import BERT, DISTILBERT, TABLES, from_params, name_of, path_of, to_params
from distiljax.nn import MaskedLM


@pytest.fixture(params=["bert", "distilbert"])
def case(request, make_model, distilbert):
    """(table, parameters, shapes, Hugging Face weights) of a model in which every row of its table occurs."""
    table = TABLES[request.param]
    module, params = make_model(**({"pooler": True} if request.param == "bert" else distilbert))
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    return table, params, shapes, from_params(table, params, head="masked_lm")


def assert_equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_every_row_is_read_and_written(case):
    table, params, shapes, weights = case
    names = [
        name for row, _, _ in table.rows(head="masked_lm") for name in {row.format(n=0), row.format(n=1)}
    ]
    assert sorted(names) == sorted(weights)
    for name in names:
        path, transpose = path_of(table, name)
        assert name_of(table, path) == (name, transpose)
        array = traverse_util.flatten_dict(params, sep="/")[path]
        np.testing.assert_array_equal(weights[name], array.T if transpose else array)
        assert weights[name].flags.c_contiguous and weights[name].dtype == np.float32
    assert_equal(to_params(table, weights, shapes, "model", head="masked_lm"), params)


def test_tables_are_one_to_one():
    for table in TABLES.values():
        rows = table.rows(head="masked_lm")
        assert len({name for name, _, _ in rows}) == len({path for _, path, _ in rows}) == len(rows)
        # Matrices are turned where, and only where, they are kernels.
        assert all(transpose == path.endswith("/kernel") for _, path, transpose in rows)


def test_without_prefix_and_with_old_spellings(case):
    table, params, shapes, weights = case
    bare = {name.removeprefix(table.prefix): x for name, x in weights.items()}
    assert bare.keys() != weights.keys()
    assert_equal(to_params(table, bare, shapes, "model", head="masked_lm"), params)
    pattern = re.compile(r"((?:LayerNorm|layer_norm))\.(weight|bias)$")
    spelling = {"weight": "gamma", "bias": "beta"}
    old = {pattern.sub(lambda m: f"{m[1]}.{spelling[m[2]]}", name): x for name, x in weights.items()}
    assert len(old.keys() - weights.keys()) == 2 * (2 * 2 + 2)
    assert_equal(to_params(table, old, shapes, "model", head="masked_lm"), params)


def test_expected_keys_are_ignored(case):
    table, params, shapes, weights = case
    extra = {
        f"{table.prefix}embeddings.position_ids": np.arange(16)[None],
        "embeddings.position_ids": np.arange(16),
    }
    if table is BERT:
        extra |= {"cls.seq_relationship.weight": np.ones((2, 12)), "cls.seq_relationship.bias": np.ones(2)}
        # The pooler is not wanted by a masked LM.
        del shapes["encoder"]["pooler"]
        params = {**params, "encoder": {k: x for k, x in params["encoder"].items() if k != "pooler"}}
    assert_equal(to_params(table, weights | extra, shapes, "model", head="masked_lm"), params)


def test_head_is_ignored_where_the_encoder_is_wanted(case):
    table, params, shapes, weights = case
    decoder = {name: np.ones((3, 3)) for name, _ in table.tied}
    read = to_params(table, weights | decoder, {"encoder": shapes["encoder"]}, "model", head=None)
    assert_equal(read, {"encoder": params["encoder"]})


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_have_to_be_equal(case, tied):
    table, params, shapes, weights = case
    flat = traverse_util.flatten_dict(params, sep="/")
    for name, path in table.tied:
        full = weights | {name: flat[path].copy() for name, path in table.tied}
        assert_equal(to_params(table, full, shapes, "model", head="masked_lm", tied=tied), params)
        full[name][(1,) * full[name].ndim] += 1
        with pytest.raises(UserError, match=f"{re.escape(name)}.* differs from .*expected equal"):
            to_params(table, full, shapes, "model", head="masked_lm", tied=tied)
        # A copy stands in for the weight itself.
        del full[name_of(table, path)[0]]
        full[name][(1,) * full[name].ndim] = flat[path][(1,) * flat[path].ndim]
        assert_equal(to_params(table, full, shapes, "model", head="masked_lm"), params)
    if not tied:
        with pytest.raises(UserError, match="tie_word_embeddings false"):
            to_params(table, weights, shapes, "model", head="masked_lm", tied=False)


def test_every_missing_weight_is_named(case):
    table, _, shapes, weights = case
    for name in weights:
        rest = {other: x for other, x in weights.items() if other != name}
        with pytest.raises(UserError, match=f"model lacks the weight '{re.escape(name)}'"):
            to_params(table, rest, shapes, "model", head="masked_lm")


def test_every_wrong_shape_is_named_with_both(case):
    table, _, shapes, weights = case
    for name, array in weights.items():
        wrong = np.ones((array.shape[0] + 1, *array.shape[1:]), np.float32)
        shapes_text = f"{re.escape(str(list(wrong.shape)))}; expected {re.escape(str(list(array.shape)))}"
        with pytest.raises(UserError, match=f"'{re.escape(name)}' has shape {shapes_text}"):
            to_params(table, weights | {name: wrong}, shapes, "model", head="masked_lm")


@pytest.mark.parametrize(
    "name",
    [
        "classifier.scale",
        "bert.embeddings.word_embeddings.weight2",
        "bert.encoder.layer.00.output.dense.bias",
        "bert.encoder.layer.x.output.dense.bias",
        "roberta.embeddings.word_embeddings.weight",
        "bert.cls.predictions.bias",
        "embeddings/word/embedding",
    ],
)
def test_unknown_weights_are_named(case, name):
    table, _, shapes, weights = case
    for wanted, head in ((shapes, "masked_lm"), ({"encoder": shapes["encoder"]}, None)):
        with pytest.raises(UserError, match=f"unknown weight '{re.escape(name)}'"):
            to_params(table, weights | {name: np.ones(12)}, wanted, "model", head=head)


def test_a_layer_too_many_and_a_doubled_weight(case):
    table, _, shapes, weights = case
    first = next(name for name in weights if ".layer.1." in name)
    with pytest.raises(UserError, match="layer.2.* no place for"):
        to_params(
            table, weights | {first.replace(".1.", ".2."): weights[first]}, shapes, "model", head="masked_lm"
        )
    with pytest.raises(UserError, match="twice"):
        to_params(
            table,
            weights | {first.removeprefix(table.prefix): weights[first]},
            shapes,
            "model",
            head="masked_lm",
        )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_float_widths_become_float32(case, dtype):
    table, params, shapes, weights = case
    read = to_params(
        table, {name: x.astype(dtype) for name, x in weights.items()}, shapes, "model", head="masked_lm"
    )
    assert_equal(read, jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), params))
    assert {x.dtype for x in jax.tree.leaves(read)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("dtype", [np.int8, np.int32, bool, ml_dtypes.float8_e4m3fn])
def test_quantised_weights_are_refused(case, dtype):
    table, _, shapes, weights = case
    with pytest.raises(UserError, match="expected float32, float16 or bfloat16"):
        to_params(
            table, {name: x.astype(dtype) for name, x in weights.items()}, shapes, "model", head="masked_lm"
        )


def test_unknown_parameters_have_no_name():
    with pytest.raises(KeyError):
        name_of(DISTILBERT, "encoder/pooler/kernel")
    assert path_of(DISTILBERT, "distilbert.pooler.dense.weight") is None


def test_table_covers_every_parameter_of_the_modules(make_model, distilbert):
    for table, changes in ((BERT, {"pooler": True}), (DISTILBERT, distilbert)):
        module, params = make_model(num_layers=11, **changes)
        assert isinstance(module, MaskedLM)
        assert len(from_params(table, params, head="masked_lm")) == len(jax.tree.leaves(params))
