r"""A verifier that is wrong about a share of the tasks, as own code for IPA's reward.

python -m launch.train --config=experiments/ipa.py --config.steps=10 \
    --config.reward=benchmarks.wrong_rewards:WrongReward --config.own.reward.rate=0.3

A task that it is wrong about pays failures and punishes successes, in each step that plays it.
Evaluations see the right verifier.
"""

from __future__ import annotations

import dataclasses

from rome.data.seeds import derive_seed
from rome.data.trajectory import Trajectory


@dataclasses.dataclass(frozen=True)
class WrongReward:
    """The reward of an episode, turned round for a share of the tasks.

    Args:
      rate: share of the tasks whose reward is wrong.
      failure: reward of what counts as failed, like `config.failure_reward`.
      seed: of the choice of these tasks.

    Raises:
      ValueError: the rate is no share.
    """

    rate: float = 0.1
    failure: float = -1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.rate <= 1.0:
            raise ValueError(f"rate={self.rate} is no share of the tasks; give 0 to 1")

    def is_wrong(self, task: str) -> bool:
        """Return whether a task is one of those whose reward is wrong."""
        return derive_seed("wrong reward", self.seed, task) % 10_000 < self.rate * 10_000

    def __call__(self, episode: Trajectory) -> float:
        """Return 1 or `failure`."""
        return 1.0 if episode.succeeded != self.is_wrong(episode.task) else self.failure
