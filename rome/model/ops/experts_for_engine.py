"""The experts of an engine: with the adapters that it serves, on one device or on its mesh.

On a mesh every device has all tokens of a call and computes the part that its experts, and its
share of their hidden units, add to each; the sums are then added up over all devices. Calls have
few tokens: moving them round a ring, as a trainer does, would take longer than adding them up.

N tokens, D model, E experts, F expert hidden, k experts a token, S slots of adapters, r rank.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from rome.model.ops.experts import NO_EXPERT, experts, room
from rome.model.ops.low_rank import Served, adapted_experts
from rome.model.sharding import ENGINE_AXES, ENGINE_RULES, is_on_engine_mesh, partition_spec

Weights = tuple[Array, Array, Array]  # gate, up, down

_EVERYWHERE = PartitionSpec()
_IN_DF = partition_spec(("experts", "embed", "expert_hidden"), ENGINE_RULES)
_IN_FD = partition_spec(("experts", "expert_hidden", "embed"), ENGINE_RULES)
# Of adapters, A [S, E, I, r] and B [S, E, r, O]: as the inputs and outputs of their matrix.
_INTO_HIDDEN = (
    partition_spec((None, "experts", "embed", None), ENGINE_RULES),
    partition_spec((None, "experts", None, "expert_hidden"), ENGINE_RULES),
)
_OUT_OF_HIDDEN = (
    partition_spec((None, "experts", "expert_hidden", None), ENGINE_RULES),
    partition_spec((None, "experts", None, "embed"), ENGINE_RULES),
)
ADAPTER_SPECS = {"gate": _INTO_HIDDEN, "up": _INTO_HIDDEN, "down": _OUT_OF_HIDDEN}


def experts_for_engine(
    x_ND: Array,
    weights: Weights,
    weights_Nk: Array,
    ids_Nk: Array,
    implementation: str,
    served: dict[str, Served],
) -> Array:
    """Return what `rome.model.ops.experts.experts` does, with an engine's adapters added.

    Args:
      x_ND: tokens.
      weights: matrices of all experts.
      weights_Nk: gate weights.
      ids_Nk: expert ids; NO_EXPERT adds nothing.
      implementation: as for `experts`.
      served: adapters by name of the matrix; may be empty.
    """
    if not is_on_engine_mesh():
        return _run(x_ND, weights, weights_Nk, ids_Nk, served, implementation, None)
    E = weights[0].shape[0]

    def on_each_device(
        x_ND: Array, weights: Weights, weights_Nk: Array, ids_Nk: Array, served: dict[str, Served]
    ) -> Array:
        e = weights[0].shape[0]
        rows = room(ids_Nk.size * e / E)
        here_Nk = ids_Nk - jax.lax.axis_index("expert") * e
        is_here_Nk = (here_Nk >= 0) & (here_Nk < e)  # no expert's id is below all of them
        local_Nk = jnp.where(is_here_Nk, here_Nk, NO_EXPERT)
        own_ND = _run(x_ND, weights, weights_Nk, local_Nk, served, implementation, rows)
        return jax.lax.psum(own_ND, ENGINE_AXES)

    of_served = {name: Served(*ADAPTER_SPECS[name], _EVERYWHERE, _EVERYWHERE) for name in served}
    return jax.shard_map(
        on_each_device,
        in_specs=(_EVERYWHERE, (_IN_DF, _IN_DF, _IN_FD), _EVERYWHERE, _EVERYWHERE, of_served),
        out_specs=_EVERYWHERE,
        check_vma=False,
    )(x_ND, weights, weights_Nk, ids_Nk, served)


def _run(
    x_ND: Array,
    weights: Weights,
    weights_Nk: Array,
    ids_Nk: Array,
    served: dict[str, Served],
    implementation: str,
    rows: int | None,
) -> Array:
    """Run the experts that one device has."""

    def run(weights: Weights, ids_Nk: Array) -> Array:
        return experts(x_ND, *weights, weights_Nk, ids_Nk, implementation, rows)

    if not served:
        return run(weights, ids_Nk)
    is_native = implementation == "native"
    return adapted_experts(served, x_ND, weights, weights_Nk, ids_Nk, is_native, run)
