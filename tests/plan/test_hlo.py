"""Reading compiled programs: work, loops and collectives of programs whose work is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from distiljax.plan.hlo import Program, _arrays
from distiljax.train.parallel import AXIS, Parallel

N, TRIPS = 16, 6


def compiled(inside):
    """Six products of [N, N] in a loop over 4 devices, and their sum over the devices inside it or after it."""
    parallel = Parallel("jit", jax.devices()[:4])

    def step(weights, rows):
        def body(total, row):
            product = (row @ weights) @ weights
            return total + (jax.lax.psum(product, AXIS) if inside else product), None

        total, _ = jax.lax.scan(body, jnp.zeros((N, N)), rows)
        return total if inside else jax.lax.psum(total, AXIS)

    shard = jax.sharding.NamedSharding(parallel.mesh, P(AXIS))
    rows = jax.ShapeDtypeStruct((4 * TRIPS, N, N), jnp.float32, sharding=shard)
    return parallel.wrap(step).lower(jax.ShapeDtypeStruct((N, N), jnp.float32), rows).compile()


@pytest.mark.parametrize("inside", [False, True])
def test_loops_are_multiplied_out_and_collectives_placed(inside):
    program = compiled(inside)
    profile = Program(program.as_text()).profile()
    assert profile.loops == (TRIPS,)
    assert profile.matrix_flops_once == 2 * 2 * N**3
    assert profile.matrix_flops == TRIPS * 2 * 2 * N**3
    (reduction,) = profile.collectives
    assert (reduction.kind, reduction.bytes, reduction.elements) == ("all-reduce", 4 * N * N, N * N)
    assert (reduction.in_loop, reduction.times) == (inside, TRIPS if inside else 1)
    assert profile.cycles == 0


def test_matrix_products_are_counted_as_xla_counts_them():
    def f(a, b, c):
        return jnp.einsum("bij,bjk->bik", a, b) @ c

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((3, 40, 50), (3, 50, 60), (60, 70))]
    program = jax.jit(f).lower(*shapes).compile()
    flops = Program(program.as_text()).profile().matrix_flops
    assert flops == 2 * 3 * 40 * 50 * 60 + 2 * 3 * 40 * 60 * 70
    assert flops == pytest.approx(program.cost_analysis()["flops"], rel=1e-3)


@pytest.mark.parametrize(
    ("line", "left", "right", "flops"),
    [
        # As the TPU compiler writes x @ kernel, queries · keys (batch and heads as dilated spatial axes), and the
        # gradient of a kernel.
        (
            "f32[16,512,768] convolution(%a, %b), window={size=1}, dim_labels=0bf_io0->0bf",
            (16, 512, 768),
            (768, 768, 1),
        )
        + (2 * 16 * 512 * 768 * 768,),
        (
            "f32[16,12,512,512] convolution(%a, %b), window={size=16x12 stride=15x11 lhs_dilate=16x12}, "
            "dim_labels=01bf_01oi->01bf",
            (16, 12, 512, 64),
            (16, 12, 512, 64),
            2 * 16 * 12 * 512 * 512 * 64,
        ),
        (
            "f32[16,12,512,64] convolution(%a, %b), window={size=16x12 stride=16x12 pad=15_15x11_11 "
            "lhs_dilate=15x11 rhs_reversal=1x1}, dim_labels=01fb_01oi->01fb",
            (16, 12, 512, 512),
            (16, 12, 64, 512),
            2 * 16 * 12 * 512 * 512 * 64,
        ),
        (
            "f32[768,768,1] convolution(%a, %b), window={size=16}, dim_labels=0fb_0io->bf0",
            (16, 512, 768),
            (16, 512, 768),
        )
        + (2 * 16 * 512 * 768 * 768,),
    ],
)
def test_products_that_a_tpu_makes_of_convolutions(line, left, right, flops):
    a, b = (f"f32[{','.join(map(str, dims))}]" for dims in (left, right))
    text = f"ENTRY %main (a: {a}, b: {b}) -> f32[] {{\n  %a = {a} parameter(0)\n  %b = {b} parameter(1)\n"
    profile = Program(f"{text}  ROOT %c = {line}\n}}\n").profile()
    assert profile.matrix_flops == flops


def test_bytes_of_arrays_and_the_memory_they_lie_in():
    arrays = _arrays(
        "(f32[16,512]{1,0:T(8,128)S(1)}, /*index=1*/bf16[8,3]{1,0:T(8,128)(2,1)}, pred[7]{0}, s32[])"
    )
    assert [(a.bytes, a.space) for a in arrays] == [(16 * 512 * 4, 1), (8 * 3 * 2, 0), (7, 0), (4, 0)]
    assert [a.bytes for a in _arrays("f8e4m3fn[10] u4[10] c64[2]")] == [10, 5, 16]


def test_moved_bytes_leave_out_what_stays_on_the_chip_and_what_only_has_a_name():
    text = """\
%fused (p.0: f32[1000,8], p.1: s32[]) -> f32[2,8] {
  %p.0 = f32[1000,8]{1,0} parameter(0)
  %p.1 = s32[]{} parameter(1)
  ROOT %slice = f32[2,8]{1,0} dynamic-slice(%p.0, %p.1, %p.1), dynamic_slice_sizes={2,8}
}

ENTRY %main (x: f32[1000,8], i: s32[]) -> f32[2,8] {
  %x = f32[1000,8]{1,0} parameter(0)
  %i = s32[]{} parameter(1)
  %near = f32[1000,8]{1,0:S(1)} copy(%x)
  %twice = f32[1000,8]{1,0:S(1)} add(%near, %near)
  %same = f32[8000]{0} bitcast(%x)
  ROOT %few = f32[2,8]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused
}
"""
    # The copy reads x; the sum moves nothing; the fusion reads a slice of x and the index, and writes the slice.
    assert Program(text).profile().moved_bytes == 32_000 + (64 + 4) + 64


def test_a_cpu_program_of_the_shape_of_a_step_moves_at_least_its_arguments():
    profile = Program(compiled(False).as_text()).profile()
    assert profile.moved_bytes >= np.prod((TRIPS, N, N)) * 4
