"""Metrics of an evaluation, and their uncertainty.

Attempts at one task resemble each other, so the task is the unit: every metric is the mean over
tasks of one value for each task, and its 95 % interval says what other tasks of the same kind would
have given. Attempts that the infrastructure spoiled are in no metric.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rome.data.trajectory import is_success
from rome.evals.agents import is_spoiled
from rome.train.intervals import wilson

RESAMPLES = 2000
MIN_TASKS = 10  # for the bootstrap; fewer values make its intervals too short
Record = Mapping[str, Any]  # of results.jsonl


def is_counted(record: Record) -> bool:
    """Return whether the attempt says something about the agent."""
    return not is_spoiled(record["ending"])


def is_solved(record: Record) -> bool:
    """Return whether the attempt solved its task."""
    if not is_counted(record):
        return False
    # records of older versions have no `success`
    return record.get("success", is_success(record["reward"]))


def pass_at_k(n: int, successes: int, k: int) -> float:
    """Return the probability that k of n attempts, drawn without replacement, hold a success.

    It is unbiased for the probability that k fresh attempts do (Chen et al. 2021, Eq. 1).

    Args:
      n: attempts.
      successes: of them.
      k: attempts drawn.

    Raises:
      ValueError: unless 0 <= successes <= n and 1 <= k <= n.
    """
    if not (0 <= successes <= n and 1 <= k <= n):
        raise ValueError(
            f"pass@{k} of {successes} successes in {n} attempts is not defined; it takes 1 <= k <="
            " n and 0 <= successes <= n"
        )
    return 1.0 - math.comb(n - successes, k) / math.comb(n, k)


def interval(values: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Return the 95 % interval of the mean of values from 0 to 1, one for each task.

    Wilson's interval over tasks if every value is 0 or 1. It is also taken where a bootstrap would
    be too short (fewer than MIN_TASKS tasks, or all values equal): values between 0 and 1 vary less
    than that, so it is then too long rather than too short. Otherwise the percentile bootstrap over
    tasks.

    Args:
      values: at least one.
      seed: of the bootstrap.

    Returns:
      {low, high, method}.
    """
    distinct = set(values)
    is_binary = distinct <= {0.0, 1.0}
    if is_binary or len(values) < MIN_TASKS or len(distinct) == 1:
        low, high = wilson(min(math.fsum(values), len(values)), len(values))
        return {"low": low, "high": high, "method": "wilson over tasks"}
    array = np.asarray(values)
    generator = np.random.default_rng(seed)
    means = []
    for _ in range(RESAMPLES):
        chosen = generator.integers(len(array), size=len(array))
        means.append(array[chosen].mean())
    low, high = np.quantile(np.array(means), [0.025, 0.975])
    return {"low": float(low), "high": float(high), "method": "bootstrap over tasks"}


def summarise(records: Iterable[Record], k: int) -> dict[str, Any]:
    """Return the metrics of an evaluation with their intervals; None where nothing counts.

    Args:
      records: attempts of one agent.
      k: attempts at each task that were asked for.

    Returns:
      mean_reward: over tasks, of the mean over a task's counted attempts.
      pass_at_1, pass_at_k: pass@1 and pass@k; a success is a reward of
        the task's `success` or more, by default 1.
      avg_at_k: mean_reward over the tasks all of whose k attempts count.
      pass_at: {k': pass@k'} for powers of two up to k, and k, each over the tasks with at least k'
        counted attempts.
      intervals: of the first four; and the numbers of tasks and attempts that they rest on.
    """
    records = list(records)
    attempts = _counted_by_task(records)
    tried = [counted for counted in attempts.values() if counted]
    rewards = [[record["reward"] for record in counted] for counted in tried]
    solved = [[is_solved(record) for record in counted] for counted in tried]
    complete = [values for values in rewards if len(values) >= k]
    pass_at = {size: _pass_at(solved, size) for size in _sizes_up_to(k)}
    metrics = {
        "mean_reward": [_mean(values) for values in rewards],
        "pass_at_1": pass_at[1],
        "pass_at_k": pass_at[k],
        "avg_at_k": [_mean(values) for values in complete],
    }
    summary: dict[str, Any] = {
        "tasks_total": len(attempts),
        "tasks_counted": len(tried),
        "tasks_with_k_attempts": len(complete),
        "attempts": len(records),
        "attempts_counted": sum(map(is_counted, records)),
        "k": k,
    }
    for name, values in metrics.items():
        summary[name] = _mean_or_none(values)
    summary["pass_at"] = {str(size): _mean_or_none(values) for size, values in pass_at.items()}
    summary["intervals"] = {
        name: interval(values) if values else None for name, values in metrics.items()
    }
    return summary


def _counted_by_task(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Return the counted attempts at each task."""
    by_task: dict[str, list[Record]] = {}
    for record in records:
        attempts = by_task.setdefault(record["task"], [])
        if is_counted(record):
            attempts.append(record)
    return by_task


def _sizes_up_to(k: int) -> list[int]:
    """Return 1, 2, 4, ... up to k, and k."""
    powers = [2**power for power in range(k.bit_length())]
    return sorted({*powers, k})


def _pass_at(solved: Sequence[Sequence[bool]], size: int) -> list[float]:
    """Return pass@size of each task with at least `size` counted attempts."""
    return [pass_at_k(len(values), sum(values), size) for values in solved if len(values) >= size]


def grouped(records: Sequence[Record], key: str) -> dict[str, dict[str, Any]]:
    """Return the metrics of each group of records that have the same value of `key`.

    Returns:
      {group: {tasks, attempts, attempts_counted, mean_reward, pass_at_1, interval}}, with the
      interval of pass_at_1.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record[key], []).append(record)
    found = {}
    for name in sorted(groups):
        summary = summarise(groups[name], 1)
        found[name] = {
            "tasks": summary["tasks_total"],
            "attempts": summary["attempts"],
            "attempts_counted": summary["attempts_counted"],
            "mean_reward": summary["mean_reward"],
            "pass_at_1": summary["pass_at_1"],
            "interval": summary["intervals"]["pass_at_1"],
        }
    return found


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _mean_or_none(values: Sequence[float]) -> float | None:
    return _mean(values) if values else None
