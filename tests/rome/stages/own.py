"""Own code of a user, as tests and a real run name it: right ones, and wrong ones of every kind."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from rome.data.batch import CONTEXT, RL
from rome.losses import LossSpec
from rome.losses.chunks import at_tokens, exp_bounded, tokens_of_kind


@dataclasses.dataclass(frozen=True)
class Clipped:
    """REINFORCE with a truncated ratio."""

    ceiling: float = 1.2

    def __post_init__(self):
        if self.ceiling < 1:
            raise ValueError(f"ceiling={self.ceiling} must be 1 or more")

    def __call__(self, logp_BT, batch, config, denominators):
        rl_BT = tokens_of_kind(RL, batch)
        log_ratio_BT = jnp.where(rl_BT, logp_BT - batch.logp_old_BT, 0.0)
        ratio_BT = jnp.minimum(exp_bounded(log_ratio_BT), self.ceiling)
        objective_BT = jnp.where(rl_BT, ratio_BT * at_tokens(batch.advantage_BC, batch), 0.0)
        objective = jnp.sum(objective_BT) / jnp.maximum(denominators.rl_tokens, 1.0)
        return -objective, {"max_ratio": jnp.max(ratio_BT), "own_objective": objective}


clipped = LossSpec(Clipped, "centred")


def weighted_likelihood(logp_BT, batch, config, denominators):
    learned_BT = at_tokens(batch.valid_BC & (batch.kind_BC != CONTEXT), batch)
    total = jnp.sum(jnp.where(learned_BT, logp_BT, 0.0))
    return -total / jnp.maximum(denominators.trained_tokens, 1.0), {}


likelihood = LossSpec(weighted_likelihood, likelihood=True)


def below_the_best(episodes, rewards):
    return [reward - max(rewards) for reward in rewards]


def by_turn(episodes, rewards):
    return [np.arange(len(episode.turns)) for episode in episodes]


@dataclasses.dataclass(frozen=True)
class ShortIsGood:
    cost: float = 0.01

    def __call__(self, episode):
        return episode.reward - self.cost * episode.num_action_tokens


@dataclasses.dataclass(frozen=True)
class Varied:
    """Tells apart even episodes of random weights, which all use up their tokens."""

    weight: float = 0.01

    def __call__(self, episode):
        written = {token for chunk in episode.chunks for token in chunk.action_ids}
        return episode.reward + self.weight * len(written)


def first_half(episodes):
    return episodes[: (len(episodes) + 1) // 2]


# -- wrong ones


def mean_over_the_batch(logp_BT, batch, config, denominators):
    return -jnp.mean(jnp.where(batch.action_mask_BT, logp_BT, 0.0)), {}


def mean_as_a_metric(logp_BT, batch, config, denominators):
    value, _ = Clipped()(logp_BT, batch, config, denominators)
    return value, {"mean_logp": jnp.mean(logp_BT)}


def not_a_number(logp_BT, batch, config, denominators):
    return jnp.sum(jnp.log(batch.reward_BC - 5.0)), {}


def gradient_not_a_number(logp_BT, batch, config, denominators):
    root_BT = jnp.where(batch.action_mask_BT, jnp.sqrt(logp_BT - logp_BT), 0.0)
    return jnp.sum(root_BT) / denominators.trained_tokens, {}


def a_value_for_each_token(logp_BT, batch, config, denominators):
    return logp_BT, {}


def no_metrics(logp_BT, batch, config, denominators):
    return jnp.sum(logp_BT) / denominators.trained_tokens


def metric_of_the_learner(logp_BT, batch, config, denominators):
    return Clipped()(logp_BT, batch, config, denominators)[0], {"entropy": jnp.float32(0.0)}


def reads_what_is_not_there(logp_BT, batch, config, denominators):
    return jnp.sum(batch.rewards), {}


def too_few(logp_BT, batch):
    return jnp.sum(logp_BT), {}


def one_for_all(episodes, rewards):
    return [0.0]


def infinite(episode):
    return float("inf")


def fails(episode):
    return episode.points


def others(episodes):
    return [object()]
