"""Datasets of environments without task folders: tool-use worlds, problems and text games.

worlds[:NAMES[:N]]       travel, shop, gui; a name is a world, or a world and a level (shop/hard)
problems[:NAMES[:N]]     math, code, math/dice, code/postfix-hard
games[:NAMES[:N]]        frozen_lake, wordle, ...
bfcl:CATEGORY            BFCL's own files (multi_turn_base, ...; multi_turn for all), played with
                         its authors' classes; or a file of that form, with possible_answer/ beside
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from envs.games import GAMES
from envs.gem import Env, make
from envs.problems import PROBLEM_IDS
from envs.rock import SandboxConfig
from envs.tasks.terminal import eval_seed
from envs.worlds import WORLD_IDS, bfcl

# Instances of an environment that belong to one --seed; the next seed's follow them.
SEEDS_APART = 100_000
KINDS = {
    "worlds": tuple(WORLD_IDS),
    "problems": tuple(env_id for env_id in PROBLEM_IDS if "/all-" not in env_id),
    # Without the slippery ones: chance decides there, so that no oracle always wins.
    "games": tuple(env_id for env_id in GAMES if "slippery" not in env_id),
}


@dataclasses.dataclass(frozen=True)
class Made:
    """An instance of a registered environment, or an entry of a published file.

    Attributes:
      name: with its seed.
      family: of the environment.
      cluster: of instances that resemble each other.
      domain: reports group by it.
      difficulty: reports group by it.
      text: the words of the user or of the problem.
      definition: everything else that defines the instance, as text.
      new_env: makes the environment.
    """

    name: str
    family: str
    cluster: str
    domain: str
    difficulty: str
    text: str
    definition: str
    new_env: Callable[[SandboxConfig], Env]

    def make_env(self, config: SandboxConfig) -> Env:
        """Return a new environment; `config` is for those that run code in a sandbox."""
        return self.new_env(config)

    def parts(self) -> list[bytes]:
        """Return everything that defines the instance."""
        return [
            self.text.encode(errors="surrogatepass"),
            self.definition.encode(errors="surrogatepass"),
        ]


def is_made(dataset: str) -> bool:
    """Return whether the name is of a dataset of this module."""
    kind = dataset.split(":")[0]
    return kind in KINDS or (kind == "bfcl" and ":" in dataset)


def load_made(dataset: str, seed: int) -> list[Made]:
    """Return the instances of a dataset.

    Args:
      dataset: see the module; N is the number of instances, by default one for each name.
      seed: chooses the instances; published files do not depend on it.

    Raises:
      ValueError: there is no such dataset, or (FormatError) a file is malformed.
    """
    kind, _, rest = dataset.partition(":")
    if kind == "bfcl":
        return [_of_published(entry, "bfcl") for entry in bfcl.load_dataset(rest)]
    names, _, count_text = rest.partition(":")
    ids = _find_ids(kind, names)
    most = SEEDS_APART * len(ids)
    count = parse_count(count_text, most) if count_text else len(ids)
    if seed < 0 or count is None:
        raise ValueError(
            f"dataset {dataset!r} with seed {seed} is not {kind}[:NAMES[:N]] with N from 1 to"
            f" {most} and a seed of 0 or more"
        )
    instances = []
    for number in range(count):
        round_number, index = divmod(number, len(ids))
        instance_seed = eval_seed(seed * SEEDS_APART + round_number)
        instances.append(_of_environment(kind, ids[index], instance_seed))
    return instances


def parse_count(text: str, most: int) -> int | None:
    """Return the number from 1 to `most` that the text is, or None."""
    if not (text.isascii() and text.isdecimal()):
        return None
    count = int(text)
    return count if 1 <= count <= most else None


def _find_ids(kind: str, names: str) -> list[str]:
    """Return the environment ids that the names stand for, each once."""
    short_names = {
        env_id: env_id.removeprefix("rome:").removeprefix("game/") for env_id in KINDS[kind]
    }
    if not names or names == "all":
        return list(short_names)
    chosen: list[str] = []
    for name in names.split(","):
        found = [env_id for env_id, short in short_names.items() if _is_named(short, name)]
        if not found:
            known = sorted({short.split("-")[0] for short in short_names.values()})
            raise ValueError(f"{kind} has nothing named {name!r}; known: {', '.join(known)}")
        chosen += found
    return list(dict.fromkeys(chosen))


def _is_named(short: str, name: str) -> bool:
    """Return whether an environment has this name, or is a level or a variant of it."""
    return name in ("", short) or short.startswith((f"{name}/", f"{name}-"))


def _of_environment(kind: str, env_id: str, seed: int) -> Made:
    """Return the instance of a registered environment with this seed."""

    def new_env(config: SandboxConfig) -> Env:
        settings: dict[str, Any] = {}
        if env_id.startswith("rome:code/"):
            settings["sandbox_config"] = config
        elif "sokoban" in env_id:
            settings["shaped"] = False  # the reward is 1 for the solved room, else 0
        if kind == "games":
            settings["state_in"] = "observation"  # agents see nothing else
        return make(env_id, seed=seed, **settings)

    env = new_env(SandboxConfig())
    opening, info = env.reset()
    name = env_id.removeprefix("rome:")
    return Made(
        name=f"{name}/{seed}",
        family=env.task.family,
        cluster=env.task.family,
        domain="games" if kind == "games" else name.split("/")[0],
        difficulty=getattr(env, "difficulty", "(none)"),
        text="\n".join(env.scenario.user.requests) if kind == "worlds" else opening,
        definition=env.definition() if hasattr(env, "definition") else str(info.get("suffix", "")),
        new_env=new_env,
    )


def _of_published(entry: Any, domain: str) -> Made:
    """Return the instance of an entry of a published file."""
    env = entry.make_env()
    env.reset()
    return Made(
        name=env.task.name,
        family=env.family,
        cluster=env.task.name,
        domain=domain,
        difficulty=env.difficulty,
        text="\n".join(env.scenario.user.requests),
        definition=env.definition(),
        new_env=lambda config: entry.make_env(),
    )
