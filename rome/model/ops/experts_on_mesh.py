"""Experts on a mesh: each device holds its share of them, and tokens travel round a ring.

B rows, T time, D model, E experts of all, e experts of one device (E = g * e), g devices of the
expert axis, F expert hidden, k experts a token, n tokens of one device.

The ring is that of the `expert` axis. Every device starts with its own tokens. A round adds this
device's experts' part to the sums of the tokens that are here now, while those tokens are already
on the way to the neighbour; after g rounds and one more hop the sums are home. That moves as much
as gathering the group's tokens and scattering the sums back (all_gather, psum_scatter), but holds
the tokens of one device at a time, so that memory does not grow with the group, and it hides the
transfer behind the matmuls. One half of the tokens goes round each way: both directions of a link
are in use. Nothing is dropped, whatever the load, unless the config sets a capacity. Large groups
of TPUs send each choice to its expert's device alone instead (`rome.model.ops.expert_exchange`,
which says when that is less).

Weights lie split over fsdp, sequence and tensor too: gathered over the first two before use (their
gradients are summed and split again on the way back), partial sums over tensor added at the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from rome.model.ops.expert_exchange import exchange
from rome.model.ops.experts import NO_EXPERT, capacity, drop_beyond, experts, grouped_matmul, room
from rome.model.ops.gathered import gather
from rome.model.sharding import RULES

Tokens = tuple[Array, Array, Array]  # x_nD, weights_nk, ids_nk (of all E experts)

FORMS = ("auto", "ring", "all_to_all")

_BY_TOKEN = PartitionSpec(RULES["batch"], RULES["time"], None)
_IN_DF = PartitionSpec("expert", RULES["embed"], "tensor")
_IN_FD = PartitionSpec("expert", "tensor", RULES["embed"])


def experts_on_mesh(
    x_BTD: Array,
    gate_EDF: Array,
    up_EDF: Array,
    down_EFD: Array,
    weights_BTk: Array,
    ids_BTk: Array,
    implementation: str,
    capacity_factor: float,
    form: str = "ring",
) -> tuple[Array, Array]:
    """Run `rome.model.ops.experts.experts_within` over the current mesh.

    Without a capacity the result equals one device's. With one, each device's tokens have their own
    share of every expert's capacity.

    Args:
      x_BTD: rows as RULES lays them out.
      gate_EDF: matrices, here and below laid out as `rome.model.params.PARAM_AXES` says.
      up_EDF: matrices.
      down_EFD: matrices.
      weights_BTk: gate weights.
      ids_BTk: expert ids; NO_EXPERT adds nothing.
      implementation: as for `experts`.
      capacity_factor: as for `experts_within`.
      form: "ring", or "all_to_all": each choice is sent to its expert's device alone
        (`rome.model.ops.expert_exchange`), on TPUs only.

    Returns:
      The sums [B, T, D] and the ids that ran [B, T, k].
    """
    run = functools.partial(
        _on_each_device, implementation=implementation, capacity_factor=capacity_factor, form=form
    )
    return jax.shard_map(
        run,
        in_specs=(_BY_TOKEN, _IN_DF, _IN_DF, _IN_FD, _BY_TOKEN, _BY_TOKEN),
        out_specs=(_BY_TOKEN, _BY_TOKEN),
        check_vma=False,
    )(x_BTD, gate_EDF, up_EDF, down_EFD, weights_BTk, ids_BTk)


def _on_each_device(
    x_BTD: Array,
    gate_eDF: Array,
    up_eDF: Array,
    down_eFD: Array,
    weights_BTk: Array,
    ids_BTk: Array,
    implementation: str,
    capacity_factor: float,
    form: str,
) -> tuple[Array, Array]:
    e = gate_eDF.shape[0]
    E = e * jax.lax.axis_size("expert")
    gate_eDF = gather(gate_eDF, axis=1, over=RULES["embed"])
    up_eDF = gather(up_eDF, axis=1, over=RULES["embed"])
    down_eFD = gather(down_eFD, axis=2, over=RULES["embed"])
    x_nD, weights_nk, ids_nk = (a.reshape(-1, a.shape[-1]) for a in (x_BTD, weights_BTk, ids_BTk))
    rows = room(ids_nk.size * e / E)
    if capacity_factor:
        each = capacity(ids_nk.size, E, capacity_factor)
        ids_nk = drop_beyond(ids_nk, each, E)
        rows = e * each

    # The backward pass computes a round again: it keeps the tokens that came by, not the experts'
    # results for them.
    @jax.checkpoint
    def local_sum(
        x_nD: Array,
        weights_nk: Array,
        ids_nk: Array,
        gate_eDF: Array,
        up_eDF: Array,
        down_eFD: Array,
    ) -> Array:
        here_nk = ids_nk - jax.lax.axis_index("expert") * e
        local_nk = jnp.where(ids_nk < 0, NO_EXPERT, here_nk)
        return experts(x_nD, gate_eDF, up_eDF, down_eFD, weights_nk, local_nk, implementation, rows)

    if form == "all_to_all" and e < E:
        matmul = grouped_matmul(implementation)
        out_nD = exchange(matmul, x_nD, weights_nk, ids_nk, gate_eDF, up_eDF, down_eFD)
    else:

        def run_experts(tokens: Tokens) -> Array:
            return local_sum(*tokens, gate_eDF, up_eDF, down_eFD)

        out_nD = _round_the_ring(run_experts, (x_nD, weights_nk, ids_nk))
    return jax.lax.psum(out_nD, "tensor").reshape(x_BTD.shape), ids_nk.reshape(ids_BTk.shape)


def _round_the_ring(local_sum: Callable[[Tokens], Array], tokens: Tokens) -> Array:
    """Return for each device's own tokens the sum of local_sum over the devices of the ring."""
    g = jax.lax.axis_size("expert")
    if g == 1:
        return local_sum(tokens)
    half = tokens[0].shape[0] // 2  # 0 for a single token: then everything goes one way
    onward = [(device, (device + 1) % g) for device in range(g)]
    backward = [(device, (device - 1) % g) for device in range(g)]

    def hop(a: Array) -> Array:
        moved = []
        if half:
            moved.append(jax.lax.ppermute(a[:half], "expert", onward))
        moved.append(jax.lax.ppermute(a[half:], "expert", backward))
        return jnp.concatenate(moved)

    def hop_all(tokens: Tokens) -> Tokens:
        return jax.tree.map(hop, tokens)

    def round_(carry: tuple[Tokens, Array], _: None) -> tuple[tuple[Tokens, Array], None]:
        tokens, sum_nD = carry
        return (hop_all(tokens), hop(sum_nD) + local_sum(tokens)), None

    (_, sum_nD), _ = jax.lax.scan(round_, (tokens, jnp.zeros_like(tokens[0])), length=g)
    return hop(sum_nD)
