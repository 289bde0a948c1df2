"""The base of problems of one turn: a text, an answer, a reward of 1 or 0."""

from __future__ import annotations

import copy
import dataclasses
import random
from typing import Any, ClassVar

from envs.gem import Env, Info, StepResult

LEVELS = ("easy", "medium", "hard")
_STATUS = {  # by ending
    "malformed": "malformed",
    "timeout": "timeout",
    "infra_sandbox": "infra",
    "infra_verifier": "infra",
}


@dataclasses.dataclass(frozen=True)
class ProblemTask:
    """The problem of an episode; its name "family-level/seed" suffices to draw it again."""

    name: str
    family: str
    seed: int


class ProblemEnv(Env):
    """An environment with one problem an episode.

    reset(seed) draws that problem; reset() draws the constructor's seed first and then seeds drawn
    from it. With family "all" each seed also draws the family.

    The info after the turn has `status` (ok, malformed where no answer was found, timeout or
    infra), `ending` (success, failure, malformed, timeout, infra_sandbox or infra_verifier)
    and `correct`.
    """

    subject = ""
    families: tuple[str, ...] = ()
    system = ""
    tools: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, family: str = "all", level: str = "medium", seed: int = 0) -> None:
        if family != "all" and family not in self.families:
            raise ValueError(
                f"family {family!r} is unknown; known: all, {', '.join(self.families)}"
            )
        if level not in LEVELS:
            raise ValueError(f"level is {level!r}; it is one of {', '.join(LEVELS)}")
        self.family = family
        self.level = level
        self.difficulty = level
        self._seed = seed
        self._resets = 0
        self._over = True
        self._next_seeds = random.Random(f"{self.subject}/{family}-{level}/{seed}/next")
        self._random_actions = random.Random(f"{self.subject}/{family}-{level}/{seed}/actions")
        self.task = self._task(seed)

    # -- Methods that a subject implements
    # ---------------------------------------------------------------------------------------------

    def _draw(self, family: str, rng: random.Random, size: int) -> str:
        """Draw the problem, keep what grading needs and return the text."""
        raise NotImplementedError

    def demonstrator_action(self) -> str | None:
        """Return the reference solution as a turn."""
        raise NotImplementedError

    def cheats(self) -> dict[str, list[str]]:
        """Return turns that try to earn the reward without a solution, by name of the trick."""
        raise NotImplementedError

    def definition(self) -> str:
        """Return the problem and its solution as text, which is equal for equal problems.

        Players never see it.
        """
        return f"{self.problem}\n{self.demonstrator_action()}"

    # -- GEM
    # ---------------------------------------------------------------------------------------------

    def reset(self, seed: int | None = None) -> tuple[str, Info]:
        """Draw a problem and return its text; see `envs.gem.Env.reset`."""
        if seed is None:
            seed = self._next_seeds.randrange(1 << 31) if self._resets else self._seed
        self._resets += 1
        self._over = False
        self.task = self._task(seed)
        rng = random.Random(f"{self.subject}/{self.task.name}")
        family = rng.choice(self.families) if self.family == "all" else self.family
        size = LEVELS.index(self.level) + 1
        self.problem = self._draw(family, rng, size)
        info: Info = {
            "task": self.task.name,
            "family": self.task.family,
            "seed": seed,
            "drawn_family": family,
            "tools": copy.deepcopy(self.tools),
        }
        return self.problem, info

    async def areset(self, seed: int | None = None) -> tuple[str, Info]:
        """Draw a problem, for callers in an event loop."""
        return self.reset(seed)

    async def aclose(self) -> None:
        """Do nothing: a problem holds no resources between turns."""

    def sample_random_action(self) -> str:
        """Return a random number as an answer."""
        return f"\\boxed{{{self._random_actions.randrange(100)}}}"

    def spawn(self, same_state: bool = False, **kwargs: Any) -> ProblemEnv:
        """Return a new environment of the same settings.

        Args:
          same_state: return a copy with the same drawn problem; then no argument may be changed.
          **kwargs: arguments of the constructor to change.

        Raises:
          ValueError: same_state with other arguments.
        """
        if not same_state:
            return type(self)(**{**self._settings(), **kwargs})
        if kwargs:
            raise ValueError(
                f"spawn(same_state=True) cannot change {', '.join(sorted(kwargs))}: the problem is"
                " drawn"
            )
        return copy.deepcopy(self)

    def _settings(self) -> dict[str, Any]:
        return {"family": self.family, "level": self.level, "seed": self._seed}

    def _task(self, seed: int) -> ProblemTask:
        family = f"{self.subject}-{self.family}-{self.level}"
        return ProblemTask(f"{family}/{seed}", family, seed)

    def _take_turn(self) -> None:
        if self._over:
            raise RuntimeError(
                f"the problem {self.task.name} is answered or not drawn; call reset()"
            )
        self._over = True

    def _graded(self, action: str, ending: str, note: str = "") -> StepResult:
        status = _STATUS.get(ending, "ok")
        info: Info = {
            "status": status,
            "ending": ending,
            "note": note,
            "correct": ending == "success",
            "use_tool": False,
            "tool_type": None,
            "tool_arguments": {},
            "parsed_action": action,
            "step_counter": 1,
        }
        if ending == "infra_verifier":
            info["permanent"] = True  # what the sandbox lacks, another one lacks too
        return "", float(ending == "success"), True, False, info
