"""Experts on a mesh: each device holds its share of them, and the tokens of a group travel round
the ring of the `expert` axis.

B rows, T time, D model, E experts of all, e experts of one device (E = g * e), g devices of the
expert axis, F expert hidden, k experts a token, n tokens of one device.

Every device starts with its own tokens. A round adds to their sum what this device's experts make
of the tokens that are here now, while those tokens are already on the way to the neighbour; after g
rounds and one more hop the sums are home. That moves what gathering the group's tokens and
scattering the sums back (all_gather, psum_scatter) would move, but holds the tokens of one device
at a time, so that memory does not grow with the group, and it hides the transfer behind the
matmuls. One half of the tokens goes round each way: both directions of a link are in use. Nothing
is dropped, whatever the load, unless the config sets a capacity. Large groups of TPUs send each
choice to its expert's device alone instead (`rome.model.ops.expert_exchange`, which says when that
is less).

Weights lie split over fsdp, sequence and tensor too: gathered over the first two before use (their
gradients are summed and split again on the way back), partial sums over tensor added at the end.
"""

from __future__ import annotations

import functools

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
    """`rome.model.ops.experts.experts_within` over the current mesh; rows lie as RULES says,
    weights as PARAM_AXES does.

    form: "ring", or "all_to_all": each choice is sent to its expert's device alone
    (`rome.model.ops.expert_exchange`), on TPUs only. Without a capacity it equals one device's
    result. With one, each device's tokens have a share of every expert's capacity of their own.
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
    e, E = gate_eDF.shape[0], gate_eDF.shape[0] * jax.lax.axis_size("expert")
    gate_eDF, up_eDF = (gather(w, axis=1, over=RULES["embed"]) for w in (gate_eDF, up_eDF))
    down_eFD = gather(down_eFD, axis=2, over=RULES["embed"])
    x_nD, weights_nk, ids_nk = (a.reshape(-1, a.shape[-1]) for a in (x_BTD, weights_BTk, ids_BTk))
    rows = room(ids_nk.size * e / E)
    if capacity_factor:
        each = capacity(ids_nk.size, E, capacity_factor)
        ids_nk, rows = drop_beyond(ids_nk, each, E), e * each

    # the backward pass computes a round again: kept are the tokens that came by, not what the
    # experts made of them
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
        return experts(
            x_nD,
            gate_eDF,
            up_eDF,
            down_eFD,
            weights_nk,
            jnp.where(ids_nk < 0, NO_EXPERT, here_nk),
            implementation,
            rows,
        )

    if form == "all_to_all" and e < E:
        out_nD = exchange(
            grouped_matmul(implementation), x_nD, weights_nk, ids_nk, gate_eDF, up_eDF, down_eFD
        )
    else:
        out_nD = _round_the_ring(
            lambda tokens: local_sum(*tokens, gate_eDF, up_eDF, down_eFD),
            (x_nD, weights_nk, ids_nk),
        )
    return jax.lax.psum(out_nD, "tensor").reshape(x_BTD.shape), ids_nk.reshape(ids_BTk.shape)


def _round_the_ring(local_sum, tokens: Tokens) -> Array:
    """The sum over the devices of the expert axis of local_sum(tokens), for each device's own
    tokens.
    """
    g = jax.lax.axis_size("expert")
    if g == 1:
        return local_sum(tokens)
    half = tokens[0].shape[0] // 2  # 0 for a single token: then everything goes one way

    def hop(values):
        onward = [(d, (d + 1) % g) for d in range(g)]
        backward = [(d, (d - 1) % g) for d in range(g)]
        ways = ((slice(None, half), onward), (slice(half, None), backward))
        return jax.tree.map(
            lambda a: jnp.concatenate(
                [
                    jax.lax.ppermute(a[part], "expert", way)
                    for part, way in ways
                    if half or way is backward
                ]
            ),
            values,
        )

    def round_(carry: tuple[Tokens, Array], _: None) -> tuple[tuple[Tokens, Array], None]:
        tokens, sum_nD = carry
        return (hop(tokens), hop(sum_nD) + local_sum(tokens)), None

    (_, sum_nD), _ = jax.lax.scan(round_, (tokens, jnp.zeros_like(tokens[0])), length=g)
    return hop(sum_nD)
