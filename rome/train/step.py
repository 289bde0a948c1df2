"""The jitted train step: score, gradients, update.

The model, the loss and the optimizer are arguments; no host, file or engine is known here.

B rows, T tokens, D model, V vocabulary, L layers, E experts, k experts a token.

A step takes as many fixed-shape micro-batches as its trajectories need, under one compilation. Each
micro-batch's loss is already divided by the denominators of the whole step, so sums over
micro-batches are the step's own loss, gradient and metrics, however it was split.
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
from rome.data.routes import route_dtype
from rome.losses import Denominators, Loss, LossConfig
from rome.model.config import ModelConfig
from rome.model.moe import load_metrics, router_loss, router_metrics, router_z_loss
from rome.model.ops.kernels import Kernels, choose_kernels
from rome.model.ops.logprobs import chunked_logprobs
from rome.model.params import param_shardings
from rome.model.qwen3 import Output, Qwen3, cast_layers, head_kernel, init_params
from rome.model.sharding import batch_sharding, extent, in_turn, row_shards
from rome.train.feed import feed, put
from rome.train.replay import count_replayed, recorded_routes, replayed_ids, route_agreement
from rome.train.state import TrainState, init_state

# tokens; the length of a single scored sequence is filled up to it, as kernels and a split time
# axis want
PROBE_MULTIPLE = 128


@dataclasses.dataclass
class Learner:
    """The compiled functions of one stage on one mesh.

    Args:
      loss: (logp_BT, batch, loss_config, denominators) -> (value, metrics), as in rome.losses.
      temperature: of the sampling; the trainer divides its logits by it.
      kernels: by name, "auto" for the mesh's own.
      offload_moments: the optimizer's moments live in the host's memory and come to the device for
        the update only.
    """

    model_config: ModelConfig
    loss: Loss
    loss_config: LossConfig
    optimizer: optax.GradientTransformation
    mesh: Mesh
    temperature: float = 1.0
    kernels: Kernels = Kernels()
    offload_moments: bool = False

    def __post_init__(self) -> None:
        self.chosen_kernels = choose_kernels(
            self.mesh.devices.flat[0].platform,
            self.model_config,
            self.kernels,
            self.mesh.shape["expert"],
            extent(self.mesh, "expert"),
        )
        params, rows, everywhere = (
            param_shardings(self.mesh, self.model_config),
            batch_sharding(self.mesh),
            NamedSharding(self.mesh, PartitionSpec()),
        )
        self._rows, self._row_sharding = row_shards(self.mesh), rows
        self._score = jax.jit(
            lambda *arrays: self._logprobs(*arrays)[0],
            in_shardings=(params, rows, rows, rows, rows),
            out_shardings=everywhere,
        )
        self._record = jax.jit(
            self._recorded, in_shardings=(params, rows, rows, rows), out_shardings=everywhere
        )
        self._probe = jax.jit(
            lambda *arrays: self._logprobs(*arrays, temperature=1.0)[0],
            in_shardings=(params, rows, rows, rows),
            out_shardings=everywhere,
        )
        self._count = jax.jit(
            lambda *arrays: self._logprobs(*arrays)[1].router.counts_LE,
            in_shardings=(params, rows, rows, rows, rows),
            out_shardings=everywhere,
        )
        self._loads = jax.jit(
            lambda counts_LE: load_metrics(counts_LE, self.model_config), out_shardings=everywhere
        )
        self._cast = jax.jit(
            lambda params, dtype: jax.tree.map(lambda leaf: leaf.astype(dtype), params),
            static_argnums=1,
            in_shardings=(params,),
            out_shardings=params,
        )
        self._zeros = jax.jit(
            lambda params: jax.tree.map(jnp.zeros_like, params),
            in_shardings=(params,),
            out_shardings=params,
        )
        self._accumulate = jax.jit(
            self._accumulated,
            in_shardings=(params, params, rows, None, None, None, None),
            out_shardings=(params, everywhere),
            donate_argnums=1,
        )
        self.state = self._abstract_state(params)  # shapes, dtypes and places; no arrays
        places = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        self._apply = jax.jit(
            self._updated,
            in_shardings=(places, params),
            out_shardings=(places, everywhere),
            donate_argnums=0,
        )

    def _abstract_state(self, params: dict) -> TrainState:
        """Shape, dtype and place of each array of a state.

        Moments lie as the parameters that they belong to, all else is everywhere.
        """
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        state = jax.eval_shape(lambda: init_state(self.model_config, self.optimizer, seed=0))
        at_rest = lambda place: (
            place.with_memory_kind("pinned_host") if self.offload_moments else place
        )
        moments = optax.tree.map_params(
            self.optimizer,
            lambda _, place: at_rest(place),
            state.opt_state,
            params,
            transform_non_params=lambda _: everywhere,
        )
        on_mesh = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
        return jax.tree.map(on_mesh, state, TrainState(everywhere, params, moments))

    def start(self, params: dict) -> TrainState:
        """Given parameters, on the host or on devices, at step 0 of a new stage: moments and
        schedule start anew, made where they lie.
        """
        places = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        params = jax.tree.map(put, params, places.params)
        in_memory = jax.tree.map(lambda place: place.with_memory_kind("device"), places.opt_state)
        moments = jax.device_put(
            jax.jit(self.optimizer.init, out_shardings=in_memory)(params), places.opt_state
        )
        return TrainState(put(np.zeros((), np.int32), places.step), params, moments)

    def keep(self, params: dict) -> dict:
        """A copy of the parameters as engines get them (in the compute type), in the host's memory:
        to score samples of this version with, later.
        """
        places = jax.tree.map(
            lambda leaf: leaf.sharding.with_memory_kind("pinned_host"), self.state.params
        )
        return jax.device_put(self._cast(params, jnp.dtype(self.model_config.dtype)), places)

    def recall(self, kept: dict) -> dict:
        """The parameters that `keep` kept, float32 and on the mesh."""
        places = jax.tree.map(lambda leaf: leaf.sharding, self.state.params)
        return self._cast(jax.device_put(kept, places), jnp.dtype(jnp.float32))

    def init(self, seed: int) -> TrainState:
        """Fresh parameters, the same for the same seed on every mesh."""
        places = jax.tree.map(lambda leaf: leaf.sharding, self.state.params)
        return self.start(
            jax.jit(
                lambda: init_params(self.model_config, jax.random.key(seed)), out_shardings=places
            )()
        )

    def lower(self, batch: Batch) -> dict[str, jax.stages.Lowered]:
        """The programs of a step, from shapes alone, for the platform of the mesh's devices, which
        need not be there: what launch.compile looks at.

        batch: one micro-batch; only shapes and dtypes are read.
        """
        state, rows = self.state, batch_sharding(self.mesh)
        batch = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows), batch
        )
        number = jax.ShapeDtypeStruct((), jnp.float32)
        denominators = Denominators(*(number for _ in Denominators._fields))
        on_platform = lambda traced: traced.lower(
            lowering_platforms=(self.mesh.devices.flat[0].platform,)
        )
        with jax.set_mesh(self.mesh):
            return {
                "score": on_platform(
                    self._score.trace(state.params, *_inputs(batch), batch.routes_BTLk)
                ),
                "accumulate": on_platform(
                    self._accumulate.trace(
                        state.params, state.params, batch, denominators, number, number, None
                    )
                ),
                "apply": on_platform(self._apply.trace(state, state.params)),
            }

    def score(self, params: dict, microbatches: Sequence[Batch]) -> list[np.ndarray]:
        """logp_BT of every micro-batch at `params`, with the routes that it carries, on the host."""
        with jax.set_mesh(self.mesh):
            return [np.asarray(self._score(params, *self._fed(batch))) for batch in microbatches]

    def score_and_record(
        self, params: dict, microbatches: Sequence[Batch]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """(logp_BT, routes_BTLk) of every micro-batch: each token chooses its experts itself, and
        the choices are there to be replayed.
        """
        with jax.set_mesh(self.mesh):
            return [
                jax.device_get(self._record(params, *self._fed(batch)[:3]))
                for batch in microbatches
            ]

    def score_one(self, params: dict, ids: Sequence[int]) -> np.ndarray:
        """log p(token | those before it) at temperature 1 of one sequence, [tokens]; 0 for the
        first.

        What an engine is compared with.
        """
        length = len(ids) + -len(ids) % (PROBE_MULTIPLE * self.mesh.shape["sequence"])
        tokens_BT, segments_BT = np.zeros((2, self._rows, length), np.int32)
        tokens_BT[:, : len(ids)], segments_BT[:, : len(ids)] = ids, 1
        positions_BT = np.tile(np.arange(length, dtype=np.int32), (self._rows, 1))
        with jax.set_mesh(self.mesh):
            return np.asarray(
                self._probe(
                    params, *feed((tokens_BT, positions_BT, segments_BT), self._row_sharding)
                )
            )[0, : len(ids)]

    def update(
        self, state: TrainState, microbatches: Sequence[Batch], denominators: Denominators
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimizer update over all micro-batches.

        `state.step` stays: a step may take several updates. The old state is consumed.
        """
        metrics: dict[str, jax.Array] = {}
        tokens = float(sum((batch.segments_BT > 0).sum() for batch in microbatches))
        replayed = float(sum(count_replayed(batch, self.model_config) for batch in microbatches))
        with jax.set_mesh(self.mesh):
            counts_LE = self._count_choices(state.params, microbatches)
            gradients = self._zeros(state.params)
            for batch in microbatches:
                gradients, figures = self._accumulate(
                    state.params,
                    gradients,
                    feed(batch, self._row_sharding),
                    denominators,
                    tokens,
                    replayed,
                    counts_LE,
                )
                metrics = combine_metrics(metrics, figures)
            state, norm = self._apply(state, gradients)
            loads = self._loads(metrics.pop("router_counts"))
        return state, metrics | loads | {"gradient_norm": norm}

    def _fed(self, batch: Batch) -> tuple[jax.Array | None, ...]:
        """What a forward pass reads of a batch, on the mesh."""
        return feed((*_inputs(batch), batch.routes_BTLk), self._row_sharding)

    def _count_choices(self, params: dict, microbatches: Sequence[Batch]) -> jax.Array | None:
        """How often the step's tokens choose each expert, [L, E]: balance is a property of the
        whole step, so a forward pass over all of it comes first.

        None where one micro-batch is the whole step and counts itself, or where nothing is
        balanced.
        """
        if len(microbatches) == 1 or not self.model_config.router_aux_loss_coef:
            return None
        return sum(in_turn(self._count(params, *self._fed(batch))) for batch in microbatches)

    def _logprobs(
        self,
        params: dict,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array,
        routes_BTLk: jax.Array | None = None,
        temperature: float | None = None,
    ) -> tuple[jax.Array, Output]:
        routes_LBTk = None if routes_BTLk is None else replayed_ids(routes_BTLk)
        model = Qwen3(
            self.model_config,
            self.model_config.scan_layers,
            self.chosen_kernels.experts,
            self.chosen_kernels.attention,
            self.chosen_kernels.exchange,
        )
        output = model.apply(
            {"params": cast_layers(params, self.model_config)},
            tokens_BT,
            positions_BT,
            segments_BT,
            routes_LBTK=routes_LBTk,
        )
        kernel_DV = head_kernel(params, self.model_config)
        logp_BT = chunked_logprobs(
            output.hidden_BTD,
            kernel_DV,
            tokens_BT,
            segments_BT,
            temperature=temperature or self.temperature,
        )
        return logp_BT, output

    def _recorded(
        self, params: dict, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        logp_BT, output = self._logprobs(params, tokens_BT, positions_BT, segments_BT)
        return logp_BT, recorded_routes(
            output.routes_LBTK, segments_BT > 0, route_dtype(self.model_config)
        )

    def _objective(
        self,
        params: dict,
        batch: Batch,
        denominators: Denominators,
        tokens: jax.Array,
        replayed: jax.Array,
        counts_LE: jax.Array | None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        logp_BT, output = self._logprobs(params, *_inputs(batch), batch.routes_BTLk)
        value, metrics = self.loss(logp_BT, batch, self.loss_config, denominators)
        metrics = metrics | {"loss": value}
        if batch.routes_BTLk is not None:
            metrics = metrics | route_agreement(batch.routes_BTLk, output.routes_LBTK, replayed)
        router, config = output.router, self.model_config
        counts_LE = router.counts_LE if counts_LE is None else counts_LE
        metrics = (
            metrics | router_metrics(router, config, tokens) | {"router_counts": router.counts_LE}
        )
        if config.router_aux_loss_coef:
            balance = router_loss(router, config, counts_LE, tokens)
            value = value + config.router_aux_loss_coef * balance
            metrics = metrics | {"router_balance": balance}
        if config.router_z_loss_coef:
            z_loss = router_z_loss(router, config, tokens)
            value = value + config.router_z_loss_coef * z_loss
            metrics = metrics | {"router_z": z_loss}
        return value, metrics

    def _accumulated(
        self,
        params: dict,
        gradients: dict,
        batch: Batch,
        denominators: Denominators,
        tokens: jax.Array,
        replayed: jax.Array,
        counts_LE: jax.Array | None,
    ) -> tuple[dict, dict[str, jax.Array]]:
        """Adds one micro-batch's gradients to those before it, in place: at no time are there two
        whole sets of them.
        """
        more, figures = jax.grad(self._objective, has_aux=True)(
            params, batch, denominators, tokens, replayed, counts_LE
        )
        return jax.tree.map(jnp.add, gradients, more), figures

    def _updated(self, state: TrainState, gradients: dict) -> tuple[TrainState, jax.Array]:
        places = jax.tree.map(lambda leaf: leaf.sharding, self.state.opt_state)
        moments = (
            jax.tree.map(
                lambda value, place: jax.device_put(value, place.with_memory_kind("device")),
                state.opt_state,
                places,
            )
            if self.offload_moments
            else state.opt_state
        )
        updates, moments = self.optimizer.update(gradients, moments, state.params)
        moments = jax.device_put(moments, places) if self.offload_moments else moments
        return TrainState(
            state.step, optax.apply_updates(state.params, updates), moments
        ), optax.tree.norm(gradients)


def _inputs(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return batch.tokens_BT, batch.positions_BT, batch.segments_BT


def combine_metrics(
    total: dict[str, jax.Array], more: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Over micro-batches: `max_` figures by maximum, all others by sum."""
    return {
        name: (
            (jnp.maximum if name.startswith("max_") else jnp.add)(total[name], value)
            if name in total
            else value
        )
        for name, value in more.items()
    }
