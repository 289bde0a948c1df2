"""The reward in a verifier's output, or the reason why there is none."""

from __future__ import annotations

import math


class VerifierError(ValueError):
    """The verifier printed no usable reward, so the episode says nothing about the policy."""


def parse_reward(text: str, task: str) -> float:
    """Return the last non-empty line of a verifier's output as a number from 0 to 1.

    Raises:
      VerifierError: the line is not a finite number in that range. The message names task and
        value.
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
