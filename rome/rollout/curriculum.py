"""The curriculum: which families of tasks the next step plays.

Families with an open outcome are drawn most often, then those without a success, for which a
demonstration is shown.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from rome.data.trajectory import Trajectory

# Weight of failures beside p * (1 - p), which is at most 0.25: a group without a success still
# brings a demonstration.
UNSOLVED = 0.1
FLOOR = 0.02  # weight of a family that is always solved: it is checked, as it may be forgotten
MEMORY = 0.95  # share of the old estimate that each new episode leaves


class Curriculum:
    """Draws families in proportion to p (1 - p) + UNSOLVED (1 - p) + FLOOR.

    p is the success rate of the family in recent training episodes, 0.5 before the first. p (1 - p)
    is the variance of its reward, which bounds the size of the policy gradient.

    Args:
      families: names of the families.
      rates: success rates to start with, from a checkpoint.
    """

    def __init__(self, families: Sequence[str], rates: dict[str, float] | None = None) -> None:
        self.rates = dict.fromkeys(families, 0.5)
        self.rates.update(rates or {})

    def draw(self, number: int, rng: random.Random) -> list[str]:
        """Draw `number` families, with replacement."""
        weights = [(p + UNSOLVED) * (1 - p) + FLOOR for p in self.rates.values()]
        return rng.choices(list(self.rates), weights, k=number)

    def observe(self, trajectories: Iterable[Trajectory]) -> None:
        """Update the success rates with finished training episodes.

        The order matters a little: pass them in the order of their groups.
        """
        for trajectory in trajectories:
            success = float(trajectory.succeeded)
            old_rate = self.rates[trajectory.family]
            self.rates[trajectory.family] = MEMORY * old_rate + (1 - MEMORY) * success
