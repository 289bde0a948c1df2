"""Distributions of what a simulated pod does in a turn: seconds and tokens, and turns."""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import numpy as np


class Distribution(Protocol):
    """A distribution of numbers from 0: seconds, tokens or turns."""

    @property
    def mean(self) -> float:
        """The expected value of a draw."""

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """Return `size` independent draws, [size] float64."""


@dataclasses.dataclass(frozen=True)
class Constant:
    """A distribution that always gives the same value."""

    value: float

    @property
    def mean(self) -> float:
        return self.value

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        return np.full(size, float(self.value))


@dataclasses.dataclass(frozen=True)
class Lognormal:
    """A lognormal distribution.

    Args:
      mean: its mean (not its median).
      sigma: standard deviation of its logarithm.
    """

    mean: float
    sigma: float

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        mean_of_log = math.log(self.mean) - self.sigma**2 / 2
        return rng.lognormal(mean_of_log, self.sigma, size)


@dataclasses.dataclass(frozen=True)
class Recorded:
    """Measured values, drawn with replacement."""

    samples: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.samples))

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        return rng.choice(np.asarray(self.samples, np.float64), size)
