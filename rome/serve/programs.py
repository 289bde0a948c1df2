"""The two compiled programs of the engine: prefill some rows of a chunk, decode some rows a few
steps.

Shapes never vary.

S slots, T context length, R rows of a call, P tokens of a chunk, Q decode steps of a call, V
vocabulary, L layers, k experts a token.

A row's numbers depend on that row only: the forms of the experts that are used here compute each
row by itself, and whatever a row asks for chooses a branch, not another program. A slot is a place
in the cache, not a row: an episode keeps its slot while its command runs, and most slots wait so at
any moment, so a call takes the few that have work.
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
from rome.serve.sampling import RowSampling, sample, token_logprobs


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The fixed shapes of one server."""

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
    """One prefill call. A row without work has slot S, which no write reaches, and length 0.

    source_R: slot whose cache the row starts from (its own, or one that holds the same prefix).
    target_RP: the token after each token, for scoring; anything where there is none.
    """

    token_RP: Array
    target_RP: Array
    start_R: Array
    length_R: Array
    source_R: Array
    slot_R: Array


class Prefilled(NamedTuple):
    """token_R, logprob_R: drawn after the last token of each row. target_logprob_RP: all 0 unless
    scores were asked for.
    """

    token_R: Array
    logprob_R: Array
    target_logprob_RP: Array
    routes_LRPk: Array


class Next(NamedTuple):
    """One decode call: the token that each row has drawn last, its position and the slot of the
    row's cache (S for a row without work).
    """

    token_R: Array
    position_R: Array
    slot_R: Array


class Decoded(NamedTuple):
    token_QR: Array
    logprob_QR: Array
    routes_QLRk: Array


Prefill = Callable[[Params, Cache, Chunks, RowSampling, Any], tuple[Cache, Prefilled]]
Decode = Callable[[Params, Cache, Next, RowSampling], tuple[Cache, Decoded]]


def make_programs(config: ModelConfig, shapes: Shapes) -> tuple[Prefill, Decode]:
    """The programs, jitted; both take the cache over (it is donated) and give it back."""
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
    """Runs a chunk of each row's prompt, and draws the token after it.

    `scores`: whether target logprobs are wanted.
    """
    R, P = chunks.token_RP.shape
    column_P = jnp.arange(P)
    real_RP = column_P[None] < chunks.length_R[:, None]
    position_RP = chunks.start_R[:, None] + column_P[None]
    own = jax.tree.map(lambda slots: slots[chunks.source_R], cache)
    hidden_RPD, own, routes_LRPk = forward(
        params, config, chunks.token_RP, position_RP, real_RP, own, experts="sorted"
    )
    cache = jax.tree.map(
        lambda slots, rows: slots.at[chunks.slot_R].set(rows, mode="drop"), cache, own
    )
    kernel_DV = head_kernel(params, config)
    last_R = jnp.maximum(chunks.length_R - 1, 0)
    logits_RV = _logits(hidden_RPD[jnp.arange(R), last_R], kernel_DV)
    token_R, logprob_R = sample(logits_RV, chunks.start_R + chunks.length_R, rows)

    def score() -> Array:
        hidden_ND = hidden_RPD.reshape(R * P, -1)
        return token_logprobs(_logits(hidden_ND, kernel_DV), chunks.target_RP.reshape(-1)).reshape(
            R, P
        )

    target_logprob_RP = jax.lax.cond(scores, score, lambda: jnp.zeros((R, P), jnp.float32))
    return cache, Prefilled(token_R, logprob_R, target_logprob_RP, routes_LRPk)


def _decode(
    config: ModelConfig, steps: int, params: Params, cache: Cache, ahead: Next, rows: RowSampling
) -> tuple[Cache, Decoded]:
    """A few steps of each row, on a copy of its slot's cache; then what the steps wrote there goes
    back.

    A row that meets its end goes on to the last step; the caller cuts what is too much, and writes
    past the context are dropped.
    """
    kernel_DV = head_kernel(params, config)
    works_R1 = ahead.slot_R[:, None] < cache[0].k_BKHS.shape[0]

    def step(
        carry: tuple[Cache, Array, Array], _: None
    ) -> tuple[tuple[Cache, Array, Array], Decoded]:
        own, token_R, position_R = carry
        hidden_R1D, own, routes_LR1k = forward(
            params, config, token_R[:, None], position_R[:, None], works_R1, own, experts="dense"
        )
        token_R, logprob_R = sample(_logits(hidden_R1D[:, 0], kernel_DV), position_R + 1, rows)
        return (own, token_R, position_R + 1), Decoded(token_R, logprob_R, routes_LR1k[:, :, 0])

    own = jax.tree.map(lambda slots: slots[ahead.slot_R], cache)
    (own, _, _), decoded = jax.lax.scan(step, (own, ahead.token_R, ahead.position_R), length=steps)
    row_R1, slot_R1, at_RQ = (
        jnp.arange(ahead.slot_R.size)[:, None],
        ahead.slot_R[:, None],
        ahead.position_R[:, None] + jnp.arange(steps),
    )
    return (
        tuple(
            LayerCache(
                layer.k_BKHS.at[slot_R1, :, :, at_RQ].set(
                    new.k_BKHS[row_R1, :, :, at_RQ], mode="drop"
                ),
                layer.v_BKSH.at[slot_R1, :, at_RQ].set(new.v_BKSH[row_R1, :, at_RQ], mode="drop"),
            )
            for layer, new in zip(cache, own)
        ),
        decoded,
    )


def _logits(hidden_ND: Array, kernel_DV: Array) -> Array:
    """float32, by the head in the compute type, as the trainer's `chunked_logprobs` does it."""
    return jnp.matmul(
        hidden_ND, kernel_DV.astype(hidden_ND.dtype), preferred_element_type=jnp.float32
    )
