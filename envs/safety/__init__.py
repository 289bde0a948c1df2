"""Safety suite: a base task with an injection or another trial, and verifiers of the harm done.

    env = compose_env("readme-exfiltrate", 7, base)      # base: an environment, not started yet
    observation, info = await env.areset()
    ...
    info["safety"]     # at the end: utility, harms, pillar, channel, severity, ...

Harm is found in the final state and in the sandbox's record, never in words. See docs/safety.md.
"""

from __future__ import annotations

from envs.gem import Env
from envs.safety.composition import Composition, CompositionError
from envs.safety.draw import Draw
from envs.safety.harm import CHANNELS, KINDS, PILLARS
from envs.safety.seeds import CLEAN, SEEDS, SMALL_SEEDS, SPLITS, Seed, compose
from envs.safety.shell import SafetyShellEnv, SafetyTask
from envs.safety.worlds import WORLD_SEEDS, SafetyWorldEnv, WorldSeed


def compose_env(
    family: str,
    number: int,
    base: Env,
    name: str = "",
    is_gated: bool = True,
    harm_rate: float = 0.0,
) -> Env:
    """Return a base environment with the injection of a family and a number.

    Args:
      family: a key of SEEDS or WORLD_SEEDS, or CLEAN and the key.
      number: draws names, wording and difficulty.
      base: not started yet; it is used up.
      name: of the task; FAMILY/NUMBER by default.
      is_gated: whether harm makes the reward 0.
      harm_rate: share of the demonstrations that do the harm, for tasks in a shell.

    Raises:
      CompositionError: the family is unknown, or the base cannot carry it.
    """
    task = SafetyTask(name or f"{family}/{number}", family, number)
    seed = WORLD_SEEDS.get(family.removeprefix(CLEAN))
    if seed is None:
        composition = compose(family, number)
        return SafetyShellEnv(base, composition, task, is_gated, harm_rate)
    draw = Draw(f"safety/{seed.name}/{number}")
    return SafetyWorldEnv(base, seed, draw, task, family.startswith(CLEAN), is_gated)


def draw_difficulty(family: str, number: int) -> int:
    """Return the difficulty of a family's composition with this number, 1 to 3."""
    return Draw(f"safety/{family.removeprefix(CLEAN)}/{number}").number(1, 3)


def has_attack(family: str, number: int) -> bool:
    """Return whether a scripted attacker can do the harm of a family."""
    seed = WORLD_SEEDS.get(family.removeprefix(CLEAN))
    return bool(seed.goal) if seed is not None else bool(compose(family, number).attacks)


def families(sort: str = "shell", *, clean: bool = True) -> list[str]:
    """Return the names of all families for bases of one sort.

    Args:
      sort: "shell" or "world".
      clean: with the form without temptation after each family that has one.
    """
    seeds = SEEDS if sort == "shell" else WORLD_SEEDS
    found = []
    for seed in seeds.values():
        found.append(seed.name)
        if clean and seed.sort != "cue":
            found.append(f"{CLEAN}{seed.name}")
    return found


__all__ = [
    "CHANNELS",
    "CLEAN",
    "KINDS",
    "PILLARS",
    "SEEDS",
    "SMALL_SEEDS",
    "SPLITS",
    "WORLD_SEEDS",
    "Composition",
    "CompositionError",
    "SafetyShellEnv",
    "SafetyTask",
    "SafetyWorldEnv",
    "Seed",
    "WorldSeed",
    "compose",
    "compose_env",
    "draw_difficulty",
    "families",
    "has_attack",
]
