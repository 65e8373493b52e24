"""Which part of a step an instruction belongs to: names, a real program, and the TPU compiler's cycles."""

import jax
import pytest

from distiljax.plan.hlo import Program
from distiljax.plan.parts import OTHER, Cycles, cycles_by_part, instructions, part_of
from distiljax.plan.program import load_program


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("jit(f)/while/body/jvp(student)/encoder/layer_3/attention/query/dot_general", "student, attention"),
        ("jit(f)/transpose(jvp(teacher))/encoder/layer_0/ffn/up/dot_general", "teacher, feed-forward"),
        ("jit(f)/jvp(student)/encoder/layer_0/attention/dropout/vmap()/shift_left", "student, dropout"),
        ("jit(f)/jvp(student)/encoder/layer_0/ffn_norm/mul", "student, LayerNorm, residuals"),
        ("jit(f)/jvp(losses)/while/body/mul", "losses over the vocabulary, L_cos"),
        ("jit(f)/optimizer/sqrt", "optimiser"),
        ("jit(f)/reduce_sum", OTHER),
        ("", OTHER),
    ],
)
def test_names_tell_the_part(path, part):
    assert part_of(path) == part


def test_every_matrix_product_of_a_step_belongs_to_a_model_or_the_losses(config):
    config.batch_size, config.student.attention_dropout = 4, 0.1
    text = load_program(config).lower(jax.devices()[:1], 2).compile().as_text()
    found = instructions(Program(text))
    products = [part for part, product in found.values() if product]
    expected = {
        f"{model}, {part}" for model in ("teacher", "student") for part in ("attention", "feed-forward")
    }
    assert {*expected, "losses over the vocabulary, L_cos"} <= set(products)
    assert OTHER not in products
    parts = {part for part, _ in found.values()}
    assert {"student, dropout", "optimiser", "masks", "student, LayerNorm, residuals"} <= parts
    # The teacher drops nothing.
    assert "teacher, dropout" not in parts


TPU = """
%fused (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  ROOT %dot.1 = f32[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}, metadata={op_name="jit(f)/jvp(student)/ffn/dot"}
}
%body (s: (f32[8,8], s32[])) -> (f32[8,8], s32[]) {
  %s = (f32[8,8]{1,0}, s32[]) parameter(0)
  %x = f32[8,8]{1,0} get-tuple-element(%s), index=0
  %fusion.1 = f32[8,8]{1,0} fusion(%x), kind=kOutput, calls=%fused, backend_config={"estimated_cycles":"70"}
  %add.1 = f32[8,8]{1,0} add(%x, %x), metadata={op_name="jit(f)/optimizer/add"}, backend_config={"estimated_cycles":"5"}
  ROOT %t = (f32[8,8]{1,0}, s32[]) tuple(%add.1, %i)
}
%condition (s: (f32[8,8], s32[])) -> pred[] {
  %s = (f32[8,8]{1,0}, s32[]) parameter(0)
  ROOT %lt = pred[] constant(true)
}
ENTRY %main (a: (f32[8,8], s32[])) -> (f32[8,8], s32[]) {
  %a = (f32[8,8]{1,0}, s32[]) parameter(0)
  %copy.1 = f32[8,8]{1,0} copy(%a), backend_config={"estimated_cycles":"11"}
  ROOT %w = (f32[8,8]{1,0}, s32[]) while(%a), condition=%condition, body=%body, trips={"known_trip_count":{"n":"3"}}
}
"""


def test_cycles_are_those_of_all_trips_and_a_fusion_without_a_name_goes_with_what_is_in_it():
    program = Program(TPU)
    assert cycles_by_part(program) == {
        "student, feed-forward": Cycles(210, 0),
        "optimiser": Cycles(0, 15),
        OTHER: Cycles(0, 11),
    }
    assert sum(map(sum, cycles_by_part(program).values())) == program.profile().cycles
