"""The model of a pod: its engines, its environments, its trainer, and the bound that they set."""

from __future__ import annotations

import dataclasses
import math
from typing import get_args

from rome.rollout.rules import StaleSamples
from rome.rollout.simulator.distributions import Constant, Distribution, Lognormal

AT_LEAST_ONE = ("engines", "slots", "concurrency", "group_size", "groups_per_step")
AT_LEAST_ZERO = (
    "token_s",
    "token_s_a_request",
    "redundancy",
    "async_ratio",
    "train_s",
    "publish_s",
)


@dataclasses.dataclass(frozen=True)
class PodModel:
    """A pod and the training that runs on it. Names in `_s` are seconds.

    An engine with n decoding requests gives each of them a token every
    `token_s + token_s_a_request * n` seconds: a decoding step reads the weights once, and the
    cache of each request. A turn first reads its prompt, beside the requests that decode.

    Args:
      engines: number of engines. An episode stays with one, the engine with the fewest episodes
        when it began.
      slots: requests that an engine runs at once; further ones wait.
      token_s: of one decoding step, however many requests run.
      token_s_a_request: what each decoding request adds to it.
      prefill_tokens_per_s: of one request; inf if reading a prompt takes no time.
      concurrency: episodes in play at once.
      latency: seconds of the environment, for each turn.
      turns: turns of an episode, rounded to whole numbers from 1.
      tokens: tokens sampled in a turn.
      prompt_tokens: tokens read in a turn: first the prompt, then observations. What came before
        is cached.
      group_size: episodes of a group that are trained on.
      redundancy: further episodes of a group; the last to finish are cancelled.
      groups_per_step: groups that a training step takes.
      async_ratio: the bound on staleness (alpha in `rome.rollout.scheduler`).
      stale_samples: what happens to samples beyond the bound: wait, keep or drop.
      train_s: of a training step.
      publish_s: of publishing the weights, during which the engines stand still.
      lent_engines: engines whose devices the trainer uses while it trains. Their requests move to
        the other engines.

    Raises:
      ValueError: a value is out of range.
    """

    engines: int = 1
    slots: int = 64
    token_s: float = 0.01
    token_s_a_request: float = 0.0
    prefill_tokens_per_s: float = math.inf
    concurrency: int = 64
    latency: Distribution = dataclasses.field(default=Lognormal(1.0, 1.0))
    turns: Distribution = dataclasses.field(default=Constant(8))
    tokens: Distribution = dataclasses.field(default=Constant(50))
    prompt_tokens: Distribution = dataclasses.field(default=Constant(0))
    group_size: int = 8
    redundancy: int = 0
    groups_per_step: int = 8
    async_ratio: int = 1
    stale_samples: StaleSamples = "wait"
    train_s: float = 1.0
    publish_s: float = 0.0
    lent_engines: int = 0

    def __post_init__(self) -> None:
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; set it to 1 or more")
        for name in AT_LEAST_ZERO:
            if not getattr(self, name) >= 0:  # true for nan, too
                raise ValueError(f"{name} is {getattr(self, name)}; set it to 0 or more")
        if not 0 <= self.lent_engines < self.engines:
            raise ValueError(
                f"lent_engines is {self.lent_engines} of {self.engines}; at least one engine must"
                " remain while the others are lent"
            )
        if not self.prefill_tokens_per_s > 0:
            raise ValueError(
                f"prefill_tokens_per_s is {self.prefill_tokens_per_s}; set it above 0 (inf: reading"
                " a prompt takes no time)"
            )
        choices = get_args(StaleSamples)
        if self.stale_samples not in choices:
            raise ValueError(
                f"stale_samples is {self.stale_samples!r}; choose one of {', '.join(choices)}"
            )

    @property
    def batch(self) -> int:
        """Trajectories that a training step takes."""
        return self.groups_per_step * self.group_size

    def token_seconds(self, requests: int) -> float:
        """Return the seconds in which each of `requests` decoding requests gets one token."""
        return self.token_s + self.token_s_a_request * requests

    def prefill_seconds(self, prompt_tokens: float) -> float:
        """Return the seconds in which an engine reads a prompt."""
        return prompt_tokens / self.prefill_tokens_per_s

    def turn_seconds(self, latency: float, tokens: float, prompt_tokens: float) -> float:
        """Return the seconds of a turn that has an engine for itself."""
        sampling = self.prefill_seconds(prompt_tokens) + tokens * self.token_seconds(1)
        return latency + sampling


def step_seconds_bound(model: PodModel) -> float:
    """Return the seconds that a step takes at least in the long run, at any async_ratio.

    That is the time of the busiest of the three: the trainer, which trains and publishes; the
    environments, where each trajectory occupies one of the `concurrency` places for as long as it
    takes alone; and the engines, with every slot in use except while weights are published.
    """
    turns = model.batch * model.turns.mean
    tokens = model.tokens.mean
    prompt_tokens = model.prompt_tokens.mean

    trainer = model.train_s + model.publish_s

    turn_alone = model.turn_seconds(model.latency.mean, tokens, prompt_tokens)
    environments = turns * turn_alone / model.concurrency

    decoding = tokens * model.token_seconds(model.slots)
    slot_seconds = turns * (decoding + model.prefill_seconds(prompt_tokens))
    slots = model.engines * model.slots
    engines = slot_seconds / slots + model.publish_s

    return max(trainer, environments, engines)


def agentic_pod(async_ratio: int = 1, stale_samples: StaleSamples = "wait") -> PodModel:
    """Return the agentic reference setting, in which environments and trainer are the bottleneck.

    64 episodes run at once, 64 trajectories are trained on in a step, in groups of 8. An episode
    has 8 turns with a lognormal latency of mean 1 s and sigma 1. The engine answers a turn of 50
    tokens in 0.05 s and a little. A train step takes 5.5 s, within 3 % of a quarter of the
    synchronous rollout time (`with_train_share`).
    """
    return PodModel(
        token_s=0.001,
        token_s_a_request=4e-6,
        async_ratio=async_ratio,
        stale_samples=stale_samples,
        train_s=5.5,
    )
