"""From what a verifier printed to a reward, or to the reason why there is none."""

from __future__ import annotations

import math


class VerifierError(ValueError):
    """The verifier did not give a usable reward: the episode says nothing about the policy."""


def parse_reward(text: str, task: str) -> float:
    """The last line that is not empty, as a finite number in [0, 1].

    Raises VerifierError that names the task and the value.
    """
    printed = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
    try:
        reward = float(printed)
    except ValueError:
        reward = math.nan
    if not math.isfinite(reward) or not 0.0 <= reward <= 1.0:
        raise VerifierError(
            f"verifier of {task} printed {printed[:60]!r}; its last line must be a number from 0"
            " to 1"
        )
    return reward
