"""What a step computes and holds, counted from the shapes of the models and the recipe."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from distiljax.distill.vocab_loss import CHUNK_LOGITS
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

    Both models decode every position where L_ce or L_mse run over all of them, else the masked ones (in any case, for
    L_mlm, accuracy and agreement).
    """
    recipe, S = program.recipe, program.seq_len
    tokens = float(program.batch_size * S)
    student, teacher = program.models.student.config, program.models.teacher
    soft = teacher is not None and (recipe.ce > 0 or recipe.mse > 0)
    decoded = float(program.batch_size * decoded_positions(program))
    # Logits that reach no loss are only a metric, without a gradient.
    decoder = (_TRAINED if soft or recipe.mlm > 0 else 1) * decode_flops(student)
    dense, attention = encoder_flops(student, S)
    parts = {
        "student_encoder": _TRAINED * tokens * dense,
        "student_attention": _TRAINED * tokens * attention,
        "student_decoder": decoded * decoder,
    }
    if teacher is not None:
        dense, attention = encoder_flops(teacher.config, S)
        parts["teacher_encoder"] = tokens * dense
        parts["teacher_attention"] = tokens * attention
        parts["teacher_decoder"] = decoded * decode_flops(teacher.config)
        if recipe.cos and student.hidden_size != teacher.config.hidden_size:
            width = student.hidden_size * teacher.config.hidden_size
            parts["cosine_projection"] = _TRAINED * tokens * 2.0 * width
    return parts


def decoded_positions(program: Program) -> int:
    """Of how many of a row's positions the vocabulary's logits are computed."""
    recipe = program.recipe
    soft = program.models.teacher is not None and (recipe.ce > 0 or recipe.mse > 0)
    everywhere = soft and recipe.ce_positions == "all"
    return program.seq_len if everywhere else program.masking.max_masked(program.seq_len)


def state_bytes(program: Program) -> dict[str, int]:
    """Bytes that stay on every device: float32 parameters, AdamW's two moments, the teacher as it is read."""
    student = count(program.params)
    teacher = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.teacher_params))
    return {
        "parameters": 4 * student,
        "optimizer": 8 * student,
        "teacher": teacher // program.model_axis,
    }


def temporary_bytes(program: Program, micro_batch_size: int, *, fused: bool) -> int:
    """An estimate of what a step holds besides: gradients, weights in the compute dtype, activations, logits.

    Assumed to be held at once: of a chunk of positions three float32 rows of the vocabulary (logits, teacher's logits,
    gradient), and the embedding's gradient. Assumed to be kept for the backward pass, a token: in each student layer
    eight vectors of the model's width, two of the feed-forward width and two [H, S] attention matrices, before and
    after dropout, in the compute dtype; no such matrix where the student's attention is `fused`, and of all but one
    layer only its input with `remat`. Nothing of the teacher is kept.
    Compilers fuse and recompute, so this is no more than an estimate.
    """
    S, student = program.seq_len, program.models.student
    config, size = student.config, jnp.dtype(student.dtype).itemsize
    gradients = 2 * 4 * count(program.params)  # the sum and one micro-batch's
    # The teacher's kernels are in the compute dtype already; of it only the word embedding is converted.
    teacher = program.models.teacher
    embedding = teacher.config.vocab_size * teacher.config.hidden_size if teacher is not None else 0
    copies = size * (count(program.params) + embedding) if size < 4 else 0
    decoded = min(micro_batch_size * decoded_positions(program), CHUNK_LOGITS // config.vocab_size + 1)
    logits = 4 * config.vocab_size * (3 * decoded + config.hidden_size)
    vectors = 8 * config.hidden_size + 2 * config.intermediate_size
    layer = size * (vectors + (0 if fused else 2 * config.num_heads * S))
    layers = config.num_layers * layer
    if student.remat:
        layers = layer + (config.num_layers - 1) * size * config.hidden_size
    return int(gradients + copies + logits + micro_batch_size * S * layers)


def gradient_bytes(program: Program) -> int:
    """Bytes of one copy of the gradients, which every device gives into the reduction."""
    return 4 * count(program.params)


def sent_bytes(reduced: float, devices: int) -> float:
    """Bytes that a device sends in a ring (or torus) all-reduce of `reduced` bytes: 2·(N − 1)/N of them."""
    return 2.0 * (devices - 1) / devices * reduced
