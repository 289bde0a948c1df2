"""Generated tasks: the terminal curriculum, and registered environments with their seeds."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from envs.games import GAMES
from envs.gem import Env, make
from envs.gem.episode import has_script, shown
from envs.problems import PROBLEM_IDS
from envs.rock import SandboxConfig
from envs.sources.source import LISTED_APART, Generated
from envs.sources.task import MARGIN_SECONDS, Content, Settings, SourceError, Task
from envs.tasks.terminal import (
    FAMILIES,
    FAMILY_TABLE,
    HELD_OUT_FAMILIES,
    WIDE_FAMILIES,
    WIDE_LIMITS,
    make_task,
)
from envs.tasks.terminal.env import (
    BASH_TOOL,
    SETUP_TIMEOUT_SECONDS,
    VERIFIER_TIMEOUT_SECONDS,
    TerminalEnv,
)
from envs.tasks.terminal.shell import SYSTEM
from envs.worlds import WORLD_IDS

GROUPS = {
    "train": FAMILIES,
    "held_out": HELD_OUT_FAMILIES,
    "wide": WIDE_FAMILIES,
    "all": FAMILIES + HELD_OUT_FAMILIES + WIDE_FAMILIES,
}
KINDS = {
    "worlds": tuple(WORLD_IDS),
    "problems": tuple(env_id for env_id in PROBLEM_IDS if "/all-" not in env_id),
    # Without the slippery ones: chance decides there, so that no demonstrator always wins. Without
    # the bare ones: only a model that was trained on their boards knows what to do.
    "games": tuple(env_id for env_id in GAMES if "slippery" not in env_id and "bare" not in env_id),
}
TERMINAL_TURNS = 6
TERMINAL_PLAY_SECONDS = 16 * 5.0 + VERIFIER_TIMEOUT_SECONDS
# Of a world, a problem or a game: a scripted dialogue takes milliseconds, submitted code seconds.
MADE_PLAY_SECONDS = 60.0
UNGROUPED = "(none)"
ONE_TURN = ("rome:math/", "rome:code/", "rome:text/")


def parse_count(text: str, most: int) -> int | None:
    """Return the number from 1 to `most` that the text is, or None."""
    if not (text.isascii() and text.isdecimal()):
        return None
    count = int(text)
    return count if 1 <= count <= most else None


# -- the terminal curriculum
# -------------------------------------------------------------------------------------------------


def open_terminal(spec: str, seed: int, settings: Settings) -> Generated:
    """Return the source of terminal[:FAMILIES[:N]].

    Without FAMILIES, training draws from the small training families, and `tasks` has one task of
    every family, the wide ones too. Held-out families are trained on only where no others are
    named.
    """
    parts = spec.split(":")
    chosen = _parse_families(parts[1]) if len(parts) > 1 else GROUPS["all"]
    most = LISTED_APART * len(chosen)
    count = parse_count(parts[2], most) if len(parts) > 2 else None
    if len(parts) > 3 or (len(parts) == 3 and count is None):
        raise SourceError(
            f"dataset {spec!r} is not terminal[:FAMILIES[:N]] with N from 1 to"
            f" {most}, for example terminal:wide:1000"
        )
    families = chosen if len(parts) > 1 else (*FAMILIES, *HELD_OUT_FAMILIES)
    trained = tuple(name for name in families if name not in HELD_OUT_FAMILIES)
    held_out = tuple(name for name in families if name in HELD_OUT_FAMILIES)
    if not trained:
        trained, held_out = held_out, ()
    make_one = functools.partial(_terminal_task, settings=settings)
    return Generated(spec, make_one, trained, held_out, listed=chosen, count=count, seed=seed)


def _parse_families(text: str) -> tuple[str, ...]:
    """Return the families of a group's name, or of names with commas between them."""
    if text in GROUPS:
        return GROUPS[text]
    names = tuple(dict.fromkeys(text.split(",")))
    unknown = [name for name in names if name not in GROUPS["all"]]
    if unknown:
        raise SourceError(
            f"terminal family {unknown[0]!r} is unknown; known: {', '.join(GROUPS)},"
            f" {', '.join(GROUPS['all'])}"
        )
    return names


def _terminal_task(family: str, seed: int, settings: Settings) -> Task:
    about = FAMILY_TABLE[family]
    limits: dict[str, Any] = dict(WIDE_LIMITS) if family in WIDE_FAMILIES else {}
    if settings.max_turns:
        limits["max_turns"] = settings.max_turns
    if settings.command_timeout:
        limits["command_timeout"] = settings.command_timeout
    name = f"{family}/{seed}"

    def new_env(config: SandboxConfig) -> Env:
        return TerminalEnv(make_task(family, seed), config, **limits)

    def read() -> Content:
        task = make_task(family, seed)
        parts = [task.instruction.encode(), task.setup.encode(), task.verifier.encode()]
        for path, (content, mode) in sorted(task.files.items()):
            parts += [path.encode(), content, str(mode).encode()]
        return Content((task.instruction,), task.instruction, parts)

    start_seconds = SandboxConfig().start_timeout + 2 * SETUP_TIMEOUT_SECONDS
    return Task(
        name=name,
        family=family,
        domain=about.domain,
        difficulty=str(about.difficulty),
        cluster=family,
        start_seconds=start_seconds + MARGIN_SECONDS,
        play_seconds=TERMINAL_PLAY_SECONDS + MARGIN_SECONDS,
        grading_seconds=TerminalEnv.grading_seconds,
        max_turns=limits.get("max_turns", TERMINAL_TURNS),
        has_demonstrator=True,
        new_env=new_env,
        read=read,
        tools=(BASH_TOOL,),
        system=SYSTEM,
    )


# -- registered environments
# -------------------------------------------------------------------------------------------------


def open_registered(
    spec: str, kind: str, ids: Sequence[str], seed: int, settings: Settings
) -> Generated:
    """Return the source of environments that `envs.gem.make` knows; a family is one of them.

    Args:
      spec: [KIND:]NAMES[:N], N the number of tasks.
      kind: of KINDS, or "gem".
      ids: of the environments.
      seed: of the source.
      settings: how they are played.
    """
    by_family = {env_id.removeprefix("rome:"): env_id for env_id in ids}
    count = None
    if kind in KINDS and spec.count(":") > 1:
        most = LISTED_APART * len(ids)
        count = parse_count(spec.split(":", 2)[2], most)
        if count is None:
            raise SourceError(f"dataset {spec!r} is not {kind}[:NAMES[:N]] with N from 1 to {most}")

    def make_one(family: str, task_seed: int) -> Task:
        return _registered_task(kind, by_family[family], task_seed, settings)

    return Generated(spec, make_one, tuple(by_family), count=count, seed=seed)


def find_ids(kind: str, names: str) -> list[str]:
    """Return the environment ids of a kind that names with commas between them stand for."""
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
            raise SourceError(f"{kind} has nothing named {name!r}; known: {', '.join(known)}")
        chosen += found
    return list(dict.fromkeys(chosen))


def _is_named(short: str, name: str) -> bool:
    """Return whether an environment has this name, or is a level or a variant of it."""
    return name == short or short.startswith((f"{name}/", f"{name}-"))


def _new_env(
    kind: str, env_id: str, seed: int, max_turns: int, config: SandboxConfig | None
) -> Env:
    """Return a registered environment whose first reset plays this seed."""
    arguments: dict[str, Any] = {}
    if env_id.startswith("rome:code/"):
        arguments["sandbox_config"] = config
    elif "sokoban" in env_id:
        arguments["shaped"] = False  # the reward is 1 for the solved room, else 0
    if kind == "games":
        arguments["state_in"] = "observation"  # agents see nothing else
    if max_turns and not env_id.startswith(ONE_TURN):
        arguments["max_turns"] = max_turns
    return make(env_id, seed=seed, **arguments)


@functools.cache
def _example(kind: str, env_id: str, max_turns: int) -> Env:
    """Return an environment of this id for what its tasks have in common; never reset it."""
    return _new_env(kind, env_id, 0, max_turns, SandboxConfig())


def _registered_task(kind: str, env_id: str, seed: int, settings: Settings) -> Task:
    """Return the instance of a registered environment with this seed."""
    family = env_id.removeprefix("rome:")
    example = _example(kind, env_id, settings.max_turns)

    def new_env(config: SandboxConfig) -> Env:
        return _new_env(kind, env_id, seed, settings.max_turns, config)

    def read() -> Content:
        env = new_env(SandboxConfig())
        observation, info = env.reset()
        opening = shown(observation, info)
        is_dialogue = hasattr(env, "scenario")
        texts = tuple(env.scenario.user.requests) if is_dialogue else (observation,)
        definition = str(info.get("suffix", ""))
        if hasattr(env, "definition"):
            definition = env.definition()
        parts = ["\n".join(texts), definition]
        return Content(texts, opening, [part.encode(errors="surrogatepass") for part in parts])

    return Task(
        name=f"{family}/{seed}",
        family=family,
        domain="games" if env_id.startswith("game/") else family.split("/")[0],
        difficulty=str(getattr(example, "difficulty", UNGROUPED)),
        cluster=example.task.family,
        start_seconds=SandboxConfig().start_timeout + MARGIN_SECONDS,
        play_seconds=MADE_PLAY_SECONDS + MARGIN_SECONDS,
        grading_seconds=float(getattr(example, "grading_seconds", 0.0)),
        max_turns=int(getattr(example, "max_turns", 1)),
        has_demonstrator=has_script(example),
        new_env=new_env,
        read=read,
        tools=tuple(getattr(example, "tools", ())),
        system=getattr(example, "system", None) or None,
    )
