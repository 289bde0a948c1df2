"""Log-probabilities of the tokens that were taken, without ever holding [B, T, V].

B rows, T tokens, D model, V vocabulary; n positions of one device (rows and time flattened), m
positions of a block; d and v are one device's part of D and V.

The head is applied to a block of positions at a time, forward and, once more, backward; kept
between the two is one number a position. Where all logits together are few they are one block and
are kept: one product of four less. On a mesh every device scores its own positions: the head is
gathered forward once, backward a part of the vocabulary at a time, and its gradient summed over
blocks in float32 and brought home once.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from rome.model.ops.gathered import WIDE, gather, scatter_sum
from rome.model.sharding import RULES, is_split

BLOCK = 512  # positions whose logits exist at one time
# tokens of the vocabulary whose head and gradient the backward pass holds at one time
MOST_WIDE = 20_000
KEPT_LOGITS = 2**26  # 256 MiB of float32; beyond, they are computed again


def chunked_logprobs(
    hidden_BTD: Array,
    kernel_DV: Array,
    tokens_BT: Array,
    segments_BT: Array,
    temperature: float = 1.0,
    *,
    block: int | None = None,
    with_entropy: bool = False,
) -> Array | tuple[Array, Array]:
    """log p(tokens[t] | tokens before t of the same segment), as the sampler saw it.

    Args:
      hidden_BTD: after the final norm; the vector at t - 1 predicts token t. Its type is the one
        that the head computes in.
      kernel_DV: on a mesh laid out as PARAM_AXES says.
      segments_BT: 0 is padding.
      temperature: divides the logits, as it did while sampling.
      block: positions whose logits exist at one time; by default all of them where they are at most
        KEPT_LOGITS, else BLOCK.
      with_entropy: also return the entropy of the distribution that token t was drawn from, a
        constant to the gradient.
    Returns:
      [B, T] float32 (and the same again for the entropy); 0 at the first token of a segment and on
      padding.
    """
    target_BT = jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)))

    def score(hidden_BTD: Array, kernel_dv: Array, target_BT: Array) -> tuple[Array, Array]:
        scores_n = _taken_logprobs(
            hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
            kernel_dv,
            target_BT.reshape(-1),
            temperature,
            block,
            is_split(),
        )
        return tuple(score_n.reshape(target_BT.shape) for score_n in scores_n)

    if is_split():
        by_token = PartitionSpec(RULES["batch"], RULES["time"])
        score = jax.shard_map(
            score,
            in_specs=(by_token, PartitionSpec(WIDE, "tensor"), by_token),
            out_specs=(by_token, by_token),
            check_vma=False,
        )
    predicted = score(hidden_BTD, kernel_DV, target_BT)
    has_predecessor_BT = jnp.pad(segments_BT[:, 1:] == segments_BT[:, :-1], ((0, 0), (1, 0))) & (
        segments_BT > 0
    )
    logp_BT, entropy_BT = (
        jnp.where(has_predecessor_BT, jnp.pad(score_BT[:, :-1], ((0, 0), (1, 0))), 0.0)
        for score_BT in predicted
    )
    return (logp_BT, jax.lax.stop_gradient(entropy_BT)) if with_entropy else logp_BT


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _taken_logprobs(
    hidden_nD: Array,
    kernel_dv: Array,
    target_n: Array,
    temperature: float,
    block: int | None,
    on_mesh: bool,
) -> tuple[Array, Array]:
    """(log p(target), entropy) of each position."""
    return _forward(hidden_nD, kernel_dv, target_n, temperature, block, on_mesh)[0]


def _forward(hidden_nD, kernel_dv, target_n, temperature, block, on_mesh):
    kernel_Dv = _gathered(kernel_dv, hidden_nD.dtype, on_mesh)
    total = lambda x: (
        jax.lax.psum(x, "tensor") if on_mesh else x
    )  # over the parts of the vocabulary
    keep = _keeps_logits(hidden_nD, kernel_dv, block)

    def score(hidden_and_target: tuple[Array, Array]) -> tuple[Array, ...]:
        hidden_mD, target_m = hidden_and_target
        logits_mv = _logits(hidden_mD, kernel_Dv, temperature)
        top_m1 = logits_mv.max(axis=-1, keepdims=True)
        top_m1 = jax.lax.pmax(top_m1, "tensor") if on_mesh else top_m1
        weight_mv = jnp.exp(logits_mv - top_m1)
        sum_m = total(weight_mv.sum(axis=-1))
        log_sum_m = top_m1[:, 0] + jnp.log(sum_m)
        taken_m = (
            total(
                jnp.sum(
                    jnp.where(_is_target(target_m, kernel_Dv.shape[1], on_mesh), logits_mv, 0.0),
                    axis=-1,
                )
            )
            - log_sum_m
        )
        entropy_m = log_sum_m - total(jnp.sum(weight_mv * logits_mv, axis=-1)) / sum_m
        return taken_m, entropy_m, log_sum_m, *([logits_mv] if keep else [])

    if keep:
        logp_n, entropy_n, log_sum_n, *logits = score((hidden_nD, target_n))
    else:
        scores = jax.lax.map(score, (_in_blocks(hidden_nD, block), _in_blocks(target_n, block)))
        (logp_n, entropy_n, log_sum_n), logits = (
            (score_km.reshape(-1)[: target_n.shape[0]] for score_km in scores),
            [],
        )
    return (logp_n, entropy_n), (hidden_nD, kernel_dv, target_n, log_sum_n, logits)


def _backward(temperature, block, on_mesh, residuals, gradients):
    """d logits = (one_hot(target) - p) * d logp / temperature; the entropy is a constant.

    Where logits are computed again, a part of the vocabulary at a time: neither the whole head nor
    its whole float32 gradient is there at once.
    """
    hidden_nD, kernel_dv, target_n, log_sum_n, logits = residuals
    gradient_n = gradients[0]
    if (
        on_mesh
    ):  # shard_map hands each part of the vocabulary its share of a gradient that all of them need
        gradient_n = jax.lax.psum(gradient_n, "tensor")

    def pull_back(
        hidden_mD: Array,
        target_m: Array,
        log_sum_m: Array,
        gradient_m: Array,
        logits_mv: Array,
        kernel_Dv: Array,
        first: Array,
    ) -> tuple[Array, Array]:
        is_target_mv = target_m[:, None] == first + jnp.arange(kernel_Dv.shape[1])
        d_mv = (
            (is_target_mv - jnp.exp(logits_mv - log_sum_m[:, None]))
            * (gradient_m / temperature)[:, None]
        ).astype(hidden_mD.dtype)
        # Turned behind a barrier: on a CPU a product whose left side is transposed leaves the fast
        # matmuls.
        hidden_Dm = jax.lax.optimization_barrier(hidden_mD.T)
        return (
            jnp.einsum("Dm,mv->Dv", hidden_Dm, d_mv, preferred_element_type=jnp.float32),
            jnp.einsum("mv,Dv->mD", d_mv, kernel_Dv, preferred_element_type=jnp.float32),
        )

    if logits:
        kernel_Dv = _gathered(kernel_dv, hidden_nD.dtype, on_mesh)
        d_kernel_Dv, d_hidden_nD = pull_back(
            hidden_nD,
            target_n,
            log_sum_n,
            gradient_n,
            logits[0],
            kernel_Dv,
            _first(kernel_Dv.shape[1], on_mesh),
        )
        d_kernel_dv = (
            scatter_sum(d_kernel_Dv.astype(hidden_nD.dtype), axis=0) if on_mesh else d_kernel_Dv
        )
        return d_hidden_nD.astype(hidden_nD.dtype), d_kernel_dv.astype(kernel_dv.dtype), None

    blocks = tuple(_in_blocks(x, block) for x in (hidden_nD, target_n, log_sum_n, gradient_n))
    parts = _vocabulary_parts(kernel_dv.shape[1])
    width = kernel_dv.shape[1] // parts

    def one_part(d_hidden_kmD: Array, part: Array) -> tuple[Array, Array]:
        kernel_Dw = _gathered(
            jax.lax.dynamic_slice_in_dim(kernel_dv, part * width, width, axis=1),
            hidden_nD.dtype,
            on_mesh,
        )
        first = _first(kernel_dv.shape[1], on_mesh) + part * width

        def add(sum_Dw: Array, blocks: tuple[Array, ...]) -> tuple[Array, Array]:
            *block, d_hidden_mD = blocks
            more_Dw, more_mD = pull_back(
                *block, _logits(block[0], kernel_Dw, temperature), kernel_Dw, first
            )
            return sum_Dw + more_Dw, d_hidden_mD + more_mD

        sum_Dw, d_hidden_kmD = jax.lax.scan(
            add, jnp.zeros(kernel_Dw.shape, jnp.float32), (*blocks, d_hidden_kmD)
        )
        # In the compute type, as the gradients of all other matrices travel.
        return d_hidden_kmD, (
            scatter_sum(sum_Dw.astype(hidden_nD.dtype), axis=0) if on_mesh else sum_Dw
        )

    d_hidden_kmD, d_kernel_pdw = jax.lax.scan(
        one_part, jnp.zeros(blocks[0].shape, jnp.float32), jnp.arange(parts)
    )
    d_hidden_nD = d_hidden_kmD.reshape(-1, hidden_nD.shape[-1])[: target_n.shape[0]]
    d_kernel_dv = jnp.swapaxes(d_kernel_pdw, 0, 1).reshape(kernel_dv.shape)
    return d_hidden_nD.astype(hidden_nD.dtype), d_kernel_dv.astype(kernel_dv.dtype), None


_taken_logprobs.defvjp(_forward, _backward)


def _gathered(kernel_dv: Array, dtype, on_mesh: bool) -> Array:
    """The kernel in the type that it computes in, whole over D. Cast first: half the bytes travel."""
    kernel_dv = kernel_dv.astype(dtype)
    return gather(kernel_dv, axis=0) if on_mesh else kernel_dv


def _keeps_logits(hidden_nD: Array, kernel_dv: Array, block: int | None) -> bool:
    return block is None and hidden_nD.shape[0] * kernel_dv.shape[1] <= KEPT_LOGITS


def _logits(hidden_mD: Array, kernel_Dv: Array, temperature: float) -> Array:
    return (
        jnp.einsum("mD,Dv->mv", hidden_mD, kernel_Dv, preferred_element_type=jnp.float32)
        / temperature
    )


def _first(v: int, on_mesh: bool) -> Array | int:
    """The first token of this device's part of the vocabulary."""
    return jax.lax.axis_index("tensor") * v if on_mesh else 0


def _is_target(target_m: Array, v: int, on_mesh: bool) -> Array:
    """Where each row's target lies, [m, v]: a mask, not an index, so that it stays local and its
    gradient is no scatter.
    """
    return target_m[:, None] == _first(v, on_mesh) + jnp.arange(v)


def _vocabulary_parts(v: int) -> int:
    """The fewest equal parts of at most MOST_WIDE tokens."""
    return next(parts for parts in range(-(-v // MOST_WIDE), v + 1) if v % parts == 0)


def _in_blocks(values_n: Array, block: int | None) -> Array:
    """[n, ...] -> [blocks, m, ...], filled up with zeros."""
    m = min(block or BLOCK, values_n.shape[0])
    filled = jnp.pad(values_n, ((0, -values_n.shape[0] % m),) + ((0, 0),) * (values_n.ndim - 1))
    return filled.reshape(-1, m, *values_n.shape[1:])
