"""Time on a slice's interconnect, by hand; the model's own FLOPs."""

import dataclasses

import numpy as np
import pytest

from rome.cost.collectives import Collective
from rome.cost.flops import active_matmul_params, forward_flops
from rome.cost.roofline import CHIPS, Bound, cost, mesh_axes, sent
from rome.model.config import PRESETS
from rome.model.sharding import make_mesh
from tests.rome.model.test_sharding import torus

V5P, V6E, TPU7X = CHIPS["v5p"], CHIPS["v6e"], CHIPS["tpu7x"]
MB = 1e6
CUBE = np.array([(0, 0, x, y, z) for z in range(4) for y in range(4) for x in range(4)])


NORMS_8B = 36 * (2 * 4096 + 2 * 128) + 4096


def collective(kind: str, groups) -> Collective:
    return Collective(kind, MB, np.array(groups), 1.0, "op")


@pytest.mark.parametrize(
    ("kind", "group", "links"),
    [
        ("all-gather", [0, 1, 2, 3], 2),  # a whole ring
        ("all-gather", [0, 1], 1),  # two neighbours
        (
            "all-gather",
            [0, 2],
            1,
        ),  # every second chip, both ways round, but another pair uses the same links
        ("all-gather", list(range(16)), 4),  # a plane of two rings
        ("all-gather", list(range(64)), 6),
        ("reduce-scatter", [0, 4, 8, 12], 2),
    ],
)
def test_a_gather_takes_in_what_it_lacks_over_the_links_that_it_has(kind, group, links):
    size, seconds = cost(collective(kind, [group]), CUBE, V5P)
    n = len(group)
    assert size == pytest.approx(MB * (n - 1) / n)
    assert seconds == pytest.approx(size / (links * V5P.link))


def test_an_all_reduce_is_a_scatter_and_a_gather():
    assert cost(collective("all-reduce", [[0, 1, 2, 3]]), CUBE, V5P) == pytest.approx(
        2 * np.array(cost(collective("all-gather", [[0, 1, 2, 3]]), CUBE, V5P))
    )


def test_a_small_slice_does_not_wrap_around():
    square = np.array([(0, 0, x, y, 0) for y in range(8) for x in range(8)])
    assert cost(collective("all-gather", [list(range(8))]), square, V6E)[1] == pytest.approx(
        MB * 7 / 8 / V6E.link
    )


def test_an_exchange_is_bound_by_the_middle_of_the_ring():
    # Four devices a ring: two send half of their payload across, over two links a direction.
    assert cost(collective("all-to-all", [[0, 1, 2, 3]]), CUBE, V5P)[1] == pytest.approx(
        2 * MB / 2 / (2 * V5P.link)
    )


def test_a_permutation_takes_as_long_as_its_longest_way():
    assert cost(
        collective("collective-permute", [[0, 1], [1, 2], [2, 3], [3, 0]]), CUBE, V5P
    ) == pytest.approx((MB, MB / V5P.link))
    assert cost(collective("collective-permute", [[0, 2], [2, 0]]), CUBE, V5P)[1] == pytest.approx(
        2 * MB / V5P.link
    )
    assert cost(collective("collective-permute", [[0, 0]]), CUBE, V5P) == (0, 0)


def test_two_devices_of_a_chip_share_its_links_and_talk_faster_to_each_other():
    chips = np.array([(0, core, x, 0, 0) for x in range(4) for core in range(2)])

    def gather(group):
        return cost(collective("all-gather", [group]), chips, TPU7X)[1]

    assert gather([0, 2, 4, 6]) == pytest.approx(MB * 3 / 4 / (2 * TPU7X.link / 2))
    assert gather([0, 1]) < gather([0, 2, 4, 6]) / 4


def test_slices_talk_through_the_data_centre():
    slices = np.array([(s, 0, x, 0, 0) for s in range(2) for x in range(4)])
    assert cost(collective("all-gather", [[0, 4]]), slices, V5P)[1] == pytest.approx(
        MB / 2 / V5P.dcn
    )


def test_collectives_are_summed_by_kind_and_mesh_axis():
    mesh = make_mesh({"fsdp": 16, "expert": 4}, devices=torus(4, 4, 4))
    groups = np.arange(64).reshape(16, 4)
    rows = sent(
        [
            dataclasses.replace(collective("all-gather", groups), times=3.0),
            collective("all-gather", groups),
            collective("all-reduce", groups.T),
        ],
        mesh,
        V5P,
    )
    assert {(row.kind, row.axes, row.runs) for row in rows} == {
        ("all-gather", "expert", 4),
        ("all-reduce", "fsdp", 1),
    }
    assert mesh_axes(np.arange(64)[None], mesh) == "fsdp+expert"
    assert rows == sorted(rows, key=lambda row: -row.seconds)


def test_a_ring_that_goes_both_ways_takes_as_long_as_one_way():
    mesh = make_mesh({"fsdp": 16, "expert": 4}, devices=torus(4, 4, 4))
    ring = np.array(
        [(4 * group + i, 4 * group + (i + 1) % 4) for group in range(16) for i in range(4)]
    )
    both = [collective("collective-permute", ring), collective("collective-permute", ring[:, ::-1])]
    (one_way,), (two_ways,) = sent(both[:1], mesh, V5P), sent(both, mesh, V5P)
    assert (
        two_ways.seconds == pytest.approx(one_way.seconds) and two_ways.bytes == 2 * one_way.bytes
    )


def test_active_weights_and_attention_of_qwen3_are_those_of_the_published_model():
    config = PRESETS["qwen3_30b_a3b"]
    assert active_matmul_params(config) == pytest.approx(3.042e9, rel=1e-3)
    # all but the embedding and the norms, which multiply nothing; a tied one is the head too
    assert active_matmul_params(PRESETS["qwen3_8b"]) == 8_190_735_360 - 151936 * 4096 - NORMS_8B
    assert active_matmul_params(PRESETS["qwen3_4b"]) == pytest.approx(4_022_468_096, rel=1e-4)
    assert (
        forward_flops(config, 8192) == 2 * active_matmul_params(config) + 2 * 8192 * 32 * 128 * 48
    )


def test_a_bound_is_the_slowest_part_or_what_does_not_hide():
    bound = Bound(compute=2.0, memory=1.0, collectives=3.0)
    assert bound.overlapped == 3.0
    assert bound.serial == 5.0


def test_behind_a_switch_every_group_has_the_rate_of_one_link():
    h100 = CHIPS["h100"]
    node = np.array([(0, 0, number, 0, 0) for number in range(8)])
    for kind, rounds in ("all-gather", 1), ("all-reduce", 2), ("all-to-all", 1):
        for group in [[0, 1]], [[0, 3, 5, 6]], [list(range(8))]:
            n = len(group[0])
            size, seconds = cost(collective(kind, group), node, h100)
            assert size == pytest.approx(rounds * MB * (n - 1) / n)
            assert seconds == pytest.approx(size / h100.link)
    size, seconds = cost(collective("collective-permute", [[0, 7], [7, 0]]), node, h100)
    assert (size, seconds) == pytest.approx((MB, MB / h100.link))
