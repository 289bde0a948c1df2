"""What a schedule hides: collectives with compute between start and end, those without, loops."""

import types

import numpy as np
import pytest

from rome.cost import hlo
from rome.cost.roofline import CHIPS
from rome.cost.schedule import Overlap, play

CHIP = CHIPS["v5p"]
MATMUL = 2 * 4096**3 / CHIP.peak_flops
HOP = 4096 * 2048 * 2 / CHIP.link  # of the tokens to a neighbour
ONWARD, BACKWARD = "{0,1},{1,2},{2,3},{3,0}", "{1,0},{2,1},{3,2},{0,3}"
PARAMETERS = """
  %w = bf16[4096,4096]{1,0:S(1)} parameter(0)
  %x = bf16[4096,4096]{1,0:S(1)} parameter(1)
  %t = bf16[4096,2048]{1,0:S(1)} parameter(2)
  %large = bf16[32768,2048]{1,0} parameter(3)
"""


def start(name="begun", number=1, pairs=ONWARD):
    return f"""  %{name} = (bf16[4096,2048]{{1,0}}, bf16[4096,2048]{{1,0}})
    collective-permute-start(%t), channel_id={number}, source_target_pairs={{{pairs}}}
"""


def done(of="begun"):
    return f"  %{of}-end = bf16[4096,2048]{{1,0:S(1)}} collective-permute-done(%{of})\n"


def matmul(name):
    return (
        f"  %{name} = bf16[4096,4096]{{1,0:S(1)}} dot(%w, %x), lhs_contracting_dims={{1}},"
        " rhs_contracting_dims={0}\n"
    )


def computation(name, body):
    root = f"  ROOT %{name}_out = bf16[] constant(0)\n"
    return f"%{name} (w: bf16[], x: bf16[], t: bf16[]) -> bf16[] {{{PARAMETERS}{body}{root}}}\n\n"


def played(body, *before):
    line = [types.SimpleNamespace(id=n, coords=(n, 0, 0)) for n in range(4)]
    devices = np.array(line, dtype=object).reshape(1, 4)
    mesh = types.SimpleNamespace(devices=devices, axis_names=("fsdp", "expert"), size=4)
    text = "".join(before) + "ENTRY " + computation("main", body)
    return play(hlo.parse(text), mesh, CHIP)


def hidden(overlap: Overlap) -> float:
    return 1 - overlap.waited / overlap.seconds


def test_a_transfer_with_enough_compute_before_its_end_is_hidden():
    found = played(start() + matmul("one") + done() + matmul("two"))
    (one,) = found.overlaps
    assert (one.kind, one.axes, one.waited) == ("collective-permute", "expert", 0.0)
    assert one.seconds == pytest.approx(HOP) and HOP < MATMUL
    assert found.seconds == pytest.approx(2 * MATMUL)


def test_a_transfer_that_is_awaited_at_once_hides_nothing():
    found = played(matmul("one") + start() + done() + matmul("two"))
    assert hidden(found.overlaps[0]) == pytest.approx(0, abs=1e-9)
    assert found.seconds == pytest.approx(2 * MATMUL + HOP)


def test_the_two_directions_of_a_link_are_used_at_once_and_one_direction_in_turn():
    both = start("a", 1, ONWARD) + start("b", 2, BACKWARD) + done("a") + done("b")
    found = played(both)
    assert found.seconds == found.overlaps[0].seconds == pytest.approx(HOP)
    assert hidden(found.overlaps[0]) == pytest.approx(0, abs=1e-9)
    same = start("a", 1, ONWARD) + start("b", 2, ONWARD) + done("a") + done("b")
    assert played(same).seconds == pytest.approx(2 * HOP)


def test_a_collective_without_a_start_is_awaited():
    gather = """  %g = bf16[16384,2048]{1,0:S(1)} all-gather(%t), channel_id=1,
    replica_groups={{0,1,2,3}}, dimensions={0}
"""
    found = played(matmul("one") + gather + matmul("two"))
    assert hidden(found.overlaps[0]) == pytest.approx(0, abs=1e-9)
    assert found.seconds == pytest.approx(2 * MATMUL + found.overlaps[0].seconds)


def test_pieces_inside_of_fusions_are_one_transfer_beside_their_matmuls():
    piece = """  %g = bf16[131072,2048]{1,0} all-gather(%large), channel_id=7,
    replica_groups={{0,1,2,3}}, dimensions={0}
"""
    inner = computation("piece", piece + matmul("inside"))

    def fusion(name):
        return (
            f"  %{name} = bf16[4096,4096]{{1,0:S(1)}} fusion(%w, %x, %t, %large), kind=kCustom,"
            " calls=%piece\n"
        )

    found = played(fusion("first") + fusion("second"), inner)
    (one,) = found.overlaps
    assert one.kind == "all-gather"
    assert one.waited == pytest.approx(one.seconds - 2 * MATMUL)
    assert found.seconds == pytest.approx(one.seconds)


def test_a_loop_counts_as_often_as_it_runs_and_its_compute_hides_what_flies_over_it():
    ring = start("inner", 2) + done("inner") + matmul("work")
    body = computation("body", ring)
    condition = "%condition (p: s32[]) -> pred[] {\n  ROOT %p = pred[] parameter(0)\n}\n\n"
    loop = (
        "  %loop = bf16[4096,4096]{1,0:S(1)} while(%w), condition=%condition, body=%body,"
        ' backend_config={"known_trip_count":{"n":"5"}}\n'
    )
    found = played(start() + loop + done(), condition, body)
    (one,) = found.overlaps
    assert found.seconds == pytest.approx(5 * (MATMUL + HOP))
    assert one.seconds == pytest.approx(6 * HOP)
    assert one.waited == pytest.approx(5 * HOP)  # the outer one flies while the loop computes
