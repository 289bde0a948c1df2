"""What a training run holds between steps, and the optimizer that moves it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rome.model.config import ModelConfig
from rome.model.qwen3 import init_params


class TrainState(NamedTuple):
    """`step` counts training steps (the weight version), not optimizer updates.

    Parameters are the float32 master copy.
    """

    step: jax.Array  # int32 []
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
) -> optax.GradientTransformation:
    """AdamW behind a global-norm clip.

    The rate warms up linearly, then (decay_updates > 0) falls to a tenth by a cosine.

    The schedule counts optimizer updates, whatever a step consumes. Only matrices decay: norms do
    not.
    """
    if decay_updates:
        rate = optax.warmup_cosine_decay_schedule(
            0.0,
            learning_rate,
            warmup_updates,
            max(decay_updates, warmup_updates + 1),
            learning_rate / 10,
        )
    else:
        rate = optax.linear_schedule(
            learning_rate / (warmup_updates + 1), learning_rate, warmup_updates
        )
    decayed = lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key != "scale", params
    )
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(rate, b1=0.9, b2=b2, eps=1e-8, weight_decay=weight_decay, mask=decayed),
    )


def init_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """Fresh parameters and optimizer moments; the same for the same seed."""
    return start_state(init_params(config, jax.random.key(seed)), optimizer)


def start_state(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """Given parameters at step 0 of a new stage: moments and the schedule start anew."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
