"""What requests change about logits before a token is drawn: penalties, biases and grammars.

In SGLang's order: frequency, presence and repetition penalty, each about the tokens of the answer
so far, then what a grammar forbids, then additions to single tokens. A logprob is that of the
changed distribution, as SGLang's.

B rows, V vocabulary, C tokens of the longest answer, N steps of a dispatch, K biases of a row, W
words of 32 bits, a bit for each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Sharding

from rome.serve.request import Request
from rome.serve.sampling import NO_TOKEN, AnyArray

MAX_BIASES = 512  # of a request
FORBIDDEN = -1e30  # finite: an infinite one less another would be NaN
ALWAYS = np.iinfo(np.int32).max


class Adjustments(NamedTuple):
    """What the rows of a call ask for. It lies on the device: most calls share an empty one.

    Attributes:
      is_used: a scalar; False where no row asks for anything.
      frequency_B: subtracted for each time that a token was drawn; 0: nothing.
      presence_B: subtracted once if a token was drawn; 0: nothing.
      repetition_B: divides the logits of tokens that were drawn, or multiplies negative ones; 1:
        nothing.
      drawn_BC: the answer so far, filled up with NO_TOKEN.
      allowed_BW: tokens that a grammar allows; all where there is none.
      biased_BK: tokens to whose logits something is added, filled up with NO_TOKEN.
      bias_BK: what is added.
      until_BK: position of a drawn token from which on it is not added any more.
    """

    is_used: AnyArray
    frequency_B: AnyArray
    presence_B: AnyArray
    repetition_B: AnyArray
    drawn_BC: AnyArray
    allowed_BW: AnyArray
    biased_BK: AnyArray
    bias_BK: AnyArray
    until_BK: AnyArray


def adjust(logits_BV: Array, position_B: Array, rows: Adjustments, lately_BN: Array) -> Array:
    """Return the logits that tokens are drawn from. Rows that ask for nothing keep every bit.

    Args:
      logits_BV: float32, as the model gives them.
      position_B: absolute position that the drawn token will have.
      rows: what they ask for.
      lately_BN: drawn since `rows.drawn_BC`, filled up with NO_TOKEN.
    """
    B, V = logits_BV.shape
    row_B1 = jnp.arange(B)[:, None]

    def places(tokens: Array) -> Array:
        return jnp.where(tokens >= 0, tokens, V)  # past the end: dropped

    drawn = places(jnp.concatenate([rows.drawn_BC, lately_BN], axis=1))
    count_BV = jnp.zeros((B, V)).at[row_B1, drawn].add(1.0, mode="drop")
    was_drawn_BV = count_BV > 0
    less_BV = rows.frequency_B[:, None] * count_BV
    logits_BV = logits_BV - less_BV - jnp.where(was_drawn_BV, rows.presence_B[:, None], 0.0)
    repetition_B1 = rows.repetition_B[:, None]
    scaled_BV = jnp.where(logits_BV < 0, logits_BV * repetition_B1, logits_BV / repetition_B1)
    logits_BV = jnp.where(was_drawn_BV, scaled_BV, logits_BV)
    bits_BW32 = (rows.allowed_BW[:, :, None] >> jnp.arange(32)) & 1
    logits_BV = jnp.where(bits_BW32.reshape(B, -1)[:, :V] == 1, logits_BV, FORBIDDEN)
    bias_BK = jnp.where(position_B[:, None] < rows.until_BK, rows.bias_BK, 0.0)
    return logits_BV.at[row_B1, places(rows.biased_BK)].add(bias_BK, mode="drop")


def first_rows(rows: Adjustments, count: int) -> Adjustments:
    """Return what the first rows ask for."""
    return Adjustments(rows.is_used, *(values[:count] for values in rows[1:]))


# -- inputs
# -------------------------------------------------------------------------------------------------


def empty_adjustments(rows: int, longest: int, vocab_size: int) -> Adjustments:
    """Return the NumPy arrays of rows that ask for nothing.

    Args:
      rows: of the call.
      longest: tokens of an answer at most.
      vocab_size: of the model.
    """
    return Adjustments(
        is_used=np.asarray(False),
        frequency_B=np.zeros(rows, np.float32),
        presence_B=np.zeros(rows, np.float32),
        repetition_B=np.ones(rows, np.float32),
        drawn_BC=np.full((rows, longest), NO_TOKEN, np.int32),
        allowed_BW=np.full((rows, -(-vocab_size // 32)), -1, np.int32),
        biased_BK=np.full((rows, MAX_BIASES), NO_TOKEN, np.int32),
        bias_BK=np.zeros((rows, MAX_BIASES), np.float32),
        until_BK=np.zeros((rows, MAX_BIASES), np.int32),
    )


def make_adjustments(
    requests: Sequence[Request], empty: Adjustments, sharding: Sharding
) -> Adjustments:
    """Return on the device what requests ask for, in the order in which they draw.

    Args:
      requests: that draw a token.
      empty: of the call; it is not changed.
      sharding: where the arrays shall lie.
    """
    made = Adjustments(*(np.array(values) for values in empty))
    for row, request in enumerate(requests):
        params = request.sampling
        made.frequency_B[row] = params.frequency_penalty
        made.presence_B[row] = params.presence_penalty
        made.repetition_B[row] = params.repetition_penalty
        if params.has_penalties:
            made.drawn_BC[row, : len(request.output_ids)] = request.output_ids
        if request.grammar is not None:
            made.allowed_BW[row] = request.grammar.allowed()
        biases = [(token, value, ALWAYS) for token, value in params.logit_bias]
        if params.min_new_tokens:
            until = len(request.prompt_ids) + params.min_new_tokens
            ends = sorted(token for token in params.stop_ids if 0 <= token < ALWAYS)
            biases += [(token, FORBIDDEN, until) for token in ends]
        for place, (token, value, until) in enumerate(biases):
            made.biased_BK[row, place] = token
            made.bias_BK[row, place] = value
            made.until_BK[row, place] = until
    return jax.device_put(made._replace(is_used=np.asarray(True)), sharding)
