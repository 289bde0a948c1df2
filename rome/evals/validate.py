"""Proves a dataset: the reference solution earns 1 every time; doing nothing and cheating earn 0.

A task that fails one of these measures something other than its agents; it is listed with each
reason. An attempt that the infrastructure spoiled proves nothing, so it is a reason too: a cheat
whose attempt is masked as an infrastructure fault has escaped its failure.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from envs.rock import SandboxConfig
from envs.sources import Task
from envs.tasks.harbor import TaskError
from rome.evals.agents import Scripted
from rome.evals.cheats import CHEATS
from rome.evals.report import Table, write_pages
from rome.evals.runner import Job
from rome.evals.safety import proof_faults
from rome.evals.statistics import Record, is_counted
from rome.files import write_atomically

AGENTS = ("oracle", "noop", "cheat", "attacker")
PROVING = AGENTS[:3]  # play every task


def proof_jobs(tasks: Sequence[Task], config: SandboxConfig, oracle_runs: int) -> list[Job]:
    """Return the attempts of a proof: for every task the oracle, one no-op, one of each cheat.

    A task of the safety suite is also played by its scripted attacker.

    Args:
      tasks: of the dataset.
      config: of the sandboxes.
      oracle_runs: attempts of the oracle at each task; several find flaky tasks.
    """
    attempts = {"oracle": oracle_runs, "noop": 1, "cheat": len(CHEATS), "attacker": 1}
    jobs = []
    for task in tasks:
        for name in AGENTS:
            if name == "attacker" and not task.has_attack:
                continue
            for attempt in range(attempts[name]):
                jobs.append(Job(Scripted(name, config), task, attempt))
    return jobs


def judge(task: str, records: Sequence[Record]) -> dict[str, Any]:
    """Return the verdict on one task.

    Args:
      task: its name.
      records: of all its attempts.

    Returns:
      {task, ok, flaky, reasons, rewards: {agent: [reward]}, oracle_seconds: {least, most} or None}.
    """
    by_agent: dict[str, list[Record]] = {name: [] for name in AGENTS}
    for record in sorted(records, key=lambda record: record["attempt"]):
        by_agent[record["agent"]].append(record)
    oracle_rewards = {record["reward"] for record in by_agent["oracle"] if is_counted(record)}
    is_flaky = len(oracle_rewards) > 1
    missing = [name for name in PROVING if not by_agent[name]]
    reasons = [f"{name} was not played" for name in missing]  # nothing is proven by no run
    if is_flaky:
        rewards = " and ".join(f"{reward:g}" for reward in sorted(oracle_rewards))
        reasons.append(f"flaky: the same solution earned {rewards}")
    for agent in AGENTS:
        for record in by_agent[agent]:
            wanted = 1.0 if agent == "oracle" else 0.0
            if record["reward"] != wanted:  # the reward is None if the attempt was spoiled
                reasons.append(_describe_fault(agent, record, wanted))
            reasons += proof_faults(agent, record)
    seconds = [record["seconds"] for record in by_agent["oracle"]]
    return {
        "task": task,
        "ok": not reasons,
        "flaky": is_flaky,
        "reasons": reasons,
        "rewards": {
            name: [record["reward"] for record in found] for name, found in by_agent.items()
        },
        "oracle_seconds": {"least": min(seconds), "most": max(seconds)} if seconds else None,
    }


def _describe_fault(agent: str, record: Record, wanted: float) -> str:
    """Return what an attempt earned instead of the wanted reward."""
    text = f"{agent} run {record['attempt'] + 1} ended as {record['ending']}"
    if record["reward"] is not None:
        text += f" with reward {record['reward']:g}"
    text += f" instead of earning {wanted:g}"
    if record["note"]:
        text += f" ({record['note']})"
    return text


def build_proof(
    identity: Mapping[str, Any],
    tasks: Sequence[Task],
    records: Sequence[Record],
    faults: Sequence[TaskError],
) -> dict[str, Any]:
    """Return the content of validation.json.

    Args:
      identity: what was validated; its fields come first.
      tasks: of the dataset.
      records: of the attempts of `proof_jobs`.
      faults: of task folders that could not be read; each is a task that fails.
    """
    by_task: dict[str, list[Record]] = {task.name: [] for task in tasks}
    for record in records:
        by_task[record["task"]].append(record)
    verdicts = [judge(name, found) for name, found in by_task.items()]
    verdicts += [_unreadable(fault) for fault in faults]
    return {
        **identity,
        "valid": all(verdict["ok"] for verdict in verdicts),
        "sound": sum(verdict["ok"] for verdict in verdicts),
        "total": len(verdicts),
        "flaky": sum(verdict["flaky"] for verdict in verdicts),
        "runs": len(records),
        "tasks": verdicts,
    }


def _unreadable(fault: TaskError) -> dict[str, Any]:
    """Return the verdict on a task that could not be read."""
    return {
        "task": str(fault.file),
        "ok": False,
        "flaky": False,
        "reasons": [str(fault)],
        "rewards": {},
        "oracle_seconds": None,
    }


def write_proof(out: pathlib.Path, proof: Mapping[str, Any]) -> None:
    """Write OUT/validation.json, validation.md and validation.html."""
    write_atomically(out / "validation.json", json.dumps(proof, indent=1, allow_nan=False) + "\n")
    write_pages(out, "validation", f"Validation of {proof['dataset']}", proof_tables(proof))


def proof_tables(proof: Mapping[str, Any]) -> list[Table]:
    """Return the tables of a validation's pages."""
    failed = []
    rows = []
    for verdict in proof["tasks"]:
        failed += [[verdict["task"], reason] for reason in verdict["reasons"]]
        row = [verdict["task"], "yes" if verdict["ok"] else "NO"]
        row += [_format_rewards(verdict["rewards"].get(agent, ())) for agent in AGENTS]
        row.append(_format_seconds(verdict["oracle_seconds"]))
        rows.append(row)
    head = ["task", "sound", "oracle", "no-op", "cheats", "attacker", "oracle's seconds"]
    return [
        Table(describe_proof(proof), ["task", "why it fails"], failed),
        Table("All tasks", head, rows),
    ]


def describe_proof(proof: Mapping[str, Any]) -> str:
    """Return the outcome of a validation on one line."""
    return (
        f"{proof['sound']} of {proof['total']} tasks are sound, {proof['flaky']} flaky,"
        f" {proof['runs']} runs"
    )


def _format_rewards(rewards: Sequence[float | None]) -> str:
    return ", ".join("spoiled" if reward is None else f"{reward:g}" for reward in rewards)


def _format_seconds(seconds: Mapping[str, float] | None) -> str:
    return f"{seconds['least']:.2f} to {seconds['most']:.2f}" if seconds else ""
