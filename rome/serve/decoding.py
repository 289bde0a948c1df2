"""The compiled program of the engine: a call, and steps of decoding that follow it at once.

T tokens of a call, R rows (sequences), M pages of a row, N steps, S stop tokens, L layers, k
experts a token.

Where all rows decode, a dispatch may take several steps: a row's drawn token is its next input, on
the device. A row ends at a stop token, and pauses at its limit: where its answer or its pages end.
What else ends an answer (stop strings, stop tokens beyond the first S) is found when the tokens are
read; what was drawn after it is dropped. A dispatch returns where its rows stand as an array of the
device, from which the next one may go on before anything is read.

A call by itself is a dispatch of one step. Prompts and decoded tokens so pass through the same
machine code: compiled twice, the same operations need not round alike (a compiler may join a
product and a sum, which leaves out a rounding, in one program and not in the other).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Sharding

from rome.model.config import ModelConfig
from rome.model.ops.kernels import Kernels
from rome.model.qwen3 import Params
from rome.serve.adapters import AdapterArrays
from rome.serve.programs import Call, PageArrays, compute_call
from rome.serve.sampling import AnyArray

# Whatever XLA_FLAGS say: without its fusion emitters, XLA's CPU compiler may round equal operations
# of a call otherwise from one size to the next.
CPU_OPTIONS = {"xla_cpu_use_fusion_emitters": True}


class Front(NamedTuple):
    """Where the rows of a dispatch stand after it.

    Attributes:
      token_R: drawn last; the next input.
      position_R: its place in the sequence.
      is_open_R: False where no token was drawn, and once the row has drawn a stop token.
      is_begun: a scalar; False for rows of which nothing was computed yet.
    """

    token_R: AnyArray
    position_R: AnyArray
    is_open_R: AnyArray
    is_begun: AnyArray


class Steps(NamedTuple):
    """What a dispatch has computed.

    Attributes:
      token_NR: drawn in each step, in the order of Call.last_R; arbitrary from count_R on.
      logprob_NR: of token_NR.
      count_R: steps in which each row drew a token: the first ones.
      target_logprob_T: of Call.target_T; all 0 unless scores were asked for.
      routes_NLTk: experts of the tokens that were computed; after the first step those of each
        row's input come first.
    """

    token_NR: AnyArray
    logprob_NR: AnyArray
    count_R: AnyArray
    target_logprob_T: AnyArray
    routes_NLTk: AnyArray


Program = Callable[
    [Params, AdapterArrays | None, PageArrays, Call, Front], tuple[PageArrays, Front, Steps]
]


def make_program(
    config: ModelConfig, kernels: Kernels, steps: int, page_sharding: Sharding, everywhere: Sharding
) -> Program:
    """Return the jitted program; it donates the pages that it is given.

    Args:
      config: the model.
      kernels: of the model.
      steps: of a dispatch at most.
      page_sharding: that the pages have, and keep.
      everywhere: whole on every device, as a Front lies.
    """
    run = functools.partial(_take_steps, config, kernels, steps)
    return jax.jit(
        run,
        donate_argnums=2,
        out_shardings=(page_sharding, everywhere, None),
        compiler_options=CPU_OPTIONS if jax.default_backend() == "cpu" else None,
    )


def empty_front(rows: int, everywhere: Sharding) -> Front:
    """Return the front of rows of which nothing was computed yet."""
    front = Front(
        np.zeros(rows, np.int32), np.zeros(rows, np.int32), np.zeros(rows, bool), np.asarray(False)
    )
    return jax.device_put(front, everywhere)


def _take_steps(
    config: ModelConfig,
    kernels: Kernels,
    steps: int,
    params: Params,
    adapters: AdapterArrays | None,
    kv: PageArrays,
    call: Call,
    front: Front,
) -> tuple[PageArrays, Front, Steps]:
    """Compute the call, or go on from the front, for up to `call.steps` steps.

    Ends before where none of the rows goes on.
    """
    T = call.token_T.size
    R = call.limit_R.size
    nothing = Steps(
        jnp.zeros((steps, R), jnp.int32),
        jnp.zeros((steps, R), jnp.float32),
        jnp.zeros(R, jnp.int32),
        jnp.zeros(T, jnp.float32),
        jnp.zeros((steps, config.num_layers, T, config.experts_per_token), jnp.int32),
    )
    Loop = tuple[Array, PageArrays, Call, Front, Steps]

    def goes_on(loop: Loop) -> Array:
        step, _, call, _, _ = loop
        return (step < call.steps) & jnp.any(call.position_T >= 0)

    def take_step(loop: Loop) -> Loop:
        step, kv, call, front, taken = loop
        kv, result = compute_call(config, kernels, params, adapters, kv, call)
        draws_R = _draws(call)
        taken = Steps(
            taken.token_NR.at[step].set(result.token_R),
            taken.logprob_NR.at[step].set(result.logprob_R),
            taken.count_R + draws_R,
            jnp.where(call.scores, result.target_logprob_T, taken.target_logprob_T),
            taken.routes_NLTk.at[step].set(result.routes_LTk),
        )
        stops_R = jnp.any(result.token_R[:, None] == call.stops_RS, axis=-1)
        front = Front(
            jnp.where(draws_R, result.token_R, front.token_R),
            jnp.where(draws_R, call.position_T[call.last_R] + 1, front.position_R),
            jnp.where(draws_R, ~stops_R, front.is_open_R),
            jnp.bool_(True),
        )
        lately_RN = call.lately_RN.at[:, step].set(result.token_R)
        following = _call_after(call, front)._replace(lately_RN=lately_RN)
        return step + 1, kv, following, front, taken

    call = jax.tree.map(jnp.asarray, call)
    first = jax.tree.map(
        functools.partial(jnp.where, front.is_begun), _call_after(call, front), call
    )
    _, kv, _, front, taken = jax.lax.while_loop(
        goes_on, take_step, (jnp.int32(0), kv, first, front, nothing)
    )
    return kv, front, taken


def _draws(call: Call) -> Array:
    """Return which rows draw a token in this call, in the order of Call.last_R."""
    return (jnp.arange(call.last_R.size) < call.draws) & (call.position_T[call.last_R] >= 0)


def _call_after(call: Call, front: Front) -> Call:
    """Return the call that takes each row one step on; rows that do not go on are padding of it.

    For calls in which every row draws.
    """
    T = call.token_T.size
    R = call.limit_R.size
    is_active_R = front.is_open_R & (front.position_R < call.limit_R)
    # A row that pauses stands at its limit, where it may have no page.
    last_R = jnp.minimum(front.position_R, call.limit_R - 1)
    place_R = jnp.arange(R, dtype=jnp.int32)

    def padded(values_R: Array, padding: int) -> Array:
        return jnp.pad(values_R, (0, T - R), constant_values=padding)

    return call._replace(
        token_T=padded(front.token_R, 0),
        position_T=padded(jnp.where(is_active_R, front.position_R, -1), -1),
        row_T=padded(place_R, 0),
        lengths_R=jnp.where(place_R < call.draws, last_R + 1, 0),
        starts_R=jnp.minimum(jnp.arange(R + 1, dtype=jnp.int32), call.draws),
        slot_T=padded(call.slot_T[call.last_R], -1),
        last_R=place_R,
        scores=jnp.bool_(False),
    )
