"""Plans: what a compiled TPU program says is read right, topologies and meshes fit together, and real programs are planned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from chroma_jax.parallel.sharding import MeshConfig, make_mesh
from chroma_jax.planning import hlo, kernels, report, schedules
from chroma_jax.planning.plan import DoesNotFit, compute, too_large, traffic, where
from chroma_jax.planning.search import candidates
from chroma_jax.training.flops import counted
from chroma_jax.utils.chips import CHIPS, parse_topology
from chroma_jax.utils.errors import InputError

CYCLES = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'
SOURCE = 'dimensions={0}, metadata={op_name="jit(step)/transpose(jvp(backbone))/x"}'
PROGRAM = f"""HloModule jit_step

%cut.1 (p0: bf16[8,1024], p1: s32[]) -> bf16[1,1024] {{
  %p0 = bf16[8,1024]{{1,0:T(8,128)(2,1)}} parameter(0)
  %p1 = s32[]{{:T(128)}} parameter(1)
  ROOT %slice = bf16[1,1024]{{1,0:T(8,128)(2,1)}} dynamic-slice(%p0, %p1), dynamic_slice_sizes={{1,1024}}
}}

%condition.1 (state: (s32[], bf16[8,1024])) -> pred[] {{
  %limit = s32[]{{:T(128)}} constant(8)
  %state = (s32[]{{:T(128)}}, bf16[8,1024]{{1,0:T(8,128)(2,1)}}) parameter(0)
  %turn = s32[]{{:T(128)}} get-tuple-element(%state), index=0
  ROOT %less = pred[]{{:T(512)}} compare(%turn, %limit), direction=LT
}}

%body.1 (state: (s32[], bf16[8,1024])) -> (s32[], bf16[8,1024]) {{
  %state.1 = (s32[]{{:T(128)}}, bf16[8,1024]{{1,0:T(8,128)(2,1)}}) parameter(0)
  %turn.1 = s32[]{{:T(128)}} get-tuple-element(%state.1), index=0
  %table = bf16[8,1024]{{1,0:T(8,128)(2,1)}} get-tuple-element(%state.1), index=1
  %row = bf16[1,1024]{{1,0:T(8,128)(2,1)}} fusion(%table, %turn.1), kind=kLoop, calls=%cut.1, {CYCLES % 100}
  %whole = bf16[4,1024]{{1,0:T(8,128)(2,1)}} all-gather(%row), replica_groups=[2,4]<=[2,4]T(1,0), {SOURCE}
  %near = f32[256]{{0:T(256)S(1)}} fusion(%whole), kind=kLoop, calls=%cut.1, {CYCLES % 7}
  %odd = f32[256]{{0:T(256)}} fusion(%near), kind=kLoop, calls=%cut.1, {CYCLES % (2**63 - 1)}
  ROOT %next = (s32[]{{:T(128)}}, bf16[8,1024]{{1,0:T(8,128)(2,1)}}) tuple(%turn.1, %table)
}}

ENTRY %main (a: bf16[8,1024]) -> bf16[8,1024] {{
  %a = bf16[8,1024]{{1,0:T(8,128)(2,1)}} parameter(0)
  %zero = s32[]{{:T(128)}} constant(0)
  %start = (s32[]{{:T(128)}}, bf16[8,1024]{{1,0:T(8,128)(2,1)}}) tuple(%zero, %a)
  %loop = (s32[]{{:T(128)}}, bf16[8,1024]{{1,0:T(8,128)(2,1)}}) while(%start), condition=%condition.1, body=%body.1
  %sent = f32[1000]{{0:T(1024)}} all-reduce(%a), replica_groups={{{{0,1,2,3}},{{4,5,6,7}}}}, to_apply=%cut.1
  ROOT %out = bf16[8,1024]{{1,0:T(8,128)(2,1)}} get-tuple-element(%loop), index=1
}}
"""


@pytest.fixture(scope="module")
def program():
    module = hlo.parse(PROGRAM)
    return module, list(hlo.executed(module))


def test_a_loop_counts_as_often_as_it_turns(program):
    _, work = program
    assert hlo.cycles(work) == 8 * (100 + 7)  # the largest integer is no estimate
    assert all(e.known for e in work)
    blind = hlo.parse(PROGRAM.replace("constant(8)", "parameter(1)"))
    assert hlo.cycles(hlo.executed(blind)) == 107 and not all(e.known for e in hlo.executed(blind))


def test_only_what_is_cut_out_of_hbm_is_read(program):
    module, work = program
    row, whole, vector = 2 * 1024, 2 * 4096, 4 * 256
    gather = row + whole
    near, odd = row, vector  # of the first the result, of the second the operand lies in vector memory
    index = 4  # the scalar that says where to cut
    assert (
        hlo.hbm_bytes(module, work) == 8 * (row + index + row + gather + near + odd) + 2 * 8192 + 4096
    )  # 1000 numbers take 1024


def test_a_kernel_that_tells_what_it_reads_of_whole_arrays_is_believed():
    told = 'custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"bytes_accessed":"%d"}}}'
    call = "  ROOT %%k = bf16[8,1024]{1,0:T(8,128)(2,1)} custom-call(%%w), %s"
    text = "HloModule m\n\nENTRY %%main (w: bf16[4096,1024]) -> bf16[8,1024] {\n"
    text += "  %%w = bf16[4096,1024]{1,0:T(8,128)(2,1)} parameter(0)\n" + call + "\n}\n"
    read = lambda attributes: hlo.hbm_bytes(module := hlo.parse(text % attributes), list(hlo.executed(module)))
    assert read('custom_call_target="tpu_custom_call"') == 2 * 1024 * (4096 + 8)
    assert read(told % 50_000) == 50_000
    assert read(told % 10**9) == 2 * 1024 * (4096 + 8)  # at most the arrays


def test_collectives_have_their_bytes_groups_and_turns(program):
    found = {c.kind: c for c in hlo.collectives(*program)}
    gather, reduce = found["all-gather"], found["all-reduce"]
    assert gather.group == (0, 4, 1, 5) and gather.times == 8 and gather.bytes == 2 * 4096 * 3 / 4
    assert reduce.group == (0, 1, 2, 3) and reduce.times == 1 and reduce.bytes == 2 * 2 * 8192 * 3 / 4
    assert where(gather.source) == "backbone backward"


@pytest.mark.parametrize(
    ("printed", "group"),
    [
        ("replica_groups={{1,3},{0,2}}, x", (1, 3)),
        ("replica_groups=[4,2]<=[8], x", (0, 1)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", (0, 4)),
        ("replica_groups=mesh['a'=8,'b'=2], device_ids=([2,8]T(1,0)) {'a'}, x", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", (0, 4)),
        ("source_target_pairs={{3,4},{4,5}}", (3, 4)),
        ("nothing of the kind", ()),
    ],
)
def test_every_way_to_print_groups_is_read(printed, group):
    assert hlo.replica_group(printed) == group


KERNEL = """HloModule jit_step

ENTRY %main.1 (p0: bf16[2,8,4,2048,64]) -> bf16[2,8,4,2048,64] {
  %p0 = bf16[2,8,4,2048,64]{4,3,2,1,0} parameter(0)
  %splash_mqa_fwd.1 = bf16[2,8,4,2048,64]{4,3,2,1,0} custom-call(%p0), custom_call_target="tpu_custom_call", \
operand_layout_constraints={s8[1,4,4]{2,1,0}, bf16[2,8,4,2048,64]{4,3,2,1,0}, bf16[2,8,2048,64]{3,2,1,0}}, \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512, \\"block_kv\\": 512, \\"block_kv_compute\\": 512}"
}}, metadata={op_name="jit(step)/jvp(backbone)/pallas_call"}
  ROOT %after.1 = bf16[2,8,4,2048,64]{4,3,2,1,0} copy(%splash_mqa_fwd.1), backend_config={"estimated_cycles":"7"}
}
"""


def test_a_kernel_s_metadata_may_be_broken_into_lines_and_its_time_is_estimated():
    work = list(hlo.executed(hlo.parse(KERNEL)))
    assert [e.instruction.opcode for e in work] == ["custom-call", "copy"] and work[1].instruction.cycles == 7
    assert where(work[0].instruction.source) == "backbone"
    chip = CHIPS["v5e"]
    pairs = 2 * 8 * 4 * 512**2 * 10  # ten of sixteen blocks are not wholly later
    expected = 2 * 2 * pairs * 128 / chip.flops + kernels.VECTOR_OPERATIONS * pairs / chip.vector
    assert kernels.seconds(work[0].instruction, chip) == pytest.approx(expected)
    assert kernels.seconds(work[1].instruction, chip) is None


def test_a_kernel_whose_schedule_is_known_takes_its_instruction_words(monkeypatch):
    turned = KERNEL.replace("2048,64]{4,3,2,1,0}, bf16[2,8,2048,64]", "64,2048]{4,3,2,1,0}, bf16[2,8,64,2048]")
    work = next(hlo.executed(hlo.parse(turned.replace('512}"', '512, \\"q_layout\\": 2}"')))).instruction
    size = kernels.BlockSizes(512, 512, 512)
    assert kernels.read(work) == kernels.Kernel("forward", 16, 4, 2048, 2048, 64, size)
    chip = CHIPS["v5p"]
    monkeypatch.setitem(
        kernels.SCHEDULES, ("v5p", "forward", 64, size), kernels.Schedule(step=200, block=1000, first=100, last=300)
    )
    words = 16 * 4 * (16 * 200 + 10 * 1000 + 4 * 400)  # of four times four blocks ten are computed, by two cores
    assert kernels.seconds(work, chip) == pytest.approx(words / 2 / chip.clock)


def test_short_rows_take_the_words_of_all_their_heads():
    call = 'bf16[256,100,1280]{2,1,0} custom-call(%n, %q, %k, %v), custom_call_target="tpu_custom_call"'
    work = next(
        hlo.executed(
            hlo.parse("ENTRY %main (n: s32[256]) -> bf16[256,100,1280] {\n  ROOT %short_attention_64.3 = " + call + "\n}\n")
        )
    )
    kernel = kernels.read(work.instruction)
    assert kernel == kernels.Kernel("short", 256 * 20, 1, 100, 100, 64, kernels.BlockSizes(100, 100, 100))
    chip = CHIPS["v5p"]
    words = kernels.SCHEDULES["v5p", "short", 64, kernel.blocks].step
    assert kernels.seconds(work.instruction, chip) == pytest.approx(256 * 20 * words / 2 / chip.clock)
    assert kernels.rough(kernel, chip) > 0.2 * kernels.seconds(work.instruction, chip)


def test_long_rows_take_the_words_of_their_loops():
    row = "bf16[3,2048,1024]{2,1,0}"
    call = 'custom-call(%n), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/jvp(backbone)/pallas_call"}'
    results = {
        "forward": f"({row}, f32[3,2,8,2048]{{3,2,1,0}})",
        "backward": f"({row}, bf16[3,2048,256]{{2,1,0}}, bf16[3,2048,256]{{2,1,0}})",
    }
    for name, shape in results.items():
        program = f"ENTRY %main (n: s32[3]) -> bf16[3] {{\n  ROOT %flash_{name}_64_512.3 = {shape} {call}\n}}\n"
        work = next(hlo.executed(hlo.parse(program))).instruction
        # two registers of two key/value heads, with eight query heads each
        assert kernels.read(work) == kernels.Kernel(f"flash_{name}", 6, 8, 2048, 2048, 64, kernels.BlockSizes(512, 512, 512))
        chip = CHIPS["v5p"]
        loops = kernels.LOOPS["v5p", f"flash_{name}", 64, 8, 512]
        words = 6 * (loops.row + 4 * loops.queries + 6 * loops.keys)  # by two cores
        assert kernels.seconds(work, chip) == pytest.approx(words / 2 / chip.clock)
        rough = kernels.rough(kernels.read(work), chip)
        assert 0.3 * rough < kernels.seconds(work, chip) < 3 * rough


SCHEDULE = """
     0   :  { %s1 = inlined_call_operand.vmem }
  0x10 LB: > { %s2 = sadd.s32 1, %s1 }
  0x12   : > { %3 = sbr.rel (%p1) target = $region8 }
  0x14   :  {} /* Start region 7 */
  0x20 PF: > { %s4 = sld } /* Start/End empty region 8 */
  0x24   : > { %5 = sbr.rel (%p2) target = $region12 }
  0x26   :  {} /* Start region 11 */
  0xa0 PF: > { %s6 = sld } /* Start/End empty region 12 :: Start region 13 */
  0xa4   : > { %7 = sbr.rel (%p3) target = $region16 }
  0xc0 PF: > { %s8 = sld } /* Start region 16 */
  0xcf   : > { %9 = sbr.rel (!%p4) target = $region99 }
"""


def test_the_words_of_a_kernel_s_parts_are_counted_from_its_schedule():
    first, block, last = 0x20 - 0x12, 0xA0 - 0x24, 0xC0 - 0xA4
    whole = 0xCF + 1 - 0x10
    assert schedules.parts(SCHEDULE) == kernels.Schedule(whole - first - block - last, block, first, last)
    straight = "\n".join(line for line in SCHEDULE.splitlines() if "0xa4" not in line)
    assert schedules.parts(straight) == kernels.Schedule(whole, 0, 0, 0)
    with pytest.raises(ValueError, match="no loop over blocks"):
        schedules.parts(SCHEDULE.replace("LB", "  "))


LOOPS = """
     0   :  { %s1 = inlined_call_operand.vmem }
  0x10 LB: > { %s2 = sadd.s32 1, %s1 } /* Start region 2 */
  0x11   : > { %s2 = sadd.s32 1, %s1 }
  0x12 LB: >> { %3 = sadd.s32 1, %s1 }
  0x13 LB: >>> { %4 = sbr.rel (%p1) target = $region8 }
  0x14   : >>> {} /* Start region 7 */
  0x15   : >>> {}
  0x16 PF: >>> { %5 = sbr.rel (%p1) target = $region12 } /* Start/End empty region 8 */
  0x17   : >>> {} /* Start region 11 */
  0x18   : >>> {}
  0x19   : >>> {}
  0x1a PF: >>> { %s6 = sld } /* Start/End empty region 12 */
  0x1b   : >> { %7 = sbr.rel (!%p2) target = $region99 }
  0x1c   : > { %8 = sbr.rel (!%p3) target = $region98 }
"""


def test_the_words_of_a_kernel_s_loops_are_counted_without_the_piece_for_keys_that_are_hidden():
    assert schedules.loops(LOOPS) == kernels.Loops(row=3, queries=2, keys=8 - 4)
    with pytest.raises(ValueError, match="loops over queries and keys"):
        schedules.loops(SCHEDULE)


PIECES = """HloModule jit_step

%start.1 (p: bf16[8,1024]) -> bf16[64,1024] {
  %p = bf16[8,1024]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[64,1024]{1,0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}

%step.1 (p: bf16[8,1024]) -> bf16[64,1024] {
  %p = bf16[8,1024]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[64,1024]{1,0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}

ENTRY %main.1 (p0: bf16[8,1024]) -> bf16[64,1024] {
  %p0 = bf16[8,1024]{1,0} parameter(0)
  %async-collective-start.1 = bf16[64,1024]{1,0} fusion(%p0), kind=kCustom, calls=%start.1
  %fusion.2 = bf16[64,1024]{1,0} fusion(%p0), kind=kOutput, calls=%step.1
  %all-gather.3 = bf16[64,1024]{1,0} all-gather(%p0), channel_id=8, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %async-collective-done.1 = bf16[64,1024]{1,0} fusion(%p0), kind=kCustom, calls=%step.1
}
"""


def test_a_collective_in_pieces_counts_once():
    module = hlo.parse(PIECES)
    found = hlo.collectives(module, list(hlo.executed(module)))
    size = 64 * 1024 * 2 * 7 / 8
    assert [(c.times, c.bytes, c.begins, c.ends) for c in found] == [(1, size, 0, 3), (1, size, 2, 2)]


GROUPS = "channel_id=%d, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}"
BESIDE = f"""HloModule jit_step

%gather.1 (p: bf16[8,1024]) -> bf16[64,1024] {{
  %p = bf16[8,1024]{{1,0}} parameter(0)
  ROOT %all-gather.1 = bf16[64,1024]{{1,0}} all-gather(%p), {GROUPS % 1}
}}, execution_thread="sparsecore"

%condition.1 (turn: s32[]) -> pred[] {{
  %limit = s32[]{{:T(128)}} constant(4)
  %turn = s32[]{{:T(128)}} parameter(0)
  ROOT %less = pred[]{{:T(512)}} compare(%turn, %limit), direction=LT
}}

%body.1 (turn: s32[]) -> s32[] {{
  %turn.1 = s32[]{{:T(128)}} parameter(0)
  %shard = bf16[8,1024]{{1,0}} copy(%turn.1), {CYCLES % 100}
  %ready = ((), (), s32[1]{{0:T(128)S(2)}}) call-start(), async_execution_thread="sparsecore", to_apply=%gather.1
  %first = bf16[64,1024]{{1,0}} copy(%shard), {CYCLES % 1000}
  %going = ((bf16[8,1024]{{1,0}}), bf16[64,1024]{{1,0}}) call-update(%ready, %shard)
  %second = ((bf16[8,1024]{{1,0}}), bf16[64,1024]{{1,0}}) all-gather-start(%shard), {GROUPS % 2}
  %short = bf16[64,1024]{{1,0}} copy(%shard), {CYCLES % 100}
  %there = bf16[64,1024]{{1,0}} call-done(%going)
  %long = bf16[64,1024]{{1,0}} copy(%there), {CYCLES % 400}
  %done = bf16[64,1024]{{1,0}} all-gather-done(%second)
  ROOT %next = s32[]{{:T(128)}} add(%turn.1, %turn.1)
}}

ENTRY %main (a: s32[]) -> s32[] {{
  %a = s32[]{{:T(128)}} parameter(0)
  ROOT %loop = s32[]{{:T(128)}} while(%a), condition=%condition.1, body=%body.1
}}
"""


def test_what_runs_beside_a_collective_is_not_waited_for(monkeypatch):
    module, topology = hlo.parse(BESIDE), parse_topology("v5e:2x4")
    work, chip = list(hlo.executed(module)), topology.chip
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(1, 8, 1, 1), ("data", "fsdp", "tensor", "context"))
    size = 64 * 1024 * 2 * 7 / 8
    # so that a gather takes 300 cycles
    monkeypatch.setattr("chroma_jax.planning.plan.ring_bandwidth", lambda *_: size * chip.clock / 300)
    assert sum(compute(module, work, chip).values()) == pytest.approx(4 * 1600 / chip.clock)
    (found,) = traffic(module, work, topology, mesh)
    assert (found.kind, found.axes, found.count, found.bytes) == ("all-gather", "fsdp", 8, 8 * size)
    assert found.seconds == pytest.approx(8 * 300 / chip.clock)
    # of the first the sparse core has 100 done when it is needed; the second begins after it and is done within the 400
    assert found.waited == pytest.approx(4 * 200 / chip.clock)
    shorter = hlo.parse(BESIDE.replace('"400"', '"50"'))
    (found,) = traffic(shorter, list(hlo.executed(shorter)), topology, mesh)
    assert found.waited == pytest.approx(4 * (200 + 250) / chip.clock)


def test_other_slices_are_waited_for_where_their_sums_are_needed():
    runtime = 'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"'
    handler = runtime + ',_xla_host_transfer_rendezvous="sum_0"}'
    text = f"""HloModule m

ENTRY %main (a: f32[1024]) -> f32[1024] {{
  %a = f32[1024]{{0}} parameter(0)
  %token = token[] after-all()
  %send = (f32[1024]{{0}}, u32[]{{:S(2)}}, token[]) send(%a, %token), channel_id=2, {handler}
  %recv = (f32[1024]{{0}}, u32[]{{:S(2)}}, token[]) recv(%token), channel_id=1, {handler}
  %meanwhile = f32[1024]{{0}} copy(%a), {CYCLES % 1000}
  %sent = token[] send-done(%send), channel_id=2, {runtime}}}
  ROOT %summed = (f32[1024]{{0}}, token[]) recv-done(%recv), channel_id=1, {runtime}}}
}}
"""
    module, topology = hlo.parse(text), parse_topology("v5e:2x2", 2)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(2, 4, 1, 1), ("data", "fsdp", "tensor", "context"))
    (found,) = traffic(module, list(hlo.executed(module)), topology, mesh)
    seconds = 4096 / topology.chip.dcn
    assert (found.kind, found.axes, found.bytes, found.seconds) == (hlo.BETWEEN_SLICES, "data", 4096, seconds)
    assert found.waited == pytest.approx(seconds - 1000 / topology.chip.clock)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5q:4x4", r"unknown chip 'v5q' \(near: v5"),
        ("v5e:4x4x4", "expected 2 dimensions, as in v5e:16x16"),
        ("v5p:4x4", "expected 3 dimensions"),
        ("v5e:", "expected 2 dimensions"),
        ("v5e:0x4", "expected 2 dimensions"),
    ],
)
def test_a_topology_that_is_none_is_an_error(name, message):
    with pytest.raises(InputError, match=message):
        parse_topology(name)


def test_links_close_to_rings_where_the_slice_is_whole():
    assert parse_topology("v5e:16x16").wrap == (True, True) and parse_topology("v5e:4x4").wrap == (False, False)
    assert parse_topology("v5p:4x4x8").wrap == (True, True, True) and parse_topology("v5p:2x2x1").wrap == (False,) * 3
    assert parse_topology("v5e:16x16", 2).num_chips == 512 and parse_topology("tpu7x:4x4x4").chip.devices == 2


def test_a_program_without_room_says_by_how_much_and_what_is_large():
    message = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm.
Used 19.50G of 15.75G hbm. Exceeded hbm capacity by 3.75G.

  Largest program allocations in hbm:

  1. Size: 4.00G
     Operator: op_name="jit(train_step)/jvp(backbone)/while"
     Shape: bf16[16,8,2048,8192]{3,2,1,0:T(8,128)}
     Unpadded size: 4.00G
"""
    topology, step = parse_topology("v5e:4x4"), jax.make_jaxpr(jax.numpy.sin)(1.0).jaxpr
    error = too_large(topology, message, step)
    assert isinstance(error, DoesNotFit) and error.needed == 19.5 * 2**30
    page = report.does_not_fit(error)
    assert "3.75 too many" in page and "bf16[16,8,2048,8192]" in page and "jvp(backbone)" in page and "4.00" in page
    assert not isinstance(too_large(topology, "INTERNAL: broken", step), DoesNotFit)


# of chroma_4b_stage1@v5e:4x4 with 256 rows a step, libtpu 0.0.42
AT_ONCE = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (36.49G) exceeds available HBM"
    " (15.75G)."
)


def test_where_the_compiler_names_no_buffers_the_step_s_own_are_named():
    def step(x, weights):
        with jax.named_scope("backbone"):
            y, all_of_them = jax.lax.scan(lambda x, w: (x @ w, jax.numpy.sin(x @ w)), x, weights)
        return y.sum() + all_of_them.sum()

    mesh = make_mesh(MeshConfig(data=2))
    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((64, 128), np.float32, sharding=NamedSharding(mesh, P("data")))
        weights = jax.ShapeDtypeStruct((5, 128, 128), np.float32, sharding=NamedSharding(mesh, P()))
        error = too_large(parse_topology("v5e:4x4"), AT_ONCE, jax.jit(step).trace(x, weights).jaxpr.jaxpr)
    assert isinstance(error, DoesNotFit) and (error.needed, error.capacity) == (36.49 * 2**30, 15.75 * 2**30)
    assert [(b.shape, b.operator, b.bytes) for b in error.buffers[:2]] == [
        ("float32[5,128,128]", "argument", 5 * 128 * 128 * 4),
        ("float32[5,32,128]", "backbone/scan", 5 * 32 * 128 * 4),
    ]
    assert "20.74 too many" in report.does_not_fit(error) and "backbone/scan" in report.does_not_fit(error)


def test_flops_of_a_program_are_those_of_its_products():
    def step(x, w, kernels):
        with jax.named_scope("first"):
            x, _ = jax.lax.scan(lambda x, w: (jax.checkpoint(lambda x: x @ w)(x), None), x, w)  # [3, 8] @ [8, 8], five times
        shape = ("NWC", "WIO", "NWC")
        x = jax.lax.conv_general_dilated(x[:, :, None], kernels, (2,), "VALID", dimension_numbers=shape)
        return jnp.sum(jax.lax.cond(x[0, 0, 0] > 0, lambda x: x @ x.swapaxes(1, 2), lambda x: jnp.zeros((3, 4, 4)), x))

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((3, 8), (5, 8, 8), (2, 1, 6))]
    products, convolution, chosen = 5 * 2 * 3 * 8 * 8, 2 * 3 * 4 * 6 * 2, 2 * 3 * 4 * 4 * 6
    forward = counted(jax.make_jaxpr(step)(*shapes), ("first",))
    assert forward == {"first": products, "other": convolution + chosen}
    both = counted(jax.make_jaxpr(jax.grad(step, argnums=(0, 1, 2)))(*shapes), ("first",))
    # backwards twice as much; a checkpointed product whose result nobody needs again is not made again
    assert both["first"] in (3 * products, 4 * products) and both["other"] == 3 * (convolution + chosen)
    with pytest.raises(InputError, match="how often it turns"):
        counted(jax.make_jaxpr(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ x, x))(jnp.zeros((2, 2))), ())


def test_candidates_use_every_device():
    topology = parse_topology("tpu7x:2x2x1")
    tried = dict(candidates(tiny.config(), topology))
    assert len(tried) > 10 and all(c.mesh.num_devices == 8 for c in tried.values())
    assert all(c.training.global_batch_size % c.mesh.num_row_shards == 0 for c in tried.values())


def test_the_default_backend_is_left_alone():
    assert jax.default_backend() == "cpu"
