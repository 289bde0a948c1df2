"""One call of the engine: some tokens of some sequences, and the tokens that follow.

T tokens of a call, R rows (sequences of a call), M pages of a row, S stop tokens, D model, V
vocabulary, L layers, k experts a token.

A call takes any mixture of tokens: the last one of a sequence that is decoded, a piece of a prompt.
It is compiled for a few T, and a call takes the smallest that holds its tokens. A token's numbers
do not depend on what else is in the call, nor on T: the layers are the trainer's own
(`rome.model.qwen3`), in forms that treat each token by itself, and what requests ask for chooses a
branch, not another program. For float32 on a CPU that is proven bitwise
(tests/rome/model/ops/test_paged.py); of the forms that need no compiler up to 32 tokens: in larger
products XLA sums in another order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from rome.model.config import ModelConfig
from rome.model.ops.kernels import Kernels
from rome.model.ops.native import products_native
from rome.model.ops.paged import Pages
from rome.model.qwen3 import Params, Qwen3, head_kernel
from rome.model.sharding import ENGINE_RULES, is_on_engine_mesh
from rome.serve.adapters import AdapterArrays, with_adapters
from rome.serve.adjusting import Adjustments, adjust, first_rows
from rome.serve.request import SamplingParams
from rome.serve.sampling import NO_TOKEN, AnyArray, RowSampling, sample, token_logprobs

CALL_SIZES = (4, 16, 64, 256)  # tokens of the calls that are smaller than the largest
FEW_SAMPLES = 4  # rows of the smaller head
STOPS = 8  # stop tokens of a row that the device knows
MAX_TOKEN = np.iinfo(np.int32).max
PageArrays = tuple[Array, ...]
Head = Callable[[Array], Array]  # from hidden states to logits


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The bounds of one server, from which the shapes of its arrays follow.

    Attributes:
      slots: requests that run at once.
      max_context: tokens of prompt and answer together.
      cache_tokens: tokens whose keys and values are kept, of running requests and of prefixes; 0:
        slots * max_context.
      page_tokens: tokens of a page, the unit in which prefixes are shared.
      call_tokens: tokens that are computed at once, at most.
      decode_steps: steps that one dispatch takes at most while nothing but decoding is to be done.
    """

    slots: int = 64
    max_context: int = 384
    cache_tokens: int = 0
    page_tokens: int = 16
    call_tokens: int = 256
    decode_steps: int = 8

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            least = 0 if name == "cache_tokens" else 1
            if value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
        if 0 < self.cache_tokens < self.pages_per_row * self.page_tokens:
            raise ValueError(
                f"--cache_tokens {self.cache_tokens} does not hold one request of --max_context"
                f" {self.max_context} in pages of {self.page_tokens}; give at least"
                f" {self.pages_per_row * self.page_tokens}, or 0 for room for all slots"
            )

    @property
    def pages_per_row(self) -> int:
        """Pages of the longest sequence."""
        return -(-self.max_context // self.page_tokens)

    @property
    def pages(self) -> int:
        """Pages of the cache."""
        if self.cache_tokens:
            return self.cache_tokens // self.page_tokens
        return self.slots * self.pages_per_row

    @property
    def call_sizes(self) -> list[int]:
        """The T of all compiled calls, smallest first."""
        return [size for size in CALL_SIZES if size < self.call_tokens] + [self.call_tokens]

    def rows(self, size: int) -> int:
        """Return the rows of a call of `size` tokens."""
        return min(size, self.slots)


class Call(NamedTuple):
    """Inputs of one call. Tokens of a row lie together, rows follow each other.

    Attributes:
      token_T: ids.
      target_T: the token after each token, for scoring; arbitrary where there is none.
      position_T: place in the sequence; negative for padding.
      row_T: row of each token.
      table_RM: pages of each row's sequence.
      lengths_R: positions of each row's sequence, this call's included; 0 without one.
      starts_R: [R + 1] first token of each row; the last entry is the number of tokens.
      slot_T: of the adapter of each token; -1: none.
      last_R: the token after which a row draws one; the rows that draw come first.
      draws: number of rows that draw, a scalar.
      scores: whether the logprobs of target_T are wanted, a scalar.
      sampling: how each row is sampled, in the order of last_R.
      steps: a scalar; above 1 only where every row draws: steps of decoding that are taken at once,
        the call itself the first of them.
      limit_R: tokens at this position and later are not computed in these steps.
      stops_RS: tokens that end a row, filled up with NO_TOKEN.
      adjustments: of the logits that a row draws from, in the order of last_R.
      lately_RN: drawn in the steps before, filled up with NO_TOKEN.
    """

    token_T: AnyArray
    target_T: AnyArray
    position_T: AnyArray
    row_T: AnyArray
    table_RM: AnyArray
    lengths_R: AnyArray
    starts_R: AnyArray
    slot_T: AnyArray
    last_R: AnyArray
    draws: AnyArray
    scores: AnyArray
    sampling: RowSampling
    steps: AnyArray
    limit_R: AnyArray
    stops_RS: AnyArray
    adjustments: Adjustments
    lately_RN: AnyArray


class Result(NamedTuple):
    """Outputs of one call.

    Attributes:
      token_R: drawn, in the order of Call.last_R.
      logprob_R: of token_R.
      target_logprob_T: of Call.target_T; all 0 unless scores were asked for.
      routes_LTk: experts of each token.
    """

    token_R: AnyArray
    logprob_R: AnyArray
    target_logprob_T: AnyArray
    routes_LTk: AnyArray


def empty_call(shapes: Shapes, size: int, adjustments: Adjustments) -> Call:
    """Return the NumPy inputs of a call of `size` tokens without any.

    Args:
      shapes: of the engine.
      size: tokens of the call.
      adjustments: of its rows.
    """
    R = shapes.rows(size)
    return Call(
        token_T=np.zeros(size, np.int32),
        target_T=np.zeros(size, np.int32),
        position_T=np.full(size, -1, np.int32),
        row_T=np.zeros(size, np.int32),
        table_RM=np.zeros((R, shapes.pages_per_row), np.int32),
        lengths_R=np.zeros(R, np.int32),
        starts_R=np.zeros(R + 1, np.int32),
        slot_T=np.full(size, -1, np.int32),
        last_R=np.zeros(R, np.int32),
        draws=np.asarray(0, np.int32),
        scores=np.asarray(False),
        sampling=empty_sampling(R),
        steps=np.asarray(1, np.int32),
        limit_R=np.zeros(R, np.int32),
        stops_RS=np.full((R, STOPS), NO_TOKEN, np.int32),
        adjustments=adjustments,
        lately_RN=np.full((R, shapes.decode_steps), NO_TOKEN, np.int32),
    )


def empty_sampling(rows: int) -> RowSampling:
    """Return how rows are sampled that ask for nothing."""
    return RowSampling(
        seed_B2=np.zeros((rows, 2), np.uint32),
        temperature_B=np.ones(rows, np.float32),
        top_p_B=np.ones(rows, np.float32),
        top_k_B=np.zeros(rows, np.int32),
        min_p_B=np.zeros(rows, np.float32),
    )


def set_stops(call: Call, row: int, params: SamplingParams) -> None:
    """Set the tokens that end one row."""
    stops = sorted(token for token in params.stop_ids if 0 <= token <= MAX_TOKEN)[:STOPS]
    call.stops_RS[row, : len(stops)] = stops


def set_sampling(sampling: RowSampling, row: int, params: SamplingParams) -> None:
    """Set how one row is sampled."""
    sampling.seed_B2[row] = (params.seed >> 32, params.seed & 0xFFFFFFFF)
    sampling.temperature_B[row] = params.temperature
    sampling.top_p_B[row] = params.top_p
    sampling.top_k_B[row] = max(params.top_k, 0)
    sampling.min_p_B[row] = params.min_p


def compute_call(
    config: ModelConfig,
    kernels: Kernels,
    params: Params,
    adapters: AdapterArrays | None,
    kv: PageArrays,
    call: Call,
) -> tuple[PageArrays, Result]:
    """Compute the tokens of a call, draw the ones that follow, and score targets if asked.

    Args:
      config: the model.
      kernels: of the model.
      params: layers unstacked.
      adapters: that tokens may name; None: there are none.
      kv: the pages of each layer, which the result takes the place of.
      call: the tokens.
    """
    model = Qwen3(config, scan=False, experts=kernels.experts, attention_form=kernels.attention)
    pages = Pages(kv, call.table_RM, call.row_T, call.lengths_R, call.starts_R)
    position_T = jnp.maximum(call.position_T, 0)
    real_T = (call.position_T >= 0).astype(jnp.int32)
    adapted = with_adapters(params, adapters, call.slot_T)
    out = model.apply(
        {"params": adapted}, call.token_T[None], position_T[None], real_T[None], pages
    )
    hidden_TD = out.hidden_BTD[0]
    head = functools.partial(_logits, config, kernels, params)
    token_R, logprob_R = _draw(hidden_TD, head, call)
    target_logprob_T = _score(hidden_TD, head, call)
    return out.pages, Result(token_R, logprob_R, target_logprob_T, out.routes_LBTK[:, 0])


def _draw(hidden_TD: Array, head: Head, call: Call) -> tuple[Array, Array]:
    """Draw a token after each row's last one; only a few logits are computed for a few rows."""
    R = call.last_R.size

    def draw(rows: int) -> tuple[Array, Array]:
        last_r = call.last_R[:rows]
        position_r = call.position_T[last_r] + 1
        sampling = jax.tree.map(lambda values: values[:rows], call.sampling)
        logits_rV = head(hidden_TD[last_r])
        # A branch: calls of which no row asks for it do not pay for it.
        logits_rV = jax.lax.cond(
            call.adjustments.is_used,
            lambda: adjust(
                logits_rV, position_r, first_rows(call.adjustments, rows), call.lately_RN[:rows]
            ),
            lambda: logits_rV,
        )
        token_r, logprob_r = sample(logits_rV, position_r, sampling)
        return jnp.pad(token_r, (0, R - rows)), jnp.pad(logprob_r, (0, R - rows))

    if R <= FEW_SAMPLES:
        return draw(R)
    is_few = call.draws <= FEW_SAMPLES
    return jax.lax.cond(is_few, lambda: draw(FEW_SAMPLES), lambda: draw(R))


def _score(hidden_TD: Array, head: Head, call: Call) -> Array:
    def score() -> Array:
        return token_logprobs(head(hidden_TD), call.target_T)

    T = call.token_T.size
    return jax.lax.cond(call.scores, score, lambda: jnp.zeros(T, jnp.float32))


def _logits(config: ModelConfig, kernels: Kernels, params: Params, hidden_ND: Array) -> Array:
    """Return float32 logits, computed as in the trainer's `chunked_logprobs`.

    On a mesh each device computes its part of the vocabulary, and gets the others'.
    """

    def matmul(hidden_ND: Array, kernel_DV: Array) -> Array:
        kernel_DV = kernel_DV.astype(hidden_ND.dtype)
        return jnp.matmul(hidden_ND, kernel_DV, preferred_element_type=jnp.float32)

    kernel_DV = head_kernel(params, config)
    if not is_on_engine_mesh():
        if kernels.attention != "native":
            return matmul(hidden_ND, kernel_DV)
        if config.tie_embeddings:  # the transposed matrix would be copied in each call
            return products_native(hidden_ND, params["embed"]["embedding"], transposed=True)[0]
        return products_native(hidden_ND, kernel_DV)[0]
    over = ENGINE_RULES["vocab"]

    def on_each_device(hidden_ND: Array, kernel_Dv: Array) -> Array:
        # Said here: left to the partitioner, the kernel is gathered, which is far larger.
        return jax.lax.all_gather(matmul(hidden_ND, kernel_Dv), over, axis=1, tiled=True)

    return jax.shard_map(
        on_each_device,
        in_specs=(PartitionSpec(), PartitionSpec(None, over)),
        out_specs=PartitionSpec(),
        check_vma=False,
    )(hidden_ND, kernel_DV)
