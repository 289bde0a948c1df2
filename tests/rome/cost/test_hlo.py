"""Reading compiled programs: loops count as often as they run, collectives by hand, and every
spelling of a replica group.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from rome.cost import collectives, costs, hlo

LAYERS, ROWS, WIDTH = 5, 16, 32


def compiled(function, *arguments) -> hlo.Module:
    return hlo.parse(jax.jit(function).lower(*arguments).compile().as_text())


def total_flops(module: hlo.Module) -> float:
    return sum(one.times * costs.flops(one) for one in hlo.executed(module))


def stack(x, w):
    layer = jax.checkpoint(lambda x, w: jnp.tanh(x @ w), prevent_cse=False)
    return jax.lax.scan(lambda x, w: (layer(x, w), None), x, w)[0]


def test_a_scanned_matmul_counts_once_a_layer_and_twice_more_backward():
    x, w = jnp.ones((ROWS, WIDTH)), jnp.ones((LAYERS, WIDTH, WIDTH))
    once = 2 * ROWS * WIDTH * WIDTH
    assert total_flops(compiled(stack, x, w)) == LAYERS * once
    backward = compiled(jax.grad(lambda x, w: stack(x, w).sum(), argnums=(0, 1)), x, w)
    assert total_flops(backward) in (
        3 * LAYERS * once,
        4 * LAYERS * once,
    )  # with or without the recomputed forward, as the compiler likes


def test_what_a_rematerialised_stack_keeps_is_the_input_of_each_layer():
    x, w = jnp.ones((ROWS, WIDTH)), jnp.ones((LAYERS, WIDTH, WIDTH))
    module = compiled(jax.grad(lambda x, w: stack(x, w).sum(), argnums=(0, 1)), x, w)
    assert costs.kept_for_backward(module) >= LAYERS * ROWS * WIDTH * 4
    assert costs.kept_for_backward(compiled(stack, x, w)) == 0


def test_memory_traffic_of_a_large_addition_is_its_operands_and_its_result():
    x = jnp.ones((512, 512))
    module = compiled(lambda x, y: x + y, x, x)
    assert (
        sum(one.times * costs.traffic(module, one) for one in hlo.executed(module))
        == 3 * 512 * 512 * 4
    )


def test_a_slice_of_a_stack_moves_a_layer_not_the_stack():
    module = hlo.parse("""
%sliced (param_0: f32[8,64], param_1: s32[]) -> f32[1,64] {
  %param_0 = f32[8,64]{1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %cut = f32[1,64]{1,0} dynamic-slice(%param_0, %param_1, %zero), dynamic_slice_sizes={1,64}
}

%doubled (param_0.1: f32[8,64], param_1.1: s32[]) -> f32[1,64] {
  %param_0.1 = f32[8,64]{1,0} parameter(0)
  %param_1.1 = s32[] parameter(1)
  %layer = f32[1,64]{1,0} fusion(%param_0.1, %param_1.1), kind=kLoop, calls=%sliced
  ROOT %twice = f32[1,64]{1,0} add(%layer, %layer)
}

ENTRY %main (stack: f32[8,64], i: s32[]) -> f32[1,64] {
  %stack = f32[8,64]{1,0} parameter(0)
  %i = s32[]{:S(1)} parameter(1)
  ROOT %out = f32[1,64]{1,0:T(8,128)S(1)} fusion(%stack, %i), kind=kLoop, calls=%doubled
}""")
    assert (
        sum(costs.traffic(module, one) for one in hlo.executed(module)) == 64 * 4
    )  # the result lies on chip


def test_collectives_are_those_written_with_their_loops_and_payloads():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def step(x, _):
        gathered = jax.lax.all_gather(x, "b", tiled=True)
        scattered = jax.lax.psum_scatter(gathered * 2, "b", tiled=True)
        passed = jax.lax.ppermute(scattered, "a", [(0, 1), (1, 0)])
        exchanged = jax.lax.all_to_all(passed, "b", 0, 0, tiled=True)
        return jnp.tanh(jax.lax.psum(exchanged, ("a", "b"))), None

    body = jax.shard_map(
        lambda x: jax.lax.scan(step, x, None, length=3)[0],
        mesh=mesh,
        in_specs=PartitionSpec(("a", "b")),
        out_specs=PartitionSpec(("a", "b")),
        check_vma=False,
    )
    found = collectives.collectives(compiled(body, jnp.ones((64, 128))), 8)
    local = 8 * 128 * 4
    assert {(one.kind, one.payload, one.times, one.groups.shape) for one in found} == {
        ("all-gather", 4 * local, 3, (2, 4)),
        ("reduce-scatter", 4 * local, 3, (2, 4)),
        ("collective-permute", local, 3, (8, 2)),
        ("all-to-all", local, 3, (2, 4)),
        ("all-reduce", local, 3, (1, 8)),
    }


def test_a_gather_spread_over_two_fusions_is_one_and_its_buffers_are_no_traffic():
    piece = """
%NAME (a: f32[4,8], b: f32[16,8], c: f32[2,2]) -> (f32[2,2], f32[4,8], f32[16,8]) {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[16,8]{1,0} parameter(1)
  %c = f32[2,2]{1,0} parameter(2)
  %gathered = f32[16,8]{1,0} all-gather(%a), channel_id=7, replica_groups={{0,1,2,3}},
    dimensions={0}
  %work = f32[2,2]{1,0} add(%c, %c)
  ROOT %out = (f32[2,2]{1,0}, f32[4,8]{1,0}, f32[16,8]{1,0}) tuple(%work, %a, %gathered)
}
"""
    kind = "(f32[2,2]{1,0}, f32[4,8]{1,0}, f32[16,8]{1,0})"
    module = hlo.parse(
        piece.replace("NAME", "first")
        + piece.replace("NAME", "second")
        + f"""
ENTRY %main (x: f32[4,8], y: f32[16,8], z: f32[2,2]) -> f32[2,2] {{
  %x = f32[4,8]{{1,0}} parameter(0)
  %y = f32[16,8]{{1,0}} parameter(1)
  %z = f32[2,2]{{1,0}} parameter(2)
  %begun = {kind} fusion(%x, %y, %z), kind=kCustom, calls=%first
  %half = f32[2,2]{{1,0}} get-tuple-element(%begun), index=0
  %ended = {kind} fusion(%x, %y, %half), kind=kCustom, calls=%second
  ROOT %all = f32[2,2]{{1,0}} get-tuple-element(%ended), index=0
}}"""
    )
    assert [(one.kind, one.payload) for one in collectives.collectives(module, 4)] == [
        ("all-gather", 16 * 8 * 4)
    ]
    assert sum(costs.traffic(module, one) for one in hlo.executed(module)) == 2 * (4 + 4) * 4


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, x", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=2] {'axis_0'}, x", [[0, 2], [1, 3]]),
        (
            "replica_groups=mesh['axis_0'=2,'axis_1'=2], device_ids=([2,2]T(1,0)) {'axis_1'}, x",
            [[0, 2], [1, 3]],
        ),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0','axis_1'}, x", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, x", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("source_target_pairs={{0,1},{1,0}}, x", [[0, 1], [1, 0]]),
        ("replica_groups={}, x", [[0, 1, 2, 3]]),
    ],
)
def test_every_spelling_of_a_group_is_read(text, groups):
    read = collectives.replica_groups(text, 4).tolist()
    assert sorted(read) == sorted(groups)


def test_a_tpus_batched_matmul_written_as_a_dilated_convolution_counts_its_real_products():
    module = hlo.parse("""
ENTRY %main (q: bf16[4,64,8,128], k: bf16[4,192,128]) -> f32[4,64,8,192] {
  %q = bf16[4,64,8,128]{3,2,1,0} parameter(0)
  %k = bf16[4,192,128,1]{2,1,0,3} parameter(1)
  ROOT %scores = f32[4,64,8,192]{3,2,1,0} convolution(%q, %k),
    window={size=4x1 stride=3x1 lhs_dilate=4x1}, dim_labels=01bf_0oi1->01bf
}""")
    assert total_flops(module) == 2 * 4 * 64 * 8 * 128 * 192


def test_a_kernel_counts_what_it_states_and_one_that_states_nothing_is_named():
    module = hlo.parse("""
ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  %gmm = bf16[8,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call",
    backend_config={"custom_call_config":{"cost_estimate":{"flops":"4096","transcendentals":"0"}}}
  ROOT %mystery = bf16[8,128]{1,0} custom-call(%gmm), custom_call_target="tpu_custom_call",
    metadata={op_name="jit(f)/mystery"}
}""")
    assert total_flops(module) == 4096
    assert costs.hidden_kernels(module) == ["jit(f)/mystery"]


def test_a_grouped_matmul_counts_the_rows_of_the_tiles_that_it_visits():
    module = hlo.parse("""
ENTRY %main (x: bf16[64,8], w: bf16[2,8,16]) -> bf16[64,16] {
  %x = bf16[64,8]{1,0} parameter(0)
  %w = bf16[2,8,16]{2,1,0} parameter(1)
  ROOT %gmm.1 = bf16[64,16]{1,0} custom-call(%x, %w), custom_call_target="tpu_custom_call",
    backend_config={"cost_estimate":{"flops":"16384"}}
}""")
    (one,) = [one for one in hlo.executed(module) if one.instruction.is_root]
    # more than its operand has, where tiles are visited once for each of several groups
    assert [costs.flops(one, rows) for rows in (16, 96)] == [16384 / 4, 16384 * 1.5]
    assert costs.flops(one) == 16384
    assert costs.traffic(module, one, 16) == 2 * (16 * 8 + 2 * 8 * 16 + 16 * 16)


def test_a_grouped_matmul_on_a_gpu_states_nothing_and_is_counted_by_its_shapes():
    module = hlo.parse("""
ENTRY %main (s: s32[5], x: bf16[64,8], w: bf16[2,8,16]) -> bf16[64,16] {
  %s = s32[5]{0} parameter(0)
  %x = bf16[64,8]{1,0} parameter(1)
  %w = bf16[2,8,16]{2,1,0} parameter(2)
  ROOT %mpmd_map.6 = bf16[64,16]{1,0} custom-call(%s, %x, %w), custom_call_target="mosaic_gpu_v2",
    metadata={op_name="jit(f)/tokamax:{\\"__type\\":\\"ops.ragged_dot.PallasMosaicGpuRaggedDot\\"}"}
}""")
    (one,) = [one for one in hlo.executed(module) if one.instruction.is_root]
    assert [costs.flops(one, rows) for rows in (16, 64)] == [2 * 16 * 8 * 16, 2 * 64 * 8 * 16]
    assert costs.flops(one) == 2 * 64 * 8 * 16 and not costs.hidden_kernels(module)
    assert costs.traffic(module, one, 16) == 4 * 5 + 2 * (16 * 8 + 2 * 8 * 16 + 16 * 16)


def test_attention_kernels_count_half_their_matmuls_and_one_more_where_backward_is_one_kernel():
    text = """
ENTRY %main (q: bf16[4,8,256,64], k: bf16[4,256,64]) -> bf16[4,8,256,64] {
  %q = bf16[4,8,256,64]{3,2,1,0} parameter(0)
  %k = bf16[4,256,64]{2,1,0} parameter(1)
  ROOT %splash_mqa_KIND_segmented.2 = (RESULTS) custom-call(%q, %k),
    custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(f)/pallas_call"}
}"""
    area = 2 * 4 * 8 * 256 * 256 * 64 / 2
    one, three = "bf16[4,8,256,64]{3,2,1,0}", ", ".join(["bf16[4,256,64]{2,1,0}"] * 3)
    for kind, results, matmuls in (
        ("fwd", one, 2),
        ("dq", one, 3),
        ("dkv", f"{one}, {one}", 4),
        ("dkv", three, 5),
    ):
        module = hlo.parse(text.replace("KIND", kind).replace("RESULTS", results))
        assert total_flops(module) == matmuls * area
        assert (
            sum(costs.flops(one, score_share=0.75) for one in hlo.executed(module))
            == 1.5 * matmuls * area
        )  # where time is split unevenly


def test_a_collective_that_another_core_carries_out_is_counted():
    module = hlo.parse("""
%offloaded (a: f32[4,8]) -> f32[16,8] {
  %a = f32[4,8]{1,0} parameter(0)
  ROOT %gathered = f32[16,8]{1,0} all-gather(%a), channel_id=3, replica_groups={{0,1,2,3}},
    dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (x: f32[4,8]) -> f32[16,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %begun = ((f32[4,8]{1,0}), f32[16,8]{1,0}) call-start(%x),
    async_execution_thread="sparsecore", to_apply=%offloaded
  ROOT %ended = f32[16,8]{1,0} call-done(%begun)
}""")
    assert [(one.kind, one.payload, one.times) for one in collectives.collectives(module, 4)] == [
        ("all-gather", 16 * 8 * 4, 1)
    ]
    assert sum(costs.traffic(module, one) for one in hlo.executed(module)) == 0


def test_an_exchange_in_ragged_parts_sends_the_even_share_of_the_room_for_a_part():
    text = """
ENTRY %main (x: bf16[FROM,8], out: bf16[TO,8], at: s32[4]) -> bf16[TO,8] {
  %x = bf16[FROM,8]{1,0} parameter(0)
  %out = bf16[TO,8]{1,0} parameter(1)
  %at = s32[4]{0} parameter(2)
  ROOT %exchanged = bf16[TO,8]{1,0} ragged-all-to-all(%x, %out, %at, %at, %at, %at),
    channel_id=1, replica_groups={{0,1,2,3}}
}"""
    for sizes in ((64, 96), (96, 64)):
        module = hlo.parse(text.replace("FROM", str(sizes[0])).replace("TO", str(sizes[1])))
        assert [(one.kind, one.payload) for one in collectives.collectives(module, 4)] == [
            ("ragged-all-to-all", 64 * 8 * 2 / 1.5)
        ]


def test_computations_of_other_threads_end_where_they_end():
    module = hlo.parse("""
%offloaded (p: f32[4]) -> f32[4] {
  ROOT %p = f32[4]{0} parameter(0)
}, execution_thread="sparsecore"

ENTRY %main (x: f32[4]) -> f32[4] {
  ROOT %x = f32[4]{0} parameter(0)
}""")
    assert set(module.computations) == {"offloaded", "main"} and module.entry.root.name == "x"


def test_text_that_is_no_program_is_refused():
    with pytest.raises(hlo.HloError, match="no ENTRY computation"):
        hlo.parse("HloModule nothing")
