"""Distributions of what a simulated pod does: seconds, tokens, turns.

Fixed, lognormal, or recorded.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import numpy as np


class Distribution(Protocol):
    """Positive numbers: seconds, tokens or turns."""

    mean: float

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Constant:
    value: float

    @property
    def mean(self) -> float:
        return self.value

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        return np.full(size, float(self.value))


@dataclasses.dataclass(frozen=True)
class Lognormal:
    """By its mean (not its median) and the standard deviation of its logarithm."""

    mean: float
    sigma: float

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        return rng.lognormal(math.log(self.mean) - self.sigma**2 / 2, self.sigma, size)


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What was measured, drawn again with replacement."""

    samples: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.samples))

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        return rng.choice(np.asarray(self.samples, np.float64), size)
