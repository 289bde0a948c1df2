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
      shares: (weight, families) of a mixture: so much of what is drawn is of these families. None
        where all families are drawn together.
    """

    def __init__(
        self,
        families: Sequence[str],
        rates: dict[str, float] | None = None,
        shares: Sequence[tuple[float, Sequence[str]]] | None = None,
    ) -> None:
        self.rates = dict.fromkeys(families, 0.5)
        rates = rates or {}
        # A folder may have changed since the checkpoint: families that are gone are not drawn.
        self.rates.update({family: rates[family] for family in families if family in rates})
        self._shares = shares if shares is not None and len(shares) > 1 else None

    def draw(self, number: int, rng: random.Random) -> list[str]:
        """Draw `number` families, with replacement."""
        weights = {family: (p + UNSOLVED) * (1 - p) + FLOOR for family, p in self.rates.items()}
        for share, families in self._shares or ():
            total = sum(weights[family] for family in families)
            for family in families:
                weights[family] *= share / total
        return rng.choices(list(weights), list(weights.values()), k=number)

    def observe(self, trajectories: Iterable[Trajectory]) -> None:
        """Update the success rates with finished training episodes.

        The order matters a little: pass them in the order of their groups.
        """
        for trajectory in trajectories:
            if trajectory.family not in self.rates:
                continue
            success = float(trajectory.succeeded)
            old_rate = self.rates[trajectory.family]
            self.rates[trajectory.family] = MEMORY * old_rate + (1 - MEMORY) * success
