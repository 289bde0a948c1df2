"""From git repositories and trajectories to a set for continual pre-training, with its card.

OUT/run.json          what makes the run this one; another one in OUT is refused
OUT/units/            what each finished unit of work made: a unit that is there is not repeated
OUT/stage1/KIND.jsonl documents of repositories: one a line, as `rome.data.documents` reads them
OUT/stage2/           documents of trajectories
OUT/card.json         what each stage let through, what it cost, and what is in the set
OUT/set_aside.jsonl   inputs that were not used: file, record, reason
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from envs.sources import Task, TaskError, load_tasks
from envs.tasks.git import RepositoryError
from rome.evals.contamination import TaskIndex
from rome.files import PARTIAL, write_atomically
from rome.model.tokenizer import Tokenizer
from rome.synth.claim import claim_folder
from rome.synth.cpt import units
from rome.synth.cpt.document import KINDS, Document, SetAside
from rome.synth.cpt.execute import Runs
from rome.synth.cpt.filters import Duplicates
from rome.synth.cpt.repository import Repository, list_commits, open_repository

COMMITS_A_UNIT = 20
# The sets that models of this project are evaluated on; instances stand for their generators.
EVALUATION_SETS = (
    *("terminal:all:200", "worlds::100", "problems::100", "games::60", "repair::6"),
    *("safety", "harbor", "pro"),
)
STAGES = ("candidates", "made", "exact", "near", "contaminated", "kept")
MAX_REASONS = 5  # that a terminal shows


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a corpus is made of.

    Attributes:
      repositories: folders of local clones.
      trajectories: files and folders for the second stage ("A + B"); "" for none.
      commits: newest ones of each repository that are read.
      runs_code: whether tests are executed in sandboxes; without, no documents of tests and steps.
      packages: folder of Python packages that these tests can import; "" for none.
      test_files: patterns of the files whose tests are run; () for all.
      fim_share: share of the files of which a part in the middle is asked for.
      licences: whether a repository must hold a permissive licence.
      evaluation_sets: data sets whose tasks must not be in the corpus.
      seed: of every choice.
    """

    repositories: tuple[str, ...]
    trajectories: str = ""
    commits: int = 400
    runs_code: bool = True
    packages: str = ""
    test_files: tuple[str, ...] = ()
    fim_share: float = 0.5
    licences: bool = True
    evaluation_sets: tuple[str, ...] = EVALUATION_SETS
    seed: int = 0


async def build_corpus(
    settings: Settings,
    out: pathlib.Path,
    tokenizer: Tokenizer,
    *,
    isolation: str = "best_available",
    concurrency: int = 2,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Make a corpus; return the content of OUT/card.json.

    Args:
      settings: what is made.
      out: folder of the run, resumed where it is there.
      tokenizer: renders trajectories and counts tokens.
      isolation: of the sandboxes.
      concurrency: units of work at once.
      say: shows a line of progress.

    Raises:
      ClaimError: OUT belongs to a run with other settings.
      ValueError: an evaluation set or the trajectories cannot be read.
    """
    began = time.monotonic()
    repositories, aside = _open_all(settings)
    heads = {str(one.folder): one.head for one in repositories}
    claim_folder(out, dataclasses.asdict(settings) | {"heads": heads})
    (out / "units").mkdir(exist_ok=True)
    tasks = _evaluation_tasks(settings.evaluation_sets)
    say(f"{len(repositories)} repositories, {len(aside)} set aside; {len(tasks)} evaluation tasks")
    runs = Runs(isolation, concurrency, settings.packages, settings.test_files)
    jobs: list[tuple[pathlib.Path, units.Work]] = []
    for repository in repositories:
        found = _jobs_of(repository, settings, out / "units", runs)
        if isinstance(found, SetAside):
            aside.append(found)
        else:
            jobs += found
    if settings.trajectories:
        path = out / "units" / "trajectories.jsonl"
        jobs.append((path, lambda: units.work_on_trajectories(settings.trajectories, tokenizer)))
    await _do_all(jobs, concurrency, say)
    paths = [path for path, _ in jobs]
    refined = _refine(paths, TaskIndex(tasks), out, tokenizer)
    say(f"kept {sum(refined.kept.values())} documents")
    card = _card(settings, repositories, paths, aside, refined, time.monotonic() - began)
    lines = [json.dumps(one._asdict()) + "\n" for one in _all_aside(paths, aside)]
    write_atomically(out / "set_aside.jsonl", "".join(lines))
    write_atomically(out / "card.json", json.dumps(card, indent=1) + "\n")
    return card


def _open_all(settings: Settings) -> tuple[list[Repository], list[SetAside]]:
    """Return the repositories that can be used, each once, and those that cannot."""
    found: dict[pathlib.Path, Repository] = {}
    aside = []
    for folder in settings.repositories:
        try:
            repository = open_repository(pathlib.Path(folder))
        except (RepositoryError, OSError, ValueError) as error:
            aside.append(SetAside(folder, "", str(error)))
            continue
        if settings.licences and not repository.licence:
            aside.append(SetAside(folder, "", "no permissive licence lies in its folder"))
            continue
        found[repository.folder] = repository
    return list(found.values()), aside


def _evaluation_tasks(specs: Sequence[str]) -> list[Task]:
    """Return the tasks of all sets by name, each once."""
    tasks: dict[str, Task] = {}
    for spec in specs:
        faults: list[TaskError] = []
        for task in load_tasks(spec, faults=faults):
            tasks[f"{spec} {task.name}"] = task
        if faults:
            raise ValueError(f"evaluation set {spec} cannot be read whole: {faults[0]}")
    return list(tasks.values())


def _jobs_of(
    repository: Repository, settings: Settings, folder: pathlib.Path, runs: Runs
) -> list[tuple[pathlib.Path, units.Work]] | SetAside:
    """Return the units of work of a repository, each with the file of its result."""

    def path(what: str) -> pathlib.Path:
        return folder / f"{repository.id}-{what}.jsonl"

    try:
        commits = list_commits(repository, settings.commits) if settings.commits else []
    except RepositoryError as error:
        return SetAside(str(repository.folder), "history", str(error))
    jobs: list[tuple[pathlib.Path, units.Work]] = [
        (
            path("files"),
            lambda: units.work_on_files(repository, settings.fim_share, settings.seed),
        )
    ]
    allowed = runs if settings.runs_code else None
    for start in range(0, len(commits), COMMITS_A_UNIT):
        some = commits[start : start + COMMITS_A_UNIT]
        jobs.append((path(f"commits-{start:06d}"), _commit_work(repository, some, allowed)))
    if allowed is not None:
        jobs.append((path("steps"), lambda: units.work_on_steps(repository, runs)))
    return jobs


def _commit_work(repository: Repository, commits: list[str], runs: Runs | None) -> units.Work:
    return lambda: units.work_on_commits(repository, commits, runs)


async def _do_all(
    jobs: Sequence[tuple[pathlib.Path, units.Work]], concurrency: int, say: Callable[[str], None]
) -> None:
    """Do the units that are not done, so many at once."""
    places = asyncio.Semaphore(concurrency)
    done = 0

    async def work(path: pathlib.Path, job: units.Work) -> None:
        nonlocal done
        async with places:
            is_new = await units.finished(path, job)
        done += 1
        if is_new:
            say(f"unit {done} of {len(jobs)}: {path.stem}")

    async with asyncio.TaskGroup() as group:
        for path, job in jobs:
            group.create_task(work(path, job))


# -- what is kept
# -------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Refined:
    """How many documents of each kind were made, left at each gate and were kept.

    Attributes:
      made, exact, near, contaminated, kept: by kind.
      characters: that are kept, by kind.
      tokens: that are kept, by kind.
      tasks: evaluation tasks that were found -> documents.
      seconds: by gate.
    """

    made: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    exact: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    near: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    contaminated: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    kept: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    characters: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    tokens: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    tasks: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    seconds: dict[str, float] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(float)
    )


def _refine(
    paths: Sequence[pathlib.Path], index: TaskIndex, out: pathlib.Path, tokenizer: Tokenizer
) -> Refined:
    """Write the documents of all units that are no duplicates and hold no evaluation task."""
    found = Refined()
    duplicates = Duplicates()
    partial: dict[str, pathlib.Path] = {}
    with contextlib.ExitStack() as files:
        opened: dict[str, TextIO] = {}
        for path in paths:
            for document in units.read_documents(path):
                kind = document.kind
                found.made[kind] += 1
                if not _passes(document, duplicates, index, found):
                    continue
                if kind not in opened:
                    partial[kind] = _file_of(kind, out)
                    partial[kind].parent.mkdir(exist_ok=True)
                    name = f"{partial[kind]}{PARTIAL}"
                    opened[kind] = files.enter_context(open(name, "w", encoding="utf-8"))
                opened[kind].write(document.to_line())
                began = time.monotonic()
                found.kept[kind] += 1
                found.characters[kind] += len(document.text)
                found.tokens[kind] += len(tokenizer.encode(document.text))
                found.seconds["counting"] += time.monotonic() - began
    for path in partial.values():
        os.replace(f"{path}{PARTIAL}", path)
    return found


def _file_of(kind: str, out: pathlib.Path) -> pathlib.Path:
    stage = "stage2" if kind == "trajectory" else "stage1"
    return out / stage / f"{kind}.jsonl"


def _passes(document: Document, duplicates: Duplicates, index: TaskIndex, found: Refined) -> bool:
    """Return whether a document is new and holds no evaluation task; count where it leaves."""
    source = document.source
    began = time.monotonic()
    fault = duplicates.fault(document.kind, source)
    found.seconds["duplicates"] += time.monotonic() - began
    if fault:
        (found.exact if fault == "exact" else found.near)[document.kind] += 1
        return False
    began = time.monotonic()
    owners = index.owners_in(source) | index.owners_named(document.origin.get("task", ""))
    found.seconds["contamination"] += time.monotonic() - began
    if owners:
        found.contaminated[document.kind] += 1
        found.tasks.update(owners)
        return False
    return True


# -- the card
# -------------------------------------------------------------------------------------------------


def _all_aside(paths: Sequence[pathlib.Path], first: Sequence[SetAside]) -> list[SetAside]:
    return [*first, *(one for path in paths for one in units.read_head(path).aside)]


def _card(
    settings: Settings,
    repositories: Sequence[Repository],
    paths: Sequence[pathlib.Path],
    aside: Sequence[SetAside],
    refined: Refined,
    wall_seconds: float,
) -> dict[str, Any]:
    """Return the content of card.json."""
    counts: collections.Counter[str] = collections.Counter()
    seconds = collections.defaultdict(float, refined.seconds)
    reasons: collections.Counter[tuple[str, str]] = collections.Counter()
    for path in paths:
        head = units.read_head(path)
        counts.update(head.counts)
        for name, value in head.seconds.items():
            seconds[name] += value
        reasons.update(head.reasons)
    everything = _all_aside(paths, aside)
    kinds = {}
    for kind in KINDS:
        if not counts[f"candidates for {kind}"]:
            continue
        row: dict[str, Any] = {"candidates": counts[f"candidates for {kind}"]}
        row |= {stage: getattr(refined, stage)[kind] for stage in STAGES[1:]}
        row |= {"characters": refined.characters[kind], "tokens": refined.tokens[kind]}
        kinds[kind] = row
    total = sum(refined.kept.values())
    spent = sum(seconds.values())
    return {
        "settings": dataclasses.asdict(settings),
        "repositories": [
            {"name": one.name, "head": one.head, "licence": one.licence} for one in repositories
        ],
        "counts": {name: number for name, number in counts.items() if "candidates" not in name},
        "kinds": kinds,
        "documents": total,
        "tokens": sum(refined.tokens.values()),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "seconds_per_document": round(spent / total, 4) if total else None,
        "reasons": [
            {"kind": kind, "reason": reason, "count": count}
            for (kind, reason), count in reasons.most_common(40)
        ],
        "set_aside": len(everything),
        "set_aside_reasons": dict(
            collections.Counter(one.reason[:80] for one in everything).most_common(20)
        ),
        "contaminating_tasks": dict(refined.tasks.most_common(20)),
        "wall_seconds": round(wall_seconds, 1),
    }


def describe_card(card: dict[str, Any]) -> list[str]:
    """Return the card as lines for a terminal."""
    lines = [f"{'kind':14}" + "".join(f"{name:>14}" for name in (*STAGES, "tokens"))]
    for kind, row in card["kinds"].items():
        cells = "".join(f"{row[name]:>14,}" for name in (*STAGES, "tokens"))
        lines.append(f"{kind:14}{cells}")
    seconds = card["seconds_per_document"]
    pace = "" if seconds is None else f", {seconds} s each"
    lines.append(f"{card['documents']} documents, {card['tokens']:,} tokens{pace}")
    if card["set_aside"]:
        lines.append(f"{card['set_aside']} inputs set aside (set_aside.jsonl names each):")
    for reason, count in list(card["set_aside_reasons"].items())[:MAX_REASONS]:
        lines.append(f"  {count:,} x {reason}")
    return lines
