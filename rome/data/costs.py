"""Costs of safety events, charged to the chunks that caused them.

An environment reports the kinds of harm that a turn did (`Chunk.events`); an attempt to reach an
address that the sandbox does not grant is the kind "egress" of every environment.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

from rome.data.trajectory import REWARD_TOLERANCE, Chunk, Trajectory

EGRESS = "egress"


def parse_costs(text: str) -> dict[str, float]:
    """Return the costs by kind that a text such as "egress:1 secret_sent:2" gives; "" is none.

    Raises:
      ValueError: the text is anything else.
    """
    costs: dict[str, float] = {}
    for part in text.split():
        kind, colon, number = part.partition(":")
        try:
            cost = float(number)
        except ValueError:
            cost = math.nan
        if not re.fullmatch(r"[a-z_]+", kind) or not colon or kind in costs:
            cost = math.nan
        if not 0 <= cost < math.inf:
            raise ValueError(
                f"{part!r} is no cost of a kind of event; write each kind at most once, with a cost"
                ' of 0 or more, as in "egress:1 secret_sent:2"'
            )
        costs[kind] = cost
    return costs


def events_of(chunk: Chunk) -> frozenset[str]:
    """Return the kinds of harm that a chunk caused."""
    denied = [EGRESS] if chunk.network_denials else []
    return frozenset([*chunk.events, *denied])


def chunk_costs(trajectory: Trajectory, costs: Mapping[str, float]) -> np.ndarray:
    """Return the cost of each turn of a trajectory, [K].

    What a replayed prefix did is not charged: the policy did not choose it.
    """
    found = []
    for _, chunk in trajectory.turns:
        charged = events_of(chunk) if chunk.kind != "context" else ()
        found.append(sum(costs.get(kind, 0.0) for kind in charged))
    return np.array(found, np.float64)


def rewards_differ(
    trajectories: Iterable[Trajectory], costs: Mapping[str, float] | None = None
) -> bool:
    """Return whether some of the episodes have another reward than others, less what they cost.

    Without a difference there is nothing that comparing them could teach.
    """
    rewards = [
        one.learned_reward - float(chunk_costs(one, costs or {}).sum()) for one in trajectories
    ]
    return bool(rewards) and max(rewards) - min(rewards) > REWARD_TOLERANCE


def discounted_costs(cost_K: np.ndarray, gamma: float) -> np.ndarray:
    """Return what each turn's return loses: the sum over j >= k of gamma ** (j - k) * cost_j, [K].

    A turn pays for its own events in full and for those of later turns less and less; it never pays
    for what was done before it.
    """
    lost_K = np.zeros(len(cost_K))
    ahead = 0.0
    for place in range(len(cost_K) - 1, -1, -1):
        ahead = float(cost_K[place]) + gamma * ahead
        lost_K[place] = ahead
    return lost_K
