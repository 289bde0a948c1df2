"""From seeds to a verified set of tasks: resumable stages, and a card that counts them.

    OUT/run.json          what makes the run this one; another one in OUT is refused
    OUT/trace.jsonl       one line for each finished unit of work of an agent, with its seconds
    OUT/drafts/           what the Instance Builder made of each seed
    OUT/candidates/       task folders that go to the proof
    OUT/proof/            the proof (launch.eval --validate)
    OUT/attempts/         what the Trajectory agent played
    OUT/tasks/            the accepted tasks: a data set of Harbor folders
    OUT/card.json         yield by stage, mutation score, cost, duplicates, domains
    OUT/set_aside.jsonl   inputs that were not used: file, record, reason

A unit of work that a kill cut off is done again; one that is in the trace is not.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from envs.rock import SandboxConfig, SandboxError
from envs.sources import Task, dataset_digest, load_tasks
from envs.tasks.made import FAMILIES, Draft, Mutants, files_of, score_mutants, write_draft
from envs.tasks.made.pro import INDEX, read_index
from rome.evals.run import validate
from rome.files import append_line, read_json, write_atomically
from rome.synth.agents import AgentSpec, agent_specs
from rome.synth.build import UNUSABLE, Built, drafts_text, read_drafts
from rome.synth.card import make_card
from rome.synth.claim import claim_folder
from rome.synth.explore import Seed, SetAside, explore
from rome.synth.models import Endpoints, think_of_ideas
from rome.synth.review import MIN_MUTATION_SCORE, find_duplicates, verifier_faults
from rome.synth.trajectories import play_tasks

STAGES = ("seeds", "built", "verifier", "unique", "mutants", "proof", "band", "accepted")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run makes.

    Attributes:
      families: of generated tasks, "NAMES:N" or "all:N"; "" for none.
      packages: folders of Python packages.
      repositories: folders of git repositories.
      tools: commands whose help is read.
      count: tasks of each package, each repository and each command.
      keep: accepted tasks of each domain that are kept at most; 0 for all.
      mutants: of each oracle.
      oracle_runs: of each task; several find flaky ones.
      attempts: of the Trajectory agent at each task; 0 for none.
      band: (least, most) pass rate of an accepted task over these attempts; for models.
      licences: whether sources must hold a permissive licence.
      seed: of everything.
    """

    families: str = ""
    packages: tuple[str, ...] = ()
    repositories: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    count: int = 10
    keep: int = 0
    mutants: int = 12
    oracle_runs: int = 3
    attempts: int = 0
    band: tuple[float, float] = (0.0, 1.0)
    licences: bool = True
    seed: int = 0


@dataclasses.dataclass
class _Unit:
    """A draft on its way: the stage that it left the run at ("" while it is in), and why."""

    draft: Draft
    id: str
    left: str = ""
    reason: str = ""
    mutants: Mutants | None = None
    pass_rate: float | None = None


class Trace:
    """The lines of OUT/trace.jsonl: finished units of work by (agent, unit)."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self.lines: dict[tuple[str, str], dict[str, Any]] = {}
        text = path.read_text(errors="replace") if path.exists() else ""
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self.lines[entry["agent"], entry["unit"]] = entry
            except (ValueError, LookupError, TypeError):
                continue  # a line that a kill cut off; its unit is done again

    def done(self, agent: str, unit: str) -> dict[str, Any] | None:
        """Return the entry of a finished unit; None where a fault of the machine ended it."""
        entry = self.lines.get((agent, unit))
        return None if entry is None or entry.get("fault") else entry

    def add(
        self, agent: str, unit: str, seconds: float, fault: str = "", **result: Any
    ) -> dict[str, Any]:
        """Append a finished unit of work; it is on disk when this returns.

        Args:
          agent: its name.
          unit: of its work.
          seconds: that it took.
          fault: of the machine or the endpoint that ended it: a resumed run does it again.
          **result: of the work.
        """
        entry = {"agent": agent, "unit": unit, "seconds": round(seconds, 3), **result}
        if fault:
            entry["fault"] = fault[:300]
        append_line(self._path, json.dumps(entry))
        self.lines[agent, unit] = entry
        return entry

    def seconds(self, agent: str) -> float:
        """Return the seconds that an agent has worked."""
        return sum(entry["seconds"] for (name, _), entry in self.lines.items() if name == agent)

    def tokens(self, agent: str) -> int:
        """Return the tokens that an agent's endpoint has billed."""
        found = (entry.get("tokens", 0) for (name, _), entry in self.lines.items() if name == agent)
        return sum(found)


async def synthesise(
    settings: Settings,
    out: pathlib.Path,
    config: SandboxConfig,
    *,
    concurrency: int = 2,
    endpoints: Endpoints | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Make, prove and write a set of tasks; return the content of OUT/card.json.

    Args:
      settings: what is made.
      out: folder of the run, resumed where it is there.
      config: of the sandboxes.
      concurrency: sandboxes at once.
      endpoints: models of the agents; None where scripts and generators do their work.
      say: shows a line of progress.

    Raises:
      ClaimError: OUT belongs to a run with other settings.
      ValueError: a family is unknown.
    """
    began = time.monotonic()
    (out / "drafts").mkdir(parents=True, exist_ok=True)
    claim_folder(out, dataclasses.asdict(settings))
    specs = agent_specs(endpoints)
    trace = Trace(out / "trace.jsonl")
    seeds, aside = explore(
        settings.families,
        settings.packages,
        settings.repositories,
        settings.count,
        settings.seed,
        settings.tools,
    )
    seeds += await _ideas(endpoints, settings, trace, out)
    say(f"explore: {len(seeds)} seeds, {len(aside)} inputs set aside")
    units, reasons = await _build_all(seeds, settings, out, config, trace, specs, concurrency)
    aside += reasons
    say(f"build: {len(units)} drafts")
    _check_texts(units)
    await _score_all(units, settings, config, trace, specs, concurrency)
    say(f"review: {sum(not unit.left for unit in units)} drafts reject enough mutants")
    await _prove(units, settings, out, config, trace, concurrency)
    say(f"proof: {sum(not unit.left for unit in units)} tasks are sound")
    if settings.attempts:
        await _find_band(units, settings, out, config, trace, concurrency, endpoints)
    _keep_some(units, settings.keep)
    _write_accepted(units, out)
    write_atomically(
        out / "set_aside.jsonl", "".join(json.dumps(one.to_json()) + "\n" for one in aside)
    )
    card = make_card(settings, len(seeds), units, aside, trace, specs, time.monotonic() - began)
    write_atomically(out / "card.json", json.dumps(card, indent=1) + "\n")
    return card


async def _ideas(
    endpoints: Endpoints | None, settings: Settings, trace: Trace, out: pathlib.Path
) -> list[Seed]:
    """Return the seeds that an Explore agent with a model thinks of; none without one."""
    if endpoints is None:
        return []
    return await think_of_ideas(endpoints, settings.count, settings.seed, trace, out)


# -- the stages
# -------------------------------------------------------------------------------------------------


async def _build_all(
    seeds: Sequence[Seed],
    settings: Settings,
    out: pathlib.Path,
    config: SandboxConfig,
    trace: Trace,
    specs: dict[str, AgentSpec],
    concurrency: int,
) -> tuple[list[_Unit], list[SetAside]]:
    """Return the drafts of all seeds in their order, and the seeds that gave none."""
    spec = specs["builder"]
    made: dict[str, Built] = {}
    budgets: dict[str, int] = {}

    async def work(seed: Seed) -> None:
        path = out / "drafts" / f"{hashlib.sha1(seed.id.encode()).hexdigest()[:16]}.json"
        if trace.done(spec.name, seed.id) and (earlier := read_drafts(path)):
            made[seed.id] = earlier
            budgets[seed.name] = budgets.get(seed.name, 0) + len(earlier.drafts)
            return
        enough = seed.kind == "commit" and budgets.get(seed.name, 0) >= settings.count
        if enough:
            return
        began = time.monotonic()
        try:
            async with asyncio.timeout(spec.seconds):
                built = await spec.work(seed, settings, config.isolation)
        except TimeoutError:
            built = Built([], f"not built within {spec.seconds:g} s", is_fault=True)
        budgets[seed.name] = budgets.get(seed.name, 0) + len(built.drafts)
        write_atomically(path, drafts_text(built), fsync=False)
        trace.add(
            spec.name,
            seed.id,
            time.monotonic() - began,
            built.reason if built.is_fault else "",
            drafts=len(built.drafts),
            tokens=built.tokens,
        )
        made[seed.id] = built

    await _all([work(seed) for seed in seeds], concurrency)
    units, aside = [], []
    taken: dict[str, int] = {}
    for number, seed in enumerate(seeds):
        built = made.get(seed.id)
        if built is None:
            continue
        if built.reason:
            aside.append(SetAside(seed.name, number, f"{seed.value[:12]} {built.reason}".strip()))
        for draft in built.drafts:
            if seed.kind == "commit" and taken.get(seed.name, 0) >= settings.count:
                break
            taken[seed.name] = taken.get(seed.name, 0) + 1
            units.append(_Unit(draft, f"{seed.id}/{draft.digest}"))
    return units, aside


def _check_texts(units: Sequence[_Unit]) -> None:
    """Take out drafts whose verifier cannot be trusted, duplicates, and copies of `pro`."""
    for unit in units:
        faults = verifier_faults(files_of(unit.draft))
        if faults:
            unit.left, unit.reason = "verifier", faults[0]
    kept = [unit for unit in units if not unit.left]
    evaluated = _evaluated_drafts(kept)
    drafts = [*evaluated, *(unit.draft for unit in kept)]
    for number, earlier in find_duplicates(drafts).items():
        if number >= len(evaluated):
            unit = kept[number - len(evaluated)]
            unit.left, unit.reason = "unique", f"repeats {drafts[earlier].name}"


def _evaluated_drafts(units: Sequence[_Unit]) -> list[Draft]:
    """Return the drafts of the evaluation set `pro` that the generators of these units made.

    Their seeds are never drawn again, but another seed may give nearly the same task.
    """
    families = {unit.id.split(":")[1] for unit in units if unit.id.startswith("generated:")}
    entries = read_index(INDEX) if families else []
    return [
        FAMILIES[one["family"]].make(one["seed"]) for one in entries if one["family"] in families
    ]


async def _score_all(
    units: Sequence[_Unit],
    settings: Settings,
    config: SandboxConfig,
    trace: Trace,
    specs: dict[str, AgentSpec],
    concurrency: int,
) -> None:
    """Take out drafts whose verifier accepts too many mutants of the oracle, or a fake."""
    spec = specs["review"]

    async def work(unit: _Unit) -> None:
        entry = trace.done(spec.name, unit.id)
        if entry is None:
            began = time.monotonic()
            found, reason, fault, tokens = Mutants(0, 0), "", "", 0
            try:
                async with asyncio.timeout(spec.seconds):
                    found = await score_mutants(
                        unit.draft, settings.mutants, settings.seed, config.isolation
                    )
                    if not _mutant_fault(found):  # a model is asked only about what may stay
                        reason, tokens = await spec.work(unit.draft)
            except (SandboxError, TimeoutError) as error:
                reason = fault = str(error) or f"not reviewed within {spec.seconds:g} s"
            except UNUSABLE as error:
                reason = str(error) or type(error).__name__
            result = dataclasses.asdict(found) | {"reason": reason, "tokens": tokens}
            entry = trace.add(spec.name, unit.id, time.monotonic() - began, fault, **result)
        unit.mutants = Mutants(
            entry["tried"], entry["rejected"], tuple(entry["survivors"]), tuple(entry["fakes"])
        )
        unit.reason = entry["reason"] or _mutant_fault(unit.mutants)
        if unit.reason:
            unit.left = "mutants"

    await _all([work(unit) for unit in units if not unit.left], concurrency)


def _mutant_fault(mutants: Mutants) -> str:
    if mutants.fakes:
        return f"a fake program passes: {mutants.fakes[0]}"
    if not mutants.tried:
        return "no mutant could be made of its oracle"
    if mutants.score < MIN_MUTATION_SCORE:
        return f"only {mutants.rejected} of {mutants.tried} mutants fail: {mutants.survivors[0]}"
    return ""


async def _prove(
    units: Sequence[_Unit],
    settings: Settings,
    out: pathlib.Path,
    config: SandboxConfig,
    trace: Trace,
    concurrency: int,
) -> None:
    """Take out tasks whose oracle fails, and those that doing nothing or a cheat passes."""
    tasks = _write_candidates(units, out)
    if not tasks:
        return
    _admit(tasks, out / "proof")
    began = time.monotonic()
    proof = await validate(
        "candidates",
        config,
        out / "proof",
        oracle_runs=settings.oracle_runs,
        concurrency=concurrency,
        seed=settings.seed,
        tasks=tasks,
    )
    if ("proof", "all") not in trace.lines:
        trace.add("proof", "all", time.monotonic() - began)
    verdicts = {verdict["task"]: verdict for verdict in proof["tasks"]}
    for unit in units:
        if not unit.left and not verdicts[unit.draft.name]["ok"]:
            unit.left = "proof"
            unit.reason = verdicts[unit.draft.name]["reasons"][0]


def _write_candidates(units: Sequence[_Unit], out: pathlib.Path) -> list[Task]:
    folder = out / "candidates"
    folder.mkdir(exist_ok=True)
    wanted = {folder_name(unit.draft): unit.draft for unit in units if not unit.left}
    for name, draft in wanted.items():
        if not (folder / name).exists():
            write_draft(draft, folder / name)
    for leftover in folder.iterdir():
        if leftover.name not in wanted:
            shutil.rmtree(leftover)
    return load_tasks(str(folder)) if wanted else []


def _admit(tasks: Sequence[Task], folder: pathlib.Path) -> None:
    """Let a folder of attempts take these candidates, where an earlier call played others.

    A resumed run has more of them: drafts that a fault of the machine kept out the last time. A
    name stands for one candidate within a run, so the attempts that are there stay valid.
    """
    path = folder / "run.json"
    if path.exists():
        identity = read_json(path, "Give another --out.")
        identity["dataset_digest"] = dataset_digest(tasks)
        write_atomically(path, json.dumps(identity, indent=1) + "\n")


def folder_name(draft: Draft) -> str:
    """Return the name of a task's folder."""
    return draft.name.replace("/", "-")


async def _find_band(
    units: Sequence[_Unit],
    settings: Settings,
    out: pathlib.Path,
    config: SandboxConfig,
    trace: Trace,
    concurrency: int,
    endpoints: Endpoints | None,
) -> None:
    """Play the sound tasks, and take out those that are too easy or too hard for what plays."""
    tasks = _write_candidates(units, out)
    if not tasks:
        return
    _admit(tasks, out / "attempts")
    began = time.monotonic()
    rates, tokens = await play_tasks(
        tasks, settings.attempts, out / "attempts", config, concurrency, settings.seed, endpoints
    )
    if ("trajectory", "all") not in trace.lines:
        trace.add("trajectory", "all", time.monotonic() - began, tokens=tokens)
    least, most = settings.band
    for unit in units:
        if unit.left:
            continue
        unit.pass_rate = rates.get(unit.draft.name)
        if unit.pass_rate is None or not least <= unit.pass_rate <= most:
            unit.left = "band"
            shown = "unknown" if unit.pass_rate is None else f"{unit.pass_rate:.2f}"
            unit.reason = f"pass rate {shown} is not within {least:g} to {most:g}"


def _keep_some(units: Sequence[_Unit], keep: int) -> None:
    """Take out what is more than `keep` of a domain."""
    counts: dict[str, int] = {}
    for unit in units:
        if unit.left:
            continue
        counts[unit.draft.domain] = counts.get(unit.draft.domain, 0) + 1
        if keep and counts[unit.draft.domain] > keep:
            unit.left, unit.reason = "accepted", f"{keep} tasks of {unit.draft.domain} are enough"


def _write_accepted(units: Sequence[_Unit], out: pathlib.Path) -> None:
    folder = out / "tasks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for unit in units:
        if not unit.left:
            write_draft(unit.draft, folder / folder_name(unit.draft))


async def _all(works: Sequence[Coroutine[Any, Any, None]], concurrency: int) -> None:
    """Do all works, some at once; the first exception ends all of them."""
    gate = asyncio.Semaphore(concurrency)

    async def gated(work: Coroutine[Any, Any, None]) -> None:
        async with gate:
            await work

    async with asyncio.TaskGroup() as group:
        for work in works:
            group.create_task(gated(work))
