"""Write a policy loss and look at its weights.

python -m examples.04_loss

To train with it: --config.loss=examples/04_loss.py:clipped_reinforce_loss (docs/extending.md).
"""

import jax
import jax.numpy as jnp

from rome.data.batch import RL, Batch
from rome.data.packing import pack
from rome.data.trajectory import Chunk, Trajectory
from rome.losses import Denominators, LossConfig, Metrics, count_denominators
from rome.losses.chunks import at_tokens, exp_bounded, tokens_of_kind


def clipped_reinforce_loss(
    logp_BT: jax.Array, batch: Batch, config: LossConfig, denominators: Denominators
) -> tuple[jax.Array, Metrics]:
    """Return REINFORCE with a truncated token ratio, a mean over the step's RL tokens."""
    rl_BT = tokens_of_kind(RL, batch)
    log_ratio_BT = jnp.where(rl_BT, logp_BT - batch.logp_old_BT, 0.0)
    ratio_BT = jnp.minimum(exp_bounded(log_ratio_BT), 1.0 + config.clip_high)
    objective_BT = jnp.where(rl_BT, ratio_BT * at_tokens(batch.advantage_BC, batch), 0.0)
    objective = jnp.sum(objective_BT) / jnp.maximum(denominators.rl_tokens, 1.0)
    return -objective, {"ratio": jnp.sum(ratio_BT * rl_BT) / denominators.rl_tokens}


if __name__ == "__main__":
    chunk = Chunk(prompt_ids=[1, 2], action_ids=[3, 4, 5], logprobs=[-1.0, -0.5, -2.0])
    won = Trajectory("task", "family", [chunk], reward=1.0, ending="success")
    lost = Trajectory("task", "family", [chunk], reward=0.0, ending="failure", episode=1)
    batch = pack([won, lost], row_length=10, chunks_per_row=2, gamma=1.0, failure_reward=0.0)
    batch = batch._replace(logp_old_BT=batch.logp_rollout_BT)
    gradient = jax.grad(clipped_reinforce_loss, has_aux=True)
    weights_BT, metrics = gradient(
        batch.logp_rollout_BT, batch, LossConfig(), count_denominators([batch])
    )
    print("tokens ", batch.tokens_BT, "\nweights", -weights_BT.round(3), "\nmetrics", metrics)
