"""Metrics of an evaluation, and their uncertainty.

Attempts at one task resemble each other, so the task is the unit: every metric is the mean over
tasks of one value for each task, and its 95 % interval says what other tasks of the same kind would
have given. Seeds of one family resemble each other, too: where the tasks are of several families,
the interval is clustered by family. Attempts that the infrastructure spoiled are in no metric.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rome.data.trajectory import is_success
from rome.evals.agents import is_spoiled
from rome.train.intervals import Z_95, wilson

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


def interval(
    values: Sequence[float], clusters: Sequence[str] | None = None, seed: int = 0
) -> dict[str, Any]:
    """Return the 95 % interval of the mean of values from 0 to 1, one for each task.

    Where several tasks share a cluster it is `clustered_interval`. Otherwise it is Wilson's
    interval over tasks if every value is 0 or 1, also where a bootstrap would be too short (fewer
    than MIN_TASKS tasks, or all values equal): values between 0 and 1 vary less than that, so it is
    then too long rather than too short. Otherwise it is the percentile bootstrap over tasks.

    Args:
      values: at least one.
      clusters: the cluster of each value; None where each is its own. Values of a single cluster
        are taken as such, too: one family says nothing about how families differ.
      seed: of the bootstrap.

    Returns:
      {low, high, method}.
    """
    distinct = set(values)
    if clusters is not None and 1 < len(set(clusters)) < len(values):
        return clustered_interval(values, clusters)
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


def clustered_error(values: Sequence[float], clusters: Sequence[str]) -> float:
    """Return the standard error of the mean where values of one cluster are not independent.

    It is the cluster-robust error with the factor G / (G - 1) for G clusters (Liang and Zeger 1986;
    for evaluations Miller 2024, "Adding Error Bars to Evals"):
    sqrt(G / (G - 1) * sum over clusters of (sum of the cluster's deviations) ** 2) / n.

    Args:
      values: one for each task.
      clusters: the cluster of each; at least two different ones.
    """
    mean = math.fsum(values) / len(values)
    deviations: dict[str, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        deviations[cluster] = deviations.get(cluster, 0.0) + value - mean
    count = len(deviations)
    squares = math.fsum(deviation**2 for deviation in deviations.values())
    return math.sqrt(count / (count - 1) * squares) / len(values)


def clustered_interval(values: Sequence[float], clusters: Sequence[str]) -> dict[str, Any]:
    """Return the 95 % interval of the mean of values from 0 to 1 over clusters of tasks.

    It is Wilson's interval for the effective number of tasks: so many independent ones would have
    this standard error. The number is multiplied by (z / t) ** 2, t with G - 1 degrees of freedom,
    since few clusters tell little of how clusters differ (Korn and Graubard 1998). It is never more
    than the number of tasks; where all clusters have the same mean it is the number of clusters.

    Args:
      values: one for each task.
      clusters: the cluster of each; at least two different ones.

    Returns:
      {low, high, method}.
    """
    from scipy.special import stdtrit  # half a second of imports, needed only here

    mean = min(math.fsum(values) / len(values), 1.0)
    count = len(set(clusters))
    error = clustered_error(values, clusters)
    effective = float(count)
    if error > 1e-9:
        t = float(stdtrit(count - 1, 0.975))
        effective = mean * (1.0 - mean) / error**2 * (Z_95 / t) ** 2
        effective = min(effective, float(len(values)))
    low, high = wilson(mean * effective, effective)
    return {"low": low, "high": high, "method": f"wilson over {count} families of tasks"}


def unbounded_interval(values: Sequence[float], clusters: Sequence[str]) -> dict[str, Any] | None:
    """Return the 95 % interval of the mean of values that may lie outside 0 to 1, as rewards may.

    Wilson's interval is for shares. This is the bootstrap over tasks where `interval` takes it for
    shares, too, and otherwise Student's t with the cluster-robust error.

    Args:
      values: one for each task, at least one.
      clusters: the cluster of each; a single one is taken as one for each value.

    Returns:
      {low, high, method}; None where the values do not differ: without a range they then say
      nothing about how others would.
    """
    from scipy.special import stdtrit  # half a second of imports, needed only here

    if len(set(values)) == 1:
        return None
    count = len(set(clusters))
    is_clustered = 1 < count < len(values)
    if not is_clustered:
        if len(values) >= MIN_TASKS:
            return interval(values)
        count, clusters = len(values), [str(number) for number in range(len(values))]
    mean = _mean(values)
    half = float(stdtrit(count - 1, 0.975)) * clustered_error(values, clusters)
    over = f"{count} families of tasks" if is_clustered else "tasks"
    return {"low": mean - half, "high": mean + half, "method": f"t over {over}"}


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
    clusters = {record["task"]: record.get("cluster", record["task"]) for record in records}
    tried = {task: counted for task, counted in attempts.items() if counted}
    rewards = {task: [record["reward"] for record in tried[task]] for task in tried}
    solved = {task: [is_solved(record) for record in tried[task]] for task in tried}
    complete = {task: values for task, values in rewards.items() if len(values) >= k}
    pass_at = {size: _pass_at(solved, size) for size in _sizes_up_to(k)}
    metrics = {
        "mean_reward": {task: _mean(values) for task, values in rewards.items()},
        "pass_at_1": pass_at[1],
        "pass_at_k": pass_at[k],
        "avg_at_k": {task: _mean(values) for task, values in complete.items()},
    }
    summary: dict[str, Any] = {
        "tasks_total": len(attempts),
        "tasks_counted": len(tried),
        "tasks_with_k_attempts": len(complete),
        "attempts": len(records),
        "attempts_counted": sum(map(is_counted, records)),
        "k": k,
    }
    for name, by_task in metrics.items():
        summary[name] = _mean_or_none(by_task)
    summary["pass_at"] = {str(size): _mean_or_none(found) for size, found in pass_at.items()}
    summary["intervals"] = {
        name: _interval_or_none(by_task, clusters) for name, by_task in metrics.items()
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


def _pass_at(solved: Mapping[str, Sequence[bool]], size: int) -> dict[str, float]:
    """Return pass@size of each task with at least `size` counted attempts."""
    found = {}
    for task, values in solved.items():
        if len(values) >= size:
            found[task] = pass_at_k(len(values), sum(values), size)
    return found


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


def _mean_or_none(by_task: Mapping[str, float]) -> float | None:
    return _mean(list(by_task.values())) if by_task else None


def _interval_or_none(
    by_task: Mapping[str, float], clusters: Mapping[str, str]
) -> dict[str, Any] | None:
    if not by_task:
        return None
    values = list(by_task.values())
    if min(values) < 0.0 or max(values) > 1.0:
        return unbounded_interval(values, [clusters[task] for task in by_task])
    return interval(values, [clusters[task] for task in by_task])
