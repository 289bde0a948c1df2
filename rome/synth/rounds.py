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
from envs.tasks.made import FAMILIES
from rome.data.seeds import derive_seed
from rome.files import write_atomically
from rome.synth.pipeline import Settings, synthesise

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
        _choose(folder / "tasks", chosen, per_domain)
    _write(out, chosen, cards, seed)
    return {domain: len(paths) for domain, paths in chosen.items()}


_KEPT = ("yield_by_stage", "accepted", "mutants", "seconds_by_agent", "duplicates", "reasons")


def _choose(tasks: pathlib.Path, chosen: dict[str, list[pathlib.Path]], per_domain: int) -> None:
    """Add the tasks of a round to those chosen, as far as their domain lacks some."""
    names = {path.name for paths in chosen.values() for path in paths}
    for path in sorted(tasks.iterdir()):
        paths = chosen[load_task(path).category]
        if len(paths) < per_domain and path.name not in names:  # a name has the generator's seed
            paths.append(path)


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
