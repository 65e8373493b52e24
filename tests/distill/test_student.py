import jax
import numpy as np
import pytest
from flax import traverse_util

from distiljax.distill.student import layer_choice, student_of
from distiljax.errors import UserError
from distiljax.nn import EncoderConfig, MaskedLM

CONFIG = EncoderConfig(
    vocab_size=50, hidden_size=24, num_layers=6, num_heads=4, intermediate_size=40, max_positions=16
)


@pytest.fixture(scope="module")
def teacher():
    module = MaskedLM(CONFIG)
    params = jax.device_get(module.init(jax.random.key(0), np.zeros((1, 4), np.int32))["params"])
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    return module, jax.tree.map(lambda x: np.asarray(jax.random.normal(next(keys), x.shape)), params)


def test_layer_choice_is_the_originals_and_spreads_evenly():
    assert layer_choice(12) == (0, 2, 4, 7, 9, 11)
    assert layer_choice(24)[0] == 0 and layer_choice(24)[-1] == 23 and len(layer_choice(24)) == 12
    for depth in range(2, 30):
        for n in range(2, depth + 1):
            chosen = layer_choice(depth, n)
            assert len(set(chosen)) == n and chosen == tuple(sorted(chosen))
            assert chosen[0] == 0 and chosen[-1] == depth - 1
    assert layer_choice(12, (1, 3)) == (1, 3)
    assert layer_choice(12, 1) == (0,) and layer_choice(1) == (0,)


@pytest.mark.parametrize("layers", [0, 7, -1, (0, 6), (-1,), ()])
def test_layers_outside_the_teacher_are_refused(layers):
    with pytest.raises(UserError, match="expected"):
        layer_choice(6, layers)


def test_half_depth_student_copies_layers_embeddings_and_head(teacher):
    module, params = teacher
    student, copied = student_of(module, params)
    assert student.config.num_layers == 3 and student.config.type_vocab_size == 0
    assert student.config.model_type == "distilbert"
    for ours, theirs in ((0, 0), (1, 2), (2, 5)):
        jax.tree.map(
            np.testing.assert_array_equal,
            copied["encoder"][f"layer_{ours}"],
            params["encoder"][f"layer_{theirs}"],
        )
    jax.tree.map(np.testing.assert_array_equal, copied["head"], params["head"])
    shapes = jax.eval_shape(student.init, jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    assert jax.tree.map(lambda x: x.shape, copied) == jax.tree.map(lambda x: x.shape, shapes)


def test_folding_keeps_the_embeddings_and_dropping_does_not(teacher):
    module, params = teacher
    ids = np.arange(12, dtype=np.int32).reshape(2, 6)
    embeddings = module.apply({"params": params}, ids).hidden_states[0]

    def of_student(token_types):
        student, copied = student_of(module, params, token_types=token_types)
        return student.apply({"params": copied}, ids).hidden_states[0]

    np.testing.assert_allclose(of_student("fold"), embeddings, atol=1e-5)
    np.testing.assert_allclose(of_student("keep"), embeddings, atol=1e-6)
    assert np.abs(np.asarray(of_student("drop")) - embeddings).max() > 0.1


def test_full_depth_student_is_the_teacher(teacher):
    module, params = teacher
    ids = np.arange(12, dtype=np.int32).reshape(2, 6)
    student, copied = student_of(module, params, 6)
    np.testing.assert_allclose(
        student.apply({"params": copied}, ids).logits, module.apply({"params": params}, ids).logits, atol=1e-4
    )


def test_a_narrower_student_keeps_what_fits(teacher):
    module, params = teacher
    student, copied = student_of(module, params, hidden_size=16, num_heads=2, intermediate_size=20)
    np.testing.assert_array_equal(copied["head"]["bias"], params["head"]["bias"])
    assert copied["encoder"]["embeddings"]["word"]["embedding"].shape == (50, 16)
    assert student.apply({"params": copied}, np.ones((1, 4), np.int32)).logits.shape == (1, 4, 50)


def test_random_initialisation_shares_nothing_with_the_teacher(teacher):
    module, params = teacher
    _, fresh = student_of(module, params, initialise="random", seed=3)
    _, other = student_of(module, params, initialise="random", seed=4)
    flat, flat_other = traverse_util.flatten_dict(fresh), traverse_util.flatten_dict(other)
    for path, value in flat.items():
        if path[-1] in ("kernel", "embedding"):
            assert abs(value.std() - 0.02) < 0.01 and (value != flat_other[path]).any()


def test_the_students_parameters_are_its_own(teacher):
    module, params = teacher
    _, copied = student_of(module, params)
    kernel = copied["encoder"]["layer_0"]["ffn"]["up"]["kernel"]
    before = params["encoder"]["layer_0"]["ffn"]["up"]["kernel"].copy()
    kernel += 1
    np.testing.assert_array_equal(params["encoder"]["layer_0"]["ffn"]["up"]["kernel"], before)


@pytest.mark.parametrize("options", [{"token_types": "merge"}, {"initialise": "zeros"}, {"hidden_size": 25}])
def test_bad_options_are_refused(teacher, options):
    with pytest.raises(UserError, match="expected|divide"):
        student_of(*teacher, **options)
