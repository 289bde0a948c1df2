"""The jitted train step: score, gradients, update. The model, the loss and the optimizer are arguments; no host, file or engine is known here.

B rows, T tokens, D model, V vocabulary, L layers, E experts.

A step takes as many fixed-shape micro-batches as its trajectories need, under one compilation. Each micro-batch's loss is already divided by
the denominators of the whole step, so sums over micro-batches are the step's own loss, gradient and metrics, however it was split.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rome.data.batch import Batch
from rome.losses import Denominators, Loss, LossConfig
from rome.losses.logprobs import chunked_logprobs
from rome.model.config import ModelConfig
from rome.model.moe import RouterStats, router_loss
from rome.model.qwen3 import Qwen3, head_kernel
from rome.model.sharding import batch_sharding, param_shardings, row_shards
from rome.train.feed import feed, put
from rome.train.state import TrainState


@dataclasses.dataclass
class Learner:
    """The compiled functions of one stage on one mesh.

    Args:
      loss: (logp_BT, batch, loss_config, denominators) -> (value, metrics), as in rome.losses.
      temperature: of the sampling; the trainer divides its logits by it.
    """

    model_config: ModelConfig
    loss: Loss
    loss_config: LossConfig
    optimizer: optax.GradientTransformation
    mesh: Mesh
    temperature: float = 1.0

    def __post_init__(self) -> None:
        params, rows, everywhere = param_shardings(self.mesh, self.model_config), batch_sharding(self.mesh), NamedSharding(self.mesh, PartitionSpec())
        self._rows, self._row_sharding = row_shards(self.mesh), rows
        self._score = jax.jit(lambda *arrays: self._logprobs(*arrays)[0], in_shardings=(params, rows, rows, rows), out_shardings=everywhere)
        self._probe = jax.jit(lambda *arrays: self._logprobs(*arrays, temperature=1.0)[0], in_shardings=(params, rows, rows, rows), out_shardings=everywhere)
        self._zeros = jax.jit(lambda params: jax.tree.map(jnp.zeros_like, params), in_shardings=(params,), out_shardings=params)
        self._accumulate = jax.jit(self._accumulated, in_shardings=(params, params, rows, None, None), out_shardings=(params, None), donate_argnums=1)
        self._apply = jax.jit(self._updated, donate_argnums=0)

    def place(self, state: TrainState) -> TrainState:
        """The state on the mesh. Optimizer moments lie as the parameters that they belong to."""
        params = jax.tree.map(put, state.params, param_shardings(self.mesh, self.model_config))
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        like = jax.jit(self.optimizer.init)(params)
        on_mesh = lambda leaf, value: put(value, leaf.sharding if isinstance(leaf.sharding, NamedSharding) else everywhere)
        return TrainState(put(state.step, everywhere), params, jax.tree.map(on_mesh, like, state.opt_state))

    def score(self, params: dict, microbatches: Sequence[Batch]) -> list[np.ndarray]:
        """logp_BT of every micro-batch at `params`, on the host."""
        with jax.set_mesh(self.mesh):
            return [np.asarray(self._score(params, *feed((batch.tokens_BT, batch.positions_BT, batch.segments_BT), self._row_sharding))) for batch in microbatches]

    def score_one(self, params: dict, ids: Sequence[int]) -> np.ndarray:
        """log p(token | those before it) at temperature 1 of one sequence, [tokens]; 0 for the first. What an engine is compared with."""
        tokens_BT = np.tile(np.asarray(ids, np.int32), (self._rows, 1))
        positions_BT = np.tile(np.arange(len(ids), dtype=np.int32), (self._rows, 1))
        with jax.set_mesh(self.mesh):
            return np.asarray(self._probe(params, *feed((tokens_BT, positions_BT, np.ones_like(tokens_BT)), self._row_sharding)))[0]

    def update(self, state: TrainState, microbatches: Sequence[Batch], denominators: Denominators) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimizer update over all micro-batches. `state.step` stays: a step may take several updates. The old state is consumed."""
        metrics: dict[str, jax.Array] = {}
        tokens = float(sum((batch.segments_BT > 0).sum() for batch in microbatches))
        with jax.set_mesh(self.mesh):
            gradients = self._zeros(state.params)
            for batch in microbatches:
                gradients, figures = self._accumulate(state.params, gradients, feed(batch, self._row_sharding), denominators, tokens)
                metrics = combine_metrics(metrics, figures)
            state, norm = self._apply(state, gradients)
        return state, metrics | {"gradient_norm": norm}

    def _logprobs(
        self, params: dict, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array, temperature: float | None = None,
    ) -> tuple[jax.Array, RouterStats]:
        output = Qwen3(self.model_config, scan=self.model_config.scan_layers).apply({"params": params}, tokens_BT, positions_BT, segments_BT)
        kernel_DV = head_kernel(params, self.model_config)
        logp_BT = chunked_logprobs(output.hidden_BTD, kernel_DV, tokens_BT, segments_BT, temperature=temperature or self.temperature)
        return logp_BT, output.router

    def _objective(self, params: dict, batch: Batch, denominators: Denominators, tokens: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        logp_BT, router = self._logprobs(params, batch.tokens_BT, batch.positions_BT, batch.segments_BT)
        value, metrics = self.loss(logp_BT, batch, self.loss_config, denominators)
        metrics = metrics | {"loss": value}
        if self.model_config.router_aux_loss_coef:
            # Each micro-batch is balanced alone and weighs by its tokens: the one term that is not a plain sum over the step.
            balance = router_loss(router, self.model_config) * router.tokens / tokens
            value = value + self.model_config.router_aux_loss_coef * balance
            metrics = metrics | {"router_balance": balance}
        return value, metrics

    def _accumulated(
        self, params: dict, gradients: dict, batch: Batch, denominators: Denominators, tokens: jax.Array,
    ) -> tuple[dict, dict[str, jax.Array]]:
        """Adds one micro-batch's gradients to those before it, in place: at no time are there two whole sets of them."""
        more, figures = jax.grad(self._objective, has_aux=True)(params, batch, denominators, tokens)
        return jax.tree.map(jnp.add, gradients, more), figures

    def _updated(self, state: TrainState, gradients: dict) -> tuple[TrainState, jax.Array]:
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        return TrainState(state.step, optax.apply_updates(state.params, updates), opt_state), optax.tree.norm(gradients)


def combine_metrics(total: dict[str, jax.Array], more: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Over micro-batches: `max_` figures by maximum, all others by sum."""
    return {name: (jnp.maximum if name.startswith("max_") else jnp.add)(total[name], value) if name in total else value for name, value in more.items()}
