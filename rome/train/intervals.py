"""Confidence intervals of success rates."""

from __future__ import annotations

import math

Z_95 = 1.959963984540054


def wilson(successes: float, n: float) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a success rate.

    Args:
      successes: number of successes, 0 to `n`.
      n: number of trials; a fraction where it is an effective one.

    Returns:
      (low, high), shares between 0 and 1; (0, 1) without any trial.

    Raises:
      ValueError: where `successes` does not lie between 0 and `n`.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} tasks is impossible")
    if n == 0:
        return 0.0, 1.0
    rate = successes / n
    z2 = Z_95**2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    variance = rate * (1 - rate) / n + z2 / (4 * n * n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(variance)
    # At both ends the bound is exact; the formula would miss it by 1e-17.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


def difference(before: tuple[float, float], after: tuple[float, float]) -> tuple[float, float]:
    """Return Newcombe's 95 % interval of `after` minus `before`, two success rates.

    It takes the two for independent. Where both were measured on the same tasks it is too wide
    rather than too narrow.

    Args:
      before: (number of successes, number of trials).
      after: likewise.

    Returns:
      (low, high), between -1 and 1.
    """
    rates = []
    bounds = []
    for successes, n in (before, after):
        rates.append(successes / n if n else 0.5)
        bounds.append(wilson(successes, n))
    change = rates[1] - rates[0]
    (low_0, high_0), (low_1, high_1) = bounds
    down = math.hypot(rates[1] - low_1, high_0 - rates[0])
    up = math.hypot(high_1 - rates[1], rates[0] - low_0)
    return max(change - down, -1.0), min(change + up, 1.0)
