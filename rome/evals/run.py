"""The three jobs of an evaluation: play a dataset, prove it, or search a corpus for it.

    from envs.rock import SandboxConfig
    from rome.evals.agents import Scripted
    from rome.evals.run import evaluate

    results = await evaluate("harbor", Scripted("oracle", SandboxConfig()), "out")
    print(results["pass_at_1"], results["intervals"]["pass_at_1"])

The command for all three is `python -m launch.eval`.
"""

from __future__ import annotations

import collections
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from envs.rock import SandboxConfig
from envs.sources import Task, dataset_digest, load_tasks
from envs.tasks.harbor import TaskError
from rome.evals.agents import Agent
from rome.evals.contamination import find_contamination, write_contamination
from rome.evals.report import Table, bounds, build_results, share, write_results
from rome.evals.runner import Job, Record, Results, open_results, run_jobs
from rome.evals.safety import safety_tables, summarise_safety
from rome.evals.validate import build_proof, describe_proof, proof_jobs, write_proof

ORACLE_RUNS = 3  # of a validation: several find flaky tasks
MAX_SHOWN = 20  # lines about tasks that are left out
PROGRESS_SECONDS = 10.0  # between two lines of progress


async def evaluate(
    dataset: str,
    agent: Agent,
    out: str | os.PathLike[str],
    *,
    attempts: int = 1,
    concurrency: int = 4,
    seed: int = 0,
    tasks: Sequence[Task] | None = None,
    faults: Sequence[TaskError] = (),
    settings: Mapping[str, Any] | None = None,
    on_finish: Callable[[Record], None] | None = None,
) -> dict[str, Any]:
    """Play an agent on a dataset, and write results.json, report.md and report.html.

    A task that cannot be read, or that cannot be played here, is left out and named in the report.

    An evaluation that was interrupted is continued by the same call: attempts that are recorded in
    `out` are not played again, except those that the infrastructure spoiled.

    Args:
      dataset: name, folder or file, as `envs.sources.load_tasks` takes it.
      agent: closed at the end.
      out: folder of the results; it belongs to this evaluation.
      attempts: at each task (the k of pass@k).
      concurrency: attempts at once, each in a sandbox of its own.
      seed: of sampling, and of the instances of generated datasets.
      tasks: of the dataset, where they are loaded already.
      faults: of tasks that could not be read (`load_tasks(..., faults=[])`).
      settings: everything else that makes the evaluation this one, such as a checkpoint or a
        temperature, as JSON values; recorded, and compared when `out` is used again.
      on_finish: called with the record of each attempt that ends, such as a `Progress`.

    Returns:
      The content of results.json: metrics with 95 % intervals (`rome.evals.statistics.summarise`),
      groups, cost, "left_out" with the reason for each task, and every attempt under "tasks".

    Raises:
      EvalError: `out` belongs to another evaluation, or another process works there.
      TaskError, ValueError: the dataset cannot be read.
    """
    out = pathlib.Path(out)
    if tasks is None:
        found: list[TaskError] = []
        tasks = load_tasks(dataset, seed, found)
        faults = [*faults, *found]
    identity = make_identity(dataset, tasks, agent.name, seed, settings)
    jobs = [Job(agent, task, attempt) for task in tasks for attempt in range(attempts)]
    with open_results(out, identity) as results:
        try:
            await run_jobs(jobs, results, concurrency=concurrency, seed=seed, on_finish=on_finish)
        finally:  # also if it was interrupted: the report then covers what was played
            await agent.close()
            report = _write_report(out, identity, jobs, results, attempts, faults)
    return report


def _write_report(
    out: pathlib.Path,
    identity: Mapping[str, Any],
    jobs: Sequence[Job],
    results: Results,
    k: int,
    faults: Sequence[TaskError],
) -> dict[str, Any]:
    """Write the report on what was played, which may not be all, and return its content."""
    records = results.find(jobs)
    is_complete = len(records) == len(jobs)
    report = build_results({**identity, "complete": is_complete}, records, k, faults)
    more: list[Table] = []
    if (summary := summarise_safety(records)) is not None:
        report["safety"] = summary
        more = safety_tables(summary)
    write_results(out, report, more)
    return report


async def validate(
    dataset: str,
    config: SandboxConfig,
    out: str | os.PathLike[str],
    *,
    oracle_runs: int = ORACLE_RUNS,
    concurrency: int = 4,
    seed: int = 0,
    tasks: Sequence[Task],
    faults: Sequence[TaskError] = (),
    settings: Mapping[str, Any] | None = None,
    on_finish: Callable[[Record], None] | None = None,
) -> dict[str, Any]:
    """Prove a dataset, and write validation.json, validation.md and validation.html.

    A task is sound if its reference solution earns 1 every time, and doing nothing and every cheat
    earn 0.

    Args:
      dataset: its name, for the report.
      config: of the sandboxes.
      out: folder of the results, as for `evaluate`.
      oracle_runs: attempts of the reference solution at each task.
      concurrency: attempts at once.
      seed: of the instances of generated datasets.
      tasks: of the dataset.
      faults: of task folders that could not be read (`load_tasks(..., faults=[])`).
      settings: as for `evaluate`.
      on_finish: as for `evaluate`.

    Returns:
      The content of validation.json; "valid" says whether all tasks are sound.
    """
    out = pathlib.Path(out)
    identity = make_identity(dataset, tasks, "validate", seed, settings)
    jobs = proof_jobs(tasks, config, oracle_runs)
    with open_results(out, identity) as results:
        await run_jobs(jobs, results, concurrency=concurrency, seed=seed, on_finish=on_finish)
        proof = build_proof(identity, tasks, results.find(jobs), faults)
        write_proof(out, proof)
    return proof


def decontaminate(
    dataset: str,
    tasks: Sequence[Task],
    corpus: str | os.PathLike[str],
    out: str | os.PathLike[str],
) -> dict[str, Any]:
    """Search a text corpus for the tasks of a dataset, and write contamination.json and pages.

    Args:
      dataset: its name, for the report.
      tasks: of the dataset.
      corpus: folder of text files.
      out: folder of the results.

    Returns:
      What was found (`rome.evals.contamination.find_contamination`), under "hits".
    """
    found = find_contamination(tasks, pathlib.Path(corpus))
    write_contamination(pathlib.Path(out), dataset, found)
    return found


def make_identity(
    dataset: str,
    tasks: Sequence[Task],
    agent: str,
    seed: int,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what identifies an evaluation; results of different ones are never mixed."""
    return {
        "dataset": dataset,
        "dataset_digest": dataset_digest(tasks),
        "agent": agent,
        "seed": seed,
        **(settings or {}),
    }


# -- what is shown
# -------------------------------------------------------------------------------------------------


class Progress:
    """Counts attempts as they end, and prints a line to stderr every PROGRESS_SECONDS.

    Attributes:
      done: number of attempts that have ended.
    """

    def __init__(self) -> None:
        self.done = 0
        self._began = time.monotonic()
        self._shown = self._began
        self._endings: collections.Counter[str] = collections.Counter()

    def __call__(self, record: Record) -> None:
        self.done += 1
        self._endings[record["ending"]] += 1
        now = time.monotonic()
        if now - self._shown > PROGRESS_SECONDS:
            self._shown = now
            counts = ", ".join(f"{name} {count}" for name, count in sorted(self._endings.items()))
            line = f"{self.done} attempts in {now - self._began:.0f} s: {counts}"
            print(line, file=sys.stderr, flush=True)

    def summary(self, total: int) -> str:
        """Return how many of `total` attempts were played, and how many were recorded before."""
        seconds = time.monotonic() - self._began
        already = total - self.done
        return f"{self.done} attempts played in {seconds:.1f} s, {already} were there already"


def describe_results(results: Mapping[str, Any]) -> str:
    """Return the outcome of an evaluation on one line."""
    k = results["k"]
    metrics = {"pass_at_1": "pass@1"}
    if k > 1:
        metrics["pass_at_k"] = f"pass@{k}"
    shown = []
    for name, label in metrics.items():
        text = f"{label} none"
        if results[name] is not None:
            text = f"{label} {share(results[name])} ({bounds(results['intervals'][name])})"
        shown.append(text)
    endings = ", ".join(f"{name} {count}" for name, count in results["by_ending"].items())
    text = (
        f"{results['agent']} on {results['dataset']}: {', '.join(shown)};"
        f" {results['attempts_counted']} of {results['attempts']} attempts count; endings:"
        f" {endings or 'none'}"
    )
    if results.get("safety"):
        for name in ("attack_success", "utility_under_attack", "utility_without_attack"):
            if (one := results["safety"]["measures"].get(name)) is not None:
                text += f"; {name.replace('_', ' ')} {share(one['value'])} ({bounds(one)})"
    if results["left_out"]:
        text += f"; {len(results['left_out'])} tasks are left out"
    return text


def describe_left_out(left_out: Sequence[Mapping[str, str]]) -> list[str]:
    """Return a line for each task that is left out, at most MAX_SHOWN of them."""
    lines = [f"left out: {one['task']}: {one['reason']}" for one in left_out[:MAX_SHOWN]]
    if len(left_out) > MAX_SHOWN:
        lines.append(f"left out: {len(left_out) - MAX_SHOWN} more, see results.json")
    return lines


def describe_validation(proof: Mapping[str, Any]) -> list[str]:
    """Return the reasons against each task, and the outcome of a validation, as lines."""
    lines = []
    for verdict in proof["tasks"]:
        lines += [f"{verdict['task']}: {reason}" for reason in verdict["reasons"]]
    return [*lines, describe_proof(proof)]


def describe_contamination(found: Mapping[str, Any], num_tasks: int) -> list[str]:
    """Return the tasks that were found in a corpus, and a summary, as lines."""
    lines = []
    for hit in found["hits"]:
        canaries = f", canary {', '.join(hit['canaries'])}" if hit["canaries"] else ""
        place = hit["places"][0]
        percent = f"{100 * hit['share']:.0f} %"
        where = f"{place['file']}:{place['line']}"
        lines.append(f"{hit['task']}: {percent} of its word runs{canaries}; {where}")
    summary = (
        f"{len(found['hits']) or 'none'} of {num_tasks} tasks found in {found['files']} files of"
        f" {found['words']:,} words; {len(found['unchecked'])} are too short to check"
    )
    if found["unreadable"]:
        summary += (
            f"; {len(found['unreadable'])} files were not searched, such as"
            f" {found['unreadable'][0]}"
        )
    return [*lines, summary]
