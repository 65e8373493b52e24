"""What the keys `attention` and `remat` of a run do to its models."""

import jax.numpy as jnp
import pytest

import distiljax
from distiljax.distill.runs import kernels_in_words, with_kernels
from distiljax.distill.step import Models
from distiljax.errors import UserError
from distiljax.nn import EncoderConfig, MaskedLM

MODELS = Models(*(MaskedLM(EncoderConfig(num_layers=n), jnp.bfloat16) for n in (1, 2)))
UNDROPPED = Models(MODELS.teacher.clone(config=EncoderConfig(num_layers=1, attention_dropout=0.0)))
ON_TPU = ("tpu", 8, [512])


def run(**changes):
    config = distiljax.distill_config()
    config.update(changes)
    return config


def test_both_models_take_the_kernel_and_the_student_alone_rematerialises():
    models = with_kernels(run(), MODELS)
    assert (models.student.attention, models.student.remat) == ("auto", False)
    models = with_kernels(run(attention="plain", remat=True), MODELS)
    assert models.student.attention == models.teacher.attention == "plain"
    assert models.student.remat and not models.teacher.remat
    assert with_kernels(run(), Models(MODELS.student)).teacher is None


def test_the_log_line_says_which_and_why():
    line = kernels_in_words(with_kernels(run(), MODELS), *ON_TPU)
    assert line == (
        "student plain (no fused kernel drops attention weights (attention_dropout 0.1)), "
        "teacher splash (fused on tpu in bfloat16)"
    )


def test_models_spread_over_devices_are_left_to_the_compiler():
    models = with_kernels(run(), MODELS)
    assert kernels_in_words(models, *ON_TPU, spread=True).endswith(
        "teacher plain (the compiler cannot split a fused kernel over devices)"
    )
    with pytest.raises(UserError, match="attention is fused, but the compiler cannot split"):
        kernels_in_words(with_kernels(run(attention="fused"), UNDROPPED), *ON_TPU, spread=True)


@pytest.mark.parametrize(
    ("attention", "words"),
    [("fused", "attention is fused, but no fused kernel drops"), ("fast", "attention is 'fast'; expected")],
)
def test_what_cannot_be_is_refused(attention, words):
    with pytest.raises(UserError, match=words):
        kernels_in_words(with_kernels(run(attention=attention), MODELS), *ON_TPU)
