"""Work and memory counted from shapes: by hand, and against what compilers make of the step."""

import jax
import pytest

import distiljax
from distiljax.plan import analytic
from distiljax.plan.hlo import Program as XlaProgram
from distiljax.plan.program import load_program

E, F, V, S, B, K = 32, 64, 384, 32, 32, 5  # K = ⌈0.15 · 32⌉


def test_the_recipes_work_by_hand(config):
    parts = analytic.step_flops(load_program(config))
    tokens = B * S
    dense, attention, decode = 2 * (4 * E * E + 2 * E * F), 4 * S * E, 2 * E * (E + V)
    assert parts == {
        "student_encoder": 3 * tokens * dense,
        "student_attention": 3 * tokens * attention,
        "student_decoder": 3 * decode * tokens,
        "teacher_encoder": 2 * tokens * dense,
        "teacher_attention": 2 * tokens * attention,
        "teacher_decoder": decode * tokens,
    }


def test_base_size_work_a_token_is_what_is_known_of_it(recipe):
    parts = analytic.step_flops(recipe)
    tokens = recipe.batch_size * recipe.seq_len
    a_token = {name: flops / tokens / 1e6 for name, flops in parts.items()}
    attention = a_token.pop("student_attention") + a_token.pop("teacher_attention")
    assert attention == pytest.approx(47, abs=1)
    # As if every parameter were used once a token: position embeddings, which are not, are few.
    assert sum(a_token.values()) == pytest.approx(617, abs=1)


def cpu_profile(program, devices, micro_batch_size):
    lowered = program.lower(jax.devices()[:devices], micro_batch_size)
    # The machine code is not wanted, and takes longest.
    return XlaProgram(lowered.compile(QUICK).as_text()).profile()


QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# The recipe itself is compiled by the TPU compiler in test_planner.py.
RECIPES = {
    "masked positions only": {"loss.ce_positions": "masked"},
    "logit MSE alone, a narrower student": {
        "loss.ce": 0.0,
        "loss.mlm": 0.0,
        "loss.mse": 1.0,
        "student.hidden_size": 16,
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_compilers_matrix_products_are_those_counted(config, name):
    """XLA:CPU, in float32: every product of the step, forward and backward, is in the count, and nothing else."""
    config.update_from_flattened_dict(RECIPES[name])
    config.dtype = "float32"
    program = load_program(config)
    profile = cpu_profile(program, 2, 8)  # of 40 masked positions, which need no filling up
    assert 2 * profile.matrix_flops == pytest.approx(sum(analytic.step_flops(program).values()), rel=1e-3)
    reduced = sum(c.elements for c in profile.collectives if not c.in_loop)
    assert analytic.count(program.params) <= reduced <= analytic.count(program.params) + 100
    assert not any(c.in_loop for c in profile.collectives)


def test_a_masked_language_model_run(teacher):
    config = distiljax.pretrain_config()
    config.model, config.dtype = teacher, "float32"
    config.data.seq_len, config.batch_size = S, B
    config.hidden_dropout = config.attention_dropout = 0.0
    program = load_program(config)
    assert program.teacher_params is None and program.models.student.config.num_layers == 2
    profile = cpu_profile(program, 1, B)
    assert profile.matrix_flops == pytest.approx(sum(analytic.step_flops(program).values()), rel=1e-3)


def test_state_and_gradients_are_four_copies_of_the_student(recipe):
    state = analytic.state_bytes(recipe)
    kernels = 12 * (4 * 768 * 768 + 2 * 768 * 3072)  # of the teacher, in bfloat16
    teacher = 4 * 109_514_298 - 2 * kernels
    assert state == {"parameters": 4 * 66_985_530, "optimizer": 8 * 66_985_530, "teacher": teacher}
    assert analytic.gradient_bytes(recipe) == 4 * 66_985_530
    assert analytic.sent_bytes(100.0, 4) == 150.0 and analytic.sent_bytes(100.0, 1) == 0.0


def test_the_estimate_of_temporaries_is_near_what_the_tpu_compiler_needs(recipe):
    # The recipe at 16 rows of 512 on a v5e: 4.11 GB by the compiler, at 32 rows 6.54 GB.
    assert analytic.temporary_bytes(recipe, 16, fused=False) == pytest.approx(4.11e9, rel=0.25)
    assert analytic.temporary_bytes(recipe, 32, fused=False) == pytest.approx(6.54e9, rel=0.25)
