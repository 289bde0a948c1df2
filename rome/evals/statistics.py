"""Figures of an evaluation and how sure they are.

Attempts at one task resemble each other, so the task is the unit: every figure is the mean over
tasks of one value for each task, and its 95 % interval says what other tasks of the same kind would
have given. Attempts that the infrastructure spoiled are in no figure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rome.evals.agents import is_spoiled
from rome.train.intervals import wilson

RESAMPLES = 2000
FEWEST_TASKS = 10  # for the bootstrap; of fewer values it makes intervals that are too short
Record = Mapping[str, Any]  # of results.jsonl


def counted(record: Record) -> bool:
    """Whether the attempt says something about the agent."""
    return not is_spoiled(record["ending"])


def pass_at_k(n: int, successes: int, k: int) -> float:
    """The probability that k attempts, drawn without replacement from n of which `successes`
    succeeded, hold a success (Chen et al. 2021, Eq. 1).

    Unbiased for the probability that k fresh attempts do. Raises ValueError unless 0 <= successes
    <= n and 1 <= k <= n.
    """
    if not (0 <= successes <= n and 1 <= k <= n):
        raise ValueError(
            f"pass@{k} of {successes} successes in {n} attempts is not defined; it takes 1 <= k <="
            " n and 0 <= successes <= n"
        )
    return 1.0 - math.comb(n - successes, k) / math.comb(n, k)


def interval(values: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """95 % interval of the mean of values from 0 to 1, one for each task: {low, high, method}.

    Wilson's over tasks where every value is 0 or 1. It is also taken where a bootstrap would claim
    too much (fewer than 10 tasks, or no two values differ): values between 0 and 1 vary less than
    that, so it is then too long rather than too short. Otherwise the percentile bootstrap over
    tasks.
    """
    if set(values) <= {0.0, 1.0} or len(values) < FEWEST_TASKS or len(set(values)) == 1:
        low, high = wilson(min(math.fsum(values), len(values)), len(values))
        return {"low": low, "high": high, "method": "wilson over tasks"}
    array = np.asarray(values)
    generator = np.random.default_rng(seed)
    means = np.array(
        [array[generator.integers(len(array), size=len(array))].mean() for _ in range(RESAMPLES)]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return {"low": float(low), "high": float(high), "method": "bootstrap over tasks"}


def summarise(records: Iterable[Record], k: int) -> dict[str, Any]:
    """mean_reward, pass_at_1, pass_at_k and avg_at_k with their intervals, and how many tasks and
    attempts they rest on; None where none is left.

    mean_reward: each task's mean over the attempts that count. avg_at_k: the same, over the tasks
    all of whose k attempts count. pass_at: k' -> pass@k' for powers of two up to k, and k. A
    success is a reward of 1. pass@k' is over the tasks with k' attempts that count.
    """
    records = list(records)
    rewards: dict[str, list[float]] = {}
    for record in records:
        attempts = rewards.setdefault(record["task"], [])
        if counted(record):
            attempts.append(record["reward"])
    tried = [values for values in rewards.values() if values]
    whole = [values for values in tried if len(values) >= k]
    sizes = sorted({*(2**power for power in range(k.bit_length()) if 2**power <= k), k})
    at = {
        size: [
            pass_at_k(len(values), values.count(1.0), size)
            for values in tried
            if len(values) >= size
        ]
        for size in sizes
    }
    figures = {
        "mean_reward": [_mean(values) for values in tried],
        "pass_at_1": at[1],
        "pass_at_k": at[k],
        "avg_at_k": [_mean(values) for values in whole],
    }
    return {
        "tasks_total": len(rewards),
        "tasks_counted": len(tried),
        "tasks_with_k_attempts": len(whole),
        "attempts": len(records),
        "attempts_counted": sum(map(counted, records)),
        "k": k,
        **{name: _mean(values) if values else None for name, values in figures.items()},
        "pass_at": {str(size): _mean(values) if values else None for size, values in at.items()},
        "intervals": {
            name: interval(values) if values else None for name, values in figures.items()
        },
    }


def grouped(records: Sequence[Record], key: str) -> dict[str, dict[str, Any]]:
    """Group -> tasks, attempts, mean_reward and pass_at_1 with its interval, for one of the
    records' keys.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record[key], []).append(record)
    found = {}
    for name in sorted(groups):
        whole = summarise(groups[name], 1)
        found[name] = {
            "tasks": whole["tasks_total"],
            "attempts": whole["attempts"],
            "attempts_counted": whole["attempts_counted"],
            "mean_reward": whole["mean_reward"],
            "pass_at_1": whole["pass_at_1"],
            "interval": whole["intervals"]["pass_at_1"],
        }
    return found


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
