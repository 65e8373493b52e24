"""What a step computes and holds, counted from the shapes of the models and the recipe."""

from __future__ import annotations

import jax.numpy as jnp

from distiljax.nn import EncoderConfig
from distiljax.plan.program import Program, count

# Backward is two products for each of the forward's: the gradient of the activations and of the weights.
_TRAINED = 3


def encoder_flops(config: EncoderConfig, seq_len: int) -> tuple[float, float]:
    """FLOP of one token's forward pass: the layers' dense products, and attention's two products of [S, S]."""
    width, inner = config.hidden_size, config.intermediate_size
    dense = 2.0 * (4 * width * width + 2 * width * inner)  # query, key, value, output; up, down
    attention = 2.0 * 2 * seq_len * width  # query · keyᵀ and weights · value
    return config.num_layers * dense, config.num_layers * attention


def decode_flops(config: EncoderConfig) -> float:
    """FLOP of one position's masked-LM head: the transform and the projection on the vocabulary."""
    return 2.0 * config.hidden_size * (config.hidden_size + config.vocab_size)


def step_flops(program: Program) -> dict[str, float]:
    """Matrix products of one optimiser step over the whole batch, by part; padding is computed like any token.

    The step decodes the masked positions of both models in any case (L_mlm, accuracy, agreement), and every position
    once more where L_ce or L_mse run over all of them.
    """
    recipe, S = program.recipe, program.seq_len
    tokens = float(program.batch_size * S)
    masked = float(program.batch_size * program.masking.max_masked(S))
    student, teacher = program.models.student.config, program.models.teacher
    soft = teacher is not None and (recipe.ce > 0 or recipe.mse > 0)
    everywhere = tokens if soft and recipe.ce_positions == "all" else 0.0
    # Logits that reach no loss are only a metric, without a gradient.
    masked_trained = recipe.mlm > 0 or (soft and recipe.ce_positions == "masked")
    dense, attention = encoder_flops(student, S)
    parts = {
        "student_encoder": _TRAINED * tokens * dense,
        "student_attention": _TRAINED * tokens * attention,
        "student_decoder": decode_flops(student)
        * (_TRAINED * everywhere + (_TRAINED if masked_trained else 1) * masked),
    }
    if teacher is not None:
        dense, attention = encoder_flops(teacher.config, S)
        parts["teacher_encoder"] = tokens * dense
        parts["teacher_attention"] = tokens * attention
        parts["teacher_decoder"] = decode_flops(teacher.config) * (everywhere + masked)
        if recipe.cos and student.hidden_size != teacher.config.hidden_size:
            width = student.hidden_size * teacher.config.hidden_size
            parts["cosine_projection"] = _TRAINED * tokens * 2.0 * width
    return parts


def state_bytes(program: Program) -> dict[str, int]:
    """Bytes that stay on every device: float32 parameters, AdamW's two moments, the teacher's parameters."""
    student = count(program.params)
    teacher = count(program.teacher_params) if program.teacher_params is not None else 0
    return {
        "parameters": 4 * student,
        "optimizer": 8 * student,
        "teacher": 4 * teacher // program.model_axis,
    }


def temporary_bytes(program: Program, micro_batch_size: int) -> int:
    """An estimate of what a step holds besides: gradients, weights in the compute dtype, activations, logits.

    Assumed to be kept for the backward pass, a token: three float32 rows of the vocabulary where logits have a
    gradient (logits, teacher's logits, gradient); in each student layer eight vectors of the model's width, two of the
    feed-forward width and two [H, S] attention matrices, before and after dropout, in the compute dtype. Nothing of
    the teacher is kept. Compilers fuse and recompute, so this is no more than an estimate.
    """
    recipe, S = program.recipe, program.seq_len
    student, teacher = program.models.student, program.models.teacher
    config, size = student.config, jnp.dtype(student.dtype).itemsize
    gradients = 2 * 4 * count(program.params)  # the sum and one micro-batch's
    copies = size * (count(program.params) + count(program.teacher_params or {})) if size < 4 else 0
    soft = teacher is not None and (recipe.ce or recipe.mse)
    share = program.masking.max_masked(S) / S + (1.0 if soft and recipe.ce_positions == "all" else 0.0)
    logits = 3 * 4 * config.vocab_size * share
    vectors = 8 * config.hidden_size + 2 * config.intermediate_size
    layers = config.num_layers * size * (vectors + 2 * config.num_heads * S)
    return int(gradients + copies + micro_batch_size * S * (logits + layers))


def gradient_bytes(program: Program) -> int:
    """Bytes of one copy of the gradients, which every device gives into the reduction."""
    return 4 * count(program.params)


def sent_bytes(reduced: float, devices: int) -> float:
    """Bytes that a device sends in a ring (or torus) all-reduce of `reduced` bytes: 2·(N − 1)/N of them."""
    return 2.0 * (devices - 1) / devices * reduced
