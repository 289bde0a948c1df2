"""What a step descends: the loss of a micro-batch with its router terms, and its gradients.

B rows, T tokens, L layers, E experts, k experts a token.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from rome.data.batch import Batch
from rome.losses import Loss, LossConfig
from rome.losses.chunks import policy_entropy
from rome.losses.types import Metrics
from rome.model.moe import router_loss, router_metrics, router_z_loss
from rome.train.forward import Forward
from rome.train.replay import route_agreement
from rome.train.sums import Sums, WholeStep, add_to_sums, empty_sums


@dataclasses.dataclass(frozen=True)
class Objective:
    """A model's loss. Its methods are pure functions of parameters and one micro-batch.

    `params` and `base` are those of `Forward`; gradients are those of `params`.

    Args:
      forward: scores the rows.
      loss: (logp_BT, batch, loss_config, denominators) -> (value, metrics), as in rome.losses.
      loss_config: switches of the loss.
    """

    forward: Forward
    loss: Loss
    loss_config: LossConfig

    def value(
        self, params: dict, base: dict | None, batch: Batch, whole: WholeStep
    ) -> tuple[jax.Array, Metrics]:
        """Return the loss of one micro-batch, router terms included, and its metrics.

        Args:
          params: float32; gradients are theirs.
          base: the frozen parameters; None without adapters.
          batch: one micro-batch.
          whole: counts of the whole step.
        """
        config = self.forward.config
        denominators, tokens, replayed, counts_LE = whole
        logp_BT, entropy_BT, output = self.forward(
            base, params, *sequences(batch), batch.routes_BTLk, batch.tree
        )
        value, metrics = self.loss(logp_BT, batch, self.loss_config, denominators)
        entropy = policy_entropy(entropy_BT, batch, denominators)
        metrics = metrics | {"loss": value, "entropy": entropy}
        if batch.routes_BTLk is not None:
            agreement = route_agreement(batch.routes_BTLk, output.routes_LBTK, replayed)
            metrics = metrics | agreement
        if config.is_dense:
            return value, metrics
        router = output.router
        if counts_LE is None:
            counts_LE = router.counts_LE
        metrics = metrics | router_metrics(router, config, tokens)
        metrics = metrics | {"router_counts": router.counts_LE}
        if config.router_aux_loss_coef:
            balance = router_loss(router, config, counts_LE, tokens)
            value = value + config.router_aux_loss_coef * balance
            metrics = metrics | {"router_balance": balance}
        if config.router_z_loss_coef:
            z_loss = router_z_loss(router, config, tokens)
            value = value + config.router_z_loss_coef * z_loss
            metrics = metrics | {"router_z": z_loss}
        return value, metrics

    def gradients(self, params: dict, base: dict | None, batch: Batch, whole: WholeStep) -> Sums:
        """Return the gradients and the metrics of one micro-batch."""
        return Sums(*jax.grad(self.value, has_aux=True)(params, base, batch, whole))

    def begin_sums(self, params: dict, base: dict | None, batch: Batch, whole: WholeStep) -> Sums:
        """Return the sums that a step of several micro-batches begins with."""
        _, metrics = jax.eval_shape(self.value, params, base, batch, whole)
        return empty_sums(params, metrics)

    def add_microbatch(
        self, params: dict, base: dict | None, sums: Sums, batch: Batch, whole: WholeStep
    ) -> Sums:
        """Add one micro-batch to those before it.

        `sums` are donated, so the devices never hold two sets of gradients.
        """
        return add_to_sums(sums, *self.gradients(params, base, batch, whole))


def sequences(batch: Batch) -> tuple[Any, Any, Any]:
    """Return tokens, positions and segments of a batch."""
    return batch.tokens_BT, batch.positions_BT, batch.segments_BT
