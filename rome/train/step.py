"""The jitted train step: score, gradients, update.

The model, the loss and the optimizer are arguments; no host, file or engine is known here.

B rows, T tokens, D model, V vocabulary, L layers, E experts, k experts a token.

A step takes as many fixed-shape micro-batches as its trajectories need, under one compilation. Each
micro-batch's loss is already divided by the denominators of the whole step, so sums over
micro-batches are the step's own loss, gradient and metrics, however it was split.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rome.data.batch import Batch
from rome.losses import Denominators, Loss, LossConfig
from rome.losses.types import Metrics
from rome.model.config import ModelConfig
from rome.model.hf.peft import HostAdapters
from rome.model.lora import Lora, adapter_shardings, init_adapters, merge
from rome.model.moe import load_metrics
from rome.model.ops.kernels import Kernels, choose_kernels
from rome.model.params import param_shardings, parameter_shapes
from rome.model.qwen3 import init_params
from rome.model.sharding import batch_sharding, extent, in_turn, row_shards
from rome.train.feed import PROBE_MULTIPLE, OwnRows, feed, one_sequence, own_rows, put
from rome.train.forward import Forward
from rome.train.objective import Objective, sequences
from rome.train.replay import count_replayed
from rome.train.speed import Work, count_work
from rome.train.state import TrainState, abstract_state
from rome.train.sums import Sums, WholeStep
from rome.train.trees import (
    abstract,
    all_finite,
    cast_tree,
    in_device_memory,
    in_host_memory,
    shardings_of,
)


@dataclasses.dataclass
class Learner:
    """The compiled functions of one stage on one mesh.

    Args:
      model_config: of the model that is trained.
      loss: (logp_BT, batch, loss_config, denominators) -> (value, metrics), as in rome.losses.
      loss_config: switches of the loss.
      optimizer: as made by rome.train.state.make_optimizer.
      mesh: with the axes of rome.model.sharding.
      temperature: of the sampling; the trainer divides its logits by it.
      kernels: by name, "auto" for the mesh's own.
      offload_moments: keep the optimizer's moments in host memory; they move to the device for the
        update only.
      skip_nonfinite_updates: an update whose gradient is not finite leaves the state as it was, and
        is counted in the metric `skipped_updates`.
      lora: the adapters that are trained in place of the parameters (`rome.model.lora`). A state
        then holds adapters alone, and so does `params` below; `freeze` gives the learner its base.

    Attributes:
      state: shapes, dtypes and shardings of a TrainState; it holds no arrays.
      base: the frozen parameters in the compute type, on the mesh; None without adapters.
      base_shardings: of the model's parameters.
    """

    model_config: ModelConfig
    loss: Loss
    loss_config: LossConfig
    optimizer: optax.GradientTransformation
    mesh: Mesh
    temperature: float = 1.0
    kernels: Kernels = dataclasses.field(default_factory=Kernels)
    offload_moments: bool = False
    skip_nonfinite_updates: bool = False
    lora: Lora | None = None

    def __post_init__(self) -> None:
        platform = self.mesh.devices.flat[0].platform
        experts = self.mesh.shape["expert"]
        self.chosen_kernels = choose_kernels(
            platform, self.model_config, self.kernels, experts, extent(self.mesh, "expert")
        )
        self._forward = Forward(self.model_config, self.chosen_kernels, self.temperature, self.lora)
        self._num_row_shards = row_shards(self.mesh)
        self._row_sharding = batch_sharding(self.mesh)
        self._replicated = NamedSharding(self.mesh, PartitionSpec())
        self.base: dict | None = None
        self.base_shardings = param_shardings(self.mesh, self.model_config)
        self._param_shardings = self.base_shardings
        if self.lora is not None:
            self._param_shardings = adapter_shardings(self.mesh, self.model_config, self.lora)
        self.state = abstract_state(
            self.model_config,
            self.optimizer,
            self.lora,
            self._param_shardings,
            self._replicated,
            moments_on_host=self.offload_moments,
        )
        self._compile()

    def _compile(self) -> None:
        """Jit the functions of a step, each with the shardings of its arguments and results.

        Nothing is traced before the first call.
        """
        base = None if self.lora is None else self.base_shardings
        params = self._param_shardings
        rows = self._row_sharding
        replicated = self._replicated
        state = shardings_of(self.state)
        forward = self._forward
        objective = Objective(forward, self.loss, self.loss_config)
        self._score = jax.jit(
            forward.logprobs_and_counts,
            in_shardings=(base, params, rows, rows, rows, rows, rows),
            out_shardings=replicated,
        )
        self._score_and_record = jax.jit(
            forward.logprobs_and_routes,
            in_shardings=(base, params, rows, rows, rows, rows),
            out_shardings=replicated,
        )
        self._probe = jax.jit(
            forward.logprobs_at_temperature_1,
            in_shardings=(base, params, rows, rows, rows),
            out_shardings=replicated,
        )
        self._count_experts = jax.jit(
            forward.expert_counts,
            in_shardings=(base, params, rows, rows, rows, rows, rows),
            out_shardings=replicated,
        )
        self._cast = jax.jit(
            cast_tree, static_argnums=1, in_shardings=(params,), out_shardings=params
        )
        if self.lora is not None:
            dtype = jnp.dtype(self.model_config.dtype)
            merging = functools.partial(merge, lora=self.lora, dtype=dtype)
            self._merge = jax.jit(merging, out_shardings=self.base_shardings)
        self._gather = jax.jit(lambda params: params, out_shardings=replicated)
        self._all_finite = jax.jit(all_finite, in_shardings=(params,), out_shardings=replicated)
        everywhere: Any = replicated
        sums = Sums(params, everywhere)
        self._differentiate = jax.jit(
            objective.gradients, in_shardings=(params, base, rows, None), out_shardings=sums
        )
        self._begin = jax.jit(
            objective.begin_sums, in_shardings=(params, base, rows, None), out_shardings=sums
        )
        self._accumulate = jax.jit(
            objective.add_microbatch,
            in_shardings=(params, base, sums, rows, None),
            out_shardings=sums,
            donate_argnums=2,
        )
        self._apply = jax.jit(
            self._apply_sums,
            in_shardings=(state, sums),
            out_shardings=(state, replicated),
            donate_argnums=0,
        )

    # -- states and parameters
    # ---------------------------------------------------------------------------------------------

    def init(self, seed: int) -> TrainState:
        """Return a state with random parameters, the same for the same seed on every mesh.

        With adapters the base is random too.
        """
        params = self.random_params(seed)
        if self.lora is None:
            return self.start(params)
        self.freeze(params)
        return self.start_adapters(seed)

    def random_params(self, seed: int) -> dict:
        """Return random parameters of the model, float32, on the mesh."""

        def make() -> dict:
            return init_params(self.model_config, jax.random.key(seed))

        return jax.jit(make, out_shardings=self.base_shardings)()

    def freeze(self, params: dict) -> None:
        """Take these parameters of the model as the base of the adapters, in the compute type.

        Args:
          params: on the host or on the mesh; those that have the compute type are not copied.
        """
        dtype = jnp.dtype(self.model_config.dtype)
        on_mesh = jax.tree.map(put, params, self.base_shardings)
        if any(leaf.dtype != dtype for leaf in jax.tree.leaves(on_mesh)):
            cast = jax.jit(cast_tree, static_argnums=1, out_shardings=self.base_shardings)
            on_mesh = cast(on_mesh, dtype)
        self.base = on_mesh

    def start_adapters(self, seed: int) -> TrainState:
        """Return a state at step 0 with new adapters, which change nothing yet, and new moments."""

        def make(lora: Lora) -> dict:
            return init_adapters(self.model_config, lora, jax.random.key(seed))

        makes = jax.jit(make, static_argnums=0, out_shardings=self._param_shardings)
        return self.start(makes(self.lora))

    def start(self, params: dict) -> TrainState:
        """Return a state at step 0 with these parameters, new moments and a new schedule.

        Args:
          params: on the host or on devices. Moments are made where they are kept.
        """
        places = shardings_of(self.state)
        params = jax.tree.map(put, params, places.params)
        on_device = jax.tree.map(in_device_memory, places.opt_state)
        make_moments = jax.jit(self.optimizer.init, out_shardings=on_device)
        moments = make_moments(params)
        moments = jax.device_put(moments, places.opt_state)
        zero = np.zeros((), np.int32)
        step = put(zero, places.step)
        return TrainState(step, params, moments)

    def keep(self, params: dict) -> dict:
        """Return a copy of the parameters in host memory, in the compute type that engines get.

        Adapters stay in float32: what engines get is rounded after they are added. Samples of this
        version can be scored with it later; see `recall`.
        """
        dtype = jnp.dtype(self.model_config.dtype if self.lora is None else jnp.float32)
        places = jax.tree.map(in_host_memory, self._param_shardings)
        return jax.device_put(self._cast(params, dtype), places)

    def recall(self, kept: dict) -> dict:
        """Return parameters that `keep` has copied, in float32 on the mesh."""
        on_mesh = jax.device_put(kept, self._param_shardings)
        return self._cast(on_mesh, jnp.dtype(jnp.float32))

    def to_publish(self, params: dict) -> tuple[dict, HostAdapters | None]:
        """Return the model's parameters, and the adapters to add to them as they are written.

        With adapters every process calls this, and each gets all of them in host memory.
        """
        if self.lora is None or self.base is None:
            return params, None
        gathered = self._gather(params)
        on_host = jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), gathered)
        return self.base, HostAdapters.of(on_host, self.model_config, self.lora)

    def merged(self, params: dict) -> dict:
        """Return the model's parameters on the mesh, adapters added: what `to_publish` writes.

        Arrays that no adapter changes are not copied.
        """
        return params if self.lora is None else self._merge(self.base, params)

    # -- scoring
    # ---------------------------------------------------------------------------------------------

    def score(self, params: dict, microbatches: Sequence[Batch]) -> list[np.ndarray]:
        """Return logp_BT (float32, on the host) of every micro-batch at `params`.

        Routes that a micro-batch carries are replayed.
        """
        return [logp_BT for logp_BT, _ in self.score_and_count(params, microbatches)]

    def score_and_count(
        self, params: dict, microbatches: Sequence[Batch]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return (logp_BT, expert_counts_LE) of every micro-batch, both on the host.

        Routes that a micro-batch carries are replayed, and counted.
        """
        with jax.set_mesh(self.mesh):
            return [
                jax.device_get(self._score(self.base, params, *self._inputs(batch)))
                for batch in microbatches
            ]

    def score_and_record(
        self, params: dict, microbatches: Sequence[Batch]
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Return (logp_BT, expert_counts_LE, routes_BTLk) of every micro-batch, on the host.

        Every token chooses its experts itself; the choices are recorded to be replayed later.
        """
        scored = []
        with jax.set_mesh(self.mesh):
            for batch in microbatches:
                *inputs, _, tree = self._inputs(batch)
                found = self._score_and_record(self.base, params, *inputs, tree)
                scored.append(jax.device_get(found))
        return scored

    def score_one(self, params: dict, ids: Sequence[int]) -> np.ndarray:
        """Return log p(token | those before it) of one sequence at temperature 1.

        An engine's own logprobs are compared with this.

        Returns:
          [tokens] float32; 0 for the first token.
        """
        multiple = PROBE_MULTIPLE * self.mesh.shape["sequence"]
        repeated = one_sequence(ids, self._num_row_shards, multiple)
        inputs = feed(repeated, self._row_sharding)
        with jax.set_mesh(self.mesh):
            logp_BT = np.asarray(self._probe(self.base, params, *inputs))
        return logp_BT[0, : len(ids)]

    # -- the update
    # ---------------------------------------------------------------------------------------------

    def update(
        self,
        state: TrainState,
        microbatches: Sequence[Batch],
        denominators: Denominators,
        work: Work | None = None,
    ) -> tuple[TrainState, Metrics]:
        """Apply one optimizer update over all micro-batches.

        The old state is consumed. `state.step` does not change: a step may take several updates.

        Args:
          state: before the update.
          microbatches: rows; those that this process does not feed may be zeros.
          denominators: of the loss, over the rows of all processes.
          work: over the rows of all processes; None: the micro-batches hold all of them.

        Returns:
          The new state, and metrics on the devices.

        Raises:
          ValueError: there is no micro-batch. A step without rows makes no update.
        """
        if not microbatches:
            raise ValueError("an update needs a micro-batch; a step without rows makes no update")
        rows = microbatches[0].num_rows
        if rows % self._num_row_shards:
            raise ValueError(
                f"a micro-batch has {rows} rows, and the mesh splits them over"
                f" {self._num_row_shards} devices. Fill it up with"
                f" rome.data.packing.microbatches(batch, {rows + -rows % self._num_row_shards})"
            )
        if work is None:
            work = self.count_work(microbatches)
        with jax.set_mesh(self.mesh):
            counts_LE = self._count_choices(state.params, microbatches)
            whole = WholeStep(denominators, float(work.tokens), float(work.replayed), counts_LE)
            sums = self._sum_up(state.params, microbatches, whole)
            return self._apply(state, sums)

    def _sum_up(self, params: dict, microbatches: Sequence[Batch], whole: WholeStep) -> Sums:
        """Return the sums over all micro-batches; each of them is one call of one program."""
        sums: Sums | None = None
        for batch in microbatches:
            rows = feed(batch._replace(expert_counts_LE=None), self._row_sharding)
            if len(microbatches) == 1:
                return self._differentiate(params, self.base, rows, whole)
            if sums is None:
                sums = self._begin(params, self.base, rows, whole)
            sums = self._accumulate(params, self.base, sums, rows, whole)
        assert sums is not None  # `update` refuses a step without micro-batches
        return sums

    def own_rows(self, rows: int, rows_per_microbatch: int) -> OwnRows:
        """Return which rows of a batch this process feeds."""
        return own_rows(self._row_sharding, rows, rows_per_microbatch)

    def count_work(self, microbatches: Sequence[Batch]) -> Work:
        """Count the work of passing these rows through the model."""
        replayed = sum(count_replayed(batch, self.model_config) for batch in microbatches)
        return count_work(microbatches)._replace(replayed=replayed)

    def is_finite(self, params: dict) -> jax.Array:
        """Return whether no parameter is inf or NaN, as a scalar that need not be waited for."""
        return self._all_finite(params)

    def _count_choices(
        self, params: dict, microbatches: Sequence[Batch]
    ) -> jax.Array | np.ndarray | None:
        """Count how often the step's tokens choose each expert, [L, E].

        Load balance is a property of the whole step. The pass that scored logp_old has counted:
        at the weights of this update where they are those that sampled, else at older ones. Where
        nothing was scored, a forward pass over the whole step comes first.

        Returns:
          None where one micro-batch is the whole step and counts itself, or where the loss has no
          balance term.
        """
        if len(microbatches) == 1 or not self.model_config.router_aux_loss_coef:
            return None
        found = [batch.expert_counts_LE for batch in microbatches]
        counted = [counts_LE for counts_LE in found if counts_LE is not None]
        if len(counted) == len(microbatches):
            return np.stack(counted).sum(axis=0)
        counts = (
            in_turn(self._count_experts(self.base, params, *self._inputs(batch)))
            for batch in microbatches
        )
        return functools.reduce(jnp.add, counts)

    def _inputs(self, batch: Batch) -> tuple[Any, ...]:
        """Return tokens, positions, segments, routes and tree of a batch, on the mesh.

        Routes and tree are None where the batch has none.
        """
        return feed((*sequences(batch), batch.routes_BTLk, batch.tree), self._row_sharding)

    def _apply_sums(self, state: TrainState, sums: Sums) -> tuple[TrainState, Metrics]:
        """Return the updated state, and the metrics of the update.

        `gradient_norm` is the norm before it is clipped.
        """
        gradients, metrics = sums
        moments = state.opt_state
        places = shardings_of(self.state).opt_state
        if self.offload_moments:
            on_device = jax.tree.map(in_device_memory, places)
            moments = jax.tree.map(jax.device_put, moments, on_device)
        moments_before = moments
        updates, moments = self.optimizer.update(gradients, moments, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        norm = optax.tree.norm(gradients)
        metrics = metrics | {"gradient_norm": norm}
        if not self.model_config.is_dense:
            metrics |= load_metrics(metrics.pop("router_counts"), self.model_config)
        if self.skip_nonfinite_updates:
            is_finite = jnp.isfinite(norm)
            kept = functools.partial(jnp.where, is_finite)
            params = jax.tree.map(kept, params, state.params)
            moments = jax.tree.map(kept, moments, moments_before)
            metrics["skipped_updates"] = (~is_finite).astype(jnp.float32)
        if self.offload_moments:
            moments = jax.device_put(moments, places)
        return TrainState(state.step, params, moments), metrics

    # -- shapes without arrays
    # ---------------------------------------------------------------------------------------------

    def abstract_base(self) -> dict | None:
        """Return shape, dtype and sharding of every frozen parameter; None without adapters."""
        if self.lora is None:
            return None

        def place(leaf: Any, sharding: NamedSharding) -> Any:
            return jax.ShapeDtypeStruct(leaf.shape, self.model_config.dtype, sharding=sharding)

        return jax.tree.map(place, parameter_shapes(self.model_config), self.base_shardings)

    def lower(self, batch: Batch) -> dict[str, jax.stages.Lowered]:
        """Lower the programs of a step from shapes alone, for launch.compile.

        The devices of the mesh need not exist; the programs are lowered for their platform.

        Args:
          batch: one micro-batch; only shapes and dtypes are read.

        Returns:
          The programs "score", "accumulate" and "apply".
        """
        platform = self.mesh.devices.flat[0].platform
        platforms = ("cuda" if platform == "gpu" else platform,)  # lowering has a finer name
        state = self.state
        base = self.abstract_base()
        params = state.params
        batch = jax.tree.map(lambda leaf: abstract(leaf, self._row_sharding), batch)
        number: Any = jax.ShapeDtypeStruct((), jnp.float32)
        denominators = Denominators(*(number for _ in Denominators._fields))
        whole = WholeStep(denominators, number, number)
        with jax.set_mesh(self.mesh):
            inputs = (*sequences(batch), batch.routes_BTLk, batch.tree)
            score = self._score.trace(base, params, *inputs)
            sums = self._begin.eval_shape(params, base, batch, whole)
            accumulate = self._accumulate.trace(params, base, sums, batch, whole)
            apply = self._apply.trace(state, sums)
            traced = {"score": score, "accumulate": accumulate, "apply": apply}
            return {
                name: program.lower(lowering_platforms=platforms)
                for name, program in traced.items()
            }
