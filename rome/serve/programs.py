"""The two compiled programs of the engine, prefill and decode.

S slots, T context length, R rows of a call, P tokens of a chunk, Q decode steps of a call, V
vocabulary, L layers, k experts per token.

Shapes never vary. A row's numbers depend on that row only: the forms of the experts that are used
here compute each row by itself, and the requests' options choose a branch, not another program. A
slot is a place in the cache, not a row of a call: an episode keeps its slot while its command runs,
and at any moment most slots wait for that, so a call takes the few that have work.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rome.model.config import ModelConfig
from rome.model.qwen3 import Params, head_kernel
from rome.serve.forward import Cache, LayerCache, forward
from rome.serve.sampling import AnyArray, RowSampling, sample, token_logprobs


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The fixed shapes of one server.

    Attributes:
      slots: sequences whose cache is kept.
      max_context: tokens of prompt and answer together.
      prefill_rows: prompts of a prefill call.
      prefill_chunk: prompt tokens of a row and prefill call; prefixes are cached in such chunks.
      decode_rows: sequences of a decode call.
      decode_steps: tokens of a row and decode call.
    """

    slots: int = 64
    max_context: int = 384
    prefill_rows: int = 8
    prefill_chunk: int = 32
    decode_rows: int = 16
    decode_steps: int = 4

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")


class Chunks(NamedTuple):
    """Inputs of one prefill call.

    A row without work has slot S, which no write reaches, and length 0.

    Attributes:
      token_RP: tokens of each row's chunk.
      target_RP: the token after each token, for scoring; arbitrary where there is none.
      start_R: position of the chunk's first token.
      length_R: tokens of the chunk.
      source_R: slot whose cache the row starts from (its own, or one that holds the same prefix).
      slot_R: slot that the row's cache is written to.
    """

    token_RP: AnyArray
    target_RP: AnyArray
    start_R: AnyArray
    length_R: AnyArray
    source_R: AnyArray
    slot_R: AnyArray


class Prefilled(NamedTuple):
    """Outputs of one prefill call.

    Attributes:
      token_R: drawn after the last token of each row.
      logprob_R: of token_R.
      target_logprob_RP: of Chunks.target_RP; all 0 unless scores were asked for.
      routes_LRPk: experts of each token; None once it is on the host, if no row asked for them.
    """

    token_R: AnyArray
    logprob_R: AnyArray
    target_logprob_RP: AnyArray
    routes_LRPk: AnyArray | None


class Next(NamedTuple):
    """Inputs of one decode call.

    Attributes:
      token_R: the token that each row has drawn last.
      position_R: its position.
      slot_R: slot of the row's cache; S for a row without work.
    """

    token_R: AnyArray
    position_R: AnyArray
    slot_R: AnyArray


class Decoded(NamedTuple):
    """Outputs of one decode call: tokens of Q steps, and the experts of the token before each.

    The experts are None once it is on the host, if no row asked for them.
    """

    token_QR: AnyArray
    logprob_QR: AnyArray
    routes_QLRk: AnyArray | None


Prefill = Callable[[Params, Cache, Chunks, RowSampling, Any], tuple[Cache, Prefilled]]
Decode = Callable[[Params, Cache, Next, RowSampling], tuple[Cache, Decoded]]


def make_programs(config: ModelConfig, shapes: Shapes) -> tuple[Prefill, Decode]:
    """Return the jitted programs; both donate the cache that they are given."""
    prefill = functools.partial(_prefill, config)
    decode = functools.partial(_decode, config, shapes.decode_steps)
    return jax.jit(prefill, donate_argnums=1), jax.jit(decode, donate_argnums=1)


def _prefill(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    chunks: Chunks,
    rows: RowSampling,
    scores: Array,
) -> tuple[Cache, Prefilled]:
    """Compute a chunk of each row's prompt, and draw the token after it.

    Args:
      config: of the model.
      params: layers unstacked.
      cache: of all slots.
      chunks: the rows' inputs.
      rows: how each row is sampled.
      scores: scalar bool, whether target logprobs are wanted.
    """
    R, P = chunks.token_RP.shape
    column_P = jnp.arange(P)
    real_RP = column_P[None] < chunks.length_R[:, None]
    position_RP = chunks.start_R[:, None] + column_P[None]
    own = jax.tree.map(lambda slots: slots[chunks.source_R], cache)
    hidden_RPD, own, routes_LRPk = forward(
        params, config, chunks.token_RP, position_RP, real_RP, own, experts="sorted"
    )

    def write_back(slots: Array, rows: Array) -> Array:
        return slots.at[chunks.slot_R].set(rows, mode="drop")

    cache = jax.tree.map(write_back, cache, own)
    kernel_DV = head_kernel(params, config)
    last_R = jnp.maximum(chunks.length_R - 1, 0)
    last_hidden_RD = hidden_RPD[jnp.arange(R), last_R]
    next_position_R = chunks.start_R + chunks.length_R
    token_R, logprob_R = sample(_logits(last_hidden_RD, kernel_DV), next_position_R, rows)

    def score() -> Array:
        logits_NV = _logits(hidden_RPD.reshape(R * P, -1), kernel_DV)
        return token_logprobs(logits_NV, chunks.target_RP.reshape(-1)).reshape(R, P)

    target_logprob_RP = jax.lax.cond(scores, score, lambda: jnp.zeros((R, P), jnp.float32))
    return cache, Prefilled(token_R, logprob_R, target_logprob_RP, routes_LRPk)


def _decode(
    config: ModelConfig, steps: int, params: Params, cache: Cache, inputs: Next, rows: RowSampling
) -> tuple[Cache, Decoded]:
    """Draw a few tokens for each row on a copy of its slot's cache, then write the new part back.

    A row that meets its end continues to the last step; the caller cuts the surplus. Writes past
    the context are dropped.
    """
    kernel_DV = head_kernel(params, config)
    num_slots = cache[0].k_BKHS.shape[0]
    works_R1 = inputs.slot_R[:, None] < num_slots

    def step(
        carry: tuple[Cache, Array, Array], _: None
    ) -> tuple[tuple[Cache, Array, Array], Decoded]:
        own, token_R, position_R = carry
        hidden_R1D, own, routes_LR1k = forward(
            params, config, token_R[:, None], position_R[:, None], works_R1, own, experts="dense"
        )
        logits_RV = _logits(hidden_R1D[:, 0], kernel_DV)
        position_R = position_R + 1
        token_R, logprob_R = sample(logits_RV, position_R, rows)
        return (own, token_R, position_R), Decoded(token_R, logprob_R, routes_LR1k[:, :, 0])

    own = jax.tree.map(lambda slots: slots[inputs.slot_R], cache)
    start = (own, inputs.token_R, inputs.position_R)
    (own, _, _), decoded = jax.lax.scan(step, start, length=steps)
    layers = [_write_back(layer, new, inputs, steps) for layer, new in zip(cache, own, strict=True)]
    return tuple(layers), decoded


def _write_back(layer: LayerCache, rows: LayerCache, inputs: Next, steps: int) -> LayerCache:
    """Copy the positions that a decode call wrote from the rows' caches to their slots."""
    row_R1 = jnp.arange(inputs.slot_R.size)[:, None]
    slot_R1 = inputs.slot_R[:, None]
    at_RQ = inputs.position_R[:, None] + jnp.arange(steps)
    k_RQKH = rows.k_BKHS[row_R1, :, :, at_RQ]
    v_RQKH = rows.v_BKSH[row_R1, :, at_RQ]
    return LayerCache(
        layer.k_BKHS.at[slot_R1, :, :, at_RQ].set(k_RQKH, mode="drop"),
        layer.v_BKSH.at[slot_R1, :, at_RQ].set(v_RQKH, mode="drop"),
    )


def _logits(hidden_ND: Array, kernel_DV: Array) -> Array:
    """Return float32 logits, computed as in the trainer's `chunked_logprobs`."""
    kernel_DV = kernel_DV.astype(hidden_ND.dtype)
    return jnp.matmul(hidden_ND, kernel_DV, preferred_element_type=jnp.float32)
