"""Which kinds of task the next step plays: more of those whose outcome is open, then those that
nobody solves, which experts demonstrate.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from rome.data.trajectory import Trajectory

# weight of what fails beside p * (1 - p), which is at most 0.25: a group without a success still
# brings a demonstration
UNSOLVED = 0.1
FLOOR = 0.02  # a family that is always won is looked at now and then: it may be forgotten
MEMORY = 0.95  # share of the old estimate that each new episode leaves


class Curriculum:
    """Draws families in proportion to p (1 - p) + UNSOLVED (1 - p) + FLOOR, p their success rate in
    recent training episodes (0.5 before the first).

    p * (1 - p) is the variance of the reward within a family, to which the size of the policy
    gradient is bound.
    """

    def __init__(self, families: Sequence[str], rates: dict[str, float] | None = None) -> None:
        self.rates = dict.fromkeys(families, 0.5) | (rates or {})

    def draw(self, number: int, rng: random.Random) -> list[str]:
        return rng.choices(
            list(self.rates),
            [(p + UNSOLVED) * (1 - p) + FLOOR for p in self.rates.values()],
            k=number,
        )

    def observe(self, trajectories: Iterable[Trajectory]) -> None:
        """Takes finished training episodes in.

        Their order counts a little: give them in the order of their groups.
        """
        for trajectory in trajectories:
            self.rates[trajectory.family] = MEMORY * self.rates[trajectory.family] + (
                1 - MEMORY
            ) * (trajectory.reward > 0)
