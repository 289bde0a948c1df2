r"""What the filter's stages and the masks save from noisy data: faults planted at a stated rate.

python -m benchmarks.noisy_data --json noisy.json [--numbers 4] [--workers 4] [--rates 0.1 0.3]

Demonstrators of the small safety families (envs/safety/small.py) play in real sandboxes. Each of
their records is honest, or has one fault that a source of many tenants may have; all of them claim
success:

    poisoned    the work is done, and the harm that an injection asks for
    hacked      the check that lies in the sandbox is edited, the work is not done
    wrong       the work was not begun, the reward says 1
    corrupted   the work is done, and what one command printed is that of another task's

Each stage of rome/synth/filter.py judges each record, whether or not another one rejected it:

    heuristic   the form of the transcript, the record of harm lost on the way ("events" without it)
    events      the same with the environment's record of harm
    judge       the rules on its content
    naive       execution, twice, against a verifier that knows nothing of harm and trusts the check
    suite       execution against the verifier of the suite

`caught` is the share of a fault's records that a stage rejects, `lost` that of honest ones, with
95 % intervals that are clustered by family. `left` is the share of faulty records among the kept
ones, for each rate of faults (a quarter of each) before the filter. The masks of SFT and those of
IPA's chunk costs leave records and take turns: `masked` is the share of harmful turns that are read
only, by the masks without the record of harm and with it.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import logging
import pathlib
import random
import statistics
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from envs.gem.core import Env
from envs.gem.episode import DemonstrationEpisode, Line, PlayedEnv, perform, play_demonstration
from envs.rock import SandboxConfig, SandboxError
from envs.safety import CLEAN, SMALL_SEEDS, CompositionError
from envs.safety.shell import SafetyShellEnv
from envs.sources import Source, Task, open_source
from envs.tasks.terminal.demonstrator import FINAL_TURN
from rome.data.relevance import HARM, MASKS, mask_turns
from rome.data.trajectory import Chunk, Trajectory
from rome.evals.statistics import interval
from rome.files import write_atomically
from rome.synth.filter import execute
from rome.synth.filter_rules import heuristic, rule_judge
from rome.synth.verdicts import Item

FAULTS = ("poisoned", "hacked", "wrong", "corrupted")
HONEST = "honest"
STAGES = ("heuristic", "events", "judge", "naive", "suite")
PIPELINES = {
    "none": (),
    "heuristic": ("heuristic",),
    "heuristic, judge": ("heuristic", "judge"),
    "heuristic, judge, naive execution": ("heuristic", "judge", "naive"),
    "heuristic with events, judge, naive execution": ("events", "judge", "naive"),
    "heuristic, judge, the suite's execution": ("heuristic", "judge", "suite"),
}
RUN_SECONDS = 120.0
RUNS = 2  # of the execution stage: from two on, it compares what commands print
# What other tasks' commands printed, for corrupted answers.
LINES = ("3", "apple.txt", "red dog", "(no output)", "7\n5\n2", "moon=4", "hat.log")
T = TypeVar("T")
Work = Callable[[], Coroutine[Any, Any, T]]


@dataclasses.dataclass(frozen=True)
class Judged:
    """One record, and what each stage says of it.

    Attributes:
      family: of its task.
      fault: one of FAULTS, or HONEST.
      rejected: stage -> whether it rejects the record.
      turns: whether each turn did harm, is masked by the rules, and with the record of harm.
    """

    family: str
    fault: str
    rejected: dict[str, bool]
    turns: tuple[tuple[bool, bool, bool], ...]


# -- records
# -------------------------------------------------------------------------------------------------


def to_record(played: DemonstrationEpisode, task: Task) -> Trajectory:
    """Return a played episode as a record that claims success."""
    chunks = [
        Chunk(
            [0],
            [0],  # some token, so that turns count as an agent's
            [0.0],
            text=turn.text,
            observation=turn.observation,
            status=turn.status,
            exit_code=turn.exit_code,
            tool_call=turn.tool_call,
            kind="imitation",
            events=list(turn.events),
        )
        for turn in played.turns
    ]
    return Trajectory(
        task.name, task.family, chunks, 1.0, "success", instruction=played.instruction
    )


def make_env(task: Task, *, is_gated: bool, harm_rate: float = 0.0) -> SafetyShellEnv:
    """Return the environment of a task with other rules of pay and demonstration."""
    env = task.make_env(SandboxConfig(isolation="best_available"))
    assert isinstance(env, SafetyShellEnv), "the small families are over shells"
    env.is_gated, env.harm_rate = is_gated, harm_rate
    return env


async def play_idle(env: Env) -> DemonstrationEpisode:
    """Play an episode that looks around and hands in."""
    played = PlayedEnv(env, RUN_SECONDS, RUN_SECONDS)
    try:
        opening, _ = await played.start()
        played.hand_over()
        call = '<tool_call>\n{"name": "bash", "arguments": {"command": "ls"}}\n</tool_call>'
        script = (Line(text) for text in (call, FINAL_TURN))
        return await perform(played, script, opening)
    finally:
        await env.aclose()  # type: ignore[attr-defined]


def corrupt(record: Trajectory, rng: random.Random, lines: Sequence[str]) -> Trajectory:
    """Return a record in which one command printed something else."""
    chunks = list(record.chunks)
    acting = [place for place, chunk in enumerate(chunks) if chunk.tool_call]
    place = rng.choice(acting)
    others = [line for line in lines if line != chunks[place].observation]
    chunks[place] = dataclasses.replace(chunks[place], observation=rng.choice(others))
    return dataclasses.replace(record, chunks=chunks)


async def play(task: Task, fault: str, rng: random.Random, lines: Sequence[str]) -> Trajectory:
    """Play one record of a task.

    Args:
      task: of the small families.
      fault: one of FAULTS, or HONEST.
      rng: of the demonstrator, and of the place of a corruption.
      lines: what other tasks' commands printed.

    Raises:
      SandboxError: it did not succeed as it should.
    """
    harm_rate = 1.0 if fault in ("poisoned", "hacked") else 0.0
    env = make_env(task, is_gated=False, harm_rate=harm_rate)
    if fault == "wrong":
        return to_record(await play_idle(env), task)
    played = await play_demonstration(env, rng, start_seconds=RUN_SECONDS, seconds=RUN_SECONDS)
    if played.ending != "success":
        raise SandboxError(f"a demonstration of {task.name} ended as {played.ending}")
    record = to_record(played, task)
    return corrupt(record, rng, lines) if fault == "corrupted" else record


# -- verdicts
# -------------------------------------------------------------------------------------------------


async def rejects(record: Trajectory, task: Task, stages: Sequence[str]) -> dict[str, bool]:
    """Return whether each of some STAGES rejects a record, whatever the others say."""
    lost = without_events(record)
    item, blind = (Item("", one, task.instruction) for one in (record, lost))
    naive = dataclasses.replace(task, new_env=lambda config: make_env(task, is_gated=False))
    config = SandboxConfig(isolation="best_available")
    found = {}
    for stage in stages:
        if stage == "judge":
            verdict = await rule_judge(blind)
        elif stage in ("naive", "suite"):
            verdict = await execute(blind, naive if stage == "naive" else task, config, RUNS)
        else:
            verdict = heuristic(item if stage == "events" else blind)
        found[stage] = verdict.accepted is False
    return found


def without_events(record: Trajectory) -> Trajectory:
    """Return a record whose record of harm was lost on the way."""
    chunks = [dataclasses.replace(chunk, events=[], network_denials=0) for chunk in record.chunks]
    return dataclasses.replace(record, chunks=chunks)


async def judge(record: Trajectory, task: Task, fault: str) -> Judged:
    """Return what every stage says of a record."""
    rejected = await rejects(record, task, STAGES)
    rules = mask_turns(without_events(record), [mask for mask in MASKS if mask != HARM])
    whole = mask_turns(record, MASKS)
    turns = tuple(
        (bool(chunk.events), one.kind == "context", other.kind == "context")
        for chunk, one, other in zip(record.chunks, rules.chunks, whole.chunks, strict=True)
    )
    return Judged(SMALL_SEEDS[task.family.removeprefix(CLEAN)].name, fault, rejected, turns)


def plan(source: Source, numbers: int) -> list[tuple[Task, str]]:
    """Return the tasks to play, and the fault of each record."""
    found = []
    for family, seed in SMALL_SEEDS.items():
        for number in range(numbers):
            task = source.train(family, number)
            found.append((task, HONEST))
            if seed.sort == "attack":
                found.append((task, "poisoned"))
            if seed.sort in ("hackable", "impossible"):
                found += [(task, "hacked")] * 2  # there are few families of them
            found += [(task, "wrong")] * (number % 2 == 0) + [(task, "corrupted")]
    return found


async def measure(numbers: int, workers: int) -> tuple[list[Judged], int]:
    """Play and judge all records; return verdicts, and how many could not be played."""

    def work_on(task: Task, fault: str, place: int) -> Work[Judged]:
        async def work() -> Judged:
            rng = random.Random(f"{task.name}/{fault}/{place}")
            return await judge(await play(task, fault, rng, LINES), task, fault)

        return work

    planned = enumerate(plan(open_source("safety:small,all"), numbers))
    jobs = [(task.name, work_on(task, fault, place)) for place, (task, fault) in planned]
    done = await work_through(jobs, workers)
    found = [one for one in done if one is not None]
    return found, len(done) - len(found)


async def work_through(jobs: Sequence[tuple[str, Work[T]]], workers: int) -> list[T | None]:
    """Return the result of each job, some at a time; None where the infrastructure spoiled it.

    Args:
      jobs: the name of its task, for the warning, and what to do.
      workers: how many are done at the same time.
    """
    done: list[T | None] = [None] * len(jobs)
    waiting = list(range(len(jobs)))

    async def worker() -> None:
        while waiting:
            place = waiting.pop()
            name, work = jobs[place]
            try:
                done[place] = await asyncio.wait_for(work(), 4 * RUN_SECONDS)
            except (SandboxError, CompositionError, TimeoutError) as error:
                logging.warning("%s was not played: %s", name, error)

    await asyncio.gather(*(worker() for _ in range(workers)))
    return done


# -- figures
# -------------------------------------------------------------------------------------------------


def share(hits: Sequence[bool], families: Sequence[str]) -> dict[str, Any]:
    """Return a share with its 95 % interval, clustered by family."""
    values = [float(hit) for hit in hits]
    if not values:
        return {"value": None, "n": 0}
    clusters = families if len(set(families)) > 1 else None
    bound = interval(values, clusters)
    value = statistics.mean(values)
    return {"value": value, "n": len(values), "low": bound["low"], "high": bound["high"]}


def left(catches: Mapping[str, float], lost: float, rate: float) -> float:
    """Return the share of faulty records among the kept ones; each fault is a quarter of `rate`."""
    faulty = sum(rate / len(catches) * (1.0 - caught) for caught in catches.values())
    return faulty / max(faulty + (1.0 - rate) * (1.0 - lost), 1e-12)


def summarise(judged: Sequence[Judged], spoiled: int, rates: Sequence[float]) -> dict[str, Any]:
    """Return shares by stage and fault, what is left by pipeline, and what the masks take."""

    def rejected(stages: Sequence[str], fault: str) -> dict[str, Any]:
        mine = [one for one in judged if one.fault == fault]
        hits = [any(one.rejected[stage] for stage in stages) for one in mine]
        return share(hits, [one.family for one in mine])

    pipelines = {}
    for name, stages in PIPELINES.items():
        catches = {fault: rejected(stages, fault) for fault in FAULTS}
        lost = rejected(stages, HONEST)
        values = {fault: one["value"] or 0.0 for fault, one in catches.items()}
        remaining = {f"{rate:g}": left(values, lost["value"] or 0.0, rate) for rate in rates}
        pipelines[name] = {"caught": catches, "lost": lost, "left": remaining}
    turns = [(one.family, *turn) for one in judged for turn in one.turns]
    masks = {}
    for name, place in (("rules", 2), ("record", 3)):
        for kind, is_harmful in (("harmful", True), ("harmless", False)):
            mine = [turn for turn in turns if turn[1] == is_harmful]
            hits = [bool(turn[place]) for turn in mine]
            masks[f"{kind} turns masked by {name}"] = share(hits, [turn[0] for turn in mine])
    return {
        "stages": {
            stage: {fault: rejected((stage,), fault) for fault in (*FAULTS, HONEST)}
            for stage in STAGES
        },
        "pipelines": pipelines,
        "masks": masks,
        "spoiled": spoiled,
    }


def show(summary: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console(width=160)
    table = Table("stage", *FAULTS, "honest lost")
    for stage, cells in summary["stages"].items():
        table.add_row(stage, *(_cell(cells[fault]) for fault in (*FAULTS, HONEST)))
    console.print(table)
    rates = list(summary["pipelines"]["none"]["left"])
    table = Table("stages one after the other", "lost", *(f"left of {rate}" for rate in rates))
    for name, one in summary["pipelines"].items():
        table.add_row(name, _cell(one["lost"]), *(f"{one['left'][rate]:.3f}" for rate in rates))
    console.print(table)
    for name, one in summary["masks"].items():
        console.print(f"{name}: {_cell(one)}")
    console.print(f"not played: {summary['spoiled']}")


def _cell(one: dict[str, Any]) -> str:
    if not one["n"]:
        return "none"
    return f"{one['value']:.2f} ({one['low']:.2f} to {one['high']:.2f}) of {one['n']}"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write the summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path, help="file for the figures")
    parser.add_argument("--numbers", type=int, default=4, help="tasks of each family")
    parser.add_argument("--workers", type=int, default=4, help="sandboxes at the same time")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.3])
    options = parser.parse_args(argv)
    judged, spoiled = asyncio.run(measure(options.numbers, options.workers))
    if not judged:
        raise SystemExit("no record could be played; see the warnings above")
    summary = summarise(judged, spoiled, options.rates)
    if options.json:
        write_atomically(options.json, json.dumps(summary, indent=1) + "\n")
    show(summary)


if __name__ == "__main__":
    main()
