"""The forward pass of training: logprobs and entropy of packed rows, with the published weights.

pi_old of fresh and of stale samples, pi inside the loss, probes of engines and held-out text are
all scored by `Forward.__call__`, so that the same weights and tokens have the same logprobs.

B rows, T tokens, L layers, E experts, k experts a token.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax

from rome.data.batch import Tree
from rome.data.routes import route_dtype
from rome.model.config import ModelConfig
from rome.model.lora import Lora, with_adapters
from rome.model.ops.kernels import Kernels
from rome.model.ops.logprobs import chunked_logprobs, tree_logprobs
from rome.model.qwen3 import Output, Qwen3, as_published, head_kernel
from rome.train.replay import recorded_routes, replayed_ids


class Scored(NamedTuple):
    """What a forward pass says about the tokens of its rows.

    Attributes:
      logp_BT: float32; 0 at the first token of a segment and on padding. In rows of prefix trees
        0 where nothing is learned.
      entropy_BT: of the distribution that the token was drawn from, in nats; a constant to the
        gradient.
      output: of the model, up to the final norm.
    """

    logp_BT: jax.Array
    entropy_BT: jax.Array
    output: Output


@dataclasses.dataclass(frozen=True)
class Forward:
    """A model's scores. Its methods are pure functions of parameters and rows.

    `params` are what is trained: the float32 parameters, and `base` is None; or with adapters
    (`rome.model.lora`) the adapters, and `base` the frozen parameters.

    Args:
      config: of the model.
      kernels: by name, all chosen.
      temperature: of the sampling; logits are divided by it.
      lora: which adapters there are; None: all parameters are trained.
    """

    config: ModelConfig
    kernels: Kernels
    temperature: float
    lora: Lora | None = None

    def __call__(
        self,
        base: dict | None,
        params: dict,
        tokens_BT: Any,
        positions_BT: Any,
        segments_BT: Any,
        routes_BTLk: Any = None,
        tree: Tree[Any] | None = None,
        temperature: float | None = None,
    ) -> Scored:
        """Score the tokens of packed rows.

        Args:
          base: the frozen parameters; None without adapters.
          params: float32; they are rounded as engines have them.
          tokens_BT: ids.
          positions_BT: within each line.
          segments_BT: 0 is padding.
          routes_BTLk: experts to replay, as in a batch; None: every token chooses its own.
          tree: how lines share their beginnings; then index t of a score is about the token that
            the tree names, not about token t. None: they do not.
          temperature: instead of that of the sampling.
        """
        if base is not None and self.lora is not None:
            params = with_adapters(base, params, self.lora)
        routes_LBTk = None if routes_BTLk is None else replayed_ids(routes_BTLk)
        model = Qwen3(
            self.config,
            self.config.scan_layers,
            self.kernels.experts,
            self.kernels.attention,
            self.kernels.exchange,
        )
        output: Any = model.apply(
            {"params": as_published(params, self.config)},
            tokens_BT,
            positions_BT,
            segments_BT,
            routes_LBTK=routes_LBTk,
            ends_BT=None if tree is None else tree.ends_BT,
        )
        hidden_BTD = output.hidden_BTD
        head_DV = head_kernel(params, self.config)
        temperature = temperature or self.temperature
        if tree is not None:
            places = (tree.about_BT, tree.predictor_BT)
            logp_BT, entropy_BT = tree_logprobs(
                hidden_BTD, head_DV, tokens_BT, *places, temperature
            )
        else:
            logp_BT, entropy_BT = chunked_logprobs(
                hidden_BTD, head_DV, tokens_BT, segments_BT, temperature, with_entropy=True
            )
        return Scored(logp_BT, entropy_BT, output)

    def logprobs_and_counts(
        self,
        base: dict | None,
        params: dict,
        tokens_BT: Any,
        positions_BT: Any,
        segments_BT: Any,
        routes_BTLk: Any,
        tree: Tree[Any] | None,
    ) -> tuple[jax.Array, jax.Array]:
        """Return logp_BT, and how often each expert is chosen, [L, E]."""
        scored = self(base, params, tokens_BT, positions_BT, segments_BT, routes_BTLk, tree)
        return scored.logp_BT, scored.output.router.counts_LE

    def logprobs_at_temperature_1(
        self, base: dict | None, params: dict, tokens_BT: Any, positions_BT: Any, segments_BT: Any
    ) -> jax.Array:
        """Return logp_BT of the model's own distribution."""
        scored = self(base, params, tokens_BT, positions_BT, segments_BT, temperature=1.0)
        return scored.logp_BT

    def logprobs_and_routes(
        self,
        base: dict | None,
        params: dict,
        tokens_BT: Any,
        positions_BT: Any,
        segments_BT: Any,
        tree: Tree[Any] | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return logp_BT, how often each expert is chosen, and the routes that tokens chose."""
        scored = self(base, params, tokens_BT, positions_BT, segments_BT, tree=tree)
        dtype = route_dtype(self.config)
        routes_BTLk = recorded_routes(scored.output.routes_LBTK, segments_BT > 0, dtype)
        return scored.logp_BT, scored.output.router.counts_LE, routes_BTLk

    def expert_counts(
        self,
        base: dict | None,
        params: dict,
        tokens_BT: Any,
        positions_BT: Any,
        segments_BT: Any,
        routes_BTLk: Any,
        tree: Tree[Any] | None,
    ) -> jax.Array:
        """Return how often each expert is chosen, [L, E]."""
        scored = self(base, params, tokens_BT, positions_BT, segments_BT, routes_BTLk, tree)
        return scored.output.router.counts_LE
