"""Proves a dataset: the reference solution earns 1 every time, doing nothing earns 0, and so does
every cheat.

A task that fails one of them measures something else than its agents: it is listed with each
reason. What the infrastructure spoiled proves nothing, so it is a reason too; a cheat that gets its
attempt masked as a fault of the infrastructure has escaped its failure.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from envs.rock import SandboxConfig
from envs.tasks.harbor import TaskError
from rome.evals.agents import Scripted
from rome.evals.cheats import CHEATS
from rome.evals.report import Table, write_pages
from rome.evals.runner import Job
from rome.evals.statistics import counted
from rome.evals.tasks import EvalTask
from rome.train.metrics import write_atomically

Record = Mapping[str, Any]


def proof_jobs(tasks: Sequence[EvalTask], config: SandboxConfig, oracle_runs: int) -> list[Job]:
    """The attempts that a proof takes: `oracle_runs` of the oracle, one no-op, one of each cheat,
    for every task.
    """
    runs = (("oracle", oracle_runs), ("noop", 1), ("cheat", len(CHEATS)))
    return [
        Job(Scripted(name, config), task, attempt)
        for task in tasks
        for name, count in runs
        for attempt in range(count)
    ]


def judge(task: str, records: Sequence[Record]) -> dict[str, Any]:
    """What the attempts prove of one task: {task, ok, reasons, flaky, rewards by agent, seconds of
    the oracle}.
    """
    by_agent: dict[str, list[Record]] = {name: [] for name in ("oracle", "noop", "cheat")}
    for record in sorted(records, key=lambda one: one["attempt"]):
        by_agent[record["agent"]].append(record)
    reasons = []
    rewards = {name: [record["reward"] for record in found] for name, found in by_agent.items()}
    seen = {record["reward"] for record in by_agent["oracle"] if counted(record)}
    for agent, found in by_agent.items():
        for record in found:
            wanted = 1.0 if agent == "oracle" else 0.0
            if record["reward"] != wanted:  # none at all where it was spoiled
                got = f"ended as {record['ending']}" + (
                    f" with reward {record['reward']:g}" if record["reward"] is not None else ""
                )
                reasons.append(
                    f"{agent} run {record['attempt'] + 1} {got} instead of earning {wanted:g}"
                    + (f" ({record['note']})" if record["note"] else "")
                )
    if flaky := len(seen) > 1:
        reasons.insert(
            0,
            "flaky: the same solution earned"
            f" {' and '.join(f'{reward:g}' for reward in sorted(seen))}",
        )
    seconds = [record["seconds"] for record in by_agent["oracle"]]
    return {
        "task": task,
        "ok": not reasons,
        "flaky": flaky,
        "reasons": reasons,
        "rewards": rewards,
        "oracle_seconds": {"least": min(seconds), "most": max(seconds)} if seconds else None,
    }


def build_proof(
    identity: Mapping[str, Any],
    tasks: Sequence[EvalTask],
    records: Sequence[Record],
    faults: Sequence[TaskError],
) -> dict[str, Any]:
    """validation.json. `faults`: task folders that could not be read; each is a task that fails."""
    found: dict[str, list[Record]] = {task.name: [] for task in tasks}
    for record in records:
        found[record["task"]].append(record)
    verdicts = [judge(name, of_task) for name, of_task in found.items()]
    verdicts += [
        {
            "task": str(fault.file),
            "ok": False,
            "flaky": False,
            "reasons": [str(fault)],
            "rewards": {},
            "oracle_seconds": None,
        }
        for fault in faults
    ]
    return {
        **identity,
        "valid": all(verdict["ok"] for verdict in verdicts),
        "sound": sum(verdict["ok"] for verdict in verdicts),
        "total": len(verdicts),
        "flaky": sum(verdict["flaky"] for verdict in verdicts),
        "runs": len(records),
        "tasks": verdicts,
    }


def write_proof(out: pathlib.Path, proof: Mapping[str, Any]) -> None:
    """OUT/validation.json, validation.md and validation.html."""
    write_atomically(out / "validation.json", json.dumps(proof, indent=1, allow_nan=False) + "\n")
    write_pages(out, "validation", f"Validation of {proof['dataset']}", proof_tables(proof))


def proof_tables(proof: Mapping[str, Any]) -> list[Table]:
    def rewards(verdict: Mapping[str, Any], agent: str) -> str:
        return ", ".join(
            "spoiled" if reward is None else f"{reward:g}"
            for reward in verdict["rewards"].get(agent, ())
        )

    failed = [
        [verdict["task"], reason] for verdict in proof["tasks"] for reason in verdict["reasons"]
    ]
    rows = [
        [
            verdict["task"],
            "yes" if verdict["ok"] else "NO",
            *(rewards(verdict, agent) for agent in ("oracle", "noop", "cheat")),
            (
                "{least:.2f} to {most:.2f}".format(**verdict["oracle_seconds"])
                if verdict["oracle_seconds"]
                else ""
            ),
        ]
        for verdict in proof["tasks"]
    ]
    return [
        (
            (
                f"{proof['sound']} of {proof['total']} tasks are sound, {proof['flaky']} flaky,"
                f" {proof['runs']} runs"
            ),
            ["task", "why it fails"],
            failed,
        ),
        ("All tasks", ["task", "sound", "oracle", "no-op", "cheats", "oracle's seconds"], rows),
    ]
