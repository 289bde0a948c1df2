"""The mesh: the same numbers on any of them, and one clear line where the model does not divide."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rome.model import sharding
from rome.model.config import PRESETS
from rome.model.moe import router_loss
from rome.model.params import axes_of, param_shardings
from rome.model.qwen3 import Qwen3, head_kernel, init_params
from rome.model.sharding import (
    batch_sharding,
    check_mesh,
    extent,
    make_mesh,
    partition_spec,
    row_shards,
)
from tests.rome.model import small
from tests.rome.model.small import random_params

CONFIG = dataclasses.replace(small.CONFIG, vocab_size=48, remat="full")
SWITCHES = dataclasses.replace(
    CONFIG,
    num_layers=3,
    dense_layers=(1,),
    intermediate_size=12,
    attention_bias=True,
    scan_layers=False,
)
DENSE = dataclasses.replace(small.DENSE, vocab_size=48, remat="full")
QWEN3 = PRESETS["qwen3_30b_a3b"]


def objective(params, tokens_BT, positions_BT, segments_BT, config, experts):
    out = Qwen3(config, scan=config.scan_layers, experts=experts).apply(
        {"params": params}, tokens_BT, positions_BT, segments_BT
    )
    logp_BTV = jax.nn.log_softmax(out.hidden_BTD @ head_kernel(params, config))
    logp_BT = jnp.take_along_axis(logp_BTV[:, :-1], tokens_BT[:, 1:, None], axis=-1)[..., 0]
    return (
        -jnp.sum(logp_BT * (segments_BT[:, 1:] != 0)) / 100 + router_loss(out.router, config),
        out.hidden_BTD,
    )


step = jax.value_and_grad(objective, has_aux=True)


def inputs(config):
    tokens_BT = jax.random.randint(jax.random.key(1), (8, 16), 0, CONFIG.vocab_size)
    positions_BT = jnp.broadcast_to(jnp.arange(16), (8, 16))
    return (
        random_params(config, scale=0.2),
        tokens_BT,
        positions_BT,
        jnp.where(positions_BT < 13, 1, 0),
    )


@functools.cache
def on_one_device(config):
    return jax.device_get(jax.jit(step, static_argnums=(4, 5))(*inputs(config), config, "dense"))


@pytest.mark.long
@pytest.mark.parametrize(
    "config, shape, experts, current",
    [  # current: whether the model knows the mesh, or only its inputs are sharded
        (CONFIG, {"fsdp": 2, "expert": 2, "tensor": 2}, "sorted", True),
        pytest.param(
            CONFIG, {"fsdp": 2, "expert": 2, "tensor": 2}, "dense", False, marks=pytest.mark.slow
        ),
        pytest.param(CONFIG, {"replica": 2, "fsdp": 4}, "sorted", False, marks=pytest.mark.slow),
        pytest.param(CONFIG, {"expert": 4, "sequence": 2}, "dense", True, marks=pytest.mark.slow),
        pytest.param(
            SWITCHES, {"fsdp": 2, "expert": 2, "tensor": 2}, "sorted", True, marks=pytest.mark.slow
        ),
        (DENSE, {"fsdp": 2, "sequence": 2, "tensor": 2}, "dense", True),
    ],
)
def test_forward_and_gradients_on_a_mesh_equal_one_device(config, shape, experts, current):
    mesh = make_mesh(shape, config)
    shardings, rows = param_shardings(mesh, config), batch_sharding(mesh)
    sharded = jax.jit(
        step,
        static_argnums=(4, 5),
        in_shardings=(shardings, rows, rows, rows),
        out_shardings=(None, shardings),
    )
    placed = jax.device_put(inputs(config), (shardings, rows, rows, rows))
    with jax.set_mesh(mesh) if current else contextlib.nullcontext():
        (loss, hidden), gradients = sharded(*placed, config, experts)
    (expected_loss, expected_hidden), expected = on_one_device(config)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    np.testing.assert_allclose(hidden, expected_hidden, atol=1e-5)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5),
        jax.device_get(gradients),
        expected,
    )


def test_every_parameter_has_a_sharding_and_the_large_ones_are_spread_over_the_whole_mesh():
    mesh = make_mesh({"fsdp": 2, "expert": 2, "tensor": 2}, QWEN3)
    shapes = jax.eval_shape(lambda key: init_params(QWEN3, key), jax.random.key(0))
    shardings = param_shardings(mesh, QWEN3)
    assert jax.tree.structure(shardings) == jax.tree.structure(shapes)
    held = jax.tree.map(
        lambda leaf, place: np.prod(place.shard_shape(leaf.shape)), shapes, shardings
    )
    assert held["layers"]["moe"]["gate"] * 8 == np.prod(shapes["layers"]["moe"]["gate"].shape)
    assert held["layers"]["attention"]["q"] * 8 == np.prod(shapes["layers"]["attention"]["q"].shape)


def test_logical_axes_name_every_axis_of_every_parameter():
    params = jax.eval_shape(lambda key: init_params(CONFIG, key), jax.random.key(0))
    axes = jax.tree_util.tree_map_with_path(axes_of, params)
    assert axes["layers"]["moe"]["down"] == (None, "experts", "expert_hidden", "embed")
    with pytest.raises(ValueError, match=r"'layers/bias'.*PARAM_AXES"):
        unknown = {"layers": {"bias": params["norm"]["scale"]}}
        jax.tree_util.tree_map_with_path(axes_of, unknown)
    with pytest.raises(ValueError, match=r"embed/embedding.*names 2 axes"):
        misshaped = {"embed": {"embedding": params["norm"]["scale"]}}
        jax.tree_util.tree_map_with_path(axes_of, misshaped)


def test_every_axis_is_in_every_mesh_and_minus_one_takes_what_is_left():
    assert dict(make_mesh({}).shape) == dict.fromkeys(sharding.AXES, 1)
    mesh = make_mesh({"fsdp": -1, "tensor": 2})
    assert dict(mesh.shape) == {"replica": 1, "fsdp": 4, "expert": 1, "sequence": 1, "tensor": 2}
    assert row_shards(mesh) == 4 and batch_sharding(mesh).spec == PartitionSpec(
        ("replica", "fsdp", "expert")
    )


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh is laid out by: enough of a TPU's device for `make_mesh`."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int = 0
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    process_index: int = 0


def torus(x: int, y: int, z: int, slices: int = 1) -> list[Chip]:
    places = [
        (i, j, k, s) for s in range(slices) for k in range(z) for j in range(y) for i in range(x)
    ]
    return [Chip(number, place[:3], place[3]) for number, place in enumerate(places)]


def test_an_axis_may_be_a_part_of_a_ring_and_neighbours_on_it_are_neighbours_on_the_torus():
    mesh = make_mesh({"fsdp": 8, "expert": 8}, devices=torus(4, 4, 4))
    spans = [
        sorted(len({device.coords[dim] for device in group}) for dim in range(3))
        for group in np.squeeze(mesh.devices)
    ]
    assert spans == [[1, 2, 4]] * 8  # the eight of an expert group: a whole ring, two deep


def test_the_extent_of_an_axis_is_what_its_groups_take_of_each_dimension_of_the_torus():
    on_cube = {
        g: sorted(
            extent(make_mesh({"fsdp": 64 // g, "expert": g}, devices=torus(4, 4, 4)), "expert")
        )
        for g in (1, 4, 8, 16, 64)
    }
    assert on_cube == {1: [], 4: [4], 8: [2, 4], 16: [4, 4], 64: [4, 4, 4]}
    assert extent(make_mesh({"fsdp": 8, "expert": 8}, devices=torus(8, 8, 1)), "expert") == (8,)
    assert (
        extent(make_mesh({"expert": 8}), "expert") == (8,)
        and extent(make_mesh({"fsdp": 8}), "expert") == ()
    )  # CPUs lie nowhere


def test_slices_are_parts_of_the_replica_axis():
    mesh = make_mesh({"replica": 4, "fsdp": 4, "expert": 8}, devices=torus(4, 4, 4, slices=2))
    assert [len({device.slice_index for device in replica.flat}) for replica in mesh.devices] == [
        1
    ] * 4
    with pytest.raises(
        ValueError,
        match=(
            r"2 slices, which do not divide replica=1. Set --config.mesh.replica to a multiple of 2"
        ),
    ):
        make_mesh({"fsdp": 16, "expert": 8}, devices=torus(4, 4, 4, slices=2))


def test_two_axes_of_one_array_on_the_same_mesh_axis_are_refused():
    with pytest.raises(ValueError, match="'tensor' on two dimensions"):
        partition_spec(("heads", "vocab"))
    with pytest.raises(ValueError, match="'pipeline' has no rule"):
        partition_spec(("pipeline",))


def test_a_mesh_that_does_not_fit_says_what_and_which_sizes_would():
    with pytest.raises(ValueError) as error:
        make_mesh({"fsdp": 4, "expert": 3}, QWEN3)
    assert (
        str(error.value)
        == "mesh (fsdp=4, expert=3) needs 12 devices, 8 are there; and 3 does not divide the 128"
        " experts. Set --config.mesh.expert to 1, 2, 4 or 8."
    )


@pytest.mark.parametrize(
    "shape, message",
    [
        (
            {"fsdp": 16},
            (
                r"mesh \(fsdp=16\) needs 16 devices, 8 are there\. Lower an axis until their"
                r" product is at most 8\."
            ),
        ),
        ({"pipeline": 2}, "mesh axis 'pipeline' is unknown; choose from replica, fsdp"),
        ({"fsdp": 0}, r"mesh \(fsdp=0\): sizes are positive"),
        ({"fsdp": -1, "expert": -1}, "at most one is -1"),
        ({"fsdp": -1, "expert": 3}, "3 does not divide the 8 devices"),
    ],
)
def test_meshes_that_cannot_be_are_refused_in_one_line(shape, message):
    with pytest.raises(ValueError, match=message) as error:
        make_mesh(shape, QWEN3)
    assert "\n" not in str(error.value)


def test_a_dense_layers_hidden_size_must_divide_too():
    check_mesh(SWITCHES, {"tensor": 2})
    with pytest.raises(ValueError, match="does not divide the dense layers' hidden size 13"):
        check_mesh(dataclasses.replace(SWITCHES, intermediate_size=13), {"tensor": 2})


def test_a_dense_model_has_nothing_to_split_over_the_expert_axis():
    check_mesh(PRESETS["qwen3_8b"], {"fsdp": 8, "tensor": 8})
    with pytest.raises(
        ValueError, match=r"a model without experts needs. Set --config.mesh.expert to 1"
    ):
        check_mesh(PRESETS["qwen3_8b"], {"expert": 2})


def test_check_mesh_names_everything_that_does_not_divide():
    check_mesh(QWEN3, {"fsdp": 8, "expert": 16, "tensor": 4}, batch=128, length=4096)
    with pytest.raises(ValueError) as error:
        check_mesh(
            QWEN3, {"fsdp": 3, "expert": 5, "sequence": 7, "tensor": 8}, batch=8, length=4096
        )
    for part in (
        "3 does not divide the hidden size 2048",
        "5 does not divide the 128 experts",
        "7 does not divide the 4096 tokens of a row",
        "8 does not divide the 4 key heads",
        "--config.mesh.tensor to 1, 2 or 4",
        "the 15 devices of replica, fsdp, expert do not divide the 8 rows",
    ):
        assert part in str(error.value)
