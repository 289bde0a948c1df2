"""A balanced set: rounds of the pipeline until every domain has its tasks.

    OUT/round-N/    a run of the pipeline, resumable as any other
    OUT/tasks/      the same number of accepted tasks of each domain
    OUT/card.json   rounds, and tasks by domain

A generator's yield is not known before its drafts are proven, so each round asks for what is still
missing and some more.
"""

from __future__ import annotations

import json
import math
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

from envs.rock import SandboxConfig
from envs.tasks.harbor import load_task
from envs.tasks.made import FAMILIES, Draft
from rome.data.seeds import derive_seed
from rome.files import write_atomically
from rome.synth.build import read_drafts
from rome.synth.pipeline import Settings, synthesise
from rome.synth.review import find_duplicates

MAX_ROUNDS = 5
SPARE = 1.45  # drafts for a task: about 70 % of the generators' drafts are accepted


async def make_balanced_set(
    out: pathlib.Path,
    config: SandboxConfig,
    *,
    seed: int,
    per_domain: int,
    families: Sequence[str] = tuple(FAMILIES),
    mutants: int = 12,
    oracle_runs: int = 3,
    concurrency: int = 2,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, int]:
    """Make `per_domain` tasks of the domain of each family; return the number of each domain.

    Args:
      out: folder of the set. The same call goes on there after a kill.
      config: of the sandboxes.
      seed: of the set; another one gives another set.
      per_domain: tasks of each domain.
      families: generators, one for each domain.
      mutants: of each oracle.
      oracle_runs: of each task.
      concurrency: sandboxes at once.
      say: shows a line of progress.

    Raises:
      SynthesisError: OUT belongs to a set with other settings.
    """
    domains = {family: FAMILIES[family].make(0).domain for family in families}
    chosen: dict[str, list[pathlib.Path]] = {domain: [] for domain in domains.values()}
    drafts_chosen: list[Draft] = []
    cards = []
    for number in range(1, MAX_ROUNDS + 1):
        missing = {name: per_domain - len(chosen[domain]) for name, domain in domains.items()}
        wanted = [name for name, count in missing.items() if count > 0]
        if not wanted:
            break
        drafts = math.ceil(SPARE * max(missing.values())) + 1
        say(f"round {number}: {drafts} drafts of each of {', '.join(wanted)}")
        settings = Settings(
            families=f"{','.join(wanted)}:{drafts}",
            mutants=mutants,
            oracle_runs=oracle_runs,
            seed=derive_seed(seed, "round", number),
        )
        folder = out / f"round-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        card = await synthesise(settings, folder, config, concurrency=concurrency, say=say)
        cards.append({"round": number, **{name: card[name] for name in _KEPT}})
        _choose(folder, chosen, drafts_chosen, per_domain)
    _write(out, chosen, cards, seed)
    return {domain: len(paths) for domain, paths in chosen.items()}


_KEPT = ("yield_by_stage", "accepted", "mutants", "seconds_by_agent", "duplicates", "reasons")


def _choose(
    folder: pathlib.Path,
    chosen: dict[str, list[pathlib.Path]],
    drafts: list[Draft],
    per_domain: int,
) -> None:
    """Add the tasks of a round to those chosen, as far as their domain lacks some.

    Args:
      folder: of the round, which holds no duplicates of its own.
      chosen: folders of tasks by domain; added to.
      drafts: of these tasks; a task that repeats one of them is left out. Added to.
      per_domain: tasks of each domain.
    """
    made = _drafts_by_digest(folder)
    tasks = [(path, load_task(path)) for path in sorted((folder / "tasks").iterdir())]
    new = [made[task.metadata["digest"]] for _, task in tasks]
    repeated = find_duplicates([*drafts, *new])
    num_earlier = len(drafts)
    for number, ((path, task), draft) in enumerate(zip(tasks, new, strict=True), num_earlier):
        paths = chosen[task.category]
        if len(paths) < per_domain and number not in repeated:
            paths.append(path)
            drafts.append(draft)


def _drafts_by_digest(folder: pathlib.Path) -> dict[str, Draft]:
    """Return the drafts of a round by their digests."""
    found = {}
    for path in (folder / "drafts").glob("*.json"):
        built = read_drafts(path)
        for draft in built.drafts if built else ():
            found[draft.digest] = draft
    return found


def _write(
    out: pathlib.Path,
    chosen: dict[str, list[pathlib.Path]],
    cards: list[dict[str, Any]],
    seed: int,
) -> None:
    """Write OUT/tasks as a whole, then the card."""
    partial = out / "tasks.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for paths in chosen.values():
        for path in paths:
            shutil.copytree(path, partial / path.name)
    shutil.rmtree(out / "tasks", ignore_errors=True)
    partial.rename(out / "tasks")
    counts = {domain: len(paths) for domain, paths in chosen.items()}
    card = {"seed": seed, "accepted": sum(counts.values()), "domains": counts, "rounds": cards}
    write_atomically(out / "card.json", json.dumps(card, indent=1) + "\n")
