"""Datasets of environments that need no task folder: tool-use worlds, one-turn problems, text
games, and the published formats over the worlds.

worlds[:NAMES[:N]]       travel, shop, gui; a name is a world or a world and a level (shop/hard)
problems[:NAMES[:N]]     math, code, math/dice, code/postfix-hard
games[:NAMES[:N]]        frozen_lake, wordle, ...
bfcl:FILE                a BFCL multi-turn file, its possible_answer/ beside it
tau2:FOLDER              a tau2 domain: db.json, tasks.json, perhaps policy.md
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from envs.games import GAMES
from envs.gem import Env, make
from envs.problems import PROBLEM_IDS
from envs.rock import SandboxConfig
from envs.tasks.terminal import eval_seed
from envs.worlds import WORLD_IDS, bfcl, tau2

# instances of an environment that one --seed may have before they would be those of the next
SEEDS_APART = 100_000
KINDS = {
    "worlds": tuple(WORLD_IDS),
    "problems": tuple(one for one in PROBLEM_IDS if "/all-" not in one),
    "games": tuple(
        one for one in GAMES if "slippery" not in one
    ),  # the ice decides there, so no oracle wins each
}


@dataclasses.dataclass(frozen=True)
class Made:
    """An instance: either of a registered environment with a seed, or of an entry of a published
    file.
    """

    name: str
    family: str
    domain: str
    difficulty: str
    text: str  # the user's or the problem's own words
    definition: str
    new_env: Callable[[SandboxConfig], Env]

    def make_env(self, config: SandboxConfig) -> Env:
        return self.new_env(config)

    def parts(self) -> list[bytes]:
        return [
            self.text.encode(errors="surrogatepass"),
            self.definition.encode(errors="surrogatepass"),
        ]


def is_made(dataset: str) -> bool:
    """Whether the name is one of this module's."""
    kind = dataset.split(":")[0]
    return kind in KINDS or (kind in ("bfcl", "tau2") and ":" in dataset)


def load_made(dataset: str, seed: int) -> list[Made]:
    """The instances of a dataset.

    Raises ValueError for a name that is none, FormatError (a ValueError) for a faulty file.
    """
    kind, _, rest = dataset.partition(":")
    if kind == "bfcl":
        return [_published(entry, "bfcl") for entry in bfcl.load(pathlib.Path(rest))]
    if kind == "tau2":
        return [_published(task, f"tau2-{task.domain}") for task in tau2.load(pathlib.Path(rest))]
    names, _, count = rest.partition(":")
    ids = _chosen(kind, names)
    if seed < 0 or (
        count
        and not (count.isascii() and count.isdecimal() and 0 < int(count) <= SEEDS_APART * len(ids))
    ):
        raise ValueError(
            f"dataset {dataset!r} with seed {seed} is not {kind}[:NAMES[:N]] with N from 1 to"
            f" {SEEDS_APART * len(ids)} and a seed of 0 or more"
        )
    total = int(count) if count else len(ids)
    return [
        _instance(kind, ids[number % len(ids)], eval_seed(seed * SEEDS_APART + number // len(ids)))
        for number in range(total)
    ]


def _chosen(kind: str, names: str) -> list[str]:
    """The ids that the names stand for, in the registry's order."""
    short = {one: one.removeprefix("rome:").removeprefix("game/") for one in KINDS[kind]}
    chosen: list[str] = []
    for name in names.split(",") if names and names != "all" else [""]:
        found = [
            one
            for one, brief in short.items()
            if name == "" or brief == name or brief.startswith((f"{name}/", f"{name}-"))
        ]
        if not found:
            raise ValueError(
                f"{kind} has nothing named {name!r}; known:"
                f" {', '.join(sorted({brief.split('-')[0] for brief in short.values()}))}"
            )
        chosen += found
    return list(dict.fromkeys(chosen))


def _instance(kind: str, env_id: str, seed: int) -> Made:
    def new_env(config: SandboxConfig) -> Env:
        # sokoban unshaped: 1 for the solved room and nothing else; boards in the observation, which
        # is all that agents are shown
        settings = (
            {"sandbox_config": config}
            if env_id.startswith("rome:code/")
            else {"shaped": False}
            if "sokoban" in env_id
            else {}
        )
        settings |= {"state_in": "observation"} if kind == "games" else {}
        return make(env_id, seed=seed, **settings)

    env = new_env(SandboxConfig())
    opening, info = env.reset()
    text = "\n".join(env.scenario.user.requests) if kind == "worlds" else opening
    definition = env.definition() if hasattr(env, "definition") else str(info.get("suffix", ""))
    domain = env_id.removeprefix("rome:").split("/")[0] if kind != "games" else "games"
    return Made(
        f"{env_id.removeprefix('rome:')}/{seed}",
        env.task.family,
        domain,
        getattr(env, "difficulty", "(none)"),
        text,
        definition,
        new_env,
    )


def _published(entry: Any, domain: str) -> Made:
    env = entry.make_env()
    env.reset()
    return Made(
        env.task.name,
        env.family,
        domain,
        env.difficulty,
        "\n".join(env.scenario.user.requests),
        env.definition(),
        lambda config: entry.make_env(),
    )
