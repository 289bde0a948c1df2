"""Safety tasks: safety[:NAMES[:N]][+BASE], see envs.safety.

A file FILE.json among NAMES, of seeds that `launch.redteam` found, stands for its families.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from envs.gem import Env
from envs.rock import SandboxConfig
from envs.safety import (
    CHANNELS,
    CLEAN,
    PILLARS,
    SEEDS,
    SMALL_SEEDS,
    SPLITS,
    WORLD_SEEDS,
    CompositionError,
    Seed,
    WorldSeed,
    compose_env,
    draw_difficulty,
    has_attack,
)
from envs.safety.found import load_injections
from envs.safety.seeds import register
from envs.safety.shell import MORE_TURNS
from envs.sources.generated import parse_count
from envs.sources.source import LISTED_APART, Generated, Source
from envs.sources.task import Content, Settings, SourceError, Task
from envs.tasks.terminal import EVAL_SEED_START, FAMILIES, HELD_OUT_FAMILIES

KIND = "safety"
SHELL_BASE = f"terminal:{','.join((*FAMILIES, *HELD_OUT_FAMILIES))}"
WORLD_BASE = "worlds:shop/easy,travel/easy"
SMALL_BASE = f"terminal:{','.join(FAMILIES)}"
UNGATED = "ungated"
SUGGESTIBLE = "suggestible"
SMALL = "small"
HARM_RATE = 0.5  # of the demonstrations of suggestible tasks
MAX_DRAWS = 8  # of a base task that can carry a family
SORTS = ("attack", "cue", "impossible", "unspecified", "stop", "hackable")


class SafetySource(Generated):
    """Tasks of seed families; training and evaluations during it never share a family.

    `count` is the number of `tasks`; training has as many as there are seeds.
    """

    def __init__(
        self,
        spec: str,
        make: Callable[[str, int], Task],
        families: Sequence[str],
        held_out: Sequence[str],
        *,
        listed: Sequence[str],
        count: int | None,
        seed: int,
        base: Source | None = None,
    ) -> None:
        # Training and evaluations share no family, so no instance is in both.
        super().__init__(spec, make, families, held_out, listed=listed, seed=seed, compares=False)
        self._base = base  # that the spec names; None: the default one, which is generated
        if count is not None:
            self._count = count

    def finite(self, *, is_trained: bool) -> list[Task]:
        """Return the base tasks of finite sets: a base that is trained on is not evaluated."""
        return [] if self._base is None else self._base.finite(is_trained=is_trained)

    def evaluation(self, per_family: int) -> list[Task]:
        """Return tasks of the held-out families only, the same for the same seed."""
        evaluated = {name.removeprefix(CLEAN) for name in self.held_out}
        chosen = super().evaluation(per_family)
        return [task for task in chosen if task.family.removeprefix(CLEAN) in evaluated]


def is_safety(spec: str) -> bool:
    """Return whether a spec is one of this kind."""
    return spec.split("+")[0].split(":")[0].strip() == KIND


def open_safety(
    spec: str, seed: int, settings: Settings, open_base: Callable[[str], Source]
) -> SafetySource:
    """Return the source of safety[:NAMES[:N]][+BASE].

    NAMES are families, channels, pillars, sorts, or splits (train, held_out, all), with commas
    between them. Without NAMES, or where they name no split and no family, training draws from the
    families of the split "train", and `tasks` has those of "held_out". The name "small" chooses
    the families of envs.safety.small instead of all others. The name "ungated" leaves the reward
    at the utility, whatever harm was done, and pays for a check that was made to pass: for
    training with `config.safety_cost`. With "suggestible", which implies it, half of the
    demonstrations do the harm that a task tempts to.

    Args:
      spec: the text.
      seed: of the source.
      settings: how its tasks are played.
      open_base: opens the source of base tasks.
    """
    head, plus, base_spec = spec.partition("+")
    parts = head.strip().split(":")
    if len(parts) > 3 or (plus and not base_spec.strip()):
        raise SourceError(f"dataset {spec!r} is not safety[:NAMES[:N]][+BASE]")
    names = [name for name in parts[1].split(",") if name] if len(parts) > 1 else []
    play = _Play(
        is_gated=UNGATED not in names and SUGGESTIBLE not in names,
        harm_rate=HARM_RATE if SUGGESTIBLE in names else 0.0,
    )
    names = _load_files([name for name in names if name not in (UNGATED, SUGGESTIBLE)])
    bases = _Bases(base_spec.strip(), open_base)
    chosen = [name for name in _choose(names) if bases.carries(name)]
    if not chosen:
        raise SourceError(f"dataset {spec!r}: no seed that it names fits base {base_spec!r}")
    seeds = _known()
    is_split = bool({"train", "held_out", "all"} & set(names)) or any(n in seeds for n in names)
    listed = _with_clean([n for n in chosen if is_split or seeds[n].split == "held_out"])
    if not listed:
        raise SourceError(
            f"dataset {spec!r} names only families of the split train, which are not evaluated by"
            " default; add train or all to its names, for example safety:all,cue"
        )
    trained = _with_clean([n for n in chosen if seeds[n].split == "train"])
    held_out = _with_clean([n for n in chosen if seeds[n].split == "held_out"])
    count = None
    if len(parts) == 3:
        count = parse_count(parts[2], LISTED_APART * len(listed))
        if count is None:
            raise SourceError(f"dataset {spec!r}: {parts[2]!r} is no number of tasks above 0")

    def make(family: str, number: int) -> Task:
        return _make_task(family, number, bases, play)

    return SafetySource(
        spec, make, trained, held_out, listed=listed, count=count, seed=seed, base=bases.named()
    )


class _Play(NamedTuple):
    """How tasks are played: whether harm voids the reward, and which demonstrations do it."""

    is_gated: bool = True
    harm_rate: float = 0.0


def _known() -> dict[str, Seed | WorldSeed]:
    return {**SEEDS, **WORLD_SEEDS, **SMALL_SEEDS}


def _load_files(names: Sequence[str]) -> list[str]:
    """Return names with the families of each file of seeds in its place."""
    found: list[str] = []
    for name in names:
        if not name.endswith(".json"):
            found.append(name)
            continue
        try:
            injections = load_injections(name)
        except (OSError, ValueError) as error:
            raise SourceError(f"safety seeds {name!r} cannot be read: {error}") from None
        register(one.seed() for one in injections)
        found += [one.name for one in injections]
    return found


def _with_clean(names: Sequence[str]) -> list[str]:
    found = []
    for name in names:
        found.append(name)
        if _known()[name].sort != "cue":
            found.append(f"{CLEAN}{name}")
    return found


def _choose(names: Sequence[str]) -> list[str]:
    """Return the families that names stand for: those of any group, within the splits named."""
    known = {*_known(), *CHANNELS, *PILLARS, *SORTS, *SPLITS, SMALL, "all"}
    unknown = [name for name in names if name not in known]
    if unknown:
        groups = ", ".join([*CHANNELS, *PILLARS, *SORTS, *SPLITS, SMALL, "all"])
        raise SourceError(
            f"safety has nothing named {unknown[0]!r}; known: {groups}, or one of"
            f" {', '.join(_known())}"
        )
    splits = [name for name in names if name in SPLITS]
    groups_named = [name for name in names if name not in (*SPLITS, SMALL, "all")]
    chosen = []
    for name, seed in _known().items():
        tags = {name, seed.channel, seed.pillar, seed.sort}
        if name not in names and (name in SMALL_SEEDS) != (SMALL in names):
            continue
        is_in_group = not groups_named or tags & set(groups_named)
        if is_in_group and (not splits or seed.split in splits):
            chosen.append(name)
    return chosen


def make_safety_task(family: str, number: int, base: Source) -> Task:
    """Return the task of a family and a number over base tasks of a source.

    Raises:
      CompositionError: the base tasks that were drawn cannot carry the family.
    """
    return _make_task(family, number, _Bases("given", lambda spec: base), _Play())


class _Bases:
    """The base tasks of a source, opened when they are needed."""

    def __init__(self, spec: str, open_base: Callable[[str], Source]) -> None:
        self._spec = spec
        self._open = open_base
        self._opened: dict[str, Source] = {}

    def named(self) -> Source | None:
        """Return the source that the spec names; None: each sort of family has a default one."""
        return self._open_once(self._spec) if self._spec else None

    def carries(self, family: str) -> bool:
        """Return whether bases of this source are of the sort that a family needs."""
        if not self._spec:
            return True
        return self._spec.startswith("worlds") == (family in WORLD_SEEDS)

    def draw(self, family: str, number: int) -> Task:
        """Return the base task of a family and a number; training ones for training numbers.

        Raises:
          CompositionError: none of MAX_DRAWS can carry the family; names the last one and why.
        """
        for last in self._candidates(family, number):
            try:
                compose_env(family, number, last.make_env(SandboxConfig()))
                return last
            except CompositionError as error:
                reason = error
        raise reason

    def _candidates(self, family: str, number: int) -> Iterator[Task]:
        name = family.removeprefix(CLEAN)
        is_world = name in WORLD_SEEDS
        default = SMALL_BASE if name in SMALL_SEEDS else SHELL_BASE
        spec = self._spec or (WORLD_BASE if is_world else default)
        source = self._open_once(spec)
        rng = random.Random(f"safety/{name}/{number}/base")
        finite = source.finite(is_trained=False) or source.finite(is_trained=True)
        kinds = [*source.families, *source.held_out]
        for _ in range(MAX_DRAWS):
            if number < EVAL_SEED_START:
                yield source.train(rng.choice(source.families), number)
            elif finite:
                yield rng.choice(finite)
            else:
                yield source.task(f"{rng.choice(kinds)}/{number}")

    def _open_once(self, spec: str) -> Source:
        if spec not in self._opened:
            self._opened[spec] = self._open(spec)
        return self._opened[spec]


def _make_task(family: str, number: int, bases: _Bases, play: _Play) -> Task:
    base = bases.draw(family, number)
    seed = _known()[family.removeprefix(CLEAN)]
    name = f"{family}/{number}"
    is_world = seed.name in WORLD_SEEDS

    def new_env(config: SandboxConfig) -> Env:
        return compose_env(family, number, base.make_env(config), name, *play)

    def read() -> Content:
        env = new_env(SandboxConfig())
        if is_world:
            opening, _ = env.reset()
            return Content((opening,), opening, [env.definition().encode(errors="replace")])
        words = base.instruction + env.composition.words
        return Content((words,), words, [*base.content.parts, *env.composition.parts()])

    return Task(
        name=name,
        family=family,
        domain=seed.pillar,
        difficulty=str(draw_difficulty(family, number)),
        cluster=seed.name,
        start_seconds=base.start_seconds,
        play_seconds=base.play_seconds,
        grading_seconds=base.grading_seconds,
        max_turns=base.max_turns + MORE_TURNS,
        has_demonstrator=True,
        new_env=new_env,
        read=read,
        tools=tuple(new_env(SandboxConfig()).tools) if is_world else base.tools,
        system=base.system,
        has_attack=has_attack(family, number),
    )
