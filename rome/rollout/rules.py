"""The numbers that the scheduler of rollouts follows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

StaleSamples = Literal["wait", "keep", "drop"]
MAX_REPLACEMENTS = 4  # of a group without spread; the last one is taken as it is


@dataclasses.dataclass(frozen=True)
class Rules:
    """The numbers that a RolloutScheduler follows.

    Args:
      groups_per_step: groups that a training step takes.
      group_size: episodes of a group that are trained on.
      concurrency: episodes in play at once.
      steps: training steps of the run; no wave starts beyond the last one.
      async_ratio: alpha, the bound on staleness in versions.
      redundancy: further episodes of a group. The first `group_size` to finish count.
      replace_equal: replace a group without spread by a group of another task (the dynamic
        sampling of DAPO, arXiv 2503.14476), up to MAX_REPLACEMENTS times.
      stale_samples: what happens to samples beyond the bound.
      siblings: number of consecutive groups that are episodes of the same task. With group_size=1
        a step takes single episodes without waiting for their siblings.
      seed: seed of the run, from which every episode's seed is derived.
      safety_cost: of harm by kind (`rome.data.costs`), which the rewards of a group lose.
    """

    groups_per_step: int
    group_size: int
    concurrency: int
    steps: int
    async_ratio: int = 0
    redundancy: int = 0
    replace_equal: bool = False
    stale_samples: StaleSamples = "wait"
    siblings: int = 1
    seed: int = 0
    safety_cost: Mapping[str, float] = dataclasses.field(default_factory=dict)
