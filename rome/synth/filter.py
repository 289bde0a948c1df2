"""The four-stage filter of trajectories: heuristic, judge, execution, expert; each a gate.

OUT/run.json           dataset, judge and re-runs; a run with others is refused
OUT/verdicts.jsonl     one record for each trajectory: its verdicts by stage, kept for good
OUT/kept.txt           the files that passed
OUT/review.html        the queue of an expert: doubtful ones, and a sample of the others
OUT/decisions.jsonl    what the expert decided; written by that page, read by the next run
OUT/funnel.json        how many each stage removed
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from envs.gem.episode import PlayedEnv
from envs.rock import SandboxConfig
from envs.sources import Task, load_tasks
from rome.agent.endpoint import ChatEndpoint
from rome.data.trajectory import from_atif
from rome.evals.agents import Outcome, StartedEnv, play_in_environment
from rome.files import append_line, read_json, write_atomically
from rome.synth.claim import claim_folder
from rome.synth.expert import (
    choose_queue,
    decision_on,
    expert_verdict,
    read_reviews,
    write_queue,
)
from rome.synth.explore import SetAside
from rome.synth.filter_rules import Judge, calibrate, heuristic, model_judge, rule_judge
from rome.synth.funnel import make_funnel
from rome.synth.verdicts import Item, Verdict

REPLAY_SECONDS = 300.0
MAX_TRAJECTORY_BYTES = 64 << 20
MAX_TRIES = 2  # of a re-run that the infrastructure spoiled
_VOLATILE = re.compile(
    r"\S*\d\S*|\b(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun|Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)\b"
)


async def filter_folder(
    folder: pathlib.Path,
    dataset: str,
    out: pathlib.Path,
    config: SandboxConfig,
    *,
    runs: int = 2,
    concurrency: int = 2,
    chat: ChatEndpoint | None = None,
    labels: pathlib.Path | None = None,
) -> dict[str, Any]:
    """Filter all trajectories of a folder, and return the content of OUT/funnel.json.

    Args:
      folder: of ATIF files; those that cannot be read are set aside with a reason.
      dataset: of their tasks, as `load_tasks` takes it.
      out: folder of the results. A run that was cut off goes on there.
      config: of the sandboxes.
      runs: of each trajectory; one that fails in any of them is flaky, or was never right.
      concurrency: sandboxes at once.
      chat: the judge's model; None for the rules.
      labels: file of decisions (`expert.read_reviews`) on some of the trajectories, on which the
        judge's threshold is calibrated; None for a threshold of 0.5.

    Raises:
      ValueError: OUT belongs to another run, or the labels are not of both kinds.
    """
    tasks = {task.name: task for task in load_tasks(dataset)}
    items, aside = read_items(folder, tasks)
    judge = rule_judge if chat is None else model_judge(chat)
    # Verdicts of another judge must not be used again.
    claimed = {
        "dataset": dataset,
        "judge": "rules" if chat is None else chat.model,
        "labels": "" if labels is None else _digest(labels),
        "runs": runs,
    }
    claim_folder(out, claimed)
    if labels is not None:
        judge = await _calibrated(judge, items, labels, out)
    await run_filter(items, tasks, out, config, judge, runs=runs, concurrency=concurrency)
    write_atomically(
        out / "set_aside.jsonl", "".join(json.dumps(one.to_json()) + "\n" for one in aside)
    )
    kept = [item.id for item in items if not item.rejected_by]
    write_atomically(out / "kept.txt", "".join(f"{folder / name}\n" for name in kept))
    funnel = make_funnel(items, len(aside))
    write_atomically(out / "funnel.json", json.dumps(funnel, indent=1) + "\n")
    return funnel


def _digest(path: pathlib.Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


async def _calibrated(
    judge: Judge, items: Sequence[Item], labels: pathlib.Path, out: pathlib.Path
) -> Judge:
    """Return the judge with the threshold that tells the labelled items apart best."""
    decisions = read_reviews(labels)
    scores: dict[str, Verdict] = {}
    for item in items:
        if decision_on(item, decisions):
            scores[item.id] = await judge(item)
    labelled = [(decisions[name].accepted, verdict.score) for name, verdict in scores.items()]
    found = calibrate(labelled)
    write_atomically(out / "calibration.json", json.dumps(found, indent=1) + "\n")

    async def calibrated(item: Item) -> Verdict:
        verdict = scores.get(item.id) or await judge(item)
        return dataclasses.replace(verdict, accepted=verdict.score >= found["threshold"])

    return calibrated


def read_items(folder: pathlib.Path, tasks: dict[str, Task]) -> tuple[list[Item], list[SetAside]]:
    """Return the trajectories of a folder, and the files that hold none."""
    items, aside = [], []
    for path in sorted(folder.rglob("*.json")):
        name = path.relative_to(folder).as_posix()
        try:
            if not _is_line(name):
                raise ValueError("its name is not one line of UTF-8, as kept.txt has it")
            if not path.is_file() or path.stat().st_size > MAX_TRAJECTORY_BYTES:
                raise ValueError(f"no regular file of at most {MAX_TRAJECTORY_BYTES} bytes")
            trajectory = from_atif(read_json(path, "It is left out."))
        except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
            aside.append(SetAside(str(path), 0, str(error)))
            continue
        task = tasks.get(trajectory.task)
        if task is None:
            reason = f"its task {trajectory.task!r} is not in the data set"
            aside.append(SetAside(str(path), 0, reason))
            continue
        items.append(Item(name, trajectory, task.instruction))
    return items, aside


def _is_line(name: str) -> bool:
    """Return whether a name can be written as a line of its own."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return name.splitlines() == [name]


async def run_filter(
    items: Sequence[Item],
    tasks: dict[str, Task],
    out: pathlib.Path,
    config: SandboxConfig,
    judge: Judge,
    *,
    runs: int,
    concurrency: int,
    every_stage: bool = False,
) -> None:
    """Give each item the verdicts of the stages, until one rejects it.

    Args:
      items: get their verdicts in place.
      tasks: by name.
      out: folder; verdicts that are there already are used again.
      config: of the sandboxes.
      judge: the second stage.
      runs: of the third stage.
      concurrency: items at once.
      every_stage: give all verdicts, also after a rejection: for ablations.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "verdicts.jsonl"
    known = _read_verdicts(path)
    gate = asyncio.Semaphore(concurrency)

    async def work(item: Item) -> None:
        item.verdicts = dict(known.get((item.id, item.digest), {}))
        async with gate:
            is_new = False
            for stage in ("heuristic", "judge", "execution"):
                if stage not in item.verdicts and (every_stage or not item.rejected_by):
                    item.verdicts[stage] = await _verdict(stage, item)
                    is_new = True
            if is_new:
                append_line(path, json.dumps(item.to_json()))

    async def _verdict(stage: str, item: Item) -> Verdict:
        if stage == "heuristic":
            return heuristic(item)
        if stage == "judge":
            return await judge(item)
        return await execute(item, tasks[item.trajectory.task], config, runs)

    async with asyncio.TaskGroup() as group:
        for item in items:
            group.create_task(work(item))
    decisions = read_reviews(out / "decisions.jsonl")
    queue = choose_queue(items)
    write_queue(out / "review.html", queue)
    for item in items:
        item.verdicts["expert"] = expert_verdict(item, queue, decisions)


def _read_verdicts(path: pathlib.Path) -> dict[tuple[str, str], dict[str, Verdict]]:
    """Return the verdicts of an earlier run by (id, digest), without a line that was cut off.

    A stage that a fault of the machine or of an endpoint kept from an opinion is asked again.
    """
    found: dict[tuple[str, str], dict[str, Verdict]] = {}
    text = path.read_text(errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            record = json.loads(line)
            found[record["id"], record["digest"]] = {
                stage: Verdict(**{**fields, "reasons": tuple(fields["reasons"])})
                for stage, fields in record["verdicts"].items()
                if stage != "expert"
                and fields["accepted"] is not None
                and not fields.get("is_stopgap")
            }
        except (ValueError, LookupError, TypeError, AttributeError):
            continue
    return found


# -- the third stage
# -------------------------------------------------------------------------------------------------


async def execute(item: Item, task: Task, config: SandboxConfig, runs: int) -> Verdict:
    """Return the verdict of re-running a trajectory's turns in fresh sandboxes.

    A run that the infrastructure spoils is tried again; if it stays spoiled there is no opinion.
    Two runs or more also say which answers of the record are not what the commands print.
    """
    answers: list[list[str]] = []
    for number in range(runs):
        outcome, shown = await _replay(item, task, config)
        for _ in range(MAX_TRIES - 1):
            if outcome.spoiled:
                outcome, shown = await _replay(item, task, config)
        answers.append(shown)
        if outcome.spoiled or outcome.reward is None:
            return Verdict("execution", None, 0.5, (f"run {number + 1}: {outcome.note}",))
        if outcome.reward < task.success:
            reason = f"run {number + 1} of {runs} earned {outcome.reward:g} ({outcome.ending})"
            return Verdict("execution", False, number / runs, (reason,))
    recorded = [chunk.observation for chunk in item.trajectory.chunks]
    if wrong := differing_turns(recorded, answers):
        turn = wrong[0]
        reason = f"turn {turn + 1} printed {answers[0][turn][:60]!r}, not {recorded[turn][:60]!r}"
        return Verdict("execution", False, 0.0, (reason,))
    return Verdict("execution", True, 1.0)


def differing_turns(recorded: Sequence[str], runs: Sequence[Sequence[str]]) -> list[int]:
    """Return the turns that were answered otherwise in all runs, and alike in these.

    Words with a digit, months and days count as equal, since times and hashes change from run to
    run. A record in which most turns differ was written in another form, and says nothing.

    Args:
      recorded: the answer to each turn.
      runs: the answers of two runs or more; fewer say nothing.
    """
    if len(runs) < 2:
        return []
    turns = min(len(recorded), *(len(shown) for shown in runs))
    found = []
    for turn in range(turns):
        printed = {_lasting(shown[turn]) for shown in runs}
        if len(printed) == 1 and _lasting(recorded[turn]) not in printed:
            found.append(turn)
    return found if len(found) <= turns / 2 else []


def _lasting(answer: str) -> str:
    return " ".join(_VOLATILE.sub("0", answer).split())


async def _replay(item: Item, task: Task, config: SandboxConfig) -> tuple[Outcome, list[str]]:
    """Play the turns of a trajectory in a new environment, whatever is observed.

    Returns:
      How it ended, and what was observed after each turn.
    """
    shown: list[str] = []

    async def play(started: StartedEnv) -> Outcome:
        played = PlayedEnv(started, REPLAY_SECONDS, task.start_seconds)
        await played.start()
        played.hand_over()
        for chunk in item.trajectory.chunks:
            turn = await played.step(chunk.text)
            shown.append(turn.observation)
            if turn.ending:
                return started.outcome(played.reward, turn.ending, turn.note)
        turn = await played.judge("truncated_turns", "the transcript ends before the episode")
        return started.outcome(played.reward, turn.ending, turn.note)

    return await play_in_environment(task, config, play), shown
