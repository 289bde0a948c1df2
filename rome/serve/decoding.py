"""Several steps of decoding in one dispatch: a row's drawn token is its next input, on the device.

R rows (sequences), M pages of a row, N steps, S stop tokens, L layers, k experts a token.

Each step is a call of `rome.serve.programs` with one token of each row, so a row's numbers are
those that single steps give. A row ends at a stop token, and pauses at its limit: where its answer
or its pages end. What else ends an answer (stop strings, stop tokens beyond the first S) is found
when the tokens are read; what was drawn after it is dropped. A dispatch returns where its rows
stand as an array of the device, from which the next one may go on before anything is read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Sharding

from rome.model.config import ModelConfig
from rome.model.qwen3 import Params
from rome.serve.adapters import AdapterArrays
from rome.serve.programs import (
    Call,
    PageArrays,
    Program,
    Shapes,
    empty_sampling,
    set_sampling,
)
from rome.serve.request import Request
from rome.serve.sampling import AnyArray, RowSampling

STOPS = 8  # stop tokens of a row that the device knows
NO_TOKEN = -1
MAX_TOKEN = np.iinfo(np.int32).max


class Front(NamedTuple):
    """Where the rows of a dispatch stand.

    Attributes:
      token_R: drawn last; the next input.
      position_R: its place in the sequence.
      is_open_R: False once the row has drawn a stop token.
    """

    token_R: AnyArray
    position_R: AnyArray
    is_open_R: AnyArray


class Rows(NamedTuple):
    """What does not change from step to step.

    Attributes:
      table_RM: pages of each row's sequence.
      limit_R: tokens at this position and later are not computed; 0 for a row without a sequence.
      slot_R: of the adapter of each row; -1: none.
      stops_RS: tokens that end the row, filled up with NO_TOKEN.
      sampling: how each row is sampled.
    """

    table_RM: AnyArray
    limit_R: AnyArray
    slot_R: AnyArray
    stops_RS: AnyArray
    sampling: RowSampling


class Steps(NamedTuple):
    """What a dispatch has drawn.

    Attributes:
      token_NR: drawn in each step; arbitrary from count_R on.
      logprob_NR: of token_NR.
      count_R: steps in which each row drew a token: the first ones.
      routes_NLRk: experts of the tokens that were computed: each row's input of each step.
    """

    token_NR: AnyArray
    logprob_NR: AnyArray
    count_R: AnyArray
    routes_NLRk: AnyArray


Decoder = Callable[
    [Params, AdapterArrays | None, PageArrays, Rows, Front], tuple[PageArrays, Front, Steps]
]


def make_decoder(
    program: Program, config: ModelConfig, steps: int, page_sharding: Sharding
) -> Decoder:
    """Return the jitted program of up to `steps` steps; it donates the pages that it is given.

    Args:
      program: of one call, as `rome.serve.programs.make_program` returns it. It is not traced again
        for a size that has been called before.
      config: of the model.
      steps: of a dispatch at most.
      page_sharding: that the pages have, and keep.
    """
    decode = functools.partial(_decode, program, config, steps)
    return jax.jit(decode, donate_argnums=2, out_shardings=(page_sharding, None, None))


def _decode(
    program: Program,
    config: ModelConfig,
    steps: int,
    params: Params,
    adapters: AdapterArrays | None,
    kv: PageArrays,
    rows: Rows,
    front: Front,
) -> tuple[PageArrays, Front, Steps]:
    """Take steps until none of the rows goes on."""
    R = rows.limit_R.size
    shape = (steps, config.num_layers, R, config.experts_per_token)
    nothing = Steps(
        jnp.zeros((steps, R), jnp.int32),
        jnp.zeros((steps, R), jnp.float32),
        jnp.zeros(R, jnp.int32),
        jnp.zeros(shape, jnp.int32),
    )
    Loop = tuple[Array, PageArrays, Front, Steps]

    def goes_on(loop: Loop) -> Array:
        step, _, front, _ = loop
        return (step < steps) & jnp.any(_is_active(front, rows))

    def take_step(loop: Loop) -> Loop:
        step, kv, front, taken = loop
        is_active_R = _is_active(front, rows)
        kv, result = program(params, adapters, kv, _call_of(rows, front))
        taken = Steps(
            taken.token_NR.at[step].set(result.token_R),
            taken.logprob_NR.at[step].set(result.logprob_R),
            taken.count_R + is_active_R,
            taken.routes_NLRk.at[step].set(result.routes_LTk),
        )
        stops_R = jnp.any(result.token_R[:, None] == rows.stops_RS, axis=-1)
        front = Front(
            jnp.where(is_active_R, result.token_R, front.token_R),
            front.position_R + is_active_R,
            front.is_open_R & ~(is_active_R & stops_R),
        )
        return step + 1, kv, front, taken

    start = (jnp.int32(0), kv, Front(*map(jnp.asarray, front)), nothing)
    _, kv, front, taken = jax.lax.while_loop(goes_on, take_step, start)
    return kv, front, taken


def _is_active(front: Front, rows: Rows) -> Array:
    return front.is_open_R & (front.position_R < rows.limit_R)


def _call_of(rows: Rows, front: Front) -> Call:
    """Return the call of one step. Rows that do not go on are padding of it."""
    R = rows.limit_R.size
    is_there_R = rows.limit_R > 0
    place_R = jnp.arange(R, dtype=jnp.int32)
    # A row that pauses stands at its limit, where it may have no page.
    last_R = jnp.minimum(front.position_R, rows.limit_R - 1)
    return Call(
        token_T=front.token_R,
        target_T=jnp.zeros(R, jnp.int32),
        position_T=jnp.where(_is_active(front, rows), front.position_R, -1),
        row_T=place_R,
        table_RM=rows.table_RM,
        lengths_R=jnp.where(is_there_R, last_R + 1, 0),
        starts_R=jnp.minimum(jnp.arange(R + 1, dtype=jnp.int32), jnp.sum(is_there_R)),
        slot_T=rows.slot_R,
        last_R=place_R,
        draws=np.int32(R),
        scores=np.False_,
        sampling=rows.sampling,
    )


# -- inputs
# -------------------------------------------------------------------------------------------------


def empty_rows(shapes: Shapes, size: int) -> tuple[Rows, Front]:
    """Return the NumPy inputs of a dispatch of `size` rows without any."""
    R = shapes.rows(size)
    rows = Rows(
        table_RM=np.zeros((R, shapes.pages_per_row), np.int32),
        limit_R=np.zeros(R, np.int32),
        slot_R=np.full(R, -1, np.int32),
        stops_RS=np.full((R, STOPS), NO_TOKEN, np.int32),
        sampling=empty_sampling(R),
    )
    return rows, Front(np.zeros(R, np.int32), np.zeros(R, np.int32), np.zeros(R, bool))


def make_rows(requests: Sequence[Request], shapes: Shapes, size: int) -> tuple[Rows, Front]:
    """Return the inputs for requests that all decode; `set_limits` sets the rest."""
    rows, front = empty_rows(shapes, size)
    for row, request in enumerate(requests):
        params = request.sampling
        stops = sorted(token for token in params.stop_ids if 0 <= token <= MAX_TOKEN)[:STOPS]
        rows.stops_RS[row, : len(stops)] = stops
        if request.adapter is not None:
            rows.slot_R[row] = request.adapter.slot
        set_sampling(rows.sampling, row, params)
        front.token_R[row] = request.ids[-1]
        front.position_R[row] = request.computed
        front.is_open_R[row] = True
    return rows, front


def set_limits(rows: Rows, requests: Sequence[Request], shapes: Shapes) -> Rows:
    """Return the inputs with the pages that requests have now.

    The arrays are new: a dispatch that runs may still read the old ones. Rows of requests that have
    ended stand behind their limit of 1.
    """
    table_RM = np.zeros_like(rows.table_RM)
    limit_R = np.zeros_like(rows.limit_R)
    for row, request in enumerate(requests):
        table_RM[row, : len(request.pages)] = request.pages
        end = min(len(request.pages) * shapes.page_tokens, request.last_position)
        limit_R[row] = max(end, 1)
    return rows._replace(table_RM=table_RM, limit_R=limit_R)
