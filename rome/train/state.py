"""The state of training between steps, and the optimizer that changes it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from rome.model.config import ModelConfig
from rome.model.lora import Lora, init_adapters
from rome.model.qwen3 import init_params
from rome.train.trees import abstract, in_host_memory


class TrainState(NamedTuple):
    """The arrays that a checkpoint holds.

    Attributes:
      step: int32 []; number of training steps, which is the version of the weights. A step may take
        several optimizer updates.
      params: the float32 master copy; with adapters (`rome.model.lora`) the adapters alone.
      opt_state: moments and schedule of the optimizer.
    """

    step: jax.Array
    params: dict
    opt_state: optax.OptState


def make_optimizer(
    *,
    learning_rate: float,
    warmup_updates: int,
    decay_updates: int,
    weight_decay: float,
    clip: float,
    b2: float = 0.95,
    final_weight_decay: float = -1.0,
    updates: int = 0,
) -> optax.GradientTransformation:
    """Return AdamW after a clip of the gradient's global norm.

    Weight decay applies to matrices only; see `is_decayed`.

    Args:
      learning_rate: its peak.
      warmup_updates: optimizer updates w of linear warm-up before the first one at the peak: the
        n-th takes n / (w + 1) of it, so none is lost to a rate of 0.
      decay_updates: optimizer updates after which a cosine has reached a tenth of the peak; 0: the
        rate stays constant.
      weight_decay: decoupled, as in AdamW.
      clip: largest global norm of the gradient.
      b2: decay of the second moment.
      final_weight_decay: reached from `weight_decay` linearly after all updates; -1: it stays.
      updates: all optimizer updates of the stage.
    """
    first_rate = learning_rate / (warmup_updates + 1)
    if decay_updates:
        rate = optax.warmup_cosine_decay_schedule(
            first_rate,
            learning_rate,
            warmup_updates,
            max(decay_updates, warmup_updates + 1),
            learning_rate / 10,
        )
    else:
        rate = optax.linear_schedule(first_rate, learning_rate, warmup_updates)
    decay: float | optax.Schedule = weight_decay
    if final_weight_decay >= 0:
        decay = optax.linear_schedule(weight_decay, final_weight_decay, updates)
    adamw = optax.adamw(rate, b1=0.9, b2=b2, eps=1e-8, weight_decay=decay, mask=is_decayed)
    return optax.chain(optax.clip_by_global_norm(clip), adamw)


def is_decayed(params: dict) -> dict:
    """Return which parameters weight decay applies to: all but scales of norms and biases.

    They are told by name: stacked over layers, a bias has as many axes as a matrix.
    """

    def is_matrix(path: tuple[Any, ...], _: Any) -> bool:
        name = path[-1].key
        return name != "scale" and not name.endswith("bias")

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def init_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """Return random parameters and new moments, the same for the same seed."""
    return start_state(init_params(config, jax.random.key(seed)), optimizer)


def start_state(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """Return a state at step 0 with these parameters, new moments and a new schedule."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def abstract_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    lora: Lora | None,
    param_shardings: dict,
    replicated: NamedSharding,
    *,
    moments_on_host: bool,
) -> TrainState:
    """Return shape, dtype and sharding of every array of a state.

    Moments are sharded as the parameters that they belong to; the rest is replicated.

    Args:
      config: of the model.
      optimizer: that the moments belong to.
      lora: which adapters the state holds in place of the parameters; None: none.
      param_shardings: of what is trained.
      replicated: of what no parameter has a sharding for.
      moments_on_host: keep the moments in host memory.
    """

    def place_moment(_: Any, sharding: NamedSharding) -> NamedSharding:
        return in_host_memory(sharding) if moments_on_host else sharding

    def replicate(_: Any) -> NamedSharding:
        return replicated

    def make_state() -> TrainState:
        if lora is None:
            return init_state(config, optimizer, seed=0)
        return start_state(init_adapters(config, lora, jax.random.key(0)), optimizer)

    state = jax.eval_shape(make_state)
    moments = optax.tree.map_params(
        optimizer,
        place_moment,
        state.opt_state,
        param_shardings,
        transform_non_params=replicate,
    )
    return TrainState(
        step=abstract(state.step, replicated),
        params=jax.tree.map(abstract, state.params, param_shardings),
        opt_state=jax.tree.map(abstract, state.opt_state, moments),
    )
