"""Problems of one turn: a text, an answer, a reward of 1 or 0.

What families of mathematics and of code share.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from typing import Any

from envs.gem import Env, Info, StepResult

LEVELS = ("easy", "medium", "hard")


@dataclasses.dataclass(frozen=True)
class ProblemTask:
    """Which problem an episode is; the name "family-level/seed" is all that is needed to have it
    again.
    """

    name: str
    family: str
    seed: int


class ProblemEnv(Env):
    """One problem a reset. reset(seed) draws that one; reset() the constructor's seed first, then
    seeds drawn from it. family "all": each seed draws one.

    info after the turn: status ok, malformed (no answer to be found) or timeout; ending success,
    failure, malformed, timeout or infra_sandbox; `correct`.
    """

    subject = ""
    families: tuple[str, ...] = ()
    system = ""
    tools: list[dict[str, Any]] = []

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
        self.task = self._task(seed)

    # -- what a subject brings
    # ---------------------------------------------------------------------------------------------

    def _draw(self, family: str, rng: random.Random, size: int) -> str:
        """Draws the problem, keeps what grading needs and returns the text."""
        raise NotImplementedError

    def demonstrator_action(self) -> str | None:
        """The reference solution as a turn."""
        raise NotImplementedError

    def cheats(self) -> dict[str, list[str]]:
        """Turns by name of the trick."""
        raise NotImplementedError

    def definition(self) -> str:
        """The problem and its solution as text: equal for equal ones. Not shown to a player."""
        return f"{self.problem}\n{self.demonstrator_action()}"

    # -- GEM
    # ---------------------------------------------------------------------------------------------

    def reset(self, seed: int | None = None) -> tuple[str, Info]:
        if seed is None:
            seed = self._next_seeds.randrange(1 << 31) if self._resets else self._seed
        self._resets = self._resets + 1
        self._over = False
        self.task = self._task(seed)
        rng = random.Random(f"{self.subject}/{self.task.name}")
        family = rng.choice(self.families) if self.family == "all" else self.family
        self.problem = self._draw(family, rng, LEVELS.index(self.level) + 1)
        return self.problem, {
            "task": self.task.name,
            "family": self.task.family,
            "seed": seed,
            "drawn_family": family,
            "tools": copy.deepcopy(self.tools),
        }

    async def areset(self, seed: int | None = None) -> tuple[str, Info]:
        return self.reset(seed)

    async def aclose(self) -> None:
        pass

    def sample_random_action(self) -> str:
        return f"\\boxed{{{self._next_seeds.randrange(100)}}}"

    def spawn(self, same_state: bool = False, **kwargs: Any) -> ProblemEnv:
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
        status = {"malformed": "malformed", "timeout": "timeout", "infra_sandbox": "infra"}.get(
            ending, "ok"
        )
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
        return "", float(ending == "success"), True, False, info
